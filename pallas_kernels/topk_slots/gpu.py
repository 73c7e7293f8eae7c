"""Triton kernels: the threshold bit by bit, in registers; a long row is split, a digit of eight bits a launch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.topk_slots import TopK

MOST_IN_REGISTERS = 16384  # slots of a row: score and position of 32 of them in each of 512 threads
DIGITS = 8  # four of the score, then four of the position


class Config(NamedTuple):
    """How a row is cut: `block` slots a program, `splits` programs a row."""

    block: int
    splits: int
    num_warps: int


def config(slots: int) -> Config:
    """One program a row as long as it fits into registers, else splits of 8192 slots: 32 a thread."""
    if slots <= MOST_IN_REGISTERS:
        block = max(triton.next_power_of_2(slots), 128)
        return Config(block, 1, min(max(block // 1024, 1), 16))
    return Config(8192, triton.cdiv(slots, 8192), 8)


def topk_slots(score: jax.Array, pos: jax.Array, k: int, *, protected: jax.Array | None = None) -> TopK:
    """As `pallas_kernels.topk_slots.topk_slots`."""
    batch, heads, slots = score.shape
    rows = batch * heads
    cut = config(slots)
    inputs = (score, pos, pos if protected is None else protected)
    static = {"N": slots, "K": k, "BLOCK": cut.block, "PROTECTED": protected is not None}
    kept = jax.ShapeDtypeStruct(score.shape, jnp.bool_)
    index = jax.ShapeDtypeStruct((batch, heads, k), jnp.int32)
    if cut.splits == 1:
        call = {"grid": (rows,), "num_warps": cut.num_warps}
        return TopK(*triton_call.call(_one_row, *inputs, out_shapes=(kept, index), **call, **static))

    call = {"grid": (rows, cut.splits), "num_warps": cut.num_warps}
    static |= {"SPLITS": cut.splits}
    state = jax.ShapeDtypeStruct((rows, 3), jnp.int32)
    counts = jax.ShapeDtypeStruct((rows, cut.splits, 256), jnp.int32)
    totals = jax.ShapeDtypeStruct((rows, cut.splits), jnp.int32)
    before = (pos, pos)  # the first digit has nothing before it, and does not look
    for digit in range(DIGITS):
        before = triton_call.call(_digit, *inputs, *before, out_shapes=(counts, state), **call, **static, DIGIT=digit)
    kept, totals = triton_call.call(_mark, *inputs, *before, out_shapes=(kept, totals), **call, **static)
    del static["PROTECTED"]
    (index,) = triton_call.call(_compact, kept, totals, out_shapes=(index,), **call, **static)
    return TopK(kept, index)


@triton.jit
def _load(score_ref, pos_ref, protected_ref, row, slot, N: tl.constexpr, PROTECTED: tl.constexpr):
    """Integers in the order of what slots are worth, and positions; a free slot, or none, has the least integer."""
    at = row.to(tl.int64) * N + slot
    score = tl.load(score_ref + at, mask=slot < N, other=0.0)
    pos = tl.load(pos_ref + at, mask=slot < N, other=-1)
    lowest = -3.4028234663852886e38
    score = tl.where(score > lowest, score, lowest)  # also of nan
    score = tl.where(tl.abs(score) < 1.1754943508222875e-38, 0.0, score)
    if PROTECTED:
        protected = tl.load(protected_ref + at, mask=slot < N, other=0)
        score = tl.where(protected != 0, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats run the other way
    return tl.where(pos < 0, -2147483648, key), pos


@triton.jit
def _threshold(key, K: tl.constexpr):
    """The largest integer that K of `key` reach, or the least there is."""
    one = tl.full((), 1, tl.int32)
    least = tl.full((), -2147483648, tl.int32)
    for i in range(32):
        more = least ^ (one << (31 - i))
        least = tl.where(tl.sum((key >= more).to(tl.int32)) >= K, more, least)
    return least


@triton.jit
def _last_position(pos, tied, need):
    """The position of the tied slot that is number `need`, from the lowest."""
    one = tl.full((), 1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for i in range(31):
        more = last | (one << (30 - i))
        last = tl.where(tl.sum((tied & (pos < more)).to(tl.int32)) < need, more, last)
    return last


@triton.jit
def _one_row(
    score_ref, pos_ref, protected_ref, kept_ref, index_ref,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PROTECTED: tl.constexpr,
):  # fmt: skip
    """All of a row and head in one program."""
    row = tl.program_id(0)
    slot = tl.arange(0, BLOCK)
    key, pos = _load(score_ref, pos_ref, protected_ref, row, slot, N, PROTECTED)
    least = _threshold(key, K)
    tied = (key == least) & (pos >= 0)
    need = K - tl.sum((key > least).to(tl.int32))
    last = tl.full((), 2147483647, tl.int32)
    if tl.sum(tied.to(tl.int32)) > need:  # else all of them stay
        last = _last_position(pos, tied, need)
    kept = (key > least) | (tied & (pos <= last))
    tl.store(kept_ref + row.to(tl.int64) * N + slot, kept, mask=slot < N)
    count = kept.to(tl.int32)
    place = tl.cumsum(count, 0) - 1
    index_ref += row.to(tl.int64) * K
    tl.store(index_ref + place, slot, mask=kept)
    tl.store(index_ref + slot, tl.full([BLOCK], N, tl.int32), mask=(slot >= tl.sum(count)) & (slot < K))


@triton.jit
def _resolve(counts_ref, state_ref, row, K: tl.constexpr, SPLITS: tl.constexpr, DIGIT: tl.constexpr):
    """What digits before DIGIT say: (least key, least reversed position, how many more are wanted among equals)."""
    key = tl.full((), 0, tl.uint32)
    late = tl.full((), 0, tl.uint32)
    need = tl.full((), K, tl.int32)
    if DIGIT > 0:
        if DIGIT > 1:
            key = tl.load(state_ref + row * 3).to(tl.uint32, bitcast=True)
            late = tl.load(state_ref + row * 3 + 1).to(tl.uint32, bitcast=True)
            need = tl.load(state_ref + row * 3 + 2)
        bins = tl.arange(0, 256)
        count = tl.zeros([256], tl.int32)
        for split in range(SPLITS):
            count += tl.load(counts_ref + (row * SPLITS + split) * 256 + bins)
        reach = tl.sum(count) - tl.cumsum(count, 0) + count  # that have this digit or a larger one
        digit = tl.maximum(tl.sum((reach >= need).to(tl.int32)) - 1, 0)
        need -= tl.sum(tl.where(bins > digit, count, 0))
        if DIGIT <= 4:
            key |= digit.to(tl.uint32) << (32 - 8 * DIGIT)
        else:
            late |= digit.to(tl.uint32) << (64 - 8 * DIGIT)
    return key, late, need


@triton.jit
def _load_unsigned(score_ref, pos_ref, protected_ref, row, slot, N: tl.constexpr, PROTECTED: tl.constexpr):
    """As `_load`, in unsigned order, and positions reversed, so that the larger is the better in both."""
    key, pos = _load(score_ref, pos_ref, protected_ref, row, slot, N, PROTECTED)
    key = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    return key, (0x7FFFFFFF - pos).to(tl.uint32, bitcast=True), pos >= 0


@triton.jit
def _digit(
    score_ref, pos_ref, protected_ref, before_ref, old_ref, counts_ref, state_ref,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PROTECTED: tl.constexpr, SPLITS: tl.constexpr,
    DIGIT: tl.constexpr,
):  # fmt: skip
    """Counts a split's slots by their next digit, of those that agree with the threshold in the digits before."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = split * BLOCK + tl.arange(0, BLOCK)
    least, late_least, need = _resolve(before_ref, old_ref, row, K, SPLITS, DIGIT)
    key, late, there = _load_unsigned(score_ref, pos_ref, protected_ref, row, slot, N, PROTECTED)
    if DIGIT < 4:
        value = key >> (24 - 8 * DIGIT)
        agrees = slot < N
        if DIGIT > 0:
            agrees &= (value >> 8) == (least >> (32 - 8 * DIGIT))
    else:
        value = late >> (56 - 8 * DIGIT)
        agrees = there & (key == least)
        if DIGIT > 4:
            agrees &= (value >> 8) == (late_least >> (64 - 8 * DIGIT))
    counts = tl.histogram((value & 0xFF).to(tl.int32), 256, mask=agrees)
    tl.store(counts_ref + (row * SPLITS + split) * 256 + tl.arange(0, 256), counts)
    if split == 0:
        tl.store(state_ref + row * 3, least.to(tl.int32, bitcast=True))
        tl.store(state_ref + row * 3 + 1, late_least.to(tl.int32, bitcast=True))
        tl.store(state_ref + row * 3 + 2, need)


