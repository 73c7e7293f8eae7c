"""Devices in three axes, and what lies where on them: from one CPU to a pod of TPUs.

Axis "data" takes rows of the batch. Axis "fsdp" takes rows too, and a part of every weight, which is gathered where it
is used. Axis "tensor" takes heads and channels. GSPMD places the collectives: no other file knows of them.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax.models.llama import Block, Params
from pallas_kernels import sharding

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes over which the rows of a batch are spread

# Weights are [out, in]. What makes heads or channels is split by what it makes, what joins them by what it joins, so
# that tensor-parallel devices meet once after attention and once after the MLP.
BY_OUT = ("tensor", "fsdp")
BY_IN = ("fsdp", "tensor")
LAYOUTS = {
    "embed": BY_OUT,
    "unembed": BY_OUT,
    "wq": BY_OUT,
    "wk": BY_OUT,
    "wv": BY_OUT,
    "w_gate": BY_OUT,
    "w_up": BY_OUT,
    "wo": BY_IN,
    "w_down": BY_IN,
    "bq": ("tensor",),
    "bk": ("tensor",),
    "bv": ("tensor",),
}


def start_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, *, timeout: int = 60
) -> None:
    """Joins the processes of a run, before jax is used. Alone, and nothing found in the environment: does nothing.

    On a TPU pod, under SLURM and under Open MPI jax finds the others by itself; elsewhere every process is told.

    Args:
      coordinator: "host:port" of process 0, which must be free there.
      count: Processes in all.
      index: Which of them this one is, 0 to count - 1.
      timeout: Seconds without a sign of life after which a process counts as dead. The others then end with an error.

    Raises:
      ValueError: If only some of coordinator, count and index are given, or index is not below count.
    """
    if jax.distributed.is_initialized():
        return
    given = (coordinator, count, index)
    if any(one is None for one in given) and any(one is not None for one in given):
        raise ValueError(
            f"start_processes: coordinator={coordinator!r}, count={count!r}, index={index!r}: give all three, or none "
            f"on a TPU pod or under SLURM, where jax finds them."
        )
    if count is not None and not 0 <= index < count:
        raise ValueError(f"start_processes: index={index} is outside 0..{count - 1}, for count={count} processes.")
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=timeout
        )
    except ValueError as error:
        # What jax says where it knows of no cluster. Any other complaint is of a cluster that is set up wrongly: to go
        # on alone there would have every process train by itself, into the same folder.
        if coordinator is not None or "coordinator_address should be defined" not in str(error):
            raise


def make_mesh(
    data: int | None = None, fsdp: int = 1, tensor: int = 1, *, chips: Sequence[jax.Device] | None = None
) -> Mesh:
    """All devices of all processes, as a mesh with axes ("data", "fsdp", "tensor").

    Args:
      data: Devices along "data"; None takes what the other two leave.
      fsdp: Devices over which the rows and the weights are spread.
      tensor: Devices over which heads and channels are spread.
      chips: The devices; None takes those that are here. Others can be compiled for.

    Raises:
      ValueError: If the product is not the number of devices.
    """
    devices = jax.device_count() if chips is None else len(chips)
    for name, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        if size is not None and size < 1:
            raise ValueError(f"make_mesh: {name}={size} must be at least 1.")
    if data is None and devices % (fsdp * tensor):
        raise ValueError(
            f"make_mesh: fsdp={fsdp} times tensor={tensor} is {fsdp * tensor}, which does not divide the {devices} "
            f"devices. Choose two whose product does."
        )
    data = devices // (fsdp * tensor) if data is None else data
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"make_mesh: data={data} times fsdp={fsdp} times tensor={tensor} is {data * fsdp * tensor}, and there are "
            f"{devices} devices. Leave data out to take what is left."
        )
    # Auto: the model's code names no shardings, so the compiler must be free to choose those of what lies between.
    # Split: on a v6e of 4 x 4 chips, say, the eight of a tensor axis are no whole side of the square.
    ordered = mesh_utils.create_device_mesh((data, fsdp, tensor), chips, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch (axis 0) over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def shardings(params: Params, mesh: Mesh) -> Params:
    """Where each weight of the backbone lies: a pytree of NamedShardings, of the structure of `params`.

    An axis that the devices do not divide, norms, and eviction heads lie whole on every device.

    Raises:
      ValueError: If "tensor" does not divide kv_heads: a head must not be cut.
    """
    tensor, kv_heads = mesh.shape["tensor"], params.config.kv_heads
    if kv_heads % tensor:
        raise ValueError(
            f"shardings: tensor={tensor} would cut heads: the model has {kv_heads} kv_heads. Choose a tensor that "
            f"divides them, and more of fsdp or data."
        )

    def place(path, leaf):
        name = getattr(path[-1], "name", None)
        in_heads = getattr(path[0], "name", None) == "heads"
        layout = () if in_heads else LAYOUTS.get(name, ())
        axes = zip(layout, leaf.shape, strict=bool(layout))
        return NamedSharding(mesh, PartitionSpec(*(None if size % mesh.shape[axis] else axis for axis, size in axes)))

    return jax.tree.map_with_path(place, params)


def over(mesh: Mesh) -> AbstractContextManager[None]:
    """What is traced inside is laid out over the mesh, by `laid`, `gathered` and kernels; elsewhere nothing is."""
    return sharding.spread_over(mesh, rows=ROWS, heads="tensor")


def laid(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x`, inside `over` spread over these axes of the mesh, first by first; whole along one that does not divide."""
    found = sharding.layout()
    if found is None:
        return x

    def fits(axis, size):
        return size % math.prod(found.mesh.shape[one] for one in (axis if isinstance(axis, tuple) else (axis,))) == 0

    sizes = x.shape[: len(axes)]
    spec = [None if axis is None or not fits(axis, size) else axis for axis, size in zip(axes, sizes, strict=True)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(found.mesh, PartitionSpec(*spec)))


