"""Caches of passages, reused in any order. Cache-Craft, Agarwal et al. 2025, arXiv:2502.15734; CacheBlend as a choice.

A prompt is a system text, chunks, and a question. A chunk that was read before brings its keys, not rotated, and its
values; some of its tokens are computed again, since what stands before them is not what stood there then:

    slots of a layer   [ system | chunk B, cached | chunk A, cached | computed: A's 2nd token, chunk D, question ]
    pos                [ 0..s   | s+4..  -1 ..    | ...             | in order                                   ]

Slots carry no order, so this is ordinary attention over a cache into which tokens come at scattered positions. The
system text is an exact prefix, and every chunk's key names it.

Source: the paper, of which no code was released: its formulas are in `fit`. CacheBlend, Yao et al. 2024,
arXiv:2405.16444, in the form of its code (one choice, at one layer); its mask, by which rows of a part of the tokens
see later ones, is not ours. Differs: a chunk whose tokens must all be computed again counts as a miss and is stored.
"""

import dataclasses
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import kernels, policies
from kvjax.attention import attend, attend_slots
from kvjax.cache import FREE, Cache, LayerShape, extend, resize
from kvjax.checks import check_params
from kvjax.counts import real, whole
from kvjax.models import llama
from kvjax.models.llama import Block, Config, Params
from kvjax.models.rope import rotate
from kvjax.policy import Policy, check_policy
from kvjax.serve import paging
from kvjax.serve.chunk_store import Store, namespace_of
from kvjax.serve.entries import Damaged, Entry
from kvjax.serve.fit import Fit, Focus, Scores, Statistics, Variant, choose, focused, largest, statistics
from kvjax.serve.shapes import bucket


class Choice(NamedTuple):
    """Which tokens of cached chunks are computed again.

    Attributes:
      name: For reports.
      alpha: Factor of a variant's CFO.
      before: (Fit, ext f64[tokens]) -> places in the chunk that are computed from the first layer on.
      after: None, or the layer whose values decide which of them go on, and the share of them that does.
    """

    name: str
    alpha: float
    before: Callable[[Fit, np.ndarray], np.ndarray]
    after: tuple[int, float] | None = None


def by_context(alpha: float = 1.0, *, share: float | None = None) -> Choice:
    """Cache-Craft's: the share that a variant's context says, of the tokens that looked outside their chunk most.

    Args:
      alpha: Factor of the share; more is dearer and nearer to computing all.
      share: The same share for all chunks, in place of what the context says.
    """
    alpha = real("by_context", "alpha", alpha, least=0.0)
    if share is None:
        return Choice(f"by_context(alpha={alpha:g})", alpha, lambda fit, ext: fit.tokens)
    share = real("by_context", "share", share, least=0.0, most=1.0)
    return Choice(
        f"by_context(share={share:g})", alpha, lambda fit, ext: largest(ext, math.ceil(share * len(ext) - 1e-9))
    )


def by_deviation(share: float = 0.15, *, layer: int = 1) -> Choice:
    """CacheBlend's: all tokens up to `layer`, and from there those whose values there differ most from the cached."""
    share = real("by_deviation", "share", share, least=0.0, most=1.0)
    layer = whole("by_deviation", "layer", layer, least=0)
    return Choice(f"by_deviation(share={share:g})", 1.0, lambda fit, ext: np.arange(len(ext)), (layer, share))


def nothing() -> Choice:
    """Positions are mended and nothing is computed again: what the others are compared with."""
    return Choice("nothing", 1.0, lambda fit, ext: np.arange(0))


class Used(NamedTuple):
    """What became of one part of a prompt.

    Attributes:
      how: "exact", as if it had been computed; "fixed", cached elsewhere, and some of it computed again; "computed"; or
        "repeated", for a chunk that comes again and is computed.
      tokens: How many it has.
      computed: How many of them were computed, in the first layer.
      cfo: Of the variant that fits best; 1 where there is none.
      why: Of what was computed, why.
    """

    how: str
    tokens: int
    computed: int
    cfo: float = 1.0
    why: str = ""


