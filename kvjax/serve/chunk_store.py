"""A store of caches in three tiers: device, host memory, disk."""

import dataclasses
import functools
import hashlib
import json
import os
import sqlite3
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.counts import flag, whole
from kvjax.serve import paging
from kvjax.serve.disk import Disk
from kvjax.serve.entries import SAFETENSORS, VERSION, Damaged, Entry, rounded, to_json, unit_of

MOST_THREADS, WORTH_THREADS = 4, 2**24  # to verify an entry, from so many bytes on
PROMOTE_AT = 2  # hits in a tier until an entry is copied to the next one up: a first hit costs no copy


class _Memory:
    """A tier of entries in memory, bounded by bytes; what leaves is handed to `demote`."""

    def __init__(self, name: str, capacity: int, pages: Callable[[int], paging.Pages], demote: Callable):
        self.name, self.capacity, self.demote = name, capacity, demote
        self.unit = unit_of(capacity)
        self.pages = pages(capacity // self.unit)
        self.entries: dict[str, Entry] = {}
        self.predictions: dict[str, int | None] = {}  # of the latest use
        self.hits: Counter[str] = Counter()  # since they came
        self.evicted = 0

    def touch(self, key: str, prediction: int | None) -> Entry:
        """The entry `key`, used now."""
        entry = self.entries[key]
        self.hits[key] += 1
        self._request(key, entry.nbytes, prediction)
        return entry

    def add(self, key: str, entry: Entry, prediction: int | None) -> bool:
        """Takes an entry in, if the pages will have it."""
        self.drop(key)
        if entry.nbytes > self.capacity:
            return False
        self.entries[key] = entry
        try:
            self._request(key, entry.nbytes, prediction)
        except paging.Full:
            del self.entries[key]
        return key in self.entries

    def _request(self, key, size, prediction):
        victims = self.pages.request(key, prediction=prediction, size=max(1, -(-size // self.unit)))
        self.predictions[key] = prediction
        gone = [(victim, self.entries.pop(victim), self.predictions.pop(victim)) for victim in victims]
        for victim, entry, bit in gone:
            self.evicted += 1
            self.hits.pop(victim, None)
            self.demote(victim, entry, bit)

    def drop(self, key: str) -> None:
        """Forgets an entry, if it is here."""
        if self.entries.pop(key, None) is not None:
            self.pages.remove(key)
            del self.predictions[key]
            self.hits.pop(key, None)

    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(entry.nbytes for entry in self.entries.values())


class Store:
    """Caches by key, in up to three tiers; each evicts by itself, by bytes, into the one below.

    An entry goes to disk when it is put, so that neither a crash nor an eviction above loses it, and into the fastest
    tier that its arrays can be in: jax arrays on the device, others in host memory. What the device evicts moves to
    host memory, unless its prediction is 1 (not needed soon); what host memory evicts is on disk, or written again if
    it left there meanwhile; what the disk evicts is gone. The second hit in a tier copies an entry to the next one up.

    Several processes may share a folder, and its capacity. Threads may share a store; a forked process must open its
    own. What another process puts under a key replaces what this one has in memory; what another removes stays in
    memory here until it is evicted.

    Raises:
      ValueError: If no tier can hold anything, or `folder` has a store of another version.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        *,
        namespace: str,
        device_bytes: int = 0,
        host_bytes: int = 2**30,
        disk_bytes: int | None = None,
        pages: Callable[[int], paging.Pages] | None = None,
        int8: bool = False,
        token_axis: int = -2,
        left: Callable[[list[str]], None] | None = None,
    ):
        """Opens a store, and cleans up what dead processes left behind.

        Args:
          folder: Of the disk tier, on a local disk; made if it is not there. None for memory alone.
          namespace: A digest of what entries are bound to (`namespace_of`); others' entries are never seen.
          device_bytes: Capacity of the device tier, for entries of jax arrays; 0 for none.
          host_bytes: Capacity of the host tier; 0 for none.
          disk_bytes: Capacity of the folder; None for as much as there is. The index, a file that is just being written
            and evicted ones that are still mapped come on top.
          pages: Makes what decides which entries leave a tier of so many bytes; None takes `paging.lru`.
          int8: Whether host and disk store 8-bit codes, of keys by channel, of values by token. Each number is off by
            at most (largest - smallest) / 510 of those that share its step, beside what its dtype rounds. The device
            keeps what it was given.
          token_axis: Of keys; channels are the last axis. Matters to int8 alone.
          left: Called with the keys that have left a tier in memory, such as `paging.Reuse.left`.
        """
        if not isinstance(namespace, str) or not namespace:
            raise ValueError(f"Store: namespace={namespace!r} must be a text, such as namespace_of(params) returns.")
        device_bytes, host_bytes = (_bytes(*item) for item in {"device": device_bytes, "host": host_bytes}.items())
        disk_bytes = None if disk_bytes is None else _bytes("disk", disk_bytes)
        if folder is not None and disk_bytes == 0:
            raise ValueError(f"Store: disk_bytes=0 leaves no room in {str(folder)!r}. Give more, or folder=None.")
        if folder is None and not device_bytes + host_bytes:
            raise ValueError("Store: no tier can hold anything. Give a folder, host_bytes or device_bytes.")
        self._int8, self._token_axis = flag("Store", "int8", int8), whole("Store", "token_axis", token_axis)
        pages = paging.lru if pages is None else pages
        self._left = left
        self._device = _Memory("device", device_bytes, pages, self._from_device) if device_bytes else None
        self._host = _Memory("host", host_bytes, pages, self._from_host) if host_bytes else None
        self._lock = threading.RLock()  # of the tiers in memory and the counts
        self._said, self._hits, self._misses, self._failed = set(), Counter(), Counter(), 0
        self._once: set[str] = set()  # hit on disk, and not promoted yet
        self._closed, self._disk = False, None
        if folder is not None:
            # What is rounded must never be taken for what is exact.
            space = f"{namespace} int8" if self._int8 else namespace
            self._disk = Disk(Path(folder).expanduser(), space, disk_bytes, pages, self._warn)

    def put(self, key: str, layers: Sequence[tuple[Any, Any]], about: dict, *, prediction: int | None = None) -> bool:
        """Stores a cache; one that had this key is replaced.

        Args:
          key: Any text.
          layers: (k, v) of each layer, of numpy or jax, of any shapes.
          about: What belongs to it: numbers, texts, lists and small arrays.
          prediction: 1 if it will not be needed soon, 0 if it will (`paging`); 1 skips host memory where there is a
            disk.

        Returns:
          Whether any tier has it. A disk that is full or read-only is warned about once, and counted.

        Raises:
          ValueError: If these are no layers, `about` is not for JSON, or the store is closed.
        """
        prediction = self._check(key, prediction)
        layers, text = _checked(key, layers), to_json(about)
        stored = self._to_host(layers)
        version = self._write(key, stored, text, prediction)
        with self._lock:
            for tier in filter(None, (self._device, self._host)):
                tier.drop(key)
            self._once.discard(key)
            if self._device is not None and all(_on_device(x) for layer in layers for x in layer):
                entry = Entry(text, layers, "device", version=version)
                if self._device.add(key, entry, prediction):
                    return True
            if version is not None and prediction == 1:
                return True
            return self._add_to_host(key, stored, text, version, prediction) or version is not None

    def get(self, key: str, *, prediction: int | None = None, late: bool = False) -> Entry | None:
        """The entry that was put under `key`, verified; None is a miss, whatever the reason (`stats`).

        Args:
          key: As in `put`.
          prediction: Of its next use, as in `put`.
          late: Checks an entry from disk layer by layer as it is used, so that computing need not wait for all of it;
            `Entry.layer` and `Entry.stream` then raise `Damaged` where a check fails, and the entry is gone.
        """
        prediction = self._check(key, prediction)
        row = self._on_disk(lambda disk: disk.touch(key, prediction))
        with self._lock:
            deleted = False
            for tier in filter(None, (self._device, self._host)):
                entry = tier.entries.get(key)
                if entry is None:
                    continue
                if row is not None and entry.version not in (None, row.version):  # replaced by another process
                    tier.drop(key)
                elif tier is self._device and any(x.is_deleted() for layer in entry.stored for x in layer):
                    tier.drop(key)  # given away by a donation
                    deleted = True
                else:
                    return self._found(key, tier, prediction)
        return self._from_disk(key, row, prediction, late, "deleted" if deleted else "absent")

    def _found(self, key: str, tier: _Memory, prediction: int | None) -> Entry:
        entry = tier.touch(key, prediction)
        self._hits[tier.name] += 1
        if tier is self._host and self._device is not None and tier.hits[key] >= PROMOTE_AT:
            import jax  # late: neither host nor disk needs it

            here = tuple(tuple(map(jax.device_put, entry.layer(i))) for i in range(entry.layers))
            up = Entry(entry.text, here, "device", version=entry.version)
            if self._device.add(key, up, prediction):
                entry = up
        return dataclasses.replace(entry)  # whoever changes its `about` changes no one else's

    def _from_disk(self, key: str, row: Any, prediction: int | None, late: bool, reason: str) -> Entry | None:
        again = key in self._once  # its second hit: it moves to host memory, checked
        late = late and not again
        version = None if row is None else row.version
        try:
            entry = self._on_disk(lambda disk: disk.read(key, row))
            if entry is not None:
                version, verify = entry.version, entry.check
                entry.check = functools.partial(self._verify_late, key, version, verify) if late else None
                if not late:
                    _each_layer(verify, entry)
        except Damaged as error:
            self._drop_damaged(key, version, error)
            return None
        with self._lock:
            if entry is None:
                if reason == "absent" and self._on_disk(lambda disk: disk.is_foreign(key)):
                    reason = "foreign"
                self._misses[reason] += 1
                return None
            self._hits["disk"] += 1
            if again:
                self._once.discard(key)
                self._add_to_host(key, entry.stored, entry.text, entry.version, prediction)
            else:
                self._once.add(key)
        return entry

    def _verify_late(self, key: str, version: int, verify: Callable[[int], None], layer: int) -> None:
        try:
            verify(layer)
        except Damaged as error:
            self._drop_damaged(key, version, error)
            raise

    def _drop_damaged(self, key: str, version: int | None, error: Damaged) -> None:
        with self._lock:
            self._misses[error.reason] += 1
        self._warn(error.reason, f"{error} It is a miss, and the entry goes.")
        self._on_disk(lambda disk: disk.remove(key, version))  # not what has replaced it meanwhile

    # From tier to tier

    def _to_host(self, layers: Sequence[tuple]) -> tuple[tuple, ...]:
        """Layers as host and disk store them; what numpy can see without a copy is not copied."""
        for x in (x for layer in layers for x in layer if _on_device(x)):
            x.copy_to_host_async()  # all of them together
        exact = [tuple(_plain(x) for x in layer) for layer in layers]
        if not self._int8:
            return tuple(exact)
        return tuple((rounded(k, self._token_axis), rounded(v, -1)) for k, v in exact)

    def _add_to_host(self, key: str, stored: Any, text: str, version: int | None, prediction: int | None) -> bool:
        """Copies an entry to host memory, unless it cannot be there."""
        if self._host is None or sum(x.nbytes for layer in stored for x in layer) > self._host.capacity:
            return False
        own = tuple(tuple(_copied(x) for x in layer) for layer in stored)
        return self._host.add(key, Entry(text, own, "host", version=version), prediction)

    def _from_device(self, key: str, entry: Entry, prediction: int | None) -> None:
        if self._host is not None and key in self._host.entries:
            return
        if any(x.is_deleted() for layer in entry.stored for x in layer):
            return
        on_disk = self._on_disk(lambda disk: disk.row(key)) is not None
        if on_disk and (prediction or self._host is None):
            return
        stored = self._to_host(entry.stored)
        if not prediction and self._add_to_host(key, stored, entry.text, entry.version, prediction):
            return
        if not on_disk:
            self._write(key, stored, entry.text, prediction)

    def _from_host(self, key: str, entry: Entry, prediction: int | None) -> None:
        if self._left is not None:
            self._left([key])
        if self._on_disk(lambda disk: disk.row(key)) is None:
            self._write(key, entry.stored, entry.text, prediction)

    def _write(self, key: str, stored: Sequence[tuple], text: str, prediction: int | None) -> int | None:
        """The version of the file in which the entry is now, or None."""
        if self._disk is None:
            return None
        try:
            return self._disk.put(key, stored, text, prediction)
        except (OSError, sqlite3.Error) as error:
            self._warn("write", f"an entry could not be written to {self._disk.folder} ({error}). It was left out.")
            with self._lock:
                self._failed += 1
            self._on_disk(lambda disk: disk.remove(key))  # what it would have replaced is out of date
            return None

    def _on_disk(self, ask: Callable[[Disk], Any]) -> Any:
        """What the disk tier answers; None without one, or where it fails."""
        if self._disk is None:
            return None
        try:
            return ask(self._disk)
        except (OSError, sqlite3.Error) as error:
            self._warn("disk", f"{self._disk.folder} does not answer ({error}). Its entries are misses.")
            return None

    def _warn(self, about: str, message: str) -> None:
        """Each kind of trouble is said once."""
        if about not in self._said:
            self._said.add(about)
            warnings.warn(f"Store: {message}", RuntimeWarning, stacklevel=4)

    def _check(self, key: str = "", prediction: int | None = None) -> int | None:
        if self._closed:
            raise ValueError("Store: it is closed. Open another one on the same folder.")
        if not isinstance(key, str):
            raise ValueError(f"Store: key={key!r} must be a text, such as a digest in hexadecimal.")
        if prediction not in (None, 0, 1):
            raise ValueError(f"Store: prediction={prediction!r} must be 0, 1 or None.")
        return None if prediction is None else int(prediction)

    # What is here

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, in order."""
        self._check()
        with self._lock:
            found = {key for tier in filter(None, (self._device, self._host)) for key in tier.entries}
        return sorted(
            {key for key in found if key.startswith(prefix)} | set(self._on_disk(lambda disk: disk.keys(prefix)) or ())
        )

    def about(self, key: str) -> dict | None:
        """What was put beside the vectors, without touching them, or counting as a use. None if there is no entry."""
        self._check(key)
        with self._lock:
            for tier in filter(None, (self._device, self._host)):
                if key in tier.entries:
                    return dataclasses.replace(tier.entries[key]).about
        try:
            entry = self._on_disk(lambda disk: disk.read(key, disk.row(key)))
        except Damaged:
            return None  # the next get says so, and drops it
        return None if entry is None else entry.about

    def remove(self, key: str) -> bool:
        """Drops an entry from all tiers. Returns whether it was in one."""
        self._check(key)
        with self._lock:
            here = False
            for tier in filter(None, (self._device, self._host)):
                here |= key in tier.entries
                tier.drop(key)
            self._once.discard(key)
        return bool(self._on_disk(lambda disk: disk.remove(key))) or here

    def __contains__(self, key: str) -> bool:
        self._check(key)
        with self._lock:
            if any(key in tier.entries for tier in (self._device, self._host) if tier is not None):
                return True
        return self._on_disk(lambda disk: disk.row(key)) is not None

    def __len__(self) -> int:
        return len(self.keys())

    def stats(self) -> dict[str, Any]:
        """Hits by tier; misses by reason (absent, foreign, damaged, torn, deleted); entries, bytes and evictions by
        tier, those of the disk over all namespaces; and writes that failed."""
        self._check()
        count, size = self._on_disk(lambda disk: disk.total()) or (0, 0)
        with self._lock:
            memory = {tier.name: tier for tier in (self._device, self._host) if tier is not None}
            disk = {} if self._disk is None else {"disk": self._disk.evicted}
            return {
                "hits": {name: self._hits[name] for name in (*memory, *disk)},
                "misses": dict(self._misses),
                "entries": {name: len(tier.entries) for name, tier in memory.items()} | dict.fromkeys(disk, count),
                "bytes": {name: tier.nbytes() for name, tier in memory.items()} | dict.fromkeys(disk, size),
                "evicted": {name: tier.evicted for name, tier in memory.items()} | disk,
                "failed_writes": self._failed,
            }

    def close(self) -> None:
        """Lets go of memory and folder. Entries that were got stay valid."""
        self._closed, self._device, self._host = True, None, None
        if self._disk is not None:
            self._disk.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def namespace_of(params: Any, tokenizer: Any = None, policy: Any = None, **more: Any) -> str:
    """A digest of what a cache is bound to; two that differ in any of it share no entries.

    Every weight counts, exactly: two position-weighted sums of its bits, modulo 2^32, are taken where it lies, and no
    order of summation changes them. (`heads.load` compares norms instead: there, two roundings of a model are one.)

    Args:
      params: The model: kvjax.Params, or any pytree of arrays.
      tokenizer: Its text or digest, or what has `to_str()`, as those of `tokenizers` do.
      policy: Its name, or what has a `name`, such as a kvjax.Policy.
      **more: What else they are bound to, for JSON: a permission domain, the digest of a system prompt, page sizes.

    Raises:
      ValueError: If tokenizer, policy or `more` are something else.
    """
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(params)
    try:
        names = [(jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape) for path, leaf in leaves]
        sums = np.asarray(jax.device_get([_bit_sums(leaf) for _, leaf in leaves]))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"namespace_of: params must be a pytree of arrays ({error}). Pass model.params.") from None
    if hasattr(tokenizer, "to_str"):
        tokenizer = tokenizer.to_str()
    policy = getattr(policy, "name", policy)
    if isinstance(policy, str) and policy.split(" ")[0] == "evict":
        raise ValueError(
            f"namespace_of: the policy is called {policy!r}, as all are that evict() or demote() made, and entries "
            f"could be taken for another's. Name it: dataclasses.replace(policy, name='mine(budget=6)')."
        )
    for name, said in (("tokenizer", tokenizer), ("policy", policy)):
        if said is not None and not isinstance(said, str):
            raise ValueError(f"namespace_of: {name} is a {type(said).__name__}, and must be a text: give a digest.")
    said = [VERSION, repr(getattr(params, "config", None)), names, sums.tolist(), tokenizer, policy, more]
    try:
        said = json.dumps(said, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"namespace_of: {error}: what entries are bound to must be for JSON. Give a digest.") from None
    return hashlib.sha256(said.encode()).hexdigest()


def _bit_sums(x: Any) -> Any:
    """Two sums over the bits of an array, u32[2], in which every number has odd weights of its own."""
    import jax

    return jax.jit(_summed)(x)


def _summed(x):
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}"))  # f64: two words
    bits, at, stride = x.astype(jnp.uint32), jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        at += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = at * jnp.uint32(0x9E3779B1)
    mixed ^= mixed >> 15  # so that the weights are no straight line
    return jnp.stack([(bits * weight).sum(dtype=jnp.uint32) for weight in (2 * at + 1, mixed | 1)])


def _each_layer(verify: Callable[[int], None], entry: Entry) -> None:
    """Verifies all layers, several at a time where that pays: CRC-32 takes longer than the memory does."""
    threads = min(MOST_THREADS, entry.layers, os.cpu_count() or 1) if entry.nbytes > WORTH_THREADS else 1
    if threads == 1:
        for i in range(entry.layers):
            verify(i)
        return
    with ThreadPoolExecutor(threads, "kvjax-verify") as pool:
        for _ in pool.map(verify, range(entry.layers)):
            pass


def _bytes(tier: str, count: Any) -> int:
    """A capacity; it may be beyond 32 bits."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
        raise ValueError(f"Store: {tier}_bytes={count!r} must be a whole number of bytes, at least 0.")
    return int(count)


def _checked(key: Any, layers: Any) -> tuple[tuple[Any, Any], ...]:
    pairs = isinstance(layers, Sequence) and all(isinstance(x, Sequence) and len(x) == 2 for x in layers)
    if not pairs or not layers:
        raise ValueError(f"put: layers of {key!r} must be a sequence of a pair (k, v) for each layer, at least one.")
    for x in (x for layer in layers for x in layer):
        if not hasattr(x, "dtype") or x.dtype.name not in SAFETENSORS:
            said = getattr(x, "dtype", type(x).__name__)
            raise ValueError(f"put: layers of {key!r} hold {said}; wanted arrays of {', '.join(SAFETENSORS)}.")
    return tuple((k, v) for k, v in layers)


def _on_device(x: Any) -> bool:
    return hasattr(x, "copy_to_host_async")


def _plain(x: Any) -> np.ndarray:
    """An array of numpy, contiguous and little-endian, copied only if it is not so already."""
    x = np.asarray(x, order="C")
    return x.astype(x.dtype.newbyteorder("<"), copy=False)


def _copied(x: Any) -> Any:
    """The store's own copy, which cannot be written."""
    if not isinstance(x, np.ndarray):
        return type(x)(*(_copied(part) if isinstance(part, np.ndarray) else part for part in x))
    x = x.copy()
    x.flags.writeable = False
    return x
