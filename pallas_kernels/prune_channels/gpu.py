"""Triton kernels: squares summed by splits of the slots, the choice, and the narrow copy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.prune_channels import Pruned
from pallas_kernels.prune_channels.reference import asked_squares

PROGRAMS = 4 * 132  # that keep an H100 busy
CHUNK = 4096  # values of the narrow copy a program writes


class Config(NamedTuple):
    """Of the sums: `block` slots at a time, `steps` blocks a program, `splits` programs a head."""

    block: int
    steps: int
    splits: int


def config(heads: int, slots: int, channels: int) -> Config:
    """Blocks of 8192 values; as many blocks a program as leave enough programs, up to 8."""
    block = max(8192 // triton.next_power_of_2(channels), 16)
    blocks = triton.cdiv(slots, block)
    steps = min(max(heads * blocks // PROGRAMS, 1), 8)
    return Config(block, steps, triton.cdiv(blocks, steps))


def prune_channels(
    k: jax.Array, q: jax.Array, keep: int, *, there: jax.Array | None = None, asked: jax.Array | None = None
) -> Pruned:
    """As `pallas_kernels.prune_channels.prune_channels`."""
    batch, heads, slots, channels = k.shape
    rows = batch * heads
    cut = config(rows, slots, channels)
    wide = triton.next_power_of_2(channels)
    masked = there is not None
    sums = jax.ShapeDtypeStruct((rows, cut.splits, channels), jnp.float32)
    (sums,) = triton_call.call(
        _squares, k, there if masked else k, out_shapes=(sums,), grid=(rows, cut.splits), num_warps=4,
        N=slots, D=channels, WIDE=wide, BLOCK=cut.block, STEPS=cut.steps, SPLITS=cut.splits, MASKED=masked,
    )  # fmt: skip
    index = jax.ShapeDtypeStruct((batch, heads, keep), jnp.int32)
    (index,) = triton_call.call(
        _choose, sums, asked_squares(q, asked), out_shapes=(index,), grid=(rows,),
        num_warps=min(max(wide // 16, 1), 16), D=channels, WIDE=wide, SPLITS=cut.splits, KEEP=keep,
    )  # fmt: skip
    keys = jax.ShapeDtypeStruct((batch, heads, slots, keep), k.dtype)
    (keys,) = triton_call.call(
        _narrow, k, index, out_shapes=(keys,), grid=(triton.cdiv(slots * keep, CHUNK), rows), num_warps=4,
        N=slots, D=channels, KEEP=keep, CHUNK=CHUNK,
    )  # fmt: skip
    return Pruned(keys, index)


@triton.jit
def _squares(
    k_ref, there_ref, sums_ref,
    N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums of squares of each channel over a split of a head's slots."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, WIDE)
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    for step in range(STEPS):
        slot = (split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        counts = slot < N
        if MASKED:
            counts &= tl.load(there_ref + row * N + slot, mask=counts, other=0) != 0
        inside = counts[:, None] & (channel < D)[None, :]
        k = tl.load(k_ref + (row * N + slot[:, None]) * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        total += k * k
    tl.store(sums_ref + (row * SPLITS + split) * D + channel, tl.sum(total, 0), mask=channel < D)


@triton.jit
def _choose(
    sums_ref, asked_ref, index_ref,
    D: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Ranks a head's channels, each against all, and lists those of rank below KEEP."""
    row = tl.program_id(0)
    channel = tl.arange(0, WIDE)
    inside = channel < D
    total = tl.zeros([WIDE], tl.float32)
    for split in range(SPLITS):  # always in this order
        total += tl.load(sums_ref + (row * SPLITS + split) * D + channel, mask=inside, other=0.0)
    score = total * tl.load(asked_ref + row * D + channel, mask=inside, other=0.0)
    score = tl.where(score >= 0, score, -1.0)  # nan, below all others
    score = tl.where(inside, score, -2.0)
    one, other = score[:, None], score[None, :]
    beaten = (other > one) | ((other == one) & (channel[None, :] < channel[:, None]))
    stays = tl.sum(beaten.to(tl.int32), 1) < KEEP
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(index_ref + row * KEEP + place, channel, mask=stays)


@triton.jit
def _narrow(k_ref, index_ref, keys_ref, N: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr):
    """Writes a stretch of the narrow keys of a head, whatever slots and channels it falls on."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = place < N * KEEP
    channel = tl.load(index_ref + row * KEEP + place % KEEP, mask=inside, other=0)
    k = tl.load(k_ref + row * (N * D) + (place // KEEP) * D + channel, mask=inside, other=0.0)
    tl.store(keys_ref + row * (N * KEEP) + place, k, mask=inside)
