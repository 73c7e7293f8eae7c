"""Triton kernels for GPU: flash attention over spans of slots, then the columns once more for their masses."""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.prefill_attention import PrefillAttention
from pallas_kernels.prefill_attention.spans import meetings, padded, spans

PROCESSORS = 132  # of an H100; fewer programs than two for each take smaller blocks


def config(dtype: jnp.dtype, dim: int, wide: int, rows: int, heads: int) -> tuple[dict, dict]:
    """Of the attention kernel and of the mass kernel: {ROWS, SLOTS, STAGES, num_warps}.

    Args:
      dtype: Of q, k and v.
      dim: Dk, made a power of two.
      wide: Dv, likewise.
      rows: Queries of a kv head: G * T.
      heads: Of kv, in the whole batch.
    """
    widest = max(dim, wide)
    if dtype == jnp.float32:
        small = widest > 64  # products without tensor cores keep their operands in registers
        attend = dict(ROWS=32 if small else 64, SLOTS=32, STAGES=2, num_warps=8)
        return attend, dict(ROWS=32, SLOTS=32 if small else 64, STAGES=2, num_warps=8)
    few = -(-rows // 128) * heads < 2 * PROCESSORS
    if widest <= 128:
        attend = dict(ROWS=64 if few else 128, SLOTS=64, STAGES=3, num_warps=4 if few or widest <= 64 else 8)
    else:
        attend = dict(ROWS=64, SLOTS=64, STAGES=2, num_warps=8)
    mass = dict(ROWS=64 if dim <= 128 else 32, SLOTS=128, STAGES=3 if dim <= 128 else 2, num_warps=8)
    return attend, mass


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
) -> PrefillAttention:
    """Two kernels, the second only with weights; see the package.

    Products of float32 are made without tensor cores ("ieee"), which is exact and slow.
    """
    batch, heads, group, count, dim = q.shape
    slots, wide = v.shape[2:]
    q_pos = jnp.broadcast_to(q_pos, (batch, heads, count))
    constants = dict(
        H=heads, G=group, T=count, N=slots, DK=dim, PAD_K=_power(dim),
        SCALE=scale * math.log2(math.e), BIASED=bias is not None, WINDOW=sliding_window or 0,
    )  # fmt: skip
    bias = k_pos if bias is None else bias  # a pointer that is not followed
    attend, mass = config(q.dtype, _power(dim), _power(wide), group * count, batch * heads)
    there = spans(*_meetings(q_pos, k_pos, group, attend, sliding_window))
    out, lse = triton_call.call(
        _attend, q, k, v, q_pos, k_pos, bias, there,
        out_shapes=[
            jax.ShapeDtypeStruct((batch, heads, group, count, wide), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, group, count), jnp.float32),
        ],
        grid=(there.shape[2], batch * heads), num_stages=attend["STAGES"],
        DV=wide, PAD_V=_power(wide), **attend, **constants,
    )  # fmt: skip
    if weights is None:
        return PrefillAttention(out, lse, None)

    some, every = (x.swapaxes(2, 3) for x in _meetings(q_pos, k_pos, group, mass, sliding_window))
    counted = jnp.repeat((weights != 0).any(axis=0), group, axis=1)  # [B, T * G]
    counted = padded(counted, 1, mass["ROWS"]).reshape(batch, 1, 1, -1, mass["ROWS"]).any(axis=-1)
    there = spans(some & counted, every)
    (columns,) = triton_call.call(
        _sum_columns, q, k, q_pos, k_pos, bias, lse, weights, there,
        out_shapes=[jax.ShapeDtypeStruct((weights.shape[0], batch, heads, slots), jnp.float32)],
        grid=(there.shape[2], batch * heads), num_stages=mass["STAGES"],
        B=batch, M=weights.shape[0], **mass, **constants,
    )  # fmt: skip
    return PrefillAttention(out, lse, columns)


def _power(dim):
    """The least power of two that holds `dim`, and that tl.dot takes."""
    return max(16, 1 << (dim - 1).bit_length())


def _meetings(q_pos, k_pos, group, blocks, window):
    """See `spans.meetings`; a kernel's rows are (token, query head), the head going round fastest."""
    q_pos = padded(jnp.repeat(q_pos, group, axis=2), 2, blocks["ROWS"], -1)
    return meetings(q_pos, padded(k_pos, 2, blocks["SLOTS"], -1), blocks["ROWS"], blocks["SLOTS"], window)


