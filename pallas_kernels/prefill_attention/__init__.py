"""Causal attention of a call of several tokens over slots in any order, with the attention that each slot received."""

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sharding import by_row_and_head

STATISTICS = 4  # most rows of weights that one call sums with
WIDEST = 256  # head_dim of the widest configuration of the kernels
LARGEST_GROUP = 16  # query heads of one kv head that the TPU kernel holds in VMEM at once
LARGEST_F32 = 2048  # channels of all query heads of a kv head: what fits into VMEM in float32
MOST_BLOCKS = 2**15  # of queries, in all rows and kv_heads: their spans lie in a TPU's scalar memory, 16 bytes each


class PrefillAttention(NamedTuple):
    """`out` [B, H, G, T, Dv] in q's dtype, `lse` f32[B, H, G, T], and `mass` f32[M, B, H, N], or None."""

    out: jax.Array
    lse: jax.Array
    mass: jax.Array | None


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
    implementation: str | None = None,
) -> PrefillAttention:
    """Softmax attention over slots, causal by position; slots may come in any order.

    A query sees the slots with 0 <= k_pos <= q_pos and, with a sliding window, q_pos - k_pos < sliding_window. One that
    sees none gives out = 0 and lse = -inf. The kernels hold no [T, N] array in HBM, and skip blocks of slots ahead of
    the first or behind the last that a block of queries can see; slots in the order of their positions skip most.

    Args:
      q: [B, H, G, T, Dk], rotated; float32 or bfloat16 for a kernel.
      k: [B, H, N, Dk], of q's dtype.
      v: [B, H, N, Dv], likewise. Dk may differ from Dv. What free slots hold must be finite.
      q_pos: i32[B, H or 1, T], -1 for padding.
      k_pos: i32[B, H, N], -1 for free slots.
      weights: f32[M, B, T], M in 1..4: mass[m] sums p over the group and over the queries, each times its weight.
        Weights of 1 count all queries, and 1 for the last few and 0 elsewhere those; blocks of 0 cost nothing at
        either end. The TPU kernel rounds weights and p to bfloat16 in a bfloat16 call. None sums nothing.
      scale: Factor of the logits, a Python number.
      bias: f32[B, H, N], added to the logits of a slot, except where a query meets its own position.
      sliding_window: Positions a query sees, its own included; None sees all.
      implementation: "tpu", "gpu" or "reference"; None takes what this machine has.

    Returns:
      `PrefillAttention`: out, lse (natural logarithm), and mass, which is None without weights.

    Raises:
      ValueError: If the shapes or dtypes do not fit together, or the implementation cannot run here or do this.
    """
    _check(q, k, v, q_pos, k_pos, weights, bias, sliding_window)

    name = dispatch.choose("prefill_attention", implementation, lambda name: unfit(name, q, k, v))
    backend = importlib.import_module(f"{__name__}.{name}")
    settings = {"scale": float(scale), "sliding_window": sliding_window}

    def part(q, k, v, q_pos, k_pos, weights, bias):
        return backend.prefill_attention(q, k, v, q_pos, k_pos, weights=weights, bias=bias, **settings)

    args = (q, k, v, q_pos, k_pos, weights, bias)
    return PrefillAttention(*by_row_and_head(part, args, (*["bh"] * 5, ".b", "bh"), ("bh", "bh", ".bh")))


def unfit(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why the kernel cannot do such a call, or None; only shapes and dtypes matter."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"its kernels are for float32 and bfloat16, and q is {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"its kernels are for one dtype, and q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[4], v.shape[3]) > WIDEST:
        return f"its kernels are for head_dim up to {WIDEST}, and q has {q.shape[4]}, v {v.shape[3]}"
    if name == "tpu" and q.shape[2] > LARGEST_GROUP:
        return f"its kernel is for groups of up to {LARGEST_GROUP} query heads, and q has {q.shape[2]}"
    if name == "tpu" and q.dtype == jnp.float32 and q.shape[2] * max(q.shape[4], v.shape[3]) > LARGEST_F32:
        return f"a block of its kernel in float32 holds {LARGEST_F32} channels of a group at most, and q has {q.shape}"
    if name == "tpu" and q.shape[0] * q.shape[1] * -(-q.shape[3] // 128) > MOST_BLOCKS:
        return f"its kernel takes {MOST_BLOCKS} blocks of 128 queries at most, and q has {q.shape}"
    return None


def _check(q, k, v, q_pos, k_pos, weights, bias, sliding_window):
    if q.ndim != 5 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"prefill_attention: q {q.shape} must be [B, H, G, T, Dk], k {k.shape} [B, H, N, Dk], and v {v.shape} "
            f"[B, H, N, Dv]."
        )
    batch, heads, _, count, dim = q.shape
    if k.shape[:2] != (batch, heads) or k.shape[3] != dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"prefill_attention: k {k.shape} and v {v.shape} do not fit q {q.shape}; they must be [B, H, N, Dk] and "
            f"[B, H, N, Dv] for q [B, H, G, T, Dk]."
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(
            f"prefill_attention: q {q.shape}, k {k.shape} or v {v.shape} is empty; give at least one each."
        )
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"prefill_attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give one floating dtype."
        )
    if q_pos.shape not in ((batch, 1, count), (batch, heads, count)) or q_pos.dtype != jnp.int32:
        raise ValueError(
            f"prefill_attention: q_pos is {q_pos.dtype}{list(q_pos.shape)}; q {q.shape} wants "
            f"int32[{batch}, 1 or {heads}, {count}]."
        )
    slots = k.shape[2]
    if k_pos.shape != (batch, heads, slots) or k_pos.dtype != jnp.int32:
        raise ValueError(
            f"prefill_attention: k_pos is {k_pos.dtype}{list(k_pos.shape)}; k {k.shape} wants "
            f"int32[{batch}, {heads}, {slots}]."
        )
    if weights is not None and (
        weights.ndim != 3
        or weights.shape[1:] != (batch, count)
        or not 1 <= weights.shape[0] <= STATISTICS
        or weights.dtype != jnp.float32
    ):
        raise ValueError(
            f"prefill_attention: weights are {weights.dtype}{list(weights.shape)}, and must be "
            f"float32[1 to {STATISTICS}, {batch}, {count}]; None sums no columns."
        )
    if bias is not None and (bias.shape != k_pos.shape or bias.dtype != jnp.float32):
        raise ValueError(
            f"prefill_attention: bias is {bias.dtype}{list(bias.shape)}; k {k.shape} wants "
            f"float32[{batch}, {heads}, {slots}]. None adds nothing."
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"prefill_attention: sliding_window={sliding_window} must be at least 1, the query itself; None sees all."
        )