class Prefilled(NamedTuple):
    """What `ChunkCache.prefill` returns.

    Attributes:
      logits: f32[1, V], of the question's last token.
      cache: Of the whole prompt, by `full`; goes into `kvjax.decode` or `step`.
      parts: A `Used` for the system text, and for each chunk.
      dropped: The layer from which on chunks that the question does not look at were left alone, or None.
    """

    logits: jax.Array
    cache: Cache
    parts: tuple[Used, ...]
    dropped: int | None


class ChunkCache:
    """Caches of system texts and chunks, in a store; entries are bound to a model.

    Args:
      folder: Where entries stay; None keeps them in memory.
      choice: Which tokens of cached chunks are computed again.
      variants: Of one chunk, at most; the one of least use leaves.
      capacity: Variants of all chunks, at most.
      focus: Leave chunks alone that the question does not look at; None never does. It costs the statistics.
      policy: Compresses what is stored of a chunk; it chooses by the chunk alone. None stores all.
      domain: Who may share entries, such as a tenant: others never see them.
      pages: Makes what decides which entries leave a tier (`paging`), by bits from how often they were used. None
        follows `mark_zero` while it is ahead of `lru`.
      **tiers: See `Store`: device_bytes, host_bytes, disk_bytes, int8.

    Use it from one thread. With int8 nothing counts as exact.

    Raises:
      ValueError: If a setting is out of range, or `policy` cannot choose by a chunk alone; what `Store` refuses, at the
        first prefill.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        *,
        choice: Choice | None = None,
        variants: int = 5,
        capacity: int = 500,
        focus: Focus | None = None,
        policy: Policy | None = None,
        domain: str = "",
        pages: Callable[[int], paging.Pages] | None = None,
        **tiers: Any,
    ):
        self.choice = by_context() if choice is None else choice
        if not isinstance(self.choice, Choice):
            raise ValueError(f"ChunkCache: choice={choice!r} must be a Choice, such as by_context() makes.")
        self.variants = whole("ChunkCache", "variants", variants, least=1)
        self.capacity = whole("ChunkCache", "capacity", capacity, least=1)
        if focus is not None and not isinstance(focus, Focus):
            raise ValueError(f"ChunkCache: focus={focus!r} must be a Focus, or None.")
        if not isinstance(domain, str):
            raise ValueError(f"ChunkCache: domain={domain!r} must be a text.")
        self.focus, self.policy, self.domain = focus, policy, domain
        if policy is not None:
            _check_policy(policy)
            if self.choice.after is not None:
                raise ValueError(
                    f"ChunkCache: {self.choice.name} compares all values of a chunk with those stored, and "
                    f"{policy.name} stores only some. Take by_context, or no policy."
                )
        self._folder, self._tiers = folder, {"pages": _robust if pages is None else pages, **tiers}
        self._reuse, self._rounds = paging.Reuse(), bool(tiers.get("int8"))
        self._params, self._store, self._stores = None, None, {}
        self._scores = Scores()

    def prefill(
        self,
        params: Params,
        system: Sequence[int],
        chunks: Sequence[Sequence[int]],
        question: Sequence[int],
        *,
        room: int = 0,
    ) -> Prefilled:
        """Reads a prompt, and computes of it what is not cached, or does not fit.

        Args:
          params: The model.
          system: Token ids that every prompt begins with; may be empty.
          chunks: Token ids of each chunk, in order. Tokenise each by itself, or a chunk never looks the same again.
          question: Token ids behind them, at least one.
          room: Tokens to leave room for.

        Raises:
          ValueError: If a text is empty that may not be, ids are not the model's, or it is too long for its context.
        """
        check_params(params)
        store = self._store_of(params)
        room = whole("ChunkCache.prefill", "room", room, least=0)
        prompt = _Prompt(params.config, system, chunks, question, room)
        for _ in range(self.variants * len(prompt.parts)):
            try:
                return self._prefill(params, store, prompt, room)
            except Damaged:  # that entry is gone now
                continue
        return self._prefill(params, store, prompt, room, look_up=False)  # from a disk that cannot be mended

    def close(self) -> None:
        """Closes the stores."""
        for store in self._stores.values():
            store.close()
        self._params, self._store, self._stores = None, None, {}

    def stats(self) -> dict[str, Any]:
        """Hits by tier and misses by reason, of the model that was used last."""
        return {} if self._store is None else self._store.stats()

    def _store_of(self, params: Params) -> Store:
        if params is not self._params:
            space = namespace_of(params, policy=self.policy, domain=self.domain, reused="chunks")
            if space not in self._stores:
                self._stores[space] = Store(self._folder, namespace=space, left=self._reuse.left, **self._tiers)
            self._params, self._store = params, self._stores[space]
        return self._store

    def _prefill(
        self, params: Params, store: Store, prompt: "_Prompt", room: int, *, look_up: bool = True
    ) -> Prefilled:
        if look_up:
            parts = [self._look_up(store, prompt, i) for i in range(len(prompt.parts))]
        else:
            parts = [_Part(i, len(tokens), prompt.starts[i]) for i, tokens in enumerate(prompt.parts)]
        seen, exact = prompt.contexts, True
        for part in parts:
            exact &= part.how in ("computed", "exact")
            part.exact = exact
        run = _Run(params, self.choice, self.focus, prompt, parts, room, queries=self.policy is not None)
        logits, cache = run()
        for i, part in enumerate(parts):
            if part.how == "computed" and part.name is not None:
                self._keep(params, store, run, part, seen[i])
        used = tuple(Used(part.how, part.count, part.computed, part.cfo, part.why) for part in parts[:-1])
        return Prefilled(logits, cache, used, run.dropped)

    def _look_up(self, store: Store, prompt: "_Prompt", i: int) -> "_Part":
        """A part of the prompt, and what is cached of it."""
        tokens, start = prompt.parts[i], prompt.starts[i]
        part = _Part(i, len(tokens), start)
        if i == len(prompt.parts) - 1 or not len(tokens):
            return part
        if i == 0:
            part.name = f"system/{prompt.hashes[0]}"
            part.entry = store.get(part.name, late=True, prediction=self._reuse.bit(part.name))
            part.how, part.why = ("computed", "new") if part.entry is None else (self._as_good("exact"), "")
            part.cfo = float(part.entry is None)
            return part
        if prompt.hashes[i] in prompt.contexts[i]:
            part.how, part.why = "repeated", "the same chunk stands before it"
            return part
        shelf = f"chunk/{prompt.hashes[0]}/{prompt.hashes[i]}/"
        part.name = f"{shelf}{time.time_ns():x}"
        known = [self._variant(name, store.about(name)) for name in store.keys(shelf)]
        found = choose(
            [variant for variant in known if variant is not None], prompt.contexts[i], prompt.before[i],
            alpha=self.choice.alpha,
        )  # fmt: skip
        if found is None:
            part.why = "new"
            return part
        variant, fit = found
        again = np.arange(0) if fit.exact else self.choice.before(fit, variant.statistics.ext)
        if len(again) == part.count and self.choice.after is None:
            part.why, part.cfo = "no variant fits", fit.cfo
            return part
        entry = store.get(variant.name, late=True, prediction=self._reuse.bit(variant.name))
        if entry is None:
            part.why = "lost"
            return part
        self._scores.use(variant.name, fit.cfo)
        part.entry, part.again, part.cfo, part.name = entry, again, fit.cfo, None
        part.how = self._as_good("exact" if fit.exact else "fixed")
        return part

    def _as_good(self, how: str) -> str:
        """What is stored in 8 bits is not what was computed."""
        return "fixed" if self._rounds else how

    def _variant(self, name: str, about: dict | None) -> Variant | None:
        if about is None:
            return None
        inter, cci, ext = (about[key] for key in ("inter", "cci", "ext"))
        return Variant(
            name, tuple(about["context"]), about["before"], Statistics(inter, cci, ext), about["exact"],
            self._scores[name], int(name.rpartition("/")[2], 16),
        )  # fmt: skip

    def _keep(self, params: Params, store: Store, run: "_Run", part: "_Part", context: tuple[str, ...]) -> None:
        """Stores a part that was computed in full."""
        about: dict[str, Any] = {"tokens": run.prompt.parts[part.index]}
        layers = run.made_of(part)
        if not part.index or self.policy is None:
            layers = [(k.swapaxes(0, 1), v.swapaxes(0, 1)) for *_, k, v in layers]
        else:
            kept = [_compressed(*made, self.policy, params.config, i) for i, made in enumerate(layers)]
            layers, about["pos"] = [(k, v) for k, v, _ in kept], np.stack([pos for *_, pos in kept])
        if part.index:
            inter, cci, ext = run.statistics_of(part)
            about |= {"context": list(context), "before": run.prompt.before[part.index], "inter": inter, "cci": cci}
            about |= {"ext": ext, "exact": part.exact and self.policy is None}
        if not store.put(part.name, layers, about, prediction=self._reuse.bit(part.name)) or not part.index:
            return
        self._scores.use(part.name)
        shelf = part.name.rpartition("/")[0]
        for where, most in ((f"{shelf}/", self.variants), ("chunk/", self.capacity)):
            names = [name for name in store.keys(where) if name != part.name]  # which has had no chance yet
            while len(names) >= most:
                worst = self._scores.worst(names)
                names.remove(worst)
                store.remove(worst)
                self._scores.forget(worst)


def _robust(capacity: int) -> paging.Pages:
    return paging.follow_the_leader([paging.mark_zero(capacity), paging.lru(capacity)])


def _check_policy(policy: Policy) -> None:
    check_policy(policy)
    if policy.layers or policy.low is not None or policy.form is not None or policy.has_codecs:
        raise ValueError(
            f"ChunkCache: {policy.name} has codecs, two tiers, or a policy for each layer, and what is stored of a "
            f"chunk is plain slots. Take one that evicts or merges; int8=True stores what is left in 8 bits."
        )
    if policy.given:
        raise ValueError(
            f"ChunkCache: {policy.name} wants scores of trained heads, which are not kept beside a chunk's keys. Take "
            f"a method that chooses by keys or attention."
        )


class _Prompt:
    """The parts of a prompt: system, chunks, question; where each begins, and what stands before it."""

    def __init__(self, config: Config, system, chunks, question, room: int):
        names = ["system", *(f"chunks[{i}]" for i in range(len(chunks))), "question"]
        self.parts = [_ids(name, ids, config) for name, ids in zip(names, (system, *chunks, question), strict=True)]
        for name, tokens in list(zip(names, self.parts, strict=True))[1:]:
            if not len(tokens):
                raise ValueError(f"ChunkCache.prefill: {name} is empty; leave it out, or give it a token.")
        sizes = [len(tokens) for tokens in self.parts]
        self.starts = np.cumsum([0, *sizes]).tolist()
        if self.starts[-1] + room > config.context:
            raise ValueError(
                f"ChunkCache.prefill: {self.starts[-1]} tokens and room={room} are more than the model's context of "
                f"{config.context}. Give fewer chunks."
            )
        self.hashes = [hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() for tokens in self.parts]
        whole_prompt = np.concatenate(self.parts).astype("<i4")
        self.before = [hashlib.sha256(whole_prompt[:start].tobytes()).hexdigest() for start in self.starts[:-1]]
        chunk_hashes = self.hashes[1:-1]
        self.contexts = [(), *(tuple(dict.fromkeys(chunk_hashes[:i])) for i in range(len(chunk_hashes))), ()]


def _ids(name: str, ids: Sequence[int], config: Config) -> np.ndarray:
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(
            f"ChunkCache.prefill: {name} must be a list of token ids, not {type(ids).__name__} {ids!r:.80}."
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab:
        raise ValueError(
            f"ChunkCache.prefill: {name} has ids from {tokens.min()} to {tokens.max()}; the model's are "
            f"0..{config.vocab - 1}. Were they made by another tokenizer?"
        )
    return tokens.astype(np.int32)


@dataclasses.dataclass
class _Part:
    """A part of a prompt in one run.

    Attributes:
      index: Among the parts; chunk i is part i + 1.
      count: Its tokens, from position `start`.
      how: See `Used`, as `cfo` and `why`.
      name: That it is to be stored under, or None.
      entry: What is cached of it.
      again: Places in it that are computed all the same.
      exact: Whether it is as if all had been computed in full.
      computed: Tokens computed in the first layer.
    """

    index: int
    count: int
    start: int
    how: str = "computed"
    why: str = ""
    cfo: float = 1.0
    name: str | None = None
    entry: Entry | None = None
    again: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(0))
    exact: bool = True
    computed: int = 0

    @property
    def slots(self) -> int:
        """Slots of each head that are cached."""
        pos = self.entry.about.get("pos")
        return self.count if pos is None else pos.shape[-1]

    @property
    def rows(self) -> np.ndarray:
        """Positions that are computed."""
        places = np.arange(self.count) if self.entry is None else self.again
        return self.start + places


class _Run:
    """One prefill, layer by layer."""

    def __init__(self, params, choice, focus, prompt, parts, room, *, queries):
        self.params, self.choice, self.focus, self.prompt, self.parts = params, choice, focus, prompt, parts
        self.room, self.chunks = room, len(parts) - 2
        self.queries = queries  # whether those of stored chunks are kept, for a policy to choose by
        self.total = prompt.starts[-1]
        self.rows = np.concatenate([part.rows for part in parts])  # positions that are computed now
        for part in parts:
            part.computed = len(part.rows)
        self.owner = np.repeat([part.index - 1 for part in parts], [part.count for part in parts])
        self.owner[self.owner == self.chunks] = -1  # the question; the system is -1 already
        self.cached = [part for part in parts if part.entry is not None]
        self.held = self._held_positions()
        stored = any(part.how == "computed" and part.index and part.name for part in parts)
        self.stores = any(part.how == "computed" and part.name for part in parts)
        self.counts = bool(self.chunks) and (stored or focus is not None)  # whether attention to chunks is summed
        self.made: list[tuple] = []  # of each layer: positions computed; queries if kept, keys, values, not rotated
        self.mass: list[tuple] = []  # of each layer: positions computed, f32[X, C]
        self.dropped: int | None = None
        self._focused: list[frozenset[int]] = []

    def __call__(self) -> tuple[jax.Array, Cache]:
        params, policy = self.params, policies.full()
        config, layers = params.config, []
        streams = [part.entry.stream() for part in self.cached]
        capacity = policy.capacity(bucket(self.total, steps=4), self.room)
        tokens = np.concatenate(self.prompt.parts)
        x = llama.embed(params, jnp.asarray(_padded(tokens[self.rows], self._width())))[None]
        for i, block in enumerate(params.blocks):
            stored = [next(stream) for stream in streams]
            k, v = self._held(stored, x.dtype)
            positions = _padded(self.rows, x.shape[1], FREE)[None]
            owners = _padded(self.owner[self.rows], x.shape[1], -1), self._held_owner()
            x, made, mass, layer = _layer(
                block, x, k, v, self._held_pos(i), positions, *owners, i, policy, config,
                self.chunks if self.counts else 0, capacity,
            )  # fmt: skip
            layers.append(layer)
            if self.stores:
                self.made.append((self.rows, *(made if self.queries else made[1:])))
            if self.counts:
                self.mass.append((self.rows, mass))
            keep = self._after(i, stored, made)
            if keep is not None:
                self.rows = self.rows[keep]
                x = x[:, _padded(keep, self._width())]
        last = x[:, len(self.rows) - 1]
        length = jnp.full(1, self.total, jnp.int32)
        return _logits(params, last), Cache(tuple(layers), length, policy, config)

    def _width(self) -> int:
        return bucket(len(self.rows), steps=4, least=32)

    def _held_positions(self) -> np.ndarray:
        """Positions of all cached slots i32[H or 1, N], those of tokens to be computed included."""
        if not self.cached:
            return np.zeros((1, 0), np.int32)
        places = []
        heads = self.params.config.kv_heads
        for part in self.cached:
            pos = part.entry.about.get("pos")
            pos = np.broadcast_to(np.arange(part.count), (1, part.count)) if pos is None else np.asarray(pos)
            places.append(np.where(pos < 0, FREE, pos + part.start))
        lead = max(pos.ndim for pos in places)
        if lead == 2:
            return np.concatenate(places, axis=-1).astype(np.int32)
        layers = self.params.config.layers  # compressed: other tokens in each layer and head
        full = [np.broadcast_to(pos, (layers, heads, pos.shape[-1])) for pos in places]
        return np.concatenate(full, axis=-1).astype(np.int32)

    def _held_pos(self, layer: int) -> np.ndarray:
        """i32[1, H, N] of a layer: free where the token is computed."""
        held = self.held if self.held.ndim == 2 else self.held[layer]
        held = np.where(np.isin(held, self.rows), FREE, held)
        width = bucket(held.shape[-1], steps=4)
        padded = np.full((self.params.config.kv_heads, width), FREE, np.int32)
        padded[:, : held.shape[-1]] = held
        return padded[None]

    def _held_owner(self) -> np.ndarray:
        """The chunk of each cached slot, i32[N]; -1 for the system's."""
        owners = [np.full(part.slots, part.index - 1, np.int32) for part in self.cached]
        joined = np.concatenate(owners) if owners else np.zeros(0, np.int32)
        return _padded(joined, bucket(len(joined), steps=4), -1)

    def _held(self, stored: list[tuple], dtype) -> tuple[jax.Array, jax.Array]:
        """Keys, not rotated, and values of all cached slots, [1, H, N, D]."""
        config = self.params.config
        width = bucket(self.held.shape[-1], steps=4)
        both = []
        for which in (0, 1):
            buffer, at = jnp.zeros((1, config.kv_heads, width, config.head_dim), dtype), 0
            for layer in stored:
                buffer = _place(buffer, layer[which], at)
                at += layer[which].shape[-2]
            both.append(buffer)
        return both[0], both[1]

    def _after(self, layer: int, stored: list[tuple], made: tuple) -> np.ndarray | None:
        """Which of the rows go on after `layer`, if not all: places among them."""
        fixed = [part for part in self.cached if part.how == "fixed"]
        stay = np.ones(len(self.rows), bool)
        if self.choice.after is not None and layer == self.choice.after[0]:
            values = np.asarray(made[-1][0], np.float32)  # [X, H, D]
            score, places = [], []
            for part, (_, v) in zip(self.cached, stored, strict=True):
                if part.how != "fixed":
                    continue
                at = np.searchsorted(self.rows, part.rows)
                old = np.asarray(v, np.float32).swapaxes(0, 1)[part.again]
                score.append(np.square(values[at] - old).sum(axis=(1, 2)))
                places.append(at)
            if places:
                places, score = np.concatenate(places), np.concatenate(score)
                stay[places] = False
                stay[places[largest(score, int(self.choice.after[1] * len(places)))]] = True
        if self.focus is not None and self.dropped is None and self.chunks and layer >= self.focus.first:
            self._focused.append(focused(self._question_mass()))
            latest = self._focused[-self.focus.repeats :]
            if len(latest) == self.focus.repeats and len(set(latest)) == 1:
                self.dropped = layer + 1
                alone = {part.index - 1 for part in fixed} - latest[0]
                stay &= ~np.isin(self.owner[self.rows], list(alone))
        return None if stay.all() else np.flatnonzero(stay)

    def _question_mass(self) -> list[float]:
        """Attention of the question to each chunk so far, for each of its tokens."""
        start = self.parts[-1].start
        total = sum(np.asarray(mass, np.float64)[: len(rows)][rows >= start].sum(axis=0) for rows, mass in self.mass)
        return [float(mass) / part.count for mass, part in zip(total, self.parts[1:-1], strict=True)]

    def made_of(self, part: _Part) -> list[tuple]:
        """Of each layer, queries if kept, keys and values [T, heads, D] of a part computed in full, not rotated."""
        layers = []
        for rows, *vectors in self.made:
            at = int(np.searchsorted(rows, part.start))
            layers.append(tuple(y[0, at : at + part.count] for y in vectors))
        return layers

    def statistics_of(self, part: _Part) -> Statistics:
        """Of a chunk that was computed in full."""
        own = []
        for rows, mass in self.mass:
            at = int(np.searchsorted(rows, part.start))
            own.append(np.asarray(mass, np.float64)[at : at + part.count])
        first = {}  # a chunk that comes again counts once, as what it is the first time
        for i, name in enumerate(self.prompt.hashes[1:-1]):
            first.setdefault(name, i)
        once = [i for i in first.values() if i <= part.index - 1]
        sizes = [self.parts[i + 1].count for i in once]
        return statistics(np.stack(own)[:, :, once], sizes, once.index(part.index - 1))


