"""KIVI, old tokens at a few bits: keys by channel, values by token. Liu et al. 2024, arXiv:2402.02750."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.cache import FREE, LayerCache, empty, resize, take, write
from kvjax.codecs import by_channel, integer, prune_channels
from kvjax.counts import whole
from kvjax.folds import at, put
from kvjax.policy import Form, Policy, Seen, method


@method
def kivi(
    bits: int = 2, *, group: int = 32, residual: int = 128, channels: int | None = None, window: int = 32
) -> Policy:
    """Keeps every token, and all but the newest at a few bits: a step for `group` tokens of a key's channel.

    Keys are rounded `residual` at a time, since a step needs its tokens together; values one at a time. With
    `channels`, rounded keys keep only so many, which the last queries of the prompt choose as in `think`.

    Bytes: L B H (n (D bits / 4 + 8 D / group + 4) + (2 residual + 1) D b) + 8 L B + 4 B.
    Bytes of fewer channels: L B H (n ((D + channels) (bits / 8 + 4 / group) + 4) + (2 residual + 1) D b + 4 channels) +
    8 L B + 4 B.

    Args:
      bits: 2, 3, 4 or 8, of keys and values. Its authors advise 4 where query heads share keys.
      group: Tokens, or channels of a value, that share a step; divides head_dim and `residual`.
      residual: Newest values that are whole; of the keys, those that do not fill up as many again.
      channels: Channels of a rounded key that stay, below head_dim and a multiple of `group`; None keeps all.
      window: Last queries of the prompt, which choose the channels; of its first chunk, where it is read in chunks.

    Source: the paper's published code, and ThinK's, arXiv:2407.21018, for `channels`. Differs: a step is at least
    2 ** -24 (the code divides by 0 where a group is constant). Keys and values have the same bits, as in the paper's
    tables; bits for each are not offered. Channels are chosen by the keys that the prompt rounds, and where it rounds
    none, by all of its keys; once for the query heads of a group; and `channels` must be a multiple of `group`, so that
    each token has its own share of a block's words. The choice of what is rounded depends on nothing, so that a cache
    serves any question; that of channels depends on the last queries.
    """
    codec = integer(bits, group=group)
    if group < 1 or residual < 1 or residual % group or residual * bits % 32:
        raise ValueError(
            f"kivi: residual={residual} must be a multiple of group={group}, and fill words of 32 bits at {bits} each."
        )

    window = whole("kivi", "window", window, least=1, mend="It counts queries.")
    if channels is not None and (whole("kivi", "channels", channels) % group or channels * bits % 32 or channels < 1):
        raise ValueError(
            f"kivi: channels={channels} must be a multiple of group={group}, and fill words of 32 bits at {bits} each."
        )

    blocks = by_channel(codec, residual)
    prune = None if channels is None else prune_channels(channels, window=window)

    def init(shape):
        if prune is not None:
            prune.check(shape.head_dim)
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

        k = mixed(loaded_keys(cache), cache.carry["k"], cache.carry["rounded_keys"])
        return dataclasses.replace(
            cache, k=k, v=mixed(codec.load(cache.v), cache.carry["v"], cache.carry["rounded_values"])
        )

    def stored_keys(k, carry):
        return blocks.store(k if prune is None else prune.project(k, carry["channels"]))

    def loaded_keys(cache: LayerCache) -> jax.Array:
        """Rounded keys, with 0 for a channel that is pruned: the products with it are those left out."""
        k = blocks.load(cache.k)
        if prune is None:
            return k
        same = cache.carry["channels"][:, :, None] == jnp.arange(cache.carry["k"].shape[-1])[:, None]
        place = same.argmax(axis=-1)[:, :, None]  # of each of D channels, i32[B, H, 1, D]
        return jnp.where(same.any(axis=-1)[:, :, None], jnp.take_along_axis(k, place, axis=-1), 0)

    def choice(cache: LayerCache, before: LayerCache | None, seen: Seen | None, rounds: jax.Array) -> dict:
        """Which channels rounded keys keep, in the carry; chosen in a row's first call, which rounds `rounds` keys."""
        if prune is None:
            return {}
        if seen is None:
            return {"channels": jnp.zeros((*cache.pos.shape[:2], channels), jnp.int32)}

        def choose():
            there = cache.pos != FREE
            there &= (cache.pos < rounds[:, None, None]) | (rounds == 0)[:, None, None]
            return prune.fit(cache.k, there, seen.q, seen.positions != FREE)

        if before is None:
            return {"channels": choose()}
        begins, old = (seen.positions == 0).any(axis=1), before.carry["channels"]
        new = jax.lax.cond(begins.any(), lambda: jnp.where(begins[:, None, None], choose(), old), lambda: old)
        return {"channels": new}

    def rounded(cache: LayerCache) -> tuple[jax.Array, jax.Array]:
        firsts = cache.carry["rounded_keys"], cache.carry["rounded_values"]
        return tuple(jnp.broadcast_to(cache.pos < first[:, None, None], cache.pos.shape) for first in firsts)

    def settled(cache: LayerCache, before: LayerCache | None, seen: Seen | None) -> LayerCache:
        tokens = (cache.pos != FREE).sum(axis=-1)[:, 0]
        now_rounded = {
            "rounded_keys": tokens // residual * residual,
            "rounded_values": jnp.maximum(tokens - residual, 0),
        }
        now_rounded |= choice(cache, before, seen, now_rounded["rounded_keys"])
        if before is not None and seen.positions.shape[1] == 1:
            return flushed(before, now_rounded, seen)

        def ring(x, size):  # where token p lies at p % size, the newest of them
            newest = (tokens - 1)[:, None] - (tokens[:, None] - 1 - jnp.arange(size)) % size
            return at(x, jnp.broadcast_to(newest.clip(0)[:, None], (*x.shape[:2], size)))

        def old_or_new(old, new, first):  # what is rounded is not rounded again
            old = jnp.pad(old, [(0, 0), (0, 0), (0, new.shape[2] - old.shape[2]), (0, 0)])
            return jnp.where((jnp.arange(new.shape[2]) < first[:, None])[:, None, :, None], old, new)

        carry = {"k": ring(cache.k, residual), "v": ring(cache.v, residual + 1)} | now_rounded
        k, v = stored_keys(cache.k, carry), codec.store(cache.v)
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
            lambda k: write_rows(k, stored_keys(carry["k"], now_rounded), old, new),
            lambda k: k,
            cache.k,
        )
        old, new = carry["rounded_values"], now_rounded["rounded_values"]
        oldest = jnp.broadcast_to((old % (residual + 1))[:, None, None], (len(old), heads, 1))
        v = write_rows(cache.v, codec.store(at(carry["v"], oldest)), old, new)
        return dataclasses.replace(cache, k=k, v=v, carry=carry | now_rounded)

    return Policy("kivi", None, frozenset(), init, update, form=Form(written, loaded, settled, rounded))
