"""Attention of a few queries over slots in any order, which moves every stored byte of keys and values once."""

import functools
import importlib
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sharding import by_row_and_head
from pallas_kernels.slot_attention.packed import Packed, words

__all__ = ["Packed", "SlotAttention", "slot_attention", "unfit"]

FREE = -1  # position of a free slot, and of a query that is padding
STATS = (None, "mass", "logits")
MOST_QUERIES = 16  # T of the kernels
MOST_CHANNELS = 256  # D of the kernels
MOST_TPU_ROWS, LEAST_TPU_GROUP = 128, 16  # G T, and channels of a step, for which VMEM has room


class SlotAttention(NamedTuple):
    """What `slot_attention` returns: `out` [B, H, G, T, Dv], `lse` f32[B, H, G, T], and `stat`, what was asked for."""

    out: jax.Array
    lse: jax.Array
    stat: jax.Array | None


def slot_attention(
    q: jax.Array,
    k: jax.Array | Packed,
    v: jax.Array | Packed,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float = 1.0,
    sliding_window: int | None = None,
    stat: str | None = None,
    implementation: str | None = None,
) -> SlotAttention:
    """Softmax attention, causal by position. A query without a visible slot gives 0, and lse = -inf.

    A slot is visible to a query if it is not free, k_pos <= q_pos, and with a window also q_pos - k_pos <
    sliding_window. Its logit is scale q . k, plus its bias, if any. All sums are in f32; where q is bf16 a kernel
    rounds probabilities to bf16 before it multiplies values.

    Args:
      q: [B, H, G, T, Dk], rotated.
      k: [B, H, N, Dk], or `Packed` of as many channels; Dk need not be Dv.
      v: [B, H, N, Dv], or `Packed`.
      q_pos: i32[B, H or 1, T], -1 for padding, which sees nothing.
      k_pos: i32[B, H, N], -1 for free slots.
      bias: f32[B, H, N], added to the logits of a slot, except where k_pos = q_pos: of a query's own token.
      scale: Factor of the products.
      sliding_window: Positions a query sees, its own included; None sees all.
      stat: What else to return. None: nothing. "mass": f32[B, H, N], the probability that each slot received, summed
        over the queries and the group. "logits": f32[B, H, G, T, N], -inf where a slot is not visible, for callers who
        join two tiers under one softmax and want the masses of both.
      implementation: "tpu", "gpu" or "reference"; None takes what this machine has, or the reference where no kernel
        does: of T > 16, channels > 256, other dtypes than one of f32 and bf16 for all, and codes of 3 bits, or of
        groups that are not whole words; on a TPU also of G T > 128, and of groups below 16.

    Returns:
      `SlotAttention`: out [B, H, G, T, Dv] in q's dtype, lse f32[B, H, G, T], and stat.

    Raises:
      ValueError: If the shapes or dtypes do not fit together, or the implementation is not to be had.
    """
    _check(q, k, v, q_pos, k_pos, bias)
    _check_settings(scale, sliding_window, stat)

    name = dispatch.choose("slot_attention", implementation, lambda name: unfit(name, q, k, v))
    backend = importlib.import_module(f"{__name__}.{name}")
    settings = {"scale": float(scale), "sliding_window": sliding_window, "stat": stat}
    part = functools.partial(backend.slot_attention, **settings)
    return SlotAttention(*by_row_and_head(part, (q, k, v, q_pos, k_pos, bias), ("bh",) * 6, ("bh",) * 3))