@triton.jit
def _mark(
    score_ref, pos_ref, protected_ref, before_ref, old_ref, kept_ref, totals_ref,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PROTECTED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Which slots of a split stay, and how many."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = split * BLOCK + tl.arange(0, BLOCK)
    least, late_least, _ = _resolve(before_ref, old_ref, row, K, SPLITS, 8)
    key, late, there = _load_unsigned(score_ref, pos_ref, protected_ref, row, slot, N, PROTECTED)
    kept = there & ((key > least) | ((key == least) & (late >= late_least)))
    tl.store(kept_ref + row.to(tl.int64) * N + slot, kept, mask=slot < N)
    tl.store(totals_ref + row * SPLITS + split, tl.sum(kept.to(tl.int32)))


@triton.jit
def _compact(
    kept_ref, totals_ref, index_ref,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes the numbers of a split's slots behind those of the splits before, and its part of the places left."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = split * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(kept_ref + row.to(tl.int64) * N + slot, mask=slot < N, other=0) != 0
    first = tl.full((), 0, tl.int32)
    total = tl.full((), 0, tl.int32)
    for other in range(SPLITS):
        count = tl.load(totals_ref + row * SPLITS + other)
        first += tl.where(other < split, count, 0)
        total += count
    place = first + tl.cumsum(kept.to(tl.int32), 0) - 1
    index_ref += row.to(tl.int64) * K
    tl.store(index_ref + place, slot, mask=kept)
    tl.store(index_ref + slot, tl.full([BLOCK], N, tl.int32), mask=(slot >= total) & (slot < K))
