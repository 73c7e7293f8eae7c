"""H2O, heavy-hitter eviction. Zhang et al. 2023, arXiv:2306.14048."""

from kvjax.policy import Policy, evict, method
from kvjax.scorers import attention_mass, place_in_cache, protect


@method
def h2o(budget: int, *, window: int, prompt: str = "dense", positions: str = "true") -> Policy:
    """Keeps the newest `window` tokens and, of the rest, those that received most attention so far.

    Bytes: L B H (budget + 1) (2 D b + 8) + 4 B.

    Args:
      budget: Slots, window included. A decode step sees budget + 1 tokens, its own included.
      window: Newest tokens that are always kept; the paper's split is half of the budget.
      prompt: "dense" reads it whole and evicts at the end, as the paper's generation code does; "greedy" reads it token
        by token, as its Algorithm 1 does, and so any other call of several tokens.
      positions: "true", or "rolling", which numbers the tokens by their place in the cache, so that it can run on
        beyond the model's context.

    Source: the paper's generation code ("real drop"): probabilities are those over what is left in the cache, summed
    over queries, and a token's attention to itself counts. Differs: scores are f32 and kept for each row of a batch;
    query heads of a group are averaged (the paper has none); to ask the first of them alone, as a later port does, is
    not offered, since the others' attention would count for nothing. The choice does not need the question, but every
    later token of a prompt takes part in it.
    """
    if not 0 < window < budget:
        raise ValueError(
            f"h2o: window={window} is outside 1..{budget - 1}. The window is part of budget={budget}; lower window or "
            f"raise budget."
        )
    if prompt not in ("dense", "greedy"):
        raise ValueError(f"h2o: prompt={prompt!r} must be 'dense' or 'greedy'.")
    if positions not in ("true", "rolling"):
        raise ValueError(f"h2o: positions={positions!r} must be 'true' or 'rolling'.")
    return evict(
        protect(attention_mass(), window=window),
        budget=budget,
        ranks=place_in_cache if positions == "rolling" else None,
        stepwise="always" if prompt == "greedy" else "never",
    )