def gathered(weights: Block | Params) -> Block | Params:
    """Weights, inside `over` whole along "fsdp".

    Left to choose, XLA brings all rows to all devices rather than the weights: 1.25 GiB for 16 rows of 10240 tokens,
    for each product in a layer of Llama-3.1-8B, all of whose weights are 0.4 GiB.
    """

    def put(path, leaf):
        layout = LAYOUTS.get(path[-1].name, ())
        return laid(leaf, *("tensor" if axis == "tensor" else None for axis in layout))

    return jax.tree.map_with_path(put, weights)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Where trained arrays and their optimiser's state lie: the longest axis that "fsdp" divides over it, else whole.

    Args:
      tree: A pytree of arrays, or of what has their shapes.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf):
        lengths = [size if size % fsdp == 0 else 0 for size in leaf.shape]
        if fsdp == 1 or not any(lengths):
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * lengths.index(max(lengths)), "fsdp"))

    return jax.tree.map(place, tree)


def place(tree: Any, layout: Any) -> Any:
    """Puts arrays that every process holds whole where `layout` says; each process copies its own parts only.

    Args:
      tree: A pytree of arrays, the same on every process.
      layout: A pytree of shardings of the same structure, or one sharding for all.
    """
    if isinstance(layout, NamedSharding):
        layout = jax.tree.map(lambda _: layout, tree)

    def put(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # device_put would first compare the array with that of every other process.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, layout)


def rows_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of every batch a process reads, as (index, count): part `index` of `count` equal ones.

    A part may be scattered: jax orders the devices of a TPU pod by the wires between them. Processes that share rows,
    as "tensor" lies across them, read the same part.

    Args:
      mesh: The devices.
      process: Which; None is this one.

    Raises:
      ValueError: If the processes' rows are not equally many, or those of two overlap and differ.
    """
    held = {}  # by process, where it has devices along data and fsdp
    for i, row in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in row:
            held.setdefault(device.process_index, set()).add(i)
    parts = sorted(set(map(tuple, map(sorted, held.values()))))
    if len({len(part) for part in parts}) != 1 or sum(map(len, parts)) != mesh.size // mesh.shape["tensor"]:
        raise ValueError(
            f"rows_of_process: along data and fsdp the processes hold {parts}, which are not equal parts of the batch. "
            f"Choose a tensor that divides the devices of a process, or is a multiple of them."
        )
    own = held[jax.process_index() if process is None else process]
    return parts.index(tuple(sorted(own))), len(parts)


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Joins the rows that each process has read into global arrays, spread over the mesh as `batch_sharding` says.

    Args:
      local: Arrays [rows, ...] of this process.

    Raises:
      ValueError: If the rows do not divide over the devices.
    """
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    count = rows_of_process(mesh)[1]
    for name, array in local.items():
        if np.ndim(array) == 0 or len(array) * count % parts:
            raise ValueError(
                f"global_batch: {name!r} has shape {np.shape(array)} on this process, of {count} that read rows; axis "
                f"0 must divide over data={mesh.shape['data']} times fsdp={mesh.shape['fsdp']}. Choose another batch."
            )
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in local.items()}