@triton.jit
def _product(x, y, acc):
    """x @ y + acc; of bf16 with tensor cores."""
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _shown(logits, q_pos, k_pos, bias, BIASED: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """Logits with the bias; -inf where a query does not see a slot. Not masked, every query sees all."""
    if BIASED:
        if MASKED:
            logits += tl.where(q_pos == k_pos, 0.0, bias)
        else:
            logits += bias
    if MASKED:
        visible = (k_pos >= 0) & (k_pos <= q_pos)
        if WINDOW > 0:
            visible &= q_pos - k_pos < WINDOW
        logits = tl.where(visible, logits, float("-inf"))
    return logits


@triton.jit
def _visit_slots(
    block, acc, top, total, q, q_pos, k_ptr, v_ptr, k_pos_ptr, bias_ptr,
    N: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAD_K: tl.constexpr, PAD_V: tl.constexpr,
    SLOTS: tl.constexpr, SCALE: tl.constexpr, BIASED: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of slots under the online softmax; not masked, it is whole: it ends before N."""
    slot = block * SLOTS + tl.arange(0, SLOTS)
    dk, dv = tl.arange(0, PAD_K), tl.arange(0, PAD_V)
    there = (slot < N) | (not MASKED)
    k_at, v_at = k_ptr + slot[None, :] * DK + dk[:, None], v_ptr + slot[:, None] * DV + dv[None, :]
    k = tl.load(k_at, mask=there[None, :] & (dk < DK)[:, None], other=0.0)  # [PAD_K, SLOTS]
    v = tl.load(v_at, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
    logits = _product(q, k, None) * SCALE
    k_pos, bias = slot, 0.0  # neither is looked at unless it is loaded
    if MASKED:
        k_pos = tl.load(k_pos_ptr + slot, mask=there, other=-1)
    if BIASED:
        bias = (tl.load(bias_ptr + slot, mask=there, other=0.0) * 1.4426950408889634)[None, :]
    logits = _shown(logits, q_pos[:, None], k_pos[None, :], bias, BIASED, WINDOW, MASKED)
    before = top
    top = tl.maximum(top, tl.max(logits, axis=1))
    finite = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(logits - finite[:, None])
    faded = tl.exp2(before - finite)
    total = total * faded + tl.sum(p, axis=1)
    acc = _product(p.to(v.dtype), v, acc * faded[:, None])
    return acc, top, total


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, there_ptr, out_ptr, lse_ptr,
    H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PAD_K: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, BIASED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """ROWS rows of (token, query head) of one kv head, over the slots that they can see."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # of a prompt, the last see most: they start first
    head = tl.program_id(1).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    token, present = row // G, row < T * G
    q_at = head * G * T + (row % G) * T + token  # of [B * H * G * T]
    dk, dv = tl.arange(0, PAD_K), tl.arange(0, PAD_V)
    q = tl.load(q_ptr + q_at[:, None] * DK + dk[None, :], mask=present[:, None] & (dk < DK)[None, :], other=0.0)
    q_pos = tl.load(q_pos_ptr + head * T + token, mask=present, other=-1)
    k_ptr, v_ptr, k_pos_ptr, bias_ptr = (
        k_ptr + head * N * DK, v_ptr + head * N * DV, k_pos_ptr + head * N, bias_ptr + head * N,
    )  # fmt: skip
    there_ptr += (head * tl.num_programs(0) + block) * 4
    first, open_, shut, stop = (
        tl.load(there_ptr), tl.load(there_ptr + 1), tl.load(there_ptr + 2), tl.load(there_ptr + 3),
    )  # fmt: skip

    acc = tl.zeros([ROWS, PAD_V], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in tl.range(open_, shut, num_stages=STAGES):
        acc, top, total = _visit_slots(
            at, acc, top, total, q, q_pos, k_ptr, v_ptr, k_pos_ptr, bias_ptr,
            N, DK, DV, PAD_K, PAD_V, SLOTS, SCALE, BIASED, WINDOW, False,
        )  # fmt: skip
    for step in tl.range(first, stop - shut + open_, num_stages=STAGES):
        at = tl.where(step < open_, step, step - open_ + shut)
        acc, top, total = _visit_slots(
            at, acc, top, total, q, q_pos, k_ptr, v_ptr, k_pos_ptr, bias_ptr,
            N, DK, DV, PAD_K, PAD_V, SLOTS, SCALE, BIASED, WINDOW, True,
        )  # fmt: skip

    some = total > 0
    total = tl.where(some, total, 1.0)
    out = acc / total[:, None]  # acc is 0 where nothing was seen
    out_at = out_ptr + q_at[:, None] * DV + dv[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=present[:, None] & (dv < DV)[None, :])
    lse = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + q_at, lse, mask=present)


@triton.jit
def _visit_queries(
    block, mass0, mass1, mass2, mass3, k, k_pos, bias, q_ptr, q_pos_ptr, lse_ptr, weights_ptr,
    B: tl.constexpr, G: tl.constexpr, T: tl.constexpr, DK: tl.constexpr, PAD_K: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, SCALE: tl.constexpr, BIASED: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what one block of rows gives to each slot; logits have slots down and queries across."""
    row = block * ROWS + tl.arange(0, ROWS)
    token, present = row // G, (row < T * G) | (not MASKED)
    q_at = (row % G) * T + token
    dk = tl.arange(0, PAD_K)
    q = tl.load(q_ptr + q_at[None, :] * DK + dk[:, None], mask=present[None, :] & (dk < DK)[:, None], other=0.0)
    lse = tl.load(lse_ptr + q_at, mask=present, other=float("-inf")) * 1.4426950408889634
    q_pos = row  # not looked at unless it is loaded
    if MASKED:
        q_pos = tl.load(q_pos_ptr + token, mask=present, other=-1)
    logits = _product(k, q, None) * SCALE
    logits = _shown(logits, q_pos[None, :], k_pos[:, None], bias, BIASED, WINDOW, MASKED)
    p = tl.exp2(logits - tl.where(lse == float("-inf"), float("inf"), lse)[None, :])
    mass0 += tl.sum(p * tl.load(weights_ptr + token, mask=present, other=0.0)[None, :], axis=1)
    if M > 1:
        mass1 += tl.sum(p * tl.load(weights_ptr + B * T + token, mask=present, other=0.0)[None, :], axis=1)
    if M > 2:
        mass2 += tl.sum(p * tl.load(weights_ptr + 2 * B * T + token, mask=present, other=0.0)[None, :], axis=1)
    if M > 3:
        mass3 += tl.sum(p * tl.load(weights_ptr + 3 * B * T + token, mask=present, other=0.0)[None, :], axis=1)
    return mass0, mass1, mass2, mass3


@triton.jit
def _sum_columns(
    q_ptr, k_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, lse_ptr, weights_ptr, there_ptr, mass_ptr,
    B: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DK: tl.constexpr,
    PAD_K: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, BIASED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The M masses of SLOTS slots of one kv head, over the rows of (token, query head) that see them and count."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    dk, here = tl.arange(0, PAD_K), slot < N
    k_at = k_ptr + head * N * DK + slot[:, None] * DK + dk[None, :]
    k = tl.load(k_at, mask=here[:, None] & (dk < DK)[None, :], other=0.0)
    k_pos = tl.load(k_pos_ptr + head * N + slot, mask=here, other=-1)
    bias = 0.0
    if BIASED:
        bias = (tl.load(bias_ptr + head * N + slot, mask=here, other=0.0) * 1.4426950408889634)[:, None]
    q_ptr, q_pos_ptr, lse_ptr, weights_ptr = (
        q_ptr + head * G * T * DK, q_pos_ptr + head * T, lse_ptr + head * G * T, weights_ptr + (head // H) * T,
    )  # fmt: skip
    there_ptr += (head * tl.num_programs(0) + block) * 4
    first, open_, shut, stop = (
        tl.load(there_ptr), tl.load(there_ptr + 1), tl.load(there_ptr + 2), tl.load(there_ptr + 3),
    )  # fmt: skip

    mass0 = tl.zeros([SLOTS], tl.float32)
    mass1, mass2, mass3 = mass0, mass0, mass0
    for at in tl.range(open_, shut, num_stages=STAGES):
        mass0, mass1, mass2, mass3 = _visit_queries(
            at, mass0, mass1, mass2, mass3, k, k_pos, bias, q_ptr, q_pos_ptr, lse_ptr, weights_ptr,
            B, G, T, DK, PAD_K, M, ROWS, SCALE, BIASED, WINDOW, False,
        )  # fmt: skip
    for step in tl.range(first, stop - shut + open_, num_stages=STAGES):
        at = tl.where(step < open_, step, step - open_ + shut)
        mass0, mass1, mass2, mass3 = _visit_queries(
            at, mass0, mass1, mass2, mass3, k, k_pos, bias, q_ptr, q_pos_ptr, lse_ptr, weights_ptr,
            B, G, T, DK, PAD_K, M, ROWS, SCALE, BIASED, WINDOW, True,
        )  # fmt: skip

    mass_ptr += head * N + slot
    for m in tl.static_range(M):
        mass = mass0 if m == 0 else mass1 if m == 1 else mass2 if m == 2 else mass3
        tl.store(mass_ptr + m * B * H * N, mass, mask=here)
