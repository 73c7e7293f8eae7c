"""Two tiers of slots in a layer: what the upper one loses moves into a cheaper one, and is attended to there.

    upper   [ 7 | 9 | . ]         token 9 stays, 7 loses        upper   [ . | 9 | . ]
    low     [ 0 | 3 | . ]         ---- demote ---->             low     [ 0 | 3 | 7 ]      at fewer bits or channels

One softmax covers both. A token takes its position and statistics along, and never comes back.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax import folds, selects
from kvjax.cache import FREE, LayerCache, LayerShape, extend, free_losers, write
from kvjax.policy import Masses, Policy, Scorer, Seen, check_policy, evict


def demote(
    scorer: Scorer,
    low: Policy,
    *,
    budget: int | None = None,
    select: Callable = selects.top_k,
    limit: Callable | None = None,
    grow: Callable[[int, int], int] | None = None,
    stepwise: str = "never",
) -> Policy:
    """A policy that evicts by a score, and whose losers go to a lower tier: `store(full(), keys=integer(4))`, say.

    The lower policy may evict in turn, by statistics that both tiers keep. Its codecs see what those of the upper one
    have projected: balance channels above, and they are balanced below.

    Args:
      scorer: By what slots stay in the upper tier.
      low: The policy of the lower tier, made by `evict`, with or without codecs.
      budget: See `evict`.
      select: See `evict`.
      limit: See `evict`.
      grow: See `Policy`.
      stepwise: See `Policy`.

    Raises:
      ValueError: If `low` cannot take the losers of another policy.
    """
    check_policy(low)
    if low.scorer is None or low.low is not None or low.ranks is not None or low.bias is not None:
        raise ValueError(
            f"demote: {low.name} cannot take the losers of another policy: it must keep slots by a score, at true "
            f"positions, without a bias and without a tier of its own."
        )
    one = LayerShape(batch=1, kv_heads=1, slots=1, head_dim=8, dtype=jnp.float32, layer=0)
    if jax.tree.leaves(low.scorer.carry(one)):
        raise ValueError(
            f"demote: {low.name} keeps a state of its layer beside its slots, for which a lower tier has no place. "
            f"Take a policy that remembers only what belongs to a token, such as h2o or tova."
        )
    mine, theirs = scorer.stats.keys(), low.scorer.stats.keys()
    if theirs & mine and not theirs <= mine:
        raise ValueError(f"demote: {low.name} keeps {sorted(theirs)}, and the upper tier some of it: {sorted(mine)}.")
    scorer = _both(scorer, low.scorer)
    policy = evict(
        scorer,
        budget=budget,
        select=select,
        fate=functools.partial(_move, low),
        limit=limit,
        grow=grow,
        stepwise=stepwise,
    )
    if low.budget is None and budget is not None:  # the layer grows, though this tier of it does not
        policy = dataclasses.replace(policy, budget=None, grow=lambda tokens, room: budget + 1)
    return dataclasses.replace(policy, low=low)


def _both(upper: Scorer, lower: Scorer) -> Scorer:
    """The upper scorer, which observes the statistics of the lower one too, where it does not by itself."""
    more = lower.stats.keys() - upper.stats.keys()

    def observe(cache, seen):
        below = lower.observe(cache, seen) if more else {}
        return upper.observe(cache, seen) | {name: below[name] for name in more}

    return upper._replace(
        needs=upper.needs | lower.needs,
        stats=upper.stats | lower.stats,
        observe=observe,
        given=upper.given | lower.given,
    )


def _move(low: Policy, cache: LayerCache, kept: jax.Array, seen: Seen, count: int) -> LayerCache:
    """Copies at most `count` losers of a row and head into the tier below, whose policy then evicts."""
    tier = cache.low
    if tier.slots and low.scorer.stats:
        theirs = seen._replace(mass=seen.low, q=low.asked(seen.q, tier.fitted))
        tier = dataclasses.replace(tier, stats=low.scorer.observe(low.loaded(tier), theirs))
    losers = folds.gather_losers(cache, kept, count)
    pos = seen.done(jnp.where(losers.real, folds.at(cache.pos, losers.slot), FREE))
    stats = {name: folds.at(cache.stats[name], losers.slot) for name in low.scorer.stats}
    k, v = losers.k.astype(cache.dtype), losers.v.astype(cache.dtype)
    arrive = Masses({need: _at_last(x, losers.slot) for need, x in seen.mass.items()})
    there = seen.low or {}  # masses of the slots of this tier
    if tier.slots == 0:  # the prompt: `Policy.first` stores both tiers when all is chosen
        held = extend(tier, k, v, pos, stats)
        return dataclasses.replace(
            free_losers(cache, kept), low=low.choose(held, seen._replace(mass=arrive), held.slots)
        )

    new = low.stored(tier, *low.projected(k, v, tier.fitted))
    if count == 1:
        stored = write(tier, *jax.tree.map(lambda leaf: leaf[:, :, 0], (new.k, new.v, pos, stats)))
        here = (stored.pos != tier.pos)[:, :, None]  # where it was written
        masses = {need: jnp.where(here if x.ndim == 4 else here[:, :, 0], arrive[need], x) for need, x in there.items()}
    else:
        stored = extend(tier, new.k, new.v, pos, stats)
        masses = {need: jnp.concatenate([x, arrive[need]], axis=-1) for need, x in there.items()}
    held = low.loaded(stored)
    below = seen._replace(mass=Masses(masses), q=low.asked(seen.q, tier.fitted))
    tier = low.choose(held, below, held.slots)
    return dataclasses.replace(free_losers(cache, kept), low=low.settled(tier, held, stored))


def _at_last(x: jax.Array, slot: jax.Array) -> jax.Array:
    """The statistic x [B, H, N] or [B, H, G, N] of slots i32[B, H, E]."""
    return jnp.take_along_axis(x, slot if x.ndim == 3 else slot[:, :, None], axis=-1)
