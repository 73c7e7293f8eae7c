"""SnapKV, votes of an observation window. Li et al. 2024, arXiv:2404.14469."""

from kvjax.policy import Policy, evict, method
from kvjax.scorers import protect, window_votes


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

    return evict(protect(window_votes(window, pool), window=window), budget=budget)
