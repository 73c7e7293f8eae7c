"""Kernels over arrays that are spread over devices: every row and head is done where it lies.

XLA cannot cut a kernel, and nobody tells it how the arrays lie while it is traced. So whoever spreads them says so:

    with spread_over(mesh, rows="data", heads="model"):
        ...
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

Axis = str | tuple[str, ...] | None


class Layout(NamedTuple):
    """Over which axes of a mesh rows and heads are spread; None for neither."""

    mesh: Mesh
    rows: Axis
    heads: Axis


_layout = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def spread_over(mesh: Mesh, *, rows: Axis = None, heads: Axis = None) -> Iterator[None]:
    """What is traced inside runs its kernels on each device's own rows and heads. Needed wherever several take part.

    Args:
      mesh: The devices.
      rows: Axes of the mesh over which the rows of caches and queries are spread.
      heads: Axes over which kv_heads are.

    Raises:
      ValueError: If the mesh has no such axis.
    """
    for kind, axis in (("rows", rows), ("heads", heads)):
        names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
        if missing := [name for name in names if name not in mesh.axis_names]:
            raise ValueError(
                f"spread_over: {kind}={axis!r}: the mesh has no axis {missing[0]!r}, but {mesh.axis_names}."
            )
    token = _layout.set(Layout(mesh, rows, heads))
    try:
        yield
    finally:
        _layout.reset(token)


def layout() -> Layout | None:
    """What `spread_over` says here; a program that was traced under another one is another program."""
    return _layout.get()


def by_row_and_head(function: Callable, args: Sequence[Any], axes: Sequence[str], out_axes: Sequence[str]) -> Any:
    """`function(*args)`, in which rows and heads are independent.

    Args:
      function: What a device does with its part of the arrays; returns a tuple of trees.
      args: Trees of arrays; None for what is left out.
      axes: Of each of `args`, what its first axes are: "b" rows, "h" heads, "." anything else, as all further ones. An
        axis of 1 is on every device.
      out_axes: The same of each tree of the result.
    """
    spread = layout()
    if spread is None:
        return function(*args)
    over = {"b": spread.rows, "h": spread.heads, ".": None}

    def spec(lead, x):
        return PartitionSpec(*(over[name] if extent > 1 else None for name, extent in zip(lead, x.shape, strict=False)))

    def specs(trees, leads):
        return tuple(jax.tree.map(functools.partial(spec, lead), x) for x, lead in zip(trees, leads, strict=True))

    results = jax.eval_shape(lambda *args: tuple(function(*args)), *args)
    parts = jax.shard_map(
        lambda *args: tuple(function(*args)),
        mesh=spread.mesh,
        in_specs=specs(args, axes),
        out_specs=specs(results, out_axes),
        check_vma=False,  # kernels do not say over which axes their results differ
    )
    return parts(*args)
