"""Pallas kernels for TPU: flash attention over spans of slots, then the columns once more for their masses."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.prefill_attention import PrefillAttention
from pallas_kernels.prefill_attention.spans import meetings, padded, spans

LANES, SUBLANES = 128, 8


def config(group: int, count: int, slots: int, dtype: jnp.dtype) -> tuple[int, int]:
    """(block_t, block_n): queries of each query head, and slots, that are in VMEM at once."""
    block_t = LANES * max(1, 4 // group)
    room = 2**18 if dtype == jnp.bfloat16 else 2**17  # logits of a block; 1 MiB, and about four arrays of that size
    block_n = max(LANES, min(512, room // (group * block_t) // LANES * LANES))
    return min(block_t, -(-count // LANES) * LANES), min(block_n, -(-slots // LANES) * LANES)


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    weights: jax.Array | None = None,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> PrefillAttention:
    """Two kernels, the second only with weights; see the package. Arrays that end inside a block are padded here."""
    batch, heads, group, count, _ = q.shape
    slots = k.shape[2]
    block_t, block_n = config(group, count, slots, q.dtype)
    q_pos = jnp.broadcast_to(q_pos, (batch, heads, count))
    q, q_pos = padded(q, 3, block_t), padded(q_pos, 2, block_t, -1)
    k, v, k_pos = padded(k, 2, block_n), padded(v, 2, block_n), padded(k_pos, 2, block_n, -1)
    bias = None if bias is None else padded(bias, 2, block_n)
    some, every = meetings(q_pos, k_pos, block_t, block_n, sliding_window)

    def flat(x):  # [B, H, ...] -> [B * H, ...]; what has one number a token becomes a row
        return None if x is None else x.reshape(batch * heads, *((1,) if x.ndim == 3 else ()), *x.shape[2:])

    arrays = flat(q), flat(k), flat(v), flat(q_pos), flat(k_pos), flat(bias)
    settings = dict(block_t=block_t, block_n=block_n, scale=scale, window=sliding_window, interpret=interpret)
    out, lse = _attend(*arrays, spans(some, every), **settings)
    mass = None
    if weights is not None:
        rows = padded(padded(weights, 2, block_t).swapaxes(0, 1), 1, SUBLANES)  # [B, 8, T]
        counted = (rows != 0).any(axis=1).reshape(batch, 1, 1, -1, block_t).any(axis=-1)  # [B, 1, 1, blocks]
        there = spans(some.swapaxes(2, 3) & counted, every.swapaxes(2, 3))
        mass = _sum_columns(*arrays[:2], *arrays[3:], lse, rows, there, **settings)  # [B * H, 8, N]
        mass = mass[:, : weights.shape[0], :slots].reshape(batch, heads, -1, slots).transpose(2, 0, 1, 3)
    out = out.reshape(batch, heads, *out.shape[1:])[:, :, :, :count]
    return PrefillAttention(out, lse.reshape(batch, heads, *lse.shape[1:])[..., :count], mass)


def _attend(q, k, v, q_pos, k_pos, bias, there, *, block_t, block_n, scale, window, interpret):
    """out [B * H, G, T, Dv] and lse f32[B * H, G, T]; `there` is i32[B, H, blocks of queries, 4]."""
    rows, group, count, dim = q.shape
    wide, blocks = v.shape[2], count // block_t

    def slot_block(b, i, j, there):
        return _visited(there, b * blocks + i, j)

    # What cannot be seen costs no product and no copy; blocks that no query sees are not in the grid at all.
    grid = (rows, blocks, _most(there))
    in_specs = [
        pl.BlockSpec((1, group, block_t, dim), lambda b, i, j, _: (b, 0, i, 0)),
        pl.BlockSpec((1, block_n, dim), lambda *at: (at[0], slot_block(*at), 0)),
        pl.BlockSpec((1, block_n, wide), lambda *at: (at[0], slot_block(*at), 0)),
        pl.BlockSpec((1, 1, block_t), lambda b, i, j, _: (b, 0, i)),
        *[pl.BlockSpec((1, 1, block_n), lambda *at: (at[0], 0, slot_block(*at)))] * (1 if bias is None else 2),
    ]
    out_specs = [
        pl.BlockSpec((1, group, block_t, wide), lambda b, i, j, _: (b, 0, i, 0)),
        pl.BlockSpec((1, group, block_t), lambda b, i, j, _: (b, 0, i)),
    ]
    scratch = [
        pltpu.VMEM((group * block_t, LANES), jnp.float32),  # top: largest logit so far
        pltpu.VMEM((group * block_t, LANES), jnp.float32),  # total: sum of exponentials so far
        pltpu.VMEM((group * block_t, wide), jnp.float32),
        pltpu.VMEM((block_t, LANES), jnp.int32),  # q_pos, down the rows
    ]
    return pl.pallas_call(
        functools.partial(_attend_kernel, scale=scale, window=window, biased=bias is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, group, count, wide), q.dtype),
            jax.ShapeDtypeStruct((rows, group, count), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="prefill_attention",
        interpret=interpret,
    )(there.reshape(-1), q, k, v, q_pos, k_pos, *(() if bias is None else (bias,)))


def _attend_kernel(there, q_ref, k_ref, v_ref, q_pos_ref, k_pos_ref, *refs, scale, window, biased):
    bias_ref, (out_ref, lse_ref, top_ref, total_ref, sum_ref, at_ref) = refs[0] if biased else None, refs[biased:]
    group, block_t = q_ref.shape[1:3]
    step, index = pl.program_id(2), pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    block = there[4 * index] + step

    @pl.when(step == 0)
    def start():
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf)
        total_ref[...] = jnp.zeros(total_ref.shape)
        sum_ref[...] = jnp.zeros(sum_ref.shape)
        at_ref[...] = _column(q_pos_ref[0])

    def visit(masked):
        logits = _product(q_ref[0].reshape(group * block_t, -1), k_ref[0], 1) * (scale * math.log2(math.e))
        logits = logits.reshape(group, block_t, -1)
        bias = None if bias_ref is None else bias_ref[0]
        logits = _shown(logits, at_ref[:, :1][None], k_pos_ref[0][None], bias, window, masked).reshape(
            group * block_t, -1
        )
        before = top_ref[...]
        top = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        finite = jnp.where(top == -jnp.inf, 0.0, top)
        p, faded = jnp.exp2(logits - finite[:, :1]), jnp.exp2(before - finite)
        top_ref[...] = top
        total_ref[...] = faded * total_ref[...] + p.sum(axis=1, keepdims=True)
        sum_ref[...] = faded[:, :1] * sum_ref[...] + _product(p.astype(v_ref.dtype), v_ref[0], 0)

    _visit_span(there, index, block, visit)

    @pl.when(step == pl.num_programs(2) - 1)
    def finish():
        total = total_ref[...]
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out = jnp.where(some[:, :1], sum_ref[...] / total[:, :1], 0.0)
        out_ref[0] = out.reshape(out_ref.shape[1:]).astype(out_ref.dtype)
        lse = jnp.where(some, top_ref[...] * math.log(2) + jnp.log(total), -jnp.inf)
        for g in range(group):
            lse_ref[0, g : g + 1, :] = lse[g * block_t : (g + 1) * block_t].T[:1]


def _sum_columns(q, k, q_pos, k_pos, bias, lse, weights, there, *, block_t, block_n, scale, window, interpret):
    """mass f32[B * H, 8, N]; weights are f32[B, 8, T], and `there` is i32[B, H, blocks of slots, 4]."""
    rows, group, count, dim = q.shape
    slots, heads = k.shape[1], q.shape[0] // weights.shape[0]
    blocks = slots // block_n

    def query_block(b, i, j, there):
        return _visited(there, b * blocks + i, j)

    grid = (rows, blocks, _most(there))
    in_specs = [
        pl.BlockSpec((1, group, block_t, dim), lambda *at: (at[0], 0, query_block(*at), 0)),
        pl.BlockSpec((1, block_n, dim), lambda b, i, j, _: (b, i, 0)),
        pl.BlockSpec((1, 1, block_t), lambda *at: (at[0], 0, query_block(*at))),
        pl.BlockSpec((1, group, block_t), lambda *at: (at[0], 0, query_block(*at))),
        pl.BlockSpec((1, SUBLANES, block_t), lambda *at: (jax.lax.div(at[0], heads), 0, query_block(*at))),
        *[pl.BlockSpec((1, 1, block_n), lambda b, i, j, _: (b, 0, i))] * (1 if bias is None else 2),
    ]
    out_specs = pl.BlockSpec((1, SUBLANES, block_n), lambda b, i, j, _: (b, 0, i))
    scratch = [pltpu.VMEM((block_n, LANES), jnp.int32), pltpu.VMEM((block_n, LANES), jnp.float32)]  # k_pos, bias
    return pl.pallas_call(
        functools.partial(_sum_columns_kernel, scale=scale, window=window, biased=bias is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=jax.ShapeDtypeStruct((rows, SUBLANES, slots), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="prefill_attention_mass",
        interpret=interpret,
    )(there.reshape(-1), q, k, q_pos, lse, weights, k_pos, *(() if bias is None else (bias,)))


def _sum_columns_kernel(there, q_ref, k_ref, q_pos_ref, lse_ref, weights_ref, k_pos_ref, *refs, scale, window, biased):
    bias_ref, (mass_ref, at_ref, extra_ref) = refs[0] if biased else None, refs[biased:]
    step, index = pl.program_id(2), pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    block = there[4 * index] + step

    @pl.when(step == 0)
    def start():
        mass_ref[...] = jnp.zeros(mass_ref.shape)
        at_ref[...] = _column(k_pos_ref[0])
        if biased:
            extra_ref[...] = _column(bias_ref[0])

    def visit(masked):  # logits lie with slots down and queries across, as the sums want them
        total = jnp.zeros((k_ref.shape[1], q_ref.shape[2]), jnp.float32)
        for g in range(q_ref.shape[1]):
            logits = _product(k_ref[0], q_ref[0, g], 1) * (scale * math.log2(math.e))
            bias = extra_ref[:, :1] if biased else None
            logits = _shown(logits, q_pos_ref[0], at_ref[:, :1], bias, window, masked)
            lse = lse_ref[0, g : g + 1, :] * math.log2(math.e)
            total += jnp.exp2(logits - jnp.where(lse == -jnp.inf, jnp.inf, lse))
        mass_ref[0] += _product(weights_ref[0].astype(q_ref.dtype), total.astype(q_ref.dtype), 1)

    _visit_span(there, index, block, visit)


def _shown(logits, q_pos, k_pos, bias, window, masked):
    """Logits to base 2 with the bias; -inf where a query does not see a slot. Not masked, every query sees all."""
    if bias is not None:
        bias = bias * math.log2(math.e)
        logits = logits + (jnp.where(q_pos == k_pos, 0.0, bias) if masked else bias)
    if not masked:
        return logits
    visible = (k_pos >= 0) & (k_pos <= q_pos)
    if window is not None:
        visible &= q_pos - k_pos < window
    return jnp.where(visible, logits, -jnp.inf)


def _product(x, y, axis):
    """x [m, n] times y along an axis of y, in f32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    numbers = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=jnp.float32)


def _column(row):
    """[1, n] -> [n, 128], each number along its row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _visited(there, index, step):
    """The block of a step; the last one again when the span has ended, which copies nothing."""
    first, stop = there[4 * index], there[4 * index + 3]
    return first + jnp.minimum(step, jnp.maximum(stop - first - 1, 0))


def _visit_span(there, index, block, visit):
    open_, shut, stop = (there[4 * index + n] for n in (1, 2, 3))
    whole = (block >= open_) & (block < shut)
    pl.when(whole)(functools.partial(visit, False))
    pl.when((block < stop) & ~whole)(functools.partial(visit, True))


def _most(there):
    """Steps of the longest span; at least one, for the outputs are written in any case."""
    return jnp.maximum((there[..., 3] - there[..., 0]).max(), 1)
