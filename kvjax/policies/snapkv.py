"""SnapKV, votes of an observation window. Li et al. 2024, arXiv:2404.14469."""

import jax.numpy as jnp

from kvjax.policy import Mass, Policy, Scorer, evict, method
from kvjax.scorers import protect


@method
def snapkv(budget: int, *, window: int = 64, pool: int = 5) -> Policy:
    """Keeps the newest `window` tokens and, of the rest, those that the window's queries attend to.

    Bytes: L B H (budget + 1) (2 D b + 8) + 4 B.

    Args:
      budget: Slots, window included.
      window: Newest tokens, which are always kept and whose queries vote.
      pool: Neighbours over which votes are averaged, an odd number; keeps the surroundings of a token that is found.

    Source: the paper, for a prompt: mass of the window's queries, mean over the group, averaged over `pool` neighbours
    outside the window with zeros beyond the ends. Differs afterwards: the paper lets the cache grow while decoding;
    here each decoded query adds its attention to the votes, and the least of the tokens outside the window leaves.
    """
    if not 0 < window < budget:
        raise ValueError(
            f"snapkv: window={window} is outside 1..{budget - 1}. The window is part of budget={budget}; lower window "
            f"or raise budget."
        )
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"snapkv: pool={pool} is not a positive odd number; 5 is the paper's default.")

    def observe(cache, seen):
        votes = seen.mass[Mass(window)]
        if seen.positions.shape[1] > 1:
            outside = cache.pos <= (seen.now - window)[:, None, None]
            pooled = jnp.where(outside, _pool(jnp.where(outside, votes, 0.0), cache.pos, pool), 0.0)
            alone = (seen.positions >= 0).sum(axis=1) == 1  # a padded row with one token is a decode step
            votes = jnp.where(alone[:, None, None], votes, pooled)
        return {**cache.stats, "votes": cache.stats["votes"] + votes}

    scorer = Scorer(frozenset({Mass(window)}), {"votes": ()}, observe, lambda cache, seen: cache.stats["votes"])
    return evict(protect(scorer, window=window), budget=budget)


def _pool(x, pos, width):
    """Mean of `width` neighbours in the order of `pos`, with zeros beyond the ends; all are [B, H, N]."""
    order = jnp.argsort(pos, axis=-1)  # free slots come first, as zeros: they are the end beyond the oldest
    sums = jnp.take_along_axis(x, order, axis=-1)
    padded = jnp.pad(sums, [(0, 0), (0, 0), (width // 2, width // 2)])
    pooled = sum(padded[..., i : i + x.shape[-1]] for i in range(width)) / width
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)
