"""How Triton kernels are called: through jax-triton on a GPU, in Triton's interpreter, or only compiled.

The interpreter runs where the environment says TRITON_INTERPRET=1 when triton is first imported. It wants arguments
that look like tensors of torch; `_Tensor` does, over a numpy array, so torch is not needed.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it was up to Triton 3.9, which warns that this will change

_recorded = contextvars.ContextVar("recorded", default=None)


class Launch(NamedTuple):
    """One call of a kernel, as far as its compiler cares."""

    kernel: Any
    types: tuple[str, ...]  # of the arrays, "*fp32"
    constants: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


class Compiled(NamedTuple):
    """What came of compiling a `Launch`."""

    shared: int  # bytes of shared memory that a block takes
    cubin: bytes


def call(
    kernel: Any,
    *arrays: jax.Array,
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: dict[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> list[jax.Array]:
    """Runs `kernel` with pointers to `arrays`, then to its outputs; then its `constants`, which are tl.constexpr.

    Args:
      kernel: Decorated with `triton.jit`.
      arrays: Its inputs; whoever calls sees to what they mean beyond their ends.
      out_shapes: Its outputs, which hold anything at first.
      grid: Programs along each axis.
      aliases: {input: output} that share a buffer; the kernel gets both pointers.
      num_warps: Of 32 threads each.
      num_stages: Of Triton's software pipeline.
      constants: All that is not an array.

    Returns:
      The outputs.
    """
    aliases = aliases or {}
    out_shapes = [jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in out_shapes]
    if (recorded := _recorded.get()) is not None:
        types = tuple(f"*{_TYPES[jnp.dtype(x.dtype).name]}" for x in (*arrays, *out_shapes))
        recorded.append(Launch(kernel, types, constants, grid, num_warps, num_stages))
        return [jnp.zeros(shape.shape, shape.dtype) for shape in out_shapes]
    if os.environ.get("TRITON_INTERPRET") == "1":

        def interpret(*arrays):
            return _interpret(kernel, [np.asarray(x) for x in arrays], out_shapes, grid, aliases, constants)

        return list(jax.pure_callback(interpret, tuple(out_shapes), *arrays))

    import jax_triton  # absent on a CPU

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=out_shapes,
        grid=grid,
        input_output_aliases=aliases,
        num_warps=num_warps,
        num_stages=num_stages,
        **({} if dispatch.capability() is None else {"compute_capability": dispatch.capability()}),
        **constants,
    )


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Notes the launches of what is traced inside, and runs none."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles to machine code for a GPU of compute capability 80, 90, ...; none needs to be here.

    Raises:
      ValueError: If a block would take more shared memory than such a GPU has.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = dict(zip(names, launch.types, strict=False)) | dict.fromkeys(launch.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(launch.types))}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    shared = compiled.metadata.shared
    if shared > SHARED_MEMORY[capability]:
        raise ValueError(
            f"{launch.kernel.__name__}: a block takes {shared} bytes of shared memory, and sm_{capability} has "
            f"{SHARED_MEMORY[capability]}."
        )
    return Compiled(shared, compiled.asm["cubin"])


_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int32": "i32",
    "uint32": "u32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i1",
}


def _interpret(kernel, arrays, out_shapes, grid, aliases, constants):
    # Outputs start as rubbish, so that what a kernel forgets to write is seen.
    outs = [np.frombuffer(b"\xaa" * (s.size * s.dtype.itemsize), s.dtype).reshape(s.shape).copy() for s in out_shapes]
    for source, target in aliases.items():
        outs[target] = arrays[source].copy()
    inputs = [outs[aliases[i]] if i in aliases else np.ascontiguousarray(x) for i, x in enumerate(arrays)]
    with _products_of_bf16():
        kernel[grid](*map(_Tensor, inputs), *map(_Tensor, outs), **constants)
    return tuple(outs)


@contextlib.contextmanager
def _products_of_bf16():
    """Triton's interpreter holds bf16 as the integers of its bits, and would multiply those in tl.dot."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def wide(builder, x):
        return builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    InterpreterBuilder.create_dot = lambda builder, a, b, *rest: dot(builder, wide(builder, a), wide(builder, b), *rest)
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = dot


class _Tensor:
    """A numpy array with the few methods of a tensor that Triton's interpreter calls; its own storage, too."""

    def __init__(self, array):
        self.array, self.dtype = array, jnp.dtype(array.dtype).name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, _):
        return self  # both sides share the memory
