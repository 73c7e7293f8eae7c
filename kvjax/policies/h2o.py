"""H2O, heavy-hitter eviction. Zhang et al. 2023, arXiv:2306.14048."""

from kvjax.policy import Policy, evict, method
from kvjax.scorers import attention_mass, protect


@method
def h2o(budget: int, *, window: int) -> Policy:
    """Keeps the newest `window` tokens and, of the rest, those that received most attention so far.

    Bytes: L B H (budget + 1) (2 D b + 8) + 4 B.

    Args:
      budget: Slots, window included. A decode step sees budget + 1 tokens, its own included.
      window: Newest tokens that are always kept; the paper's split is half of the budget.

    Source: the paper's generation code ("real drop"): probabilities are those over what is left in the cache, summed
    over queries, and a token's attention to itself counts. Differs: scores are f32 and kept for each row of a batch;
    query heads of a group are averaged (the paper has none). The choice does not need the question, but every later
    token of a prompt takes part in it.
    """
    if not 0 < window < budget:
        raise ValueError(
            f"h2o: window={window} is outside 1..{budget - 1}. The window is part of budget={budget}; lower window or "
            f"raise budget."
        )
    return evict(protect(attention_mass(), window=window), budget=budget)
