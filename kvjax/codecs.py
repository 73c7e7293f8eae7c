"""Codecs: how keys or values are stored. What they save is smaller buffers.

A codec is a linear map of the channels (`project`, with `query` as its counterpart, so that products stay what they
were), and then a form to store (`store`, and `load` back). Policies and attention see projected vectors: a pruned key
is never widened.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.counts import whole
from pallas_kernels.prune_channels import prune_channels as cut_channels
from pallas_kernels.slot_attention.packed import Packed

TINY = 2.0**-24  # the smallest positive f16
HUGE = 65504.0  # the largest
HALF = 0  # as `Codec.group`: half of the channels there are


class Codec(NamedTuple):
    """A way to store vectors.

    Attributes:
      name: For reports and errors.
      fit: (k f32[B, H, N, D], there bool[B, H, N], q f32[B, H, G, T, D], asked bool[B, T]) -> what is chosen once, from
        the first call of a sequence: arrays that begin with B. `there` and `asked` say which are tokens.
      project: (x [B, H, N, D], fitted) -> [B, H, N, D'].
      query: (q [B, H, G, T, D], fitted) -> [B, H, G, T, D'], with query(q) . project(k) = q . k, or near it; None where
        project changes nothing, which values need.
      store: f32[B, H, N, D'] -> a tree of [B, H, N, ...].
      load: that tree -> f32[B, H, N, D'].
      check: (head_dim) -> None; refuses what does not fit.
      group: Channels that share a step, in codecs that round; `HALF` where that depends on how many there are.
      narrows: Whether project leaves fewer channels.
      fit_and_project: As `fit`, but (what is chosen, project(k)), where one reading of the keys serves both; or None.
    """

    name: str
    fit: Callable[..., Any]
    project: Callable[[jax.Array, Any], jax.Array]
    query: Callable[[jax.Array, Any], jax.Array] | None
    store: Callable[[jax.Array], Any]
    load: Callable[[Any], jax.Array]
    check: Callable[[int], None]
    group: int | None = None
    narrows: bool = False
    fit_and_project: Callable[..., tuple[Any, jax.Array]] | None = None

    def fitted_to(self, *first_call) -> tuple[Any, jax.Array]:
        """What `fit` chooses, and the projected keys; arguments as there."""
        if self.fit_and_project is not None:
            return self.fit_and_project(*first_call)
        chosen = self.fit(*first_call)
        return chosen, self.project(first_call[0], chosen)


def _nothing(*_):
    return ()


def _same(x, fitted):
    return x


def integer(bits: int, *, group: int | None = 32) -> Codec:
    """Rounds each token's channels, in groups, to integers of 2, 3, 4 or 8 bits, packed in words of 32.

    A group is stored as codes, a step and a minimum: x is near step code + minimum, by half a step and what f16 rounds.
    Step and minimum are f16, and codes refer to what is stored of them; halves round to even; beyond 65504 x is cut.

    Bytes of a vector: D bits / 8 + 4 D / group, words rounded up.

    Args:
      bits: 2, 3, 4 or 8. Three bits lie in two planes, two bits and one.
      group: Channels that share a step; divides head_dim. None takes half of the channels, which are rotated alike.
    """
    bits = whole("integer", "bits", bits)
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"integer: bits={bits} must be 2, 3, 4 or 8.")
    if group is None:
        return _integer(bits, HALF)
    return _integer(bits, whole("integer", "group", group, least=1, mend="It is a divisor of head_dim."))


@functools.cache  # the same object for the same settings, so that nothing is compiled twice
def _integer(bits: int, group: int) -> Codec:
    levels = 2**bits - 1

    def check(head_dim):
        if head_dim % (group or 2):
            raise ValueError(
                f"integer: group={group or None} does not divide the {head_dim} channels of a head that are stored; "
                f"give a divisor of it."
            )

    def store(x):
        size = group or x.shape[-1] // 2
        x = x.astype(jnp.float32).clip(-HUGE, HUGE)
        x = x.reshape(*x.shape[:-1], -1, size)
        low, high = x.min(axis=-1), x.max(axis=-1)
        step = jnp.maximum((high - low) / levels, TINY).astype(jnp.float16)
        low = low.astype(jnp.float16)
        codes = (x - low[..., None].astype(jnp.float32)) / step[..., None].astype(jnp.float32)
        codes = jnp.round(codes).clip(0, levels).astype(jnp.uint32)
        return Packed(pack(codes.reshape(*x.shape[:-2], -1), bits), step, low, bits, size)

    return Codec(
        f"int{bits}" if group == 32 else f"int{bits} (group={group or None})",
        _nothing,
        _same,
        None,
        store,
        Packed.load,
        check,
        group,
    )


class ByChannel(NamedTuple):
    """How blocks of tokens are stored: `store` f32[B, H, N, D] -> tree of [B, H, N, ...], and `load` back."""

    store: Callable[[jax.Array], Any]
    load: Callable[[Any], jax.Array]


def by_channel(codec: Codec, block: int) -> ByChannel:
    """Rounds as `codec`, an `integer`, does, but each channel over the tokens of a group, `block` tokens at a time.

    A token's slot holds its part of the block's codes, steps and minima, and means nothing without the other slots of
    the block: they are not to be moved apart. Bytes are those of `codec`.

    Args:
      codec: Made by `integer`; its group divides `block` and head_dim, and block x bits and D x bits fill words of 32.
      block: Tokens; a last block that is not full is filled up with zeros.

    Raises:
      ValueError: If the codec is none of `integer`, or its group does not divide `block`.
    """
    if not isinstance(codec, Codec) or codec.group is None or codec.fit is not _nothing:
        said = codec.name if isinstance(codec, Codec) else repr(codec)
        raise ValueError(
            f"by_channel: {said} rounds nothing by itself. Give a codec made by integer, such as integer(4)."
        )
    if codec.group == HALF:
        raise ValueError(
            f"by_channel: {codec.name} takes half of the channels for a group; give it a number of tokens."
        )
    block = whole("by_channel", "block", block, least=1, mend="It counts tokens.")
    if block % codec.group:
        raise ValueError(f"by_channel: block={block} must be a multiple of {codec.name}'s group={codec.group}.")

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)])
        return x.reshape(*x.shape[:2], -1, block, x.shape[3])

    def store(x):
        tree = codec.store(blocks(x).swapaxes(3, 4))  # [B, H, blocks, D, words of `block` tokens]
        return jax.tree.map(
            lambda leaf: leaf.reshape(*leaf.shape[:2], -1, _per_token(leaf, block))[:, :, : x.shape[2]], tree
        )

    def load(tree):
        slots = tree.codes.shape[2]
        tree = jax.tree.map(blocks, tree)  # [B, H, blocks, block, ...]
        width = tree.step.shape[4] * codec.group
        x = codec.load(jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:3], width, -1), tree)).swapaxes(3, 4)
        return x.reshape(*x.shape[:2], -1, width)[:, :, :slots]

    return ByChannel(store, load)


def check_codec(said: str, codec: Any) -> None:
    """Refuses what stores no tokens by themselves; `said` is how the error begins."""
    if isinstance(codec, ByChannel):
        raise ValueError(
            f"{said}by_channel(...) stores blocks of tokens in shared words, which only kivi's own form can hold. Take "
            f"policies.kivi, or codecs.integer, which rounds each token by itself."
        )
    if not isinstance(codec, Codec):
        raise ValueError(f"{said}{codec!r} is no codec. Make one with kvjax.codecs, such as integer(4).")


def _per_token(leaf, block):
    return leaf.shape[3] * leaf.shape[4] // block


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes u32[..., n] of 1, 2, 3, 4 or 8 bits in words u32[..., m], the first in the lowest bits (`Packed`)."""
    if bits == 3:
        return jnp.concatenate([pack(codes & 3, 2), pack(codes >> 2, 1)], axis=-1)
    each = 32 // bits
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    codes = codes.reshape(*codes.shape[:-1], -1, each)
    return (codes << (bits * jnp.arange(each, dtype=jnp.uint32))).sum(axis=-1, dtype=jnp.uint32)


def prune_channels(keep: int, *, window: int = 32) -> Codec:
    """Stores only those channels of the keys that count most for the last queries of the prompt, as ThinK does.

    Channel j counts (mean of q_j squared over the window and the group) times (mean of k_j squared over the tokens that
    are kept). Chosen once, for each row and head; recent keys are pruned like all others.

    Bytes of a key: those of `keep` channels; beside them 4 B H keep a layer for their numbers.

    Args:
      keep: Channels that stay, below head_dim.
      window: Last queries that are asked.

    Source: Xu et al. 2024, arXiv:2407.21018, without its full-width recent keys.
    """
    keep, window = whole("prune_channels", "keep", keep, least=1), whole("prune_channels", "window", window, least=1)
    return _prune_channels(keep, window)


@functools.cache  # the same object for the same settings, so that nothing is compiled twice
def _prune_channels(keep: int, window: int) -> Codec:
    def check(head_dim):
        if keep >= head_dim:
            raise ValueError(f"prune_channels: keep={keep} prunes nothing of {head_dim} channels; give fewer.")

    def fit_and_project(k, there, q, asked):
        count = min(window, q.shape[3])
        last = jnp.argsort(~asked | (jnp.cumsum(asked[:, ::-1], axis=1)[:, ::-1] > count), axis=1, stable=True)[
            :, :count
        ]
        q = jnp.take_along_axis(q, last[:, None, None, :, None], axis=3)
        asked = jnp.take_along_axis(asked, last, axis=1)
        keys, channels = cut_channels(k, q, keep, there=there, asked=asked)
        return channels, keys

    def fit(k, there, q, asked):
        return fit_and_project(k, there, q, asked)[0]

    def project(x, channels):
        return jnp.take_along_axis(x, channels[:, :, None], axis=-1)

    def query(q, channels):
        return jnp.take_along_axis(q, channels[:, :, None, None], axis=-1)

    return Codec(
        f"{keep} channels",
        fit,
        project,
        query,
        lambda x: x,
        lambda x: x,
        check,
        narrows=True,
        fit_and_project=fit_and_project,
    )


@functools.cache  # the same object for the same settings, so that nothing is compiled twice
def balance() -> Codec:
    """Scales channels so that keys and queries have the same largest value in each, as MiKV does before it rounds.

    Chosen once, for each row and head, from the first call. Bytes: 4 B H D a layer.

    Source: Yang et al. 2024, arXiv:2402.18096, eqs. 2-4 (second-hand).
    """

    def fit(k, there, q, asked):
        most_q = jnp.abs(jnp.where(asked[:, None, None, :, None], q.astype(jnp.float32), 0.0)).max(axis=(2, 3))
        most_k = jnp.abs(jnp.where(there[..., None], k.astype(jnp.float32), 0.0)).max(axis=2)
        scale = jnp.sqrt(most_q / most_k)
        return jnp.where((scale > 0) & (scale < jnp.inf), scale.clip(1e-4, 1e4), 1.0)  # [B, H, D]

    def project(x, scale):
        return x * scale[:, :, None].astype(x.dtype)

    def query(q, scale):
        return q / scale[:, :, None, None].astype(q.dtype)

    return Codec("balanced", fit, project, query, lambda x: x, lambda x: x, lambda head_dim: None)


def pipe(first: Codec, then: Codec) -> Codec:
    """Two codecs, one after the other: `pipe(prune_channels(32), integer(4))`.

    Raises:
      ValueError: If the first already rounds: what it stores has no channels that the second could take.
    """
    for codec in (first, then):
        check_codec("pipe: ", codec)
    if first.group is not None:
        raise ValueError(f"pipe: {first.name} stores codes, which {then.name} cannot take. Put it last.")
    return _pipe(first, then)


@functools.cache  # the same object for the same settings, so that nothing is compiled twice
def _pipe(first: Codec, then: Codec) -> Codec:
    def fit_and_project(k, there, q, asked):
        one, k = first.fitted_to(k, there, q, asked)
        two, k = then.fitted_to(k, there, q if first.query is None else first.query(q, one), asked)
        return (one, two), k

    def fit(k, there, q, asked):
        return fit_and_project(k, there, q, asked)[0]

    def project(x, fitted):
        return then.project(first.project(x, fitted[0]), fitted[1])

    def query(q, fitted):
        for codec, own in zip((first, then), fitted, strict=True):
            q = q if codec.query is None else codec.query(q, own)
        return q

    def check(head_dim):
        first.check(head_dim)
        like = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.float32)
        q = jax.ShapeDtypeStruct((1, 1, 1, 1, head_dim), jnp.float32)
        there, asked = jax.ShapeDtypeStruct((1, 1, 1), bool), jax.ShapeDtypeStruct((1, 1), bool)
        then.check(jax.eval_shape(lambda *a: first.project(a[0], first.fit(*a)), like, there, q, asked).shape[-1])

    return Codec(
        f"{first.name}, {then.name}",
        fit,
        project,
        None if first.query is None and then.query is None else query,
        then.store,
        then.load,
        check,
        then.group,
        first.narrows or then.narrows,
        fit_and_project,
    )
