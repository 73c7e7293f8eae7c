"""KeyDiff, eviction of keys that resemble the rest. Park et al. 2025, arXiv:2504.15364."""

import jax.numpy as jnp

from kvjax.cache import FREE
from kvjax.policy import Policy, Scorer, check_budget, evict, method
from kvjax.scorers import keep_stats


@method
def keydiff(budget: int) -> Policy:
    """Keeps the keys that point away from the mean direction of all keys of their head; looks at no query.

    Bytes: L B H (budget + 1) (2 D b + 4) + 4 B.

    Args:
      budget: Slots.

    Source: the paper. The score is minus the cosine between a key and the mean of the normalised keys in hand, both
    as cached, that is rotated. Every later token moves that mean, and so the choice.
    """
    check_budget("keydiff", budget)

    def score(cache, seen):
        k = cache.k.astype(jnp.float32)
        unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
        occupied = (cache.pos != FREE)[..., None]
        anchor = jnp.sum(unit * occupied, axis=2, keepdims=True)  # a cosine needs no mean
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.sum(unit * anchor, axis=-1)

    return evict(Scorer(frozenset(), {}, keep_stats, score), budget=budget)
