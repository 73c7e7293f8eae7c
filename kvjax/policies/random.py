"""Random eviction: the baseline that any method must beat."""

import jax
import jax.numpy as jnp

from kvjax.policy import Policy, Scorer, check_budget, evict, method
from kvjax.scorers import keep_stats


@method
def random(budget: int, *, seed: int = 0) -> Policy:
    """Keeps a random sample of the tokens, drawn for each layer and head.

    A token's draw depends on seed, layer, head and position alone, so a sequence keeps the same tokens in any batch,
    and a sample stays uniform while the sequence grows.

    Bytes: L B H (budget + 1) (2 D b + 4) + 4 B + 4 L.

    Args:
      budget: Slots.
      seed: Of the draws.
    """
    check_budget("random", budget)
    if not 0 <= seed < 2**32:
        raise ValueError(f"random: seed={seed} is outside 0..{2**32 - 1}; it is mixed into 32 bits.")

    def score(cache, seen):
        head = jnp.arange(cache.pos.shape[1], dtype=jnp.uint32)[None, :, None]
        stream = _mix(_mix(jnp.uint32(seed) ^ _mix(cache.carry)) ^ head)
        draw = _mix(_mix(cache.pos.astype(jnp.uint32)) ^ stream)
        return (draw >> 8).astype(jnp.float32)  # 24 bits are exact in f32

    def carry(shape):
        return jnp.asarray(shape.layer, jnp.uint32)

    return evict(Scorer(frozenset(), {}, keep_stats, score, carry), budget=budget)


def _mix(x: jax.Array) -> jax.Array:
    """Scrambles u32 values one to one (the finaliser of MurmurHash3, after a step away from zero)."""
    x = x + jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
