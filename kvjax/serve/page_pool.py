"""A pool of pages on the device, and behind it in host memory, that hold the caches of conversations.

A page is the keys and values of `page` tokens in all layers; the last one of a conversation may have fewer. Its key
names all tokens up to its end, so conversations that begin alike share pages:

    page       [ system text ] - [ question, answer ] - [ quest     ]        a chain, of one conversation
                               \\ [ another one       ]                       a page of another, behind the same parent
    key        H(seed, tokens)   H(key before it, tokens)

On the device pages lie in buffers that are made once, k and v [P, H, page, D] for each layer, and written in place.
A rule of `paging` says what leaves them for host memory; a tail leaves before what stands before it.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies
from kvjax.cache import FREE, Cache, LayerShape, nbytes, take
from kvjax.checks import as_array, check_cache, check_ids, check_params
from kvjax.counts import whole
from kvjax.models.llama import Params
from kvjax.serve import paging
from kvjax.serve.chunk_store import namespace_of
from kvjax.serve.shapes import bucket


@dataclasses.dataclass(frozen=True, eq=False)
class Lease:
    """What `PagePool.get` found. Its pages stay on the device until it is released.

    Attributes:
      cache: One row, by `full`, that has seen the first `length` tokens; a copy. None if there are none.
      length: Tokens that need not be read again; less than were asked for, so that there are logits of the last one.
      chain: The keys of its pages, root first.
    """

    cache: Cache | None
    length: int
    chain: tuple[bytes, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass
class _Page:
    parent: bytes
    tokens: tuple[int, ...]
    slot: int | None = None  # on the device
    host: np.ndarray | None = None  # [L, 2, H, page, D]; stays when the page is brought back, for it cannot change
    bit: int | None = None  # of its latest touch
    scored: int | None = None  # what its tokens' scores said
    children: dict[bytes, None] = dataclasses.field(default_factory=dict)  # on either side, in order


class PagePool:
    """Caches of conversations as pages on the device, with host memory behind them; for one model and one thread.

    A bit of 1 (`paging`) says that a page may as well leave: when the device throws it out it is gone, unless pages
    behind it are in host memory. Bits come from the scores given with `put`, or else from `reuse`; without either all
    that leaves goes to the host.

    Programs are compiled for each bucket of page counts, and those of `put` for each count of slots besides.

    Source: the rules that the field agrees on, as in vLLM and SGLang. Differs: a partial last page is kept and shared,
    until a longer one that begins like it takes its place; any part of a page can be found.
    """

    def __init__(
        self,
        params: Params,
        *,
        device_pages: int,
        host_pages: int | None = None,
        page: int = 16,
        pages: Callable[[int], paging.Pages] = paging.lru,
        reuse: paging.Reuse | None = None,
        domain: str = "",
    ):
        """Allocates the device's buffers; a page takes 2 L H page D numbers.

        Args:
          params: The model.
          device_pages: Pages that fit on the device; no conversation may be longer.
          host_pages: Pages that fit in host memory, 0 for none; None takes twice as many as on the device.
          page: Tokens of a page.
          pages: Makes what decides which pages leave, one for the device and one for the host. It may not throw out at
            once what it is asked for.
          reuse: Predicts bits, from how often pages are put and got; of this pool alone.
          domain: Who may share pages, such as a tenant; part of the keys.

        Raises:
          ValueError: If a setting makes no sense.
        """
        check_params(params)
        count = whole("PagePool", "device_pages", device_pages, least=1, mend="It is what the device has room for.")
        behind = 2 * count if host_pages is None else whole("PagePool", "host_pages", host_pages, least=0)
        self.page, config = whole("PagePool", "page", page, least=1), params.config
        self._device, self._host = _made(pages, count), _made(pages, behind) if behind else None
        self._params, self._reuse, self._about = params, reuse, {"domain": domain, "page": self.page, "reused": "pages"}
        self._namespace = namespace_of(params, **self._about)
        self._seed = bytes.fromhex(self._namespace)
        shape, dtype = (count, config.kv_heads, self.page, config.head_dim), params.embed.dtype
        self._buffers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))
        self._free = list(range(count))[::-1]
        self._nodes = {self._seed: _Page(b"", ())}  # and all pages behind this one
        self._leases: dict[Lease, None] = {}
        self._leased = Counter()
        self._counts = Counter()

    def put(self, params: Params, tokens: Sequence[int], cache: Cache, *, scores: Any = None) -> int:
        """Takes in what a cache holds; pages that are here are touched, and not stored again.

        Args:
          params: The model that made it; another one is refused.
          tokens: The token ids that it has seen, all of them.
          cache: One row, made by `full`; it is not changed.
          scores: Of retaining heads or gates, f[..., tokens], for `paging.bits_of_scores` at its threshold; they hold
            until the page is put with others.

        Returns:
          How many pages are new.

        Raises:
          paging.Full: If it has more pages than the device, beside those that leases keep. Nothing has changed.
          ValueError: If arguments do not fit together. Nothing has changed either.
        """
        tokens = self._check("put", params, tokens)
        self._check_cache(cache, tokens)
        scored = []
        if scores is not None:
            scored = paging.bits_of_scores(scores, self.page)
            if np.shape(scores)[-1] != len(tokens):
                raise ValueError(f"put: scores of {np.shape(scores)[-1]} tokens came with {len(tokens)} tokens.")
        chain, covered = self._match(tokens)
        keys = chain if covered == len(tokens) else page_keys(self._seed, tokens, self.page)
        self._check_room("put", keys)
        missing = self._missing(keys)
        if keys is chain:
            staged = self._staged(missing)
        else:
            first = np.int32(len(keys) - len(missing))
            staged = _cut(cache.layers, first, page=self.page, count=_bucket(len(missing)))
        new = [(i, key) for i, key in enumerate(keys) if key not in self._nodes]
        for i, key in new:
            part = tuple(tokens[i * self.page : (i + 1) * self.page].tolist())
            self._add(key, _Page(keys[i - 1] if i else self._seed, part))
        self._seat(keys, missing, staged, scored)
        return len(new)

    def get(self, params: Params, tokens: Sequence[int]) -> Lease:
        """The longest beginning of `tokens` that is here, as a cache for `kvjax.prefill` to go on from.

        Args:
          params: The model.
          tokens: All token ids of the conversation, those that are to be read now included.

        Returns:
          A `Lease`; give it to `release` when the conversation has been put, or is over.

        Raises:
          paging.Full: If its pages find no room beside those that leases keep. Nothing has changed.
          ValueError: If arguments make no sense, or the pool is another model's.
        """
        tokens = self._check("get", params, tokens)
        chain, covered = self._match(tokens)
        length = min(covered, len(tokens) - 1)
        chain = chain[: -(-length // self.page)]
        self._check_room("get", chain)
        missing = self._missing(chain)
        self._counts.update(asked=len(tokens), found=length, device=len(chain) - len(missing), host=len(missing))
        cache = None
        if chain:
            self._seat(chain, missing, self._staged(missing))
            self._device.pin(chain[-1])  # and so those before it
            layers = _gathered(self._buffers, self._slots(chain), np.int32(length))
            cache = Cache(layers, jax.device_put(np.full(1, length, np.int32)), policies.full(), params.config)
        lease = Lease(cache, length, tuple(chain))
        self._leases[lease] = None
        self._leased.update(chain)
        return lease

    def release(self, lease: Lease) -> None:
        """Lets the pages of a lease leave. Raises ValueError if it is not one of this pool, or was released."""
        if lease not in self._leases:
            raise ValueError("release: no lease of this pool, or one that was released before. Each is released once.")
        del self._leases[lease]
        self._leased -= Counter(lease.chain)
        if lease.chain:
            self._device.unpin(lease.chain[-1])

    def stats(self) -> dict[str, Any]:
        """What is here, and what happened so far.

        Pages by side (one that is on both counts twice) and those leased; bytes allocated on the device, and in use on
        the host; tokens asked for and found; pages found by side; bytes moved to each, rounded up as transfers are;
        evictions by side, and how many of those from the device went nowhere.
        """
        size, counts = nbytes(self._buffers) // self._device.capacity, self._counts
        sides = {"device": self._device, "host": self._host or ()}
        return {
            "pages": {name: len(side) for name, side in sides.items()} | {"leased": len(self._leased)},
            "bytes": {"device": nbytes(self._buffers), "host": len(sides["host"]) * size},
            "tokens": {name: counts[name] for name in ("asked", "found")},
            "hits": {name: counts[name] for name in sides},
            "moved": {name: counts[name] for name in ("to_host", "to_device")},
            "evicted": {name: side.evictions if side else 0 for name, side in sides.items()},
            "dropped": counts["dropped"],
        }

    # Which pages

    def _match(self, tokens: np.ndarray) -> tuple[list[bytes], int]:
        """The pages that hold the longest beginning of `tokens`, and how many tokens that is."""
        chain = []
        for key in page_keys(self._seed, tokens, self.page):
            if key not in self._nodes:
                break
            chain.append(key)
        covered = min(len(chain) * self.page, len(tokens))
        rest = tokens[covered : covered + self.page].tolist()
        behind = self._nodes[chain[-1] if chain else self._seed].children
        alike = {key: _alike(self._nodes[key].tokens, rest) for key in behind}
        best = max(alike, key=alike.get, default=None)
        return ([*chain, best], covered + alike[best]) if best and alike[best] else (chain, covered)

    def _missing(self, chain: Sequence[bytes]) -> Sequence[bytes]:
        """The pages that are not on the device: the last ones, for tails leave first."""
        return [key for key in chain if key not in self._device]

    def _add(self, key: bytes, node: _Page) -> None:
        """Notes a new page, which takes the place of shorter ones that it begins with, if nobody has leased them."""
        siblings = self._nodes[node.parent].children
        for one in [one for one in siblings if one not in self._leased]:
            own = self._nodes[one].tokens
            if own == node.tokens[: len(own)]:
                self._remove(one)
        siblings[key] = None
        self._nodes[key] = node

    def _remove(self, key: bytes) -> None:
        """Forgets a page that has none behind it."""
        node = self._nodes.pop(key)
        del self._nodes[node.parent].children[key]
        if node.slot is not None:
            self._free.append(node.slot)
        if key in self._device:
            self._device.remove(key)
            self._left([key])
        if self._host is not None:
            self._host.remove(key)

    def _left(self, keys: Sequence[bytes]) -> None:
        if self._reuse is not None:
            self._reuse.left(keys)

    # Between device and host

    def _seat(self, chain: Sequence[bytes], missing: Sequence[bytes], staged: Any, scored: Sequence = ()) -> None:
        """Touches a chain, root first, and writes what is missing, `staged`, where it finds room."""
        gone = []
        for i, key in enumerate(chain):
            node, parent = self._nodes[key], chain[i - 1] if i else None
            node.scored = int(scored[i]) if i < len(scored) else node.scored
            predicted = None if self._reuse is None else self._reuse.bit(key)
            node.bit = predicted if node.scored is None else node.scored
            if node.slot is None and node.host is not None:
                self._host.request(key, prediction=node.bit, parent=parent)  # it sees what the device misses
            gone += self._device.request(key, prediction=node.bit, parent=parent)
        self._demote(gone)
        for key in missing:
            self._nodes[key].slot = self._free.pop()
        if missing:
            self._buffers = _written(self._buffers, staged, self._slots(missing))

    def _demote(self, gone: Sequence[bytes]) -> None:
        """Moves pages that the device has thrown out, tails first, to the host, or drops them."""
        self._left(gone)
        moving = {}
        for key in gone:
            node = self._nodes[key]
            if self._host is None or (node.bit == 1 and not node.children):
                self._remove(key)
                self._counts["dropped"] += 1
            else:
                moving[key] = node.host
        fetch = [key for key, held in moving.items() if held is None]
        if fetch:
            fetched = np.asarray(_stacked(self._buffers, self._slots(fetch)))  # one transfer
            self._counts["to_host"] += fetched.nbytes
            moving |= {key: x.copy() for key, x in zip(fetch, fetched, strict=False)}  # each can go by itself
        for key in list(moving):
            node, held = self._nodes[key], moving.pop(key)
            self._free.append(node.slot)
            node.slot = None
            if node.host is not None:
                continue
            parent = None if node.parent == self._seed else node.parent
            try:
                victims = self._host.request(key, prediction=node.bit, parent=parent)
            except paging.Full:  # all of the host are pages before it
                self._remove(key)
                self._counts["dropped"] += 1
                continue
            node.host = held
            for victim in victims:
                self._nodes[victim].host = None
                if victim not in self._device and victim not in moving:
                    self._remove(victim)

    def _slots(self, keys: Sequence[bytes]) -> np.ndarray:
        """Slots of pages, i32[bucket]; what rounds the count up is out of range."""
        slots = np.full(_bucket(len(keys)), self._device.capacity, np.int32)
        slots[: len(keys)] = [self._nodes[key].slot for key in keys]
        return slots

    def _staged(self, keys: Sequence[bytes]) -> Any:
        """Pages of the host on the device, [bucket, L, 2, H, page, D], in one transfer; None of none."""
        if not keys:
            return None
        first = self._nodes[keys[0]].host
        staged = np.zeros((_bucket(len(keys)), *first.shape), first.dtype)
        for i, key in enumerate(keys):
            staged[i] = self._nodes[key].host
        self._counts["to_device"] += staged.nbytes
        return jax.device_put(staged)

    # What callers can get wrong

    def _check(self, where: str, params: Params, tokens: Any) -> np.ndarray:
        """Token ids as i32[tokens], of this pool's model."""
        check_params(params)
        if params is not self._params and namespace_of(params, **self._about) != self._namespace:
            raise ValueError(f"{where}: these params are not those of this pool. Each model needs a pool of its own.")
        self._params = params
        tokens = np.asarray(as_array("tokens", tokens))
        if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"{where}: tokens are {tokens.dtype}{list(tokens.shape)}, and must be the ids of one conversation, "
                f"integers [tokens], at least one."
            )
        check_ids(params.config, tokens[None], [len(tokens)])
        return tokens.astype(np.int32)

    def _check_cache(self, cache: Any, tokens: np.ndarray) -> None:
        """It must be one row by `full` that has seen `tokens`, and must still be there."""
        check_cache(self._params, policies.full(), cache, 1)
        if any(x.is_deleted() for x in jax.tree.leaves(cache)):
            raise ValueError("put: the cache was donated, and is gone. Put what the step returned.")
        seen = int(cache.length[0])
        if seen != len(tokens):
            raise ValueError(f"put: the cache has seen {seen} tokens, and {len(tokens)} came with it. Give just those.")
        for layer, (k, _) in zip(cache.layers, self._buffers, strict=True):
            if layer.k.dtype != k.dtype:
                raise ValueError(f"put: the cache holds {layer.k.dtype}, and this model {k.dtype}. Prefill it anew.")
            if layer.slots < seen or (np.sort(layer.pos)[..., -seen:] != np.arange(seen)).any():
                raise ValueError("put: the cache has lost some of its tokens. Leave steps room: prefill(..., room=64).")

    def _check_room(self, where: str, chain: Sequence[bytes]) -> None:
        others = len(self._leased.keys() - set(chain))
        if len(chain) + others > self._device.capacity:
            raise paging.Full(
                f"{where}: {len(chain)} pages of {self.page} tokens do not fit into device_pages="
                f"{self._device.capacity} beside {others} others that are leased. Release leases, or make the pool "
                f"larger."
            )


