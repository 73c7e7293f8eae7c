"""Where the kernels of `pallas_kernels` do the work: attention, on a TPU or a GPU that they run on.

On a CPU, and in the few calls that no kernel can do, the same operations run in plain jnp: `attention.attend_slots`.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.cache import LayerCache
from kvjax.policy import Mass, Policy
from pallas_kernels import dispatch, prefill_attention, sharding, slot_attention


def jit(function: Callable, **options) -> Callable:
    """`jax.jit`, but traced anew where other kernels would be chosen, or rows and heads are spread otherwise."""
    signature = inspect.signature(function)
    choices = inspect.Parameter("choices", inspect.Parameter.KEYWORD_ONLY)

    def chosen(*args, choices, **kwargs):
        return function(*args, **kwargs)

    chosen.__signature__ = signature.replace(parameters=[*signature.parameters.values(), choices])
    statics = (*options.pop("static_argnames", ()), "choices")
    program = jax.jit(chosen, static_argnames=statics, **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return program(*args, choices=(dispatch.preferred(), dispatch.capability(), sharding.layout()), **kwargs)

    call._cache_size = program._cache_size
    return call


def attention_of(q: tuple, k: tuple, v: tuple, needs: frozenset[Mass]) -> str:
    """The implementation that attends: "tpu", "gpu", or "reference".

    Args:
      q: Queries of each tier, [B, H, G, T, D]; of these and the others only shapes and dtypes matter.
      k: Keys of each tier: arrays, or `Packed`.
      v: Values of each tier.
      needs: Statistics that the policy wants.
    """
    name = dispatch.preferred()
    if name == "reference":
        return name
    if q[0].shape[3] <= slot_attention.MOST_QUERIES:
        unfit = any(slot_attention.unfit(name, *tier) for tier in zip(q, k, v, strict=True))
    else:  # its masses are sums over the group, under a softmax of one tier
        one = len(k) == 1 and len(needs) <= prefill_attention.STATISTICS
        summed = not any(need.by_query_head for need in needs)
        unfit = not (one and summed) or prefill_attention.unfit(name, q[0], k[0], v[0])
    return "reference" if unfit else name


def attend(q, k, v, q_pos, k_pos, weights, *, bias=None, sliding_window=None):
    """`attention.attend_slots` for calls of which `attention_of` names a kernel: out, lse and masses.

    Args:
      q: [B, H, G, T, D] of each tier.
      k: [B, H, N, D] of each tier, or `Packed`.
      v: Likewise.
      q_pos: i32[B, H or 1, T].
      k_pos: i32[B, H, N], of all tiers.
      weights: {Mass: f32[B, H or 1, T]}, the queries that count.
      bias: f32[B, H, N], of all tiers.
      sliding_window: See `attention.attend_slots`.
    """
    group, count = q[0].shape[2:4]
    if count > slot_attention.MOST_QUERIES:
        needs = sorted(weights)
        stacked = jnp.stack([weights[need][:, 0] for need in needs]) / group if needs else None
        out, lse, mass = prefill_attention.prefill_attention(
            q[0], k[0], v[0], q_pos, k_pos, weights=stacked, bias=bias, sliding_window=sliding_window
        )
        return out, lse, {need: mass[i] for i, need in enumerate(needs)}

    plain = len(k) == 1 and all(count == 1 and not need.by_query_head for need in weights)
    stat = ("mass" if plain else "logits") if weights else None
    parts, start = [], 0
    for tier in zip(q, k, v, strict=True):
        slots = slice(start, start := start + tier[2].shape[2])
        own_bias = None if bias is None else bias[:, :, slots]
        parts.append(
            slot_attention.slot_attention(
                *tier, q_pos, k_pos[:, :, slots], own_bias, stat=stat, sliding_window=sliding_window
            )
        )
    out, lse = joined(parts)
    if stat != "logits":
        return out, lse, {need: parts[0].stat / group for need in weights}
    logits = jnp.concatenate([part.stat for part in parts], axis=-1)
    p = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
    return out, lse, {need: _summed(need, weight, p) for need, weight in weights.items()}


def joined(parts) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of one softmax over all tiers, out of those of each."""
    if len(parts) == 1:
        return parts[0].out, parts[0].lse
    lse = jax.nn.logsumexp(jnp.stack([part.lse for part in parts]), axis=0)
    base = jnp.where(lse > -jnp.inf, lse, 0.0)
    out = sum(jnp.exp(part.lse - base)[..., None] * part.out.astype(jnp.float32) for part in parts)
    return out.astype(parts[-1].out.dtype), lse


def _summed(need: Mass, weight: jax.Array, p: jax.Array) -> jax.Array:
    """The statistic of probabilities f32[B, H, G, T, N]."""
    p = (weight[:, :, None, :, None] * p).sum(axis=3)
    return p if need.by_query_head else p.mean(axis=2)


def in_decode_steps(policy: Policy, layer: LayerCache) -> str:
    """The implementation that attends to a layer's cache one token at a time."""
    tiers = []
    for own, tier in zip((policy, policy.low), layer.tiers, strict=False):
        k, v = own.read(tier, jax.eval_shape(own.loaded, tier))
        q = jax.ShapeDtypeStruct((*tier.pos.shape[:2], 1, 1, k.shape[-1]), tier.dtype)
        tiers.append((q, k, v))
    return attention_of(*zip(*tiers, strict=True), policy.needs)
