"""`fold_slots` for TPU: a one-hot matrix product, over the band of targets that each block of slots has.

    grid (B * H, chunks of C, blocks of N); a chunk is all of C where VMEM allows, so that k and v are read once.

    for a block of 512 slots:   y = weight * x, in f32, 0 where dropped             [512, D]
    for each 128 output slots   sum[128, D] += onehot[128, 512] @ y
      between the least and the greatest target of the block

Runs of neighbours (KVMerger) touch one or two groups of 128 a block; arbitrary targets touch all.

The product is exact: f32 is cut into three bf16 parts, y = high + middle + low to the last bit, the one-hot matrix is
exact in bf16, and the matrix unit sums products of bf16 in f32. That is three passes, where the highest precision of an
f32 product would take six. Where a nan or inf is in the block, 0 * nan would spread it: it is taken out of y, counted
per target by two more products, and added as an infinity of its sign, both for a nan: inf - inf.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
GROUP = 128  # output slots of one product
CHUNK_BYTES = 6 * 2**20  # of VMEM for sums and outputs; v5e gives a kernel 16 MiB


def fold_slots(
    k: jax.Array,
    v: jax.Array,
    target: jax.Array,
    weight: jax.Array,
    slots: int,
    *,
    value_weight: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.fold_slots`."""
    batch, heads, count = target.shape
    block, chunk = config(k, v, slots)
    blocks, chunks = pl.cdiv(count, block), pl.cdiv(slots, chunk)
    plan, first, last = _plan(target, weight, value_weight, slots, blocks * block, block)
    k, v = (x.reshape(batch * heads, count, -1) for x in (k, v))
    grid = (batch * heads, chunks, blocks)
    in_specs = [
        pl.BlockSpec((1, 3, block), lambda i, c, n, *_: (i, 0, n)),
        *(pl.BlockSpec((1, min(block, count), x.shape[-1]), lambda i, c, n, *_: (i, n, 0)) for x in (k, v)),
    ]
    rows = min(chunk, slots)  # a block as long as the array needs no tiling
    out_specs = [pl.BlockSpec((1, rows, x.shape[-1]), lambda i, c, n, *_: (i, c, 0)) for x in (k, v)]
    out = pl.pallas_call(
        _kernel,
        name="fold_slots",
        out_shape=[jax.ShapeDtypeStruct((batch * heads, slots, x.shape[-1]), x.dtype) for x in (k, v)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((chunk, x.shape[-1]), jnp.float32) for x in (k, v)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(first, last, plan, k, v)
    return tuple(x.reshape(batch, heads, slots, -1) for x in out)


def config(k: jax.Array, v: jax.Array, slots: int) -> tuple[int, int]:
    """(slots of a block, output slots of a chunk), the latter whole groups."""
    count = k.shape[-2]
    wide = [pl.cdiv(x.shape[-1], LANES) * LANES for x in (k, v)]
    slot_bytes = sum(width * (4 + 2 * x.dtype.itemsize) for width, x in zip(wide, (k, v), strict=True))
    most = CHUNK_BYTES // slot_bytes // GROUP * GROUP
    block = 512 if sum(wide) <= 2 * LANES else 256
    return min(block, pl.cdiv(count, LANES) * LANES), min(most, pl.cdiv(slots, GROUP) * GROUP)


def _plan(target, weight, value_weight, slots, padded, block):
    """What a block of slots does: f32[B * H, 3, N] of target (-1 drops) and weights, and its first and last group."""
    target = jnp.where((target >= 0) & (target < slots), target, -1)
    fill = padded - target.shape[-1]  # k and v are not padded: what lies beyond their ends is dropped
    target, weight, value_weight = (
        jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, fill)), constant_values=-1)
        for x in (target, weight, value_weight)
    )
    blocks = target.reshape(-1, block)
    first = jnp.where(blocks >= 0, blocks, slots).min(axis=1) // GROUP
    last = jnp.where(blocks >= 0, blocks // GROUP, -1).max(axis=1)
    return jnp.stack([target.astype(jnp.float32), weight, value_weight], axis=1), first, last


def _kernel(first_ref, last_ref, plan_ref, k_ref, v_ref, k_out, v_out, k_sum, v_sum):
    head, chunk, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    blocks, groups = pl.num_programs(2), k_sum.shape[0] // GROUP
    band = (
        jnp.maximum(first_ref[head * blocks + n] - chunk * groups, 0),
        jnp.minimum(last_ref[head * blocks + n] + 1 - chunk * groups, groups),
    )

    @pl.when(n == 0)
    def _():
        k_sum[...] = jnp.zeros_like(k_sum)
        v_sum[...] = jnp.zeros_like(v_sum)

    @pl.when(band[0] < band[1])
    def _():
        target = plan_ref[0, :1, :].astype(jnp.int32) - chunk * groups * GROUP  # [1, block]
        columns = plan_ref[0].T[: k_ref.shape[1]]  # [block, 3]
        for x_ref, out, column in ((k_ref, k_sum, 1), (v_ref, v_sum, 2)):
            y = x_ref[0].astype(jnp.float32) * columns[:, column : column + 1]
            y = jnp.where(columns[:, :1] >= 0, y, 0)
            _add(y, target[:, : y.shape[0]], out, band)

    @pl.when(n == blocks - 1)
    def _():
        k_out[0] = k_sum[: k_out.shape[1]].astype(k_out.dtype)
        v_out[0] = v_sum[: v_out.shape[1]].astype(v_out.dtype)


def _add(y, target, out, band):
    """Adds the rows of y f32[block, D] to the rows of `out` that they join, by groups of a band."""
    finite = jnp.abs(y) < jnp.inf  # False for nan
    parts = _split(jnp.where(finite, y, 0))

    @pl.loop(*band)
    def _(group):
        here, onehot = _group(group, target)
        high, middle, low = (_product(onehot, part) for part in parts)
        out[here, :] += high + (middle + low)

    @pl.when(jnp.max(jnp.where(finite, 0.0, 1.0)) > 0)
    def _():
        up = jnp.where(finite | (y == -jnp.inf), 0.0, 1.0).astype(jnp.bfloat16)  # inf or nan
        down = jnp.where(finite | (y == jnp.inf), 0.0, 1.0).astype(jnp.bfloat16)  # -inf or nan

        @pl.loop(*band)
        def _(group):
            here, onehot = _group(group, target)
            ups, downs = _product(onehot, up), _product(onehot, down)
            out[here, :] += jnp.where(ups > 0, jnp.inf, 0.0) - jnp.where(downs > 0, jnp.inf, 0.0)


def _group(group, target):
    start = pl.multiple_of(group * GROUP, GROUP)
    slot = start + jax.lax.broadcasted_iota(jnp.int32, (GROUP, target.shape[1]), 0)
    return pl.ds(start, GROUP), jnp.where(slot == target, 1.0, 0.0).astype(jnp.bfloat16)


def _split(y):
    """Three bf16 that sum to the finite f32 y exactly: 24 bits are three times 8. Cut, not rounded: none overflows."""
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(y, jnp.uint32) & np.uint32(0xFFFF0000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        y = y - part
    return parts


_product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
