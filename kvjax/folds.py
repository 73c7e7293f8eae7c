"""Fates: what becomes of the tokens that lose their slot.

What `policy.evict` takes as `fate` is (cache, kept, seen, most) -> the cache without its losers: `into_nearest`, say.
`fold` and `spread` are what such functions are made of, as in `policies/d2o.py` and `cam.py`.

A loser is folded into kept slots: a part of its key and value is added to theirs. Positions and statistics of those
stay. Losers are few (one, in a decode step), so they are gathered: E losers a head, in the order of their positions.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import FREE, LayerCache, free_losers, take_or_free
from kvjax.counts import real
from kvjax.policy import Seen
from pallas_kernels import dispatch
from pallas_kernels.fold_slots import fold_slots
from pallas_kernels.topk_slots import topk_slots

BLOCK = 256  # losers that are compared with all kept keys at once
FEW = 64  # losers up to which a fold writes rows, and not whole buffers
LAST = jnp.iinfo(jnp.int32).max  # a position behind all others


def into_nearest(similar: float = 0.0) -> Callable:
    """A fate: each loser joins the kept token whose key points most like its own, if their cosine reaches `similar`.

    Key and value become means, in which a loser weighs exp(cosine - 1) and the kept token 1. All others are dropped.
    """
    similar = real("into_nearest", "similar", similar, least=-1.0, most=1.0)

    def fate(cache, kept, seen, most):
        losers = gather_losers(cache, kept, most)
        target, cosine = nearest(cache, kept, losers)
        weight = jnp.where(cosine >= similar, jnp.exp(cosine - 1), 0.0)
        return fold(cache, kept, losers, target, weight, weight, seen)

    return fate


class Losers(NamedTuple):
    """The tokens that leave, by position. `real` is false beyond their number; `slot` is then any.

    Attributes:
      slot: i32[B, H, E].
      real: bool[B, H, E].
      k: f32[B, H, E, D].
      v: f32[B, H, E, D].
    """

    slot: jax.Array
    real: jax.Array
    k: jax.Array
    v: jax.Array


def gather_losers(cache: LayerCache, kept: jax.Array, count: int) -> Losers:
    """The occupied slots that are not in `kept` bool[B, H, N]; they must not be more than `count`."""
    slot = first_slots(cache.pos, (cache.pos != FREE) & ~kept, count)
    real = at(cache.pos != FREE, slot) & ~at(kept, slot)
    return Losers(slot, real, at(cache.k, slot).astype(jnp.float32), at(cache.v, slot).astype(jnp.float32))


def first_slots(pos: jax.Array, among: jax.Array, count: int) -> jax.Array:
    """i32[B, H, count], the slots `among` bool[B, H, N] of lowest position; others follow where they are fewer."""
    order = jnp.where(among, pos, LAST)
    if count == 1:
        return jnp.argmin(order, axis=-1, keepdims=True)
    return jnp.argsort(order, axis=-1)[..., :count]


def at(leaf: jax.Array, slot: jax.Array) -> jax.Array:
    """Slots i32[B, H, M] of a slot-aligned leaf [B, H, N, ...]."""
    return jnp.take_along_axis(leaf, slot.reshape(slot.shape + (1,) * (leaf.ndim - 3)), axis=2)


def nearest(cache: LayerCache, kept: jax.Array, losers: Losers) -> tuple[jax.Array, jax.Array]:
    """The kept slot whose key points most like a loser's: slot i32[B, H, E], and cosine f32[B, H, E].

    Ties go to the lowest position.
    """
    count, slots = losers.slot.shape[-1], cache.slots
    if count == 1:  # a decode step reads the keys where they lie
        candidates, there = None, kept
        keys, pos = cache.k, cache.pos
    else:
        candidates = first_slots(cache.pos, kept, slots - count or slots)  # where all may go, any number may stay
        there, keys, pos = at(kept, candidates), at(cache.k, candidates), at(cache.pos, candidates)
    size = _norm(keys)

    def find(k):
        cosine = jnp.einsum("bhed,bhnd->bhen", k, keys, preferred_element_type=jnp.float32)
        cosine = cosine / (_norm(k)[..., None] * size[:, :, None])
        cosine = jnp.where(there[:, :, None], cosine, -jnp.inf)
        return first_best(cosine, pos[:, :, None])

    place, cosine = in_blocks(find, losers.k, BLOCK)
    return place if candidates is None else at(candidates, place), cosine


def first_best(score: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Place of the largest score on the last axis, ties to the lowest `pos`, and that score.

    The place is found by its index: XLA may compute a score twice, with another last bit, so that none equals the top.
    """
    best = jnp.argmax(score, axis=-1, keepdims=True)
    top = jnp.take_along_axis(score, best, axis=-1)
    tied = (jnp.arange(score.shape[-1]) == best) | (score == top)
    return jnp.where(tied, pos, LAST).argmin(axis=-1), top[..., 0]


