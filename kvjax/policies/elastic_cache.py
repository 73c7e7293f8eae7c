"""Elastic Cache, anchors for the instruction and a fixed point for the answer. Liu et al. 2024, arXiv:2407.18121."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from kvjax.cache import FREE, LayerCache, empty, free_losers, resize
from kvjax.counts import real
from kvjax.folds import LAST, add, at, first_slots, fold, gather_losers
from kvjax.policy import Mass, Policy, Seen, method
from kvjax.selects import ranked


@method
def elastic_cache(
    pruned: float = 0.5,
    *,
    sinks: int = 1,
    last: int = 1,
    distance: int = 25,
    losers: str = "merge",
    selection: str = "attended",
) -> Policy:
    """Keeps a share of all tokens: the most attended of the prompt, which take in the others, and the newest.

    The prompt's most attended tokens, one choice for all heads, are anchors; each other token is averaged into the
    nearest by position. From then on, whenever there are more than 1 - `pruned` of all tokens seen, the oldest one
    behind a fixed place of the cache goes. So it grows, more slowly than a full cache.

    Bytes: L B H (n (1 - pruned) + 1) (2 D b + 8) + 4 B, the slots rounded up.

    Args:
      pruned: Share of the tokens seen that is not kept, the paper's r.
      sinks: First tokens of the prompt that stay as they are.
      last: Last tokens of the prompt that stay as they are.
      distance: Slots at the end of the compressed prompt that may go later; those before them never do.
      losers: "merge" averages the others of the prompt into their anchors, "evict" drops them.
      selection: "attended" takes the most attended for anchors, as the paper means it; "official" repeats the published
        code, which compares token numbers with a count of ranks, merges the token `sinks` places before the one it
        means, anchors too, and keeps one slot less.

    Source: paper and code, and the paper where the code's selection has errors. Differs: tokens keep their true
    positions (the code numbers new ones by the length of the cache, which attention here cannot, so that its published
    numbers are not to be had); a later turn is read token by token; a prompt cannot be read in chunks, since its length
    decides what is kept. Nothing in the paper looks at what is image and what text. Here tokens can be marked,
    `prefill(..., given={"permanent": mask})` with 1.0 for text: when the prompt is compressed they stay as they are as
    long as there are others to go, and only others are merged; "official" does not look at marks.
    """
    pruned = real("elastic_cache", "pruned", pruned, least=0, below=1, mend="It is the share that goes.")
    if sinks < 0 or last < 0 or distance < 0:
        raise ValueError(f"elastic_cache: sinks={sinks}, last={last} and distance={distance} must not be negative.")
    if losers not in ("merge", "evict"):
        raise ValueError(f"elastic_cache: losers={losers!r} must be 'merge' or 'evict'.")
    if selection not in ("attended", "official"):
        raise ValueError(f"elastic_cache: selection={selection!r} must be 'attended' or 'official'.")
    share = Fraction(pruned).limit_denominator(1000)
    if share == 1:
        raise ValueError(f"elastic_cache: pruned={pruned} is too near 1: it counts in thousandths. Give at most 0.999.")
    num, den = share.numerator, share.denominator

    def init(shape):
        return empty(shape, {"permanent": ()})

    def grow(tokens, room):
        return tokens + room - num * (tokens + room) // den + 1

    def update(cache, seen, capacity):
        if seen.positions.shape[1] < cache.slots:  # not the prompt
            return resize(thin(cache, seen), capacity)
        return resize(compress(cache, seen), capacity)

    def thin(cache: LayerCache, seen: Seen) -> LayerCache:
        occupied = cache.pos != FREE
        held, length = occupied.sum(axis=-1, keepdims=True), (seen.now + 1)[:, None, None]
        over = (den * held - length * (den - num) >= den) & (length > 0)
        may_go = occupied & (cache.stats["permanent"] == 0) & (cache.pos < length - 1)
        oldest = jnp.where(may_go, cache.pos, LAST).min(axis=-1, keepdims=True)
        return free_losers(cache, occupied & ~(over & (cache.pos == oldest)))

    def compress(cache: LayerCache, seen: Seen) -> LayerCache:
        slots, occupied = cache.slots, cache.pos != FREE
        length = occupied.sum(axis=-1, keepdims=True)  # [B, H, 1]
        stay = length - num * length // den
        first = jnp.minimum(sinks, stay)
        final = jnp.minimum(last, stay - first)
        protected = (cache.pos < first) | (cache.pos >= length - final)
        marked = cache.stats["permanent"] > 0
        mass = jnp.where(occupied, seen.mass[Mass()].mean(axis=1, keepdims=True), -jnp.inf)
        order = first_slots(cache.pos, occupied, slots)
        back = jnp.argsort(order, axis=-1)  # slot -> place by position
        if selection == "official":
            anchor, joining = _published(at(mass, order), length, length - stay, sinks, last)
            kept = occupied & (protected | at(anchor, back))
        else:
            best_first = ranked(mass, cache.pos)
            rights = jnp.where(occupied, jnp.where(protected, 0, jnp.where(marked, 1, 2)), 3)
            best_first = at(best_first, jnp.argsort(at(rights, best_first), axis=-1, stable=True))
            kept = occupied & (jnp.argsort(best_first, axis=-1) < stay)
            anchor = at(kept & ~protected & ~marked, order)

        # Each of the others joins the nearest anchor, the left one of two.
        place, pos = jnp.arange(slots), at(cache.pos, order)
        left = jax.lax.cummax(jnp.where(anchor, place, -1), axis=2)
        right = jax.lax.cummin(jnp.where(anchor, place, slots), axis=2, reverse=True)
        to_left = jnp.where(left >= 0, pos - at(pos, left.clip(0)), LAST)
        to_right = jnp.where(right < slots, at(pos, right.clip(0, slots - 1)) - pos, LAST)
        nearest = at(order, jnp.where(to_left <= to_right, left, right).clip(0, slots - 1))
        merges = anchor.any(axis=-1, keepdims=True) & (losers == "merge")

        rank = at(jnp.cumsum(at(kept, order), axis=-1) - 1, back)
        fixed = jnp.maximum(jnp.minimum(sinks, stay), jnp.minimum(stay - distance, stay - 1))
        permanent = (kept & (rank < fixed)).astype(jnp.float32)
        cache = dataclasses.replace(cache, stats={"permanent": permanent})
        if selection == "official":
            return free_losers(_means(cache, at(jnp.where(merges & joining, nearest, slots), back), seen), kept)
        leave = gather_losers(cache, kept, max(slots - (slots - num * slots // den), 1))
        joins = (merges & leave.real).astype(jnp.float32)
        return fold(cache, kept, leave, at(nearest, at(back, leave.slot)), joins, joins, seen)

    return Policy("elastic_cache", None, frozenset({Mass()}), init, update, grow=grow, stepwise="turns")


def _published(mass, length, gone, sinks, last):
    """What the published code takes for anchors, and what it averages into them: bool[B, H, N] each, by position."""
    place = jnp.arange(mass.shape[-1])
    number = length - sinks - last  # of those between the first and the last
    between = (place >= sinks) & (place < length - last)
    ascending = jnp.argsort(jnp.where(between, mass, jnp.inf), axis=-1) - sinks
    above = ascending > gone  # says of the rank what is true of the token that has it
    acts = (gone > 0) & (number > gone)
    anchor = between & jnp.where(acts, at(above, jnp.broadcast_to((place - sinks).clip(0), mass.shape)), gone == 0)
    return anchor, acts & (place < number) & ~above


def _means(cache, target, seen):
    """The cache with each slot the mean of itself and those whose `target` i32[B, H, N] it is; N is none.

    Other than in a fold, slots that stay can join others too.
    """
    target = seen.done(target)
    divisor = (1 + add(jnp.zeros(target.shape), target, jnp.ones(target.shape)))[..., None]

    def mean(leaf):
        own = leaf.astype(jnp.float32)
        return jnp.where(divisor > 1, (own + add(jnp.zeros_like(own), target, own)) / divisor, own).astype(leaf.dtype)

    return dataclasses.replace(cache, k=mean(cache.k), v=mean(cache.v))