def page_keys(seed: bytes, tokens: Sequence[int] | np.ndarray, page: int) -> list[bytes]:
    """The key of each page: SHA-256 of the key before it, at first `seed`, and its tokens as little-endian i32."""
    keys, tokens = [], np.asarray(tokens, "<i4")
    for at in range(0, len(tokens), page):
        seed = hashlib.sha256(seed + tokens[at : at + page].tobytes()).digest()
        keys.append(seed)
    return keys


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two pages have in common before they part."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(one), len(other)))


def _bucket(count: int) -> int:
    return bucket(count, least=1)


def _made(pages: Callable[[int], paging.Pages], capacity: int) -> paging.Pages:
    made, probe = pages(capacity), pages(1)
    if not isinstance(made, paging.Pages) or made.capacity != capacity:
        raise ValueError("PagePool: pages must make paging.Pages of the capacity that it is given, such as paging.lru.")
    if probe.request(b"", prediction=1):
        raise ValueError("PagePool: pages throws out at once what it is asked for. Take lazy=True.")
    return made


# ---- programs; buffers are ((k, v) of each layer), [P, H, page, D], and staged pages [count, L, 2, H, page, D] ----


@functools.partial(jax.jit, donate_argnums=0)
def _written(buffers, staged, slots):
    """The buffers with staged pages at `slots`, in place; those out of range are left out."""

    def put(buffer, pages):
        return buffer.at[slots].set(pages, mode="drop")

    return tuple((put(k, staged[:, i, 0]), put(v, staged[:, i, 1])) for i, (k, v) in enumerate(buffers))