def _norm(x):
    x = x.astype(jnp.float32)
    return jnp.sqrt((x * x).sum(axis=-1)) + 1e-12


def in_blocks(function, x: jax.Array, size: int):
    """`function` of x [B, H, E, ...], which it may see in blocks of `size` along E; its results have E third."""
    count = x.shape[2]
    if count <= size:
        return function(x)
    blocks = -(-count // size)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, blocks * size - count)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(*x.shape[:2], blocks, size, *x.shape[3:]), 2, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, 2)
        return y.reshape(*y.shape[:2], blocks * size, *y.shape[4:])[:, :, :count]

    return jax.tree.map(join, jax.lax.map(function, x))


def fold(
    cache: LayerCache,
    kept: jax.Array,
    losers: Losers,
    target: jax.Array,
    weight: jax.Array,
    total: jax.Array,
    seen: Seen,
    bound: int | None = None,
) -> LayerCache:
    """Makes key and value of each target slot a weighted mean of its own, at weight 1, and its losers'; frees those.

    Args:
      cache: Of N slots.
      kept: bool[B, H, N], the slots that stay, targets among them.
      losers: All others that are occupied, as gathered from the cache; E a head.
      target: i32[B, H, E], the slot that each loser joins, in its own row and head; it joins none below 0 or beyond N.
      weight: f32[B, H, E], how much of the loser is added; nothing happens where it is 0.
      total: f32[B, H, E], what it adds to the divisor of its target, which is 1 without losers.
      seen: What attention saw; the fold waits for its output.
      bound: The most slots of a row and head that stay; None knows none.

    Returns:
      The cache, of N slots; where a kernel folds a call of several tokens, of `bound` slots if that is less.
    """
    joins = losers.real & (weight != 0) & (target >= 0)
    target = jnp.maximum(target, 0)
    if dispatch.preferred() != "reference" and seen.positions.shape[1] > 1:
        slots = cache.slots if bound is None else min(bound, cache.slots)
        return _folded_into_fewer(cache, kept, losers.slot, joins, target, weight, total, slots)
    cache = free_losers(cache, kept)
    slot = seen.done(jnp.where(joins, target, cache.slots))  # beyond the last: dropped
    weight, total = jnp.where(joins, weight, 0.0), jnp.where(joins, total, 0.0)
    if slot.shape[-1] <= FEW:  # the rows of the targets alone are read and written
        # losers of one target all write its row, finished
        same = (slot[..., :, None] == slot[..., None, :]).astype(jnp.float32)
        divisor = 1 + jnp.einsum("bhef,bhf->bhe", same, total)[..., None]

        def folded(leaf, lost):
            gathered = jnp.einsum("bhef,bhfd->bhed", same, weight[..., None] * lost)
            return put(leaf, slot, (at(leaf, target).astype(jnp.float32) + gathered) / divisor)

        return cache.with_slots((folded(cache.k, losers.k), folded(cache.v, losers.v), cache.pos, cache.stats))

    divisor = 1 + add(jnp.zeros(cache.pos.shape, jnp.float32), slot, total)[..., None]
    joined = add(jnp.zeros(cache.pos.shape, bool), slot, joins)[..., None]

    def merged(leaf, lost):
        gathered = add(jnp.zeros(leaf.shape, jnp.float32), slot, weight[..., None] * lost)
        return jnp.where(joined, ((leaf.astype(jnp.float32) + gathered) / divisor).astype(leaf.dtype), leaf)

    return cache.with_slots((merged(cache.k, losers.k), merged(cache.v, losers.v), cache.pos, cache.stats))


def _folded_into_fewer(cache, kept, source, joins, target, weight, total, slots):
    """`fold` in one pass over keys and values, which writes the slots that stay and no others."""
    place = jnp.where(kept, jnp.cumsum(kept, axis=-1) - 1, slots)  # of each slot, among those that stay
    divisor = 1 + add(jnp.zeros(cache.pos.shape), jnp.where(joins, target, cache.slots), jnp.where(joins, total, 0.0))
    source = jnp.where(joins, source, cache.slots)
    to = put(place, source, at(place, target))
    share = put(1 / divisor, source, weight / at(divisor, target))
    k, v = fold_slots(cache.k, cache.v, to, share, slots)
    slot = jnp.broadcast_to(jnp.arange(cache.slots, dtype=jnp.int32), cache.pos.shape)
    index = topk_slots(jnp.zeros(cache.pos.shape), jnp.where(kept, slot, FREE), slots).index
    return dataclasses.replace(take_or_free(dataclasses.replace(cache, k=(), v=()), index), k=k, v=v)


def put(leaf: jax.Array, slot: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [B, H, M, ...] into slots i32[B, H, M] of a leaf [B, H, N, ...]; those beyond N are dropped."""
    row, head = _corner(slot)
    return leaf.at[row, head, slot].set(rows.astype(leaf.dtype), mode="drop")


def add(leaf: jax.Array, slot: jax.Array, rows: jax.Array) -> jax.Array:
    """As `put`, but adds; several rows may meet in a slot."""
    row, head = _corner(slot)
    if leaf.dtype == bool:
        return leaf.at[row, head, slot].max(rows, mode="drop")
    return leaf.at[row, head, slot].add(rows.astype(leaf.dtype), mode="drop")


def _corner(slot):
    batch, heads, _ = slot.shape
    return jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]


def spread(
    cache: LayerCache, losers: Losers, kept: jax.Array, mass: jax.Array, draw: jax.Array, targets: int, seen: Seen
):
    """Adds the value of each loser, in equal parts, to the `targets` tokens that follow it; keys stay.

    A loser is spread with probability (its mass) / (mean mass of the tokens that follow it). When several leave at
    once they do so in order, and those that follow may be losers too, which carry on what they were given.

    Args:
      cache: Of N slots.
      losers: As gathered from it, E a head.
      kept: bool[B, H, N], all others.
      mass: f32[B, H, N].
      draw: f32[B, H, N] in [0, 1); a loser is spread if its draw is below the probability.
      targets: How many tokens at most.
      seen: What attention saw; the spread waits for its output.
    """
    slots, count = cache.slots, losers.slot.shape[-1]
    if count == 1:
        later = kept & (cache.pos > at(cache.pos, losers.slot))
        slot = first_slots(cache.pos, later, slots)[..., : min(targets, slots)]
        there = at(later, slot) & losers.real
        number = there.sum(axis=-1, keepdims=True)
        mean = jnp.where(there, at(mass, slot), 0.0).sum(axis=-1, keepdims=True) / jnp.maximum(number, 1)
        open_gate = at(draw, losers.slot) < _ratio(at(mass, losers.slot), mean)
        part = losers.v * (open_gate / jnp.maximum(number, 1))[..., None]
        rows = at(cache.v, slot).astype(jnp.float32) + part
        slot = seen.done(jnp.where(there & open_gate, slot, slots))
        return cache.with_slots((cache.k, put(cache.v, slot, rows), cache.pos, cache.stats))

    order = first_slots(cache.pos, cache.pos != FREE, slots)  # all slots by position, free ones last
    occupied = at(cache.pos, order) != FREE
    leaves = occupied & ~at(kept, order)
    weight = jnp.where(occupied, at(mass, order), 0.0)
    sums = jnp.cumsum(jnp.pad(weight, [(0, 0), (0, 0), (1, 0)]), axis=-1)
    filled = occupied.sum(axis=-1, keepdims=True)
    first = jnp.arange(slots) + 1
    number = (jnp.minimum(first + targets, filled) - first).clip(0)
    later = jnp.take_along_axis(sums, (first + number).clip(0, slots), axis=-1) - sums[..., 1:]
    probability = _ratio(weight, later / jnp.maximum(number, 1))
    part = jnp.where(leaves & (at(draw, order) < probability), 1 / jnp.maximum(number, 1), 0.0)
    reach = jnp.arange(targets)

    def pass_on(i, v):
        row = jax.lax.dynamic_slice_in_dim(v, i, 1, axis=2)
        given = jnp.where(reach < number[..., i, None], part[..., i, None], 0.0)[..., None] * row
        following = jax.lax.dynamic_slice_in_dim(v, i + 1, targets, axis=2) + given
        return jax.lax.dynamic_update_slice_in_dim(v, following, i + 1, axis=2)

    v = jnp.pad(at(cache.v, order).astype(jnp.float32), [(0, 0), (0, 0), (0, targets), (0, 0)])
    v = jax.lax.fori_loop(0, slots, pass_on, v)
    v = at(v, jnp.argsort(order, axis=-1)).astype(cache.v.dtype)
    return cache.with_slots((cache.k, v, cache.pos, cache.stats))


def _ratio(own, mean):
    """own / mean, at most 1; 0/0 is 0."""
    return jnp.where(own > 0, jnp.minimum(own / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny), 1.0), 0.0)