def _padded(x: np.ndarray, count: int, fill: int = 0) -> np.ndarray:
    return np.pad(x, (0, count - len(x)), constant_values=fill).astype(np.int32)


@functools.partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
    """`piece` [H, n, D] put into buffer [1, H, N, D] at slot `at`."""
    return jax.lax.dynamic_update_slice(buffer, piece[None].astype(buffer.dtype), (0, 0, at, 0))


_logits = jax.jit(llama.logits)


def _chunk_layer(
    block: Block,
    x: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pos: jax.Array,
    positions: jax.Array,
    owner: jax.Array,
    held_owner: jax.Array,
    layer: int,
    policy: Policy,
    config: Config,
    chunks: int,
    capacity: int,
):
    """One layer over the computed tokens, x [1, X, width] at `positions` i32[1, X], and cached slots.

    Args:
      block: Its weights.
      x: The residual stream.
      k: Of cached slots, not rotated, [1, H, N, D].
      v: Likewise.
      pos: i32[1, H, N], -1 for free slots.
      positions: -1 for padding.
      owner: The chunk of each computed token, i32[X]; -1 for none.
      held_owner: The chunk of each cached slot, i32[N].
      layer: Which it is.
      policy: Of the cache to make, `full`.
      config: Of the model.
      chunks: How many chunks to sum the attention to; 0 sums none.
      capacity: Slots of the cache to make.

    Returns:
      The new x; the computed tokens' queries, keys and values, not rotated, [1, X, heads, D]; the attention of each to
      each chunk, mean over heads, f32[X, C]; the layer's cache.
    """
    made = llama.project(block, x, config, positions)
    q, own_k, own_v = (y.swapaxes(1, 2) for y in (made.q, made.k, made.v))
    slots = jnp.concatenate([pos, jnp.broadcast_to(positions[:, None], own_k.shape[:3])], axis=2)
    turned = config.rope.angles(jnp.maximum(slots, 0), config.head_dim)
    keys = rotate(jnp.concatenate([k, own_k], axis=2), *turned)
    # the value of a free slot may be anything, and 0 times nan is nan
    values = jnp.concatenate([jnp.where((pos != FREE)[..., None], v, 0), own_v], axis=2)
    cos, sin = config.rope.angles(jnp.maximum(positions, 0), config.head_dim)
    q = rotate(q, cos[:, None], sin[:, None]) * config.head_dim**-0.5
    q = q.reshape(1, config.kv_heads, -1, *q.shape[2:]).astype(x.dtype)
    read = values
    if chunks:  # a column for each chunk: what its slots receive comes out of the same product
        of = jnp.concatenate([held_owner, owner])[None, None, :, None] == jnp.arange(chunks)
        read = jnp.concatenate([values, jnp.broadcast_to(of, (*slots.shape, chunks)).astype(values.dtype)], axis=-1)
    out = attend_slots(q, keys, read, positions[:, None], slots, sliding_window=config.sliding_window).out
    mass = out[0, ..., config.head_dim :].astype(jnp.float32).mean(axis=(0, 1))
    out = out[..., : config.head_dim].reshape(1, config.q_heads, -1, config.head_dim).swapaxes(1, 2)
    free = policy.empty(LayerShape(1, config.kv_heads, 0, config.head_dim, x.dtype, layer))
    cache = resize(extend(free, keys, values, slots), capacity)
    return llama.finish(block, x, out, config), (made.q, made.k, made.v), mass, cache


_layer = kernels.jit(_chunk_layer, static_argnames=("config", "chunks", "capacity"))


@functools.partial(jax.jit, static_argnames="config")
def _compressed(q: jax.Array, k: jax.Array, v: jax.Array, policy: Policy, config: Config, layer: int):
    """What a policy keeps of a chunk, read by itself: keys, not rotated, values [H, M, D], and places i32[H, M].

    q [T, Hq, D], k and v [T, H, D] are those of the chunk's tokens in its prompt.
    """
    positions = jnp.arange(q.shape[0])[None]
    settings = {"rope": config.rope, "layer": layer, "sliding_window": config.sliding_window}
    _, kept = attend(q[None], k[None], v[None], None, policy, positions=positions, **settings)
    if policy.budget is not None:
        kept = resize(kept, min(policy.budget, q.shape[0]))
    if policy.ranks is not None:  # those were not rotated to begin with
        return kept.k[0], kept.v[0], kept.pos[0]
    cos, sin = config.rope.angles(jnp.maximum(kept.pos, 0), config.head_dim)
    return rotate(kept.k, cos, -sin)[0], kept.v[0], kept.pos[0]
