"""`slot_write` for GPUs: a program of one warp stores the rows of one row and head, of up to four buffers a launch."""

import jax
import triton
import triton.language as tl

from pallas_kernels import triton_call

TOGETHER = 4  # buffers of one launch: a launch costs more than its stores


def slot_write(buffers: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], slot: jax.Array) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.slot_write`; rows already have the dtypes of their buffers."""
    out = []
    for start in range(0, len(buffers), TOGETHER):
        out += _launch(buffers[start : start + TOGETHER], rows[start : start + TOGETHER], slot)
    return tuple(out)


def _launch(buffers, rows, slot):
    count = buffers[0].shape[2]
    widths = [x.shape[3] if x.ndim == 4 else 1 for x in buffers]
    return triton_call.call(
        _KERNELS[len(buffers) - 1],
        slot,
        *rows,
        *buffers,
        out_shapes=buffers,
        grid=(slot.size,),
        aliases={1 + len(rows) + i: i for i in range(len(buffers))},
        num_warps=1 if max(widths) <= 256 else 4,
        num_stages=1,
        N=count,
        **{f"W{i}": width for i, width in enumerate(widths)},
        **{f"BLOCK{i}": triton.next_power_of_2(width) for i, width in enumerate(widths)},
    )


@triton.jit
def _put(row, buffer, program, slot, N: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    if (slot >= 0) & (slot < N):
        channel = tl.arange(0, BLOCK)
        x = tl.load(row + program * W + channel, mask=channel < W)
        tl.store(buffer + (program * N + slot) * W + channel, x, mask=channel < W)


# One kernel for each count of buffers. The inputs i0.. are the outputs o0..: nothing of them is read.


@triton.jit
def _write_1(slots, r0, i0, o0, N: tl.constexpr, W0: tl.constexpr, BLOCK0: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)  # a buffer may hold more than 2**31 numbers
    slot = tl.load(slots + program)
    _put(r0, o0, program, slot, N, W0, BLOCK0)


@triton.jit
def _write_2(
    slots, r0, r1, i0, i1, o0, o1,
    N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + program)
    _put(r0, o0, program, slot, N, W0, BLOCK0)
    _put(r1, o1, program, slot, N, W1, BLOCK1)


@triton.jit
def _write_3(
    slots, r0, r1, r2, i0, i1, i2, o0, o1, o2,
    N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    BLOCK0: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + program)
    _put(r0, o0, program, slot, N, W0, BLOCK0)
    _put(r1, o1, program, slot, N, W1, BLOCK1)
    _put(r2, o2, program, slot, N, W2, BLOCK2)


@triton.jit
def _write_4(
    slots, r0, r1, r2, r3, i0, i1, i2, i3, o0, o1, o2, o3,
    N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    BLOCK0: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr, BLOCK3: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + program)
    _put(r0, o0, program, slot, N, W0, BLOCK0)
    _put(r1, o1, program, slot, N, W1, BLOCK1)
    _put(r2, o2, program, slot, N, W2, BLOCK2)
    _put(r3, o3, program, slot, N, W3, BLOCK3)


_KERNELS = (_write_1, _write_2, _write_3, _write_4)