def _rows(buffer, slots):
    return buffer.at[slots].get(mode="fill", fill_value=0)


@jax.jit
def _stacked(buffers, slots):
    """The pages at `slots`, as one array."""
    return jnp.stack([jnp.stack([_rows(k, slots), _rows(v, slots)], axis=1) for k, v in buffers], axis=1)


@jax.jit
def _gathered(buffers, slots, length):
    """The layers of a cache that has seen `length` tokens, of the pages at `slots` in order."""

    def layer(i, buffers):
        k, v = (_rows(x, slots).swapaxes(0, 1) for x in buffers)  # [H, count, page, D]
        shape = LayerShape(1, k.shape[0], k.shape[1] * k.shape[2], k.shape[3], k.dtype, i)
        empty = policies.full().empty(shape)
        at = jax.lax.broadcasted_iota(jnp.int32, empty.pos.shape, 2)
        k, v = k.reshape(empty.k.shape), v.reshape(empty.v.shape)
        return dataclasses.replace(empty, k=k, v=v, pos=jnp.where(at < length, at, FREE))

    return tuple(layer(i, both) for i, both in enumerate(buffers))


@functools.partial(jax.jit, static_argnames=("page", "count"))
def _cut(layers, first, *, page, count):
    """Pages first..first + count - 1 of a cache, staged; behind its last token anything."""

    def pages(x):  # [1, H, count * page, D]
        return x.reshape(x.shape[1], count, page, x.shape[-1]).swapaxes(0, 1)

    def both(layer):
        order = jnp.argsort(layer.pos.astype(jnp.uint32), axis=-1)  # free slots, -1, come last
        at = jnp.minimum(first * page + jnp.arange(count * page), layer.slots - 1)
        moved = take(layer, order[..., at])
        return jnp.stack([pages(moved.k), pages(moved.v)], axis=1)

    return jnp.stack([both(layer) for layer in layers], axis=1)
