"""Random eviction: the baseline that any method must beat."""

import jax.numpy as jnp

from kvjax.draws import check_seed, uniform
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
    check_seed("random", seed)

    def score(cache, seen):
        return uniform(seed, cache.carry, cache.pos)

    def carry(shape):
        return jnp.asarray(shape.layer, jnp.uint32)

    return evict(Scorer(frozenset(), {}, keep_stats, score, carry), budget=budget)
