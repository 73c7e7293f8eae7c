"""KIVI, old tokens at a few bits: keys by channel, values by token. Liu et al. 2024, arXiv:2402.02750."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.cache import FREE, LayerCache, empty, resize, take, write
from kvjax.codecs import by_channel, integer
from kvjax.folds import at, put
from kvjax.policy import Form, Policy, Seen, method


@method
def kivi(bits: int = 2, *, group: int = 32, residual: int = 128) -> Policy:
    """Keeps every token, and all but the newest at a few bits: a step for `group` tokens of a key's channel.

    Keys are rounded `residual` at a time, since a step needs its tokens together; values one at a time.

    Bytes: L B H (n (D bits / 4 + 8 D / group + 4) + (2 residual + 1) D b) + 8 L B + 4 B.

    Args:
      bits: 2, 3, 4 or 8, of keys and values. Its authors advise 4 where query heads share keys.
      group: Tokens, or channels of a value, that share a step; divides head_dim and `residual`.
      residual: Newest values that are whole; of the keys, those that do not fill up as many again.

    Source: the paper's published code. Differs: a step is at least 2 ** -24 (the code divides by 0 where a group is
    constant). Keys and values have the same bits, as in the paper's tables; bits for each are not offered. Nor is
    ThinK's pruning of the rounded keys, as one of its published examples has it: a block's words are in a form of
    kivi's own, which no other codec reads. The choice depends on nothing, so a cache serves any question.
    """
    codec = integer(bits, group=group)
    if group < 1 or residual < 1 or residual % group or residual * bits % 32:
        raise ValueError(
            f"kivi: residual={residual} must be a multiple of group={group}, and fill words of 32 bits at {bits} each."
        )

    channels = by_channel(codec, residual)

    def init(shape):
        if shape.head_dim % group or shape.head_dim * bits % 32:
            raise ValueError(
                f"kivi: head_dim={shape.head_dim} must be a multiple of group={group}, and fill words of 32 bits at "
                f"{bits} each."
            )
        return empty(shape, {})

    def update(cache, seen, capacity):
        if seen.positions.shape[1] > 1:  # token p belongs into slot p
            cache = take(cache, jnp.argsort(cache.pos == FREE, axis=-1, stable=True))
        return resize(cache, capacity)

    def written(cache: LayerCache, k, v, position: jax.Array) -> LayerCache:
        def ring(old, new):
            size = old.shape[2]
            place = jnp.where(position >= 0, position % size, size)  # beyond the last: dropped
            return put(old, jnp.broadcast_to(place[:, None, None], new.shape[:3]), new)

        bare = write(dataclasses.replace(cache, k=(), v=()), (), (), position)
        rings = {"k": ring(cache.carry["k"], k), "v": ring(cache.carry["v"], v)}
        return dataclasses.replace(bare, k=cache.k, v=cache.v, carry=cache.carry | rings)

    def loaded(cache: LayerCache) -> LayerCache:
        slot = jnp.arange(cache.slots)

        def mixed(old, ring, first):
            newest = ring[:, :, slot % ring.shape[2]]
            return jnp.where((slot < first[:, None])[:, None, :, None], old.astype(cache.dtype), newest)

        k = mixed(channels.load(cache.k), cache.carry["k"], cache.carry["rounded_keys"])
        return dataclasses.replace(
            cache, k=k, v=mixed(codec.load(cache.v), cache.carry["v"], cache.carry["rounded_values"])
        )

    def rounded(cache: LayerCache) -> tuple[jax.Array, jax.Array]:
        firsts = cache.carry["rounded_keys"], cache.carry["rounded_values"]
        return tuple(jnp.broadcast_to(cache.pos < first[:, None, None], cache.pos.shape) for first in firsts)

    def settled(cache: LayerCache, before: LayerCache | None, seen: Seen | None) -> LayerCache:
        tokens = (cache.pos != FREE).sum(axis=-1)[:, 0]
        now_rounded = {
            "rounded_keys": tokens // residual * residual,
            "rounded_values": jnp.maximum(tokens - residual, 0),
        }
        if before is not None and seen.positions.shape[1] == 1:
            return flushed(before, now_rounded, seen)

        def ring(x, size):  # where token p lies at p % size, the newest of them
            newest = (tokens - 1)[:, None] - (tokens[:, None] - 1 - jnp.arange(size)) % size
            return at(x, jnp.broadcast_to(newest.clip(0)[:, None], (*x.shape[:2], size)))

        def old_or_new(old, new, first):  # what is rounded is not rounded again
            old = jnp.pad(old, [(0, 0), (0, 0), (0, new.shape[2] - old.shape[2]), (0, 0)])
            return jnp.where((jnp.arange(new.shape[2]) < first[:, None])[:, None, :, None], old, new)

        carry = {"k": ring(cache.k, residual), "v": ring(cache.v, residual + 1)} | now_rounded
        k, v = channels.store(cache.k), codec.store(cache.v)
        if before is not None:
            k = jax.tree.map(functools.partial(old_or_new, first=before.carry["rounded_keys"]), before.k, k)
            v = jax.tree.map(functools.partial(old_or_new, first=before.carry["rounded_values"]), before.v, v)
        return dataclasses.replace(cache, k=k, v=v, carry=carry)

    def flushed(cache: LayerCache, now_rounded, seen) -> LayerCache:
        """After a decode step: the keys, if there is a full block of them, and the oldest whole value."""
        carry, heads = cache.carry, cache.pos.shape[1]

        def write_rows(tree, rows, first, last):  # at slots first.., in the rows of the batch that have so many more
            count = jax.tree.leaves(rows)[0].shape[2]
            slot = jnp.where((last - first >= count)[:, None], first[:, None] + jnp.arange(count), cache.slots)
            slot = seen.done(jnp.broadcast_to(slot[:, None], (slot.shape[0], heads, count)))
            return jax.tree.map(lambda leaf, new: put(leaf, slot, new), tree, rows)

        old, new = carry["rounded_keys"], now_rounded["rounded_keys"]
        k = jax.lax.cond(
            (new > old).any(),
            lambda k: write_rows(k, channels.store(carry["k"]), old, new),
            lambda k: k,
            cache.k,
        )
        old, new = carry["rounded_values"], now_rounded["rounded_values"]
        oldest = jnp.broadcast_to((old % (residual + 1))[:, None, None], (len(old), heads, 1))
        v = write_rows(cache.v, codec.store(at(carry["v"], oldest)), old, new)
        return dataclasses.replace(cache, k=k, v=v, carry=carry | now_rounded)

    return Policy("kivi", None, frozenset(), init, update, form=Form(written, loaded, settled, rounded))
