"""Pallas for TPU: the threshold bit by bit over rows that stay in VMEM, then the indices by counting, twice."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.topk_slots import FREE, TopK

LANES = 128
MOST_AT_ONCE = 65536  # slots of the rows of one program, unless one row is longer
LEAST_KEY = -(2**31)


def topk_slots(
    score: jax.Array, pos: jax.Array, k: int, *, protected: jax.Array | None = None, interpret: bool = False
) -> TopK:
    """As `pallas_kernels.topk_slots.topk_slots`."""
    batch, heads, slots = score.shape
    rows = batch * heads
    chunks = _round_up(pl.cdiv(slots, LANES), 8)
    places = _round_up(k, LANES)
    together = next(n for n in (8, 4, 2, 1) if rows % n == 0 and (n == 1 or n * chunks * LANES <= MOST_AT_ONCE))

    def fold(x, fill):  # [rows, chunks, 128]: a row's slots lie on sublanes and lanes
        x = jnp.pad(x.reshape(rows, slots), ((0, 0), (0, chunks * LANES - slots)), constant_values=fill)
        return x.reshape(rows, chunks, LANES)

    inputs = [fold(score, 0), fold(pos, FREE)]
    if protected is not None:
        inputs.append(fold(protected.astype(jnp.int8), 0))
    grid = (rows // together,)
    block = pl.BlockSpec((together, chunks, LANES), lambda i: (i, 0, 0))
    in_specs = [block] * len(inputs)
    out_specs = (block, pl.BlockSpec((together, 1, places), lambda i: (i, 0, 0)))
    kept, index = pl.pallas_call(
        functools.partial(_kernel, k=k, slots=slots, with_protected=protected is not None),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=(
            jax.ShapeDtypeStruct((rows, chunks, LANES), jnp.int8),
            jax.ShapeDtypeStruct((rows, 1, places), jnp.int32),
        ),
        scratch_shapes=[pltpu.VMEM((together, chunks, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_vmem(chunks)),
        interpret=interpret,
        name="topk_slots",
    )(*inputs)
    kept = kept.reshape(rows, -1)[:, :slots].reshape(score.shape) != 0
    return TopK(kept, index[:, 0, :k].reshape(batch, heads, k))


def _round_up(n, step):
    return pl.cdiv(n, step) * step


def _vmem(chunks):
    """Bytes: what the compiler takes by itself, or more for long rows."""
    return max(16, 48 * chunks * LANES // 2**20 + 8) * 2**20


def _kernel(*refs, k, slots, with_protected):
    score, pos, *protected, kept, index, key = refs
    key[...] = _keys(score[...], pos[...], protected[0][...] if with_protected else None)
    least, last = _threshold(key, pos, k)
    tied = (key[...] == least) & (pos[...] >= 0)
    stays = (key[...] > least) | (tied & (pos[...] <= last))
    key[...] = stays.astype(jnp.int32)  # the keys have served
    kept[...] = key[...].astype(jnp.int8)
    for row in range(kept.shape[0]):
        _write_indices(key, index, row, k, slots)


def _keys(score, pos, protected):
    """Integers in the order of what slots are worth; a free slot has the least there is."""
    limits = jnp.finfo(jnp.float32)
    score = jnp.where(score > limits.min, score, limits.min)  # also of nan
    score = jnp.where(jnp.abs(score) < limits.tiny, 0.0, score)
    if protected is not None:
        score = jnp.where(protected.astype(jnp.int32) != 0, jnp.inf, score)
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats run the other way
    return jnp.where(pos < 0, LEAST_KEY, bits)


def _threshold(key, pos, k):
    """(key, position) [rows, 1, 1] of the last slot that stays: those above it in key stay, and of equals the lower."""

    def count(which):
        return jnp.sum(which.astype(jnp.int32), axis=(1, 2), keepdims=True)

    def key_bit(i, least):
        more = least ^ (jnp.int32(1) << (31 - i))
        return jnp.where(count(key[...] >= more) >= k, more, least)

    rows = key.shape[0]
    least = jax.lax.fori_loop(0, 32, key_bit, jnp.full((rows, 1, 1), LEAST_KEY, jnp.int32))
    need = k - count(key[...] > least)
    spare = count((key[...] == least) & (pos[...] >= 0)) - need

    def position_bit(i, last):
        more = last | (jnp.int32(1) << (30 - i))
        below = (key[...] == least) & (pos[...] >= 0) & (pos[...] < more)
        return jnp.where(count(below) < need, more, last)

    ties = jnp.where(jnp.max(spare) > 0, 31, 0)  # without any to break, all that are equal stay
    start = jnp.where(jnp.max(spare) > 0, 0, 2**31 - 1)
    return least, jax.lax.fori_loop(0, ties, position_bit, jnp.full((rows, 1, 1), start, jnp.int32))


def _write_indices(stays, index, row, k, slots):
    """Place j holds the number of slots with at most j kept among them and those before: whole chunks, then lanes.

    Counts of a chunk are at most 128, which bf16 holds, and sums are in f32: the products are exact.
    """
    chunks, places = stays.shape[1], index.shape[2]
    kept = stays[row].astype(jnp.float32)  # [C, 128]
    upto = _counts_up_to(kept)  # [C, 1]
    count = jnp.sum(kept, axis=1, keepdims=True)
    before = upto - count
    within = _dot(_lower(LANES), kept.astype(jnp.bfloat16), (1, 1)).astype(jnp.bfloat16)  # [128, C]
    total = jnp.sum(count)
    width = next(n for n in (512, 256, 128) if places % n == 0 and n * chunks <= 2**19 or n == 128)

    def write(i, _):
        j = (i * width + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)).astype(jnp.float32)
        chunk = jnp.sum((upto <= j).astype(jnp.float32), axis=0, keepdims=True)  # [1, J]
        here = (before <= j) & (j < upto)  # [C, J], one chunk a place
        start = jnp.sum(jnp.where(here, before, 0.0), axis=0, keepdims=True)
        lanes = _dot(within, here.astype(jnp.float32).astype(jnp.bfloat16), (1, 0))  # [128, J]
        lane = jnp.sum((lanes <= j - start).astype(jnp.float32), axis=0, keepdims=True)
        found = jnp.where(j < total, LANES * chunk + lane, slots).astype(jnp.int32)
        index[row, :, pl.ds(pl.multiple_of(i * width, width), width)] = found
        return _

    jax.lax.fori_loop(0, places // width, write, None)


def _counts_up_to(kept):
    """Kept slots in each chunk and all before it, f32[C, 1]."""
    chunks = kept.shape[0]
    step = next(n for n in (128, 64, 32, 16, 8) if chunks % n == 0)
    parts, carry = [], jnp.zeros((1, 1), jnp.float32)
    for start in range(0, chunks, step):
        part = _dot(_lower(step), kept[start : start + step].astype(jnp.bfloat16), (1, 0))  # [step, 128]
        parts.append(jnp.sum(part, axis=1, keepdims=True) + carry)
        carry = parts[-1][-1:]
    return jnp.concatenate(parts, axis=0)


def _lower(n):
    """bf16[n, n], 1 on and below the diagonal."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    return (row >= column).astype(jnp.float32).astype(jnp.bfloat16)


def _dot(a, b, axes):
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)
