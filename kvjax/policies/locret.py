"""Locret, eviction by trained retaining heads. Huang et al. 2024, arXiv:2410.01805."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax import selects
from kvjax.cache import FREE, LayerCache, empty, free_losers, resize
from kvjax.counts import whole
from kvjax.policy import Policy, Seen, check_budget, method
from kvjax.scorers import place_in_cache


@method
def locret(
    budget: int,
    *,
    stabilizers: int | None = None,
    tail: int = 100,
    sinks: int = 0,
    every: int | None = None,
    positions: str = "cache",
) -> Policy:
    """Keeps the tokens that a trained head scored highest when they arrived, chosen anew after each chunk of a prompt.

    Its model needs heads, `kvjax.with_heads(params, kvjax.heads.load(...))`: a token's score comes from its own query,
    key and value, and never changes. So a prompt can be read with `chunk`, in memory that does not depend on its
    length. The last `tail` tokens of a turn are read after the rest was chosen among, and always stay.

    Bytes: L B H (budget + tail + every) (2 D b + 12) + 4 B (L + 1), and 8 in place of 12 with true positions. Without
    `every`, a prompt of n tokens and m to come take min(n, budget + tail) + m slots.

    Args:
      budget: Slots that a turn's last chunk leaves before its tail.
      stabilizers: Newest tokens that stay after each chunk but the last, so that the next one reads on well; part of
        the budget. None takes half of the budget, at most the paper's 2500.
      tail: Last tokens of each turn; at least as many as a question has (the paper's n_loc).
      sinks: First tokens that always stay. For Locret-Q, which puts the question in front of the prompt as well as
        behind it: the leading token and the question.
      every: Tokens generated before the cache is cut back to the budget; None never does, as the paper. A later turn
        chooses among them all.
      positions: "cache" numbers tokens by their place in the cache, so that none is beyond budget + tail + answer;
        "true" keeps their positions, and keys rotated.

    Source: the paper, and its authors' code for the order of things. Differs: scores are f32, and of equal scores the
    older token stays; heads of a group share one score, for the cache holds kv_heads. Ours: `every`, later turns (all
    that is in hand competes; if a turn is all tail and would not fit, the cache is cut back before it), `sinks` and
    "true". The choice depends on the prefix alone, but for the places where chunks end.
    """
    check_budget("locret", budget)
    stabilizers = min(2500, budget // 2) if stabilizers is None else stabilizers
    stabilizers = whole("locret", "stabilizers", stabilizers, least=0)
    sinks = whole("locret", "sinks", sinks, least=0)
    tail = whole("locret", "tail", tail, least=0)
    if stabilizers + sinks >= budget:
        raise ValueError(
            f"locret: stabilizers={stabilizers} and sinks={sinks} are kept besides what scores choose, and must be "
            f"less than budget={budget}; lower them or raise budget."
        )
    every = None if every is None else whole("locret", "every", every, least=1, mend="None never evicts in an answer.")
    if positions not in ("cache", "true"):
        raise ValueError(f"locret: positions={positions!r} must be 'cache' or 'true'.")

    def init(shape):
        generated = () if every is None else jnp.zeros(shape.batch, jnp.int32)
        place = {"place": ()} if positions == "cache" else {}  # 1 + that in the cache; 0 for a token just arrived
        return empty(shape, {"locret": (), **place}, generated)

    def kept(cache: LayerCache, stable: jax.Array) -> jax.Array:
        """The best `budget` slots bool[B, H, N], where the newest `stable` i32[B] in hand count as the best."""
        older = place_in_cache(cache)
        in_hand = (cache.pos != FREE).sum(axis=-1, keepdims=True)
        forced = (older >= in_hand - stable[:, None, None]) | (cache.pos < sinks)
        score = jnp.where(forced, jnp.inf, cache.stats["locret"])
        return selects.top_k(score, cache.pos, budget)

    def cut(cache: LayerCache, rows: jax.Array, stable: jax.Array) -> LayerCache:
        """The cache with no more than `budget` slots in use, in the `rows` bool[B]."""
        if cache.slots <= budget:
            return cache
        return free_losers(cache, kept(cache, stable) | ~rows[:, None, None])

    def placed(cache: LayerCache) -> LayerCache:
        return with_places(cache, place_in_cache(cache)) if positions == "cache" else cache

    def cut_back(cache: LayerCache, rows: jax.Array) -> LayerCache:
        """`cut` with stabilizers, of no cost where there are no such rows."""

        def smaller():  # keys and values stay out of it, and are not copied
            left = placed(cut(cache, rows, jnp.full(rows.shape, stabilizers)))
            return left.pos, left.stats

        pos, stats = jax.lax.cond(rows.any(), smaller, lambda: (cache.pos, cache.stats))
        return dataclasses.replace(cache, pos=pos, stats=stats)

    def update(cache: LayerCache, seen: Seen, capacity: int) -> LayerCache:
        if seen.turn is None:
            return step(cache, seen)
        end = jnp.maximum(seen.turn.start, seen.turn.stop - tail)
        reads = (seen.now != FREE) & (seen.now < end)  # rows with tokens before the tail in this call
        if every is not None:
            cache = cache.with_carry(jnp.zeros_like(cache.carry))
        return resize(placed(cut(cache, reads, jnp.where(seen.now == end - 1, 0, stabilizers))), capacity)

    def step(cache: LayerCache, seen: Seen) -> LayerCache:
        if positions == "cache":
            cache = with_places(cache, places(cache))
        if every is None:
            return cache
        reads = seen.now != FREE
        generated = cache.carry + reads
        return cut_back(cache, reads & (generated % every == 0)).with_carry(generated)

    def make_room(cache: LayerCache, last: jax.Array, room: int | jax.Array) -> LayerCache:
        used = (cache.pos != FREE).sum(axis=-1).max(axis=-1)
        full = (last > 0) & (used + last + (room if every is None else every) > cache.slots)
        return cut_back(cache, full)

    def grow(tokens, room):
        return min(tokens, budget + tail) + room

    return Policy(
        "locret",
        None if every is None else budget + tail + every - 1,
        frozenset(),
        init,
        update,
        ranks=places if positions == "cache" else None,
        given=frozenset({"locret"}),
        tail=tail,
        make_room=make_room,
        grow=grow,
    )


def places(cache: LayerCache) -> jax.Array:
    """How many tokens of the same row and head are older, i32[B, H, N], without a sort.

    Those that have been placed keep their places; new ones come behind them, in order.
    """
    there = cache.pos != FREE
    settled = there & (cache.stats["place"] > 0)
    new = there & ~settled
    first = jnp.where(new, cache.pos, jnp.iinfo(jnp.int32).max).min(axis=-1, keepdims=True)
    behind = settled.sum(axis=-1, keepdims=True) + cache.pos - first
    return jnp.where(settled, cache.stats["place"].astype(jnp.int32) - 1, jnp.where(new, behind, 0))


def with_places(cache: LayerCache, place: jax.Array) -> LayerCache:
    """The cache with `place` i32[B, H, N] noted beside its tokens."""
    noted = jnp.where(cache.pos != FREE, place + 1, 0).astype(jnp.float32)
    return dataclasses.replace(cache, stats={**cache.stats, "place": noted})