def unfit(implementation: str, q: jax.Array, k: jax.Array | Packed, v: jax.Array | Packed) -> str | None:
    """Why the kernel cannot do such a call, or None; only shapes and dtypes matter."""
    tpu, rows = implementation == "tpu", q.shape[2] * q.shape[3]
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q is {q.dtype}, and kernels are for float32 and bfloat16"
    if q.shape[3] > MOST_QUERIES:
        return f"q has {q.shape[3]} queries, and kernels take {MOST_QUERIES} at most"
    if tpu and rows > MOST_TPU_ROWS:
        return f"q has {rows} queries for each kv_head, and the kernel takes {MOST_TPU_ROWS} at most"
    for name, x in (("k", k), ("v", v)):
        if x.shape[-1] > MOST_CHANNELS:
            return f"{name} has {x.shape[-1]} channels, and kernels take {MOST_CHANNELS} at most"
        if not isinstance(x, Packed):
            if x.dtype != q.dtype:
                return f"{name} is {x.dtype} and q is {q.dtype}, and kernels take one dtype"
        elif x.bits == 3:
            return f"{name} has codes of 3 bits, which lie in two planes"
        elif x.group % (32 // x.bits):
            return f"{name} has groups of {x.group} channels, and kernels want whole words of {32 // x.bits}"
        elif tpu and x.group < LEAST_TPU_GROUP:
            return f"{name} has groups of {x.group} channels, and the kernel wants {LEAST_TPU_GROUP} at least"
    return None


def _check(q, k, v, q_pos, k_pos, bias):
    if q.ndim != 5:
        raise ValueError(f"slot_attention: q {q.shape} must be [B, H, G, T, Dk].")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"slot_attention: q is {q.dtype}; give a floating dtype.")
    batch, heads, group, queries, width = q.shape
    if not group * queries:
        raise ValueError(f"slot_attention: q {q.shape} has no query. Give at least one.")
    if k_pos.ndim != 3 or k_pos.shape[:2] != (batch, heads) or not k_pos.shape[2]:
        raise ValueError(
            f"slot_attention: k_pos {k_pos.shape} must be [B, H, N] with at least one slot, for q {q.shape}, "
            f"[B, H, G, T, Dk]."
        )
    slots = k_pos.shape[2]
    for name, x in (("k", k), ("v", v)):
        _check_stored(name, x, (batch, heads, slots))
    if k.shape[-1] != width:
        raise ValueError(
            f"slot_attention: k has {k.shape[-1]} channels and q {q.shape} has {width}. Were the channels of k "
            f"pruned, and not those of q?"
        )
    if q_pos.shape not in ((batch, heads, queries), (batch, 1, queries)):
        raise ValueError(
            f"slot_attention: q_pos {q_pos.shape} must be [B, H or 1, T]: {(batch, heads, queries)} or "
            f"{(batch, 1, queries)}."
        )
    for name, x in (("q_pos", q_pos), ("k_pos", k_pos)):
        if x.dtype != jnp.int32:
            raise ValueError(
                f"slot_attention: {name} is {x.dtype}, and must be int32; -1 marks padding and free slots."
            )
    if bias is not None and (bias.shape != k_pos.shape or bias.dtype != jnp.float32):
        raise ValueError(
            f"slot_attention: bias {bias.dtype}{list(bias.shape)} must be float32{list(k_pos.shape)}, as k_pos."
        )


def _check_settings(scale, sliding_window, stat):
    if not isinstance(scale, numbers.Real):
        raise ValueError(f"slot_attention: scale={scale!r} must be a number of Python; multiply q by an array.")
    if sliding_window is not None and (not isinstance(sliding_window, numbers.Integral) or sliding_window < 1):
        raise ValueError(f"slot_attention: sliding_window={sliding_window!r} must be an int from 1; None sees all.")
    if stat not in STATS:
        raise ValueError(f"slot_attention: stat={stat!r} must be one of {STATS}.")


def _check_stored(name, x, lead):
    if not isinstance(x, Packed):
        if x.ndim != 4 or x.shape[:3] != lead:
            raise ValueError(f"slot_attention: {name} {x.shape} must be [B, H, N, D] with [B, H, N] = {list(lead)}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"slot_attention: {name} is {x.dtype}; give a floating dtype, or `Packed` for codes.")
        return
    if x.bits not in (2, 3, 4, 8):
        raise ValueError(f"slot_attention: {name} has bits={x.bits}; they must be 2, 3, 4 or 8.")
    groups = x.step.shape[-1]
    for field, wide, dtype in (
        ("codes", words(x.channels, x.bits), jnp.uint32),
        ("step", groups, jnp.float16),
        ("low", groups, jnp.float16),
    ):
        part = getattr(x, field)
        if part.shape != (*lead, wide) or part.dtype != dtype:
            raise ValueError(
                f"slot_attention: {name}.{field} is {part.dtype}{list(part.shape)}, and must be {jnp.dtype(dtype)}"
                f"{[*lead, wide]} for {x.channels} channels of {x.bits} bits in groups of {x.group}."
            )
