"""CaM, cache merging: a token that leaves gives its value to those after it. Zhang et al. 2024, ICML (PMLR 235)."""

import jax.numpy as jnp

from kvjax.cache import free_losers
from kvjax.counts import flag, whole
from kvjax.draws import check_seed, uniform
from kvjax.folds import gather_losers, spread
from kvjax.policy import Policy, evict, method
from kvjax.scorers import attention_mass, place_in_cache, protect, recency


@method
def cam(
    budget: int,
    *,
    sinks: int = 4,
    heavy: bool = False,
    window: int = 0,
    targets: int = 32,
    prompt: str = "dense",
    positions: str = "true",
    seed: int = 0,
) -> Policy:
    """Evicts as StreamingLLM or H2O do, and adds the value of each loser to the tokens that follow it.

    A loser's value is added in equal parts to the next `targets` tokens, with probability (attention it has received so
    far) / (mean attention that they have received), at most 1. Keys and the choice of tokens are those of the method
    underneath.

    Bytes: L B H (budget + 1) (2 D b + 8) + 4 B + 4 L.

    Args:
      budget: Slots, sinks and window included.
      sinks: First tokens that are always kept.
      heavy: False keeps the newest tokens, as StreamingLLM does; True keeps those with most attention so far, as H2O
        does.
      window: Newest tokens that are always kept; only with `heavy`.
      targets: Tokens that share a loser's value.
      prompt: "dense" reads it whole, and then its losers leave in order, each with what it was given; "greedy" reads
        it token by token, as the published code for perplexity does, and so any other call of several tokens.
      positions: "true", as in the code for question answering and generation; or "rolling", which numbers the tokens by
        their place in the cache, as StreamingLLM and the code for perplexity do.
      seed: Of the draws.

    Source: the paper's Eq. 14 (second-hand) and its published code, where they agree. Differs: the value is divided by
    the number of tokens that there are; masses are averaged over the query heads of a group. Other bounds of that
    probability than 0 and 1, which the paper tried and did not keep, are not offered. Independent measurements saw no
    gain on long contexts.
    """
    if sinks < 0 or window < 0 or sinks + max(window, 1) > budget:
        raise ValueError(
            f"cam: sinks={sinks} and window={window} must fit into budget={budget}; lower them or raise it."
        )
    heavy = flag("cam", "heavy", heavy)
    if heavy != (window > 0):
        raise ValueError(f"cam: window={window} goes with heavy=True, and only with it; heavy={heavy}.")
    targets = whole("cam", "targets", targets, least=1, mend="The paper's code takes 16 or 32.")
    if prompt not in ("dense", "greedy"):
        raise ValueError(f"cam: prompt={prompt!r} must be 'dense' or 'greedy'.")
    if positions not in ("true", "rolling"):
        raise ValueError(f"cam: positions={positions!r} must be 'true' or 'rolling'.")
    check_seed("cam", seed)

    def give(cache, kept, seen, count):
        losers = gather_losers(cache, kept, count)
        draw = uniform(seed, cache.carry, cache.pos)
        most = min(targets, cache.slots)  # no more can follow
        return free_losers(spread(cache, losers, kept, cache.stats["mass"], draw, most, seen), kept)

    mass = attention_mass()
    chosen = mass if heavy else mass._replace(score=recency().score)
    scorer = protect(chosen, sinks=sinks, window=window)
    scorer = scorer._replace(carry=lambda shape: jnp.asarray(shape.layer, jnp.uint32))
    return evict(
        scorer,
        budget=budget,
        fate=give,
        ranks=place_in_cache if positions == "rolling" else None,
        stepwise="always" if prompt == "greedy" else "never",
    )
