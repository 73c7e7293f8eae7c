"""TOVA, token omission via attention. Oren et al. 2024, arXiv:2401.06104."""

import jax.numpy as jnp

from kvjax.policy import Mass, Policy, Scorer, check_budget, evict, method
from kvjax.scorers import keep_stats


@method
def tova(budget: int) -> Policy:
    """Keeps what the newest token attends to most, the same tokens in all heads of a layer.

    Bytes: L B H (budget + 1) (2 D b + 4) + 4 B.

    Args:
      budget: Slots.

    Source: the paper. The score is the probability given by the newest query, averaged over all query heads of the
    layer; nothing is protected, so that the newest token may itself be the least.
    """
    check_budget("tova", budget)

    def score(cache, seen):
        return jnp.broadcast_to(seen.mass[Mass(last=1)].mean(axis=1, keepdims=True), cache.pos.shape)

    return evict(Scorer(frozenset({Mass(last=1)}), {}, keep_stats, score), budget=budget)
