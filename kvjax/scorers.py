"""Scorers: by what slots are kept. New statistics go here, beside their kin."""

import jax
import jax.numpy as jnp

from kvjax.cache import FREE, LayerCache
from kvjax.counts import whole
from kvjax.policy import Mass, Scorer


def keep_stats(cache, seen):
    """The `observe` of scorers that keep no statistics of their own."""
    return cache.stats


def place_in_cache(cache: LayerCache) -> jax.Array:
    """For `Policy.ranks`: how many tokens of the same row and head are older, i32[B, H, N]."""
    pos = cache.pos
    if pos.shape[-1] > 512:
        order = jnp.argsort(jnp.where(pos == FREE, jnp.iinfo(pos.dtype).max, pos), axis=-1)
        return jnp.argsort(order, axis=-1)
    older = (pos[..., None, :] < pos[..., None]) & (pos[..., None, :] != FREE)  # on a CPU quicker than two sorts
    return older.sum(axis=-1)


def recency() -> Scorer:
    """The position: newer tokens stay."""
    return Scorer(frozenset(), {}, keep_stats, lambda cache, seen: cache.pos.astype(jnp.float32))


def attention_mass() -> Scorer:
    """Attention each slot has received so far, summed over queries, mean over its group."""

    def observe(cache, seen):
        return {**cache.stats, "mass": cache.stats["mass"] + seen.mass[Mass()]}

    return Scorer(frozenset({Mass()}), {"mass": ()}, observe, lambda cache, seen: cache.stats["mass"])


def window_votes(window: int, pool: int) -> Scorer:
    """Attention from the newest `window` queries of each call, averaged over `pool` neighbours, as in SnapKV.

    Of a call of several tokens, tokens within the window get no votes, and beyond the ends of the others there are
    zeros. A single token adds the attention that its query gives.
    """

    def observe(cache, seen):
        votes = seen.mass[Mass(window)]
        if seen.positions.shape[1] > 1:
            outside = cache.pos <= (seen.now - window)[:, None, None]
            pooled = jnp.where(outside, _pool(jnp.where(outside, votes, 0.0), cache.pos, pool), 0.0)
            alone = (seen.positions >= 0).sum(axis=1) == 1  # a padded row with one token is a decode step
            votes = jnp.where(alone[:, None, None], votes, pooled)
        return {**cache.stats, "votes": cache.stats["votes"] + votes}

    return Scorer(frozenset({Mass(window)}), {"votes": ()}, observe, lambda cache, seen: cache.stats["votes"])


def _pool(x, pos, width):
    """Mean of `width` neighbours in the order of `pos`, with zeros beyond the ends; all are [B, H, N]."""
    order = jnp.argsort(pos, axis=-1)  # free slots come first, as zeros: they are the end beyond the oldest
    sums = jnp.take_along_axis(x, order, axis=-1)
    padded = jnp.pad(sums, [(0, 0), (0, 0), (width // 2, width // 2)])
    pooled = sum(padded[..., i : i + x.shape[-1]] for i in range(width)) / width
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)


def given(name: str) -> Scorer:
    """A score that each token brings along, such as a trained head's: `attend(..., given={name: f32[B, H, T]})`."""
    return Scorer(frozenset(), {name: ()}, keep_stats, lambda cache, seen: cache.stats[name], given=frozenset({name}))


def protect(scorer: Scorer, *, sinks: int = 0, window: int = 0) -> Scorer:
    """Another scorer, under which the first `sinks` positions and the newest `window` tokens always stay.

    Together they must fit the budget of the policy, which does not ask.
    """
    sinks, window = whole("protect", "sinks", sinks, least=0), whole("protect", "window", window, least=0)

    def score(cache, seen):
        newest = cache.pos > (seen.now - window)[:, None, None]
        return jnp.where((cache.pos < sinks) | newest, jnp.inf, scorer.score(cache, seen))

    return scorer._replace(score=score)
