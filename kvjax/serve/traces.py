"""Requests for pages, what would have been right to predict of them, and how predictions go wrong.

A trace is i32[T], the pages in the order of their requests; predictions are as long. Bits are u8[T].
"""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from kvjax.counts import real, whole
from kvjax.serve.paging import Reuse, belady, lru

NEVER = 2**31 - 1  # the next request of a page that does not come back


class Errors(NamedTuple):
    """Bits that are wrong: `zeros` are 0 where the truth is 1, `ones` the other way round."""

    zeros: int
    ones: int


# ---- traces ----


def zipf(
    length: int, *, pages: int = 1000, alpha: float = 0.9, swaps: int = 50, every: int = 1000, seed: int = 0
) -> np.ndarray:
    """Independent requests, of which the page of rank r gets a share of r^-alpha; ranks drift.

    Args:
      length: Requests.
      pages: Different pages.
      alpha: 0 is uniform.
      swaps: Random pairs of ranks that change places after each `every` requests.
      every: See `swaps`.
      seed: Of the draws.
    """
    length, every = whole("zipf", "length", length, least=1), whole("zipf", "every", every, least=1)
    random, share = _random("zipf", seed), _shares("zipf", pages, alpha)
    at, parts = np.arange(pages), []
    for start in range(0, length, every):
        if start:
            for i, j in random.integers(pages, size=(swaps, 2)):
                at[[i, j]] = at[[j, i]]
        parts.append(at[random.choice(pages, size=min(every, length - start), p=share)])
    return np.concatenate(parts).astype(np.int32)


def rag(length: int, *, chunks: int = 500, retrieved: int = 5, alpha: float = 1.0, seed: int = 0) -> np.ndarray:
    """Queries that ask for `retrieved` different chunks each, a chunk of rank r with weight r^-alpha.

    Args:
      length: Requests, the last query may be cut short.
      chunks: Different chunks.
      retrieved: Of a query.
      alpha: 0 is uniform.
      seed: Of the draws.
    """
    length, chunks = whole("rag", "length", length, least=1), whole("rag", "chunks", chunks, least=1)
    retrieved = whole("rag", "retrieved", retrieved, least=1)
    if retrieved > chunks:
        raise ValueError(f"rag: retrieved={retrieved} is above chunks={chunks}; a query asks for different chunks.")
    random, share = _random("rag", seed), _shares("rag", chunks, alpha)
    queries = [random.choice(chunks, size=retrieved, replace=False, p=share) for _ in range(-(-length // retrieved))]
    return np.concatenate(queries)[:length].astype(np.int32)


def loop(length: int, *, pages: int = 120) -> np.ndarray:
    """The pages 0, 1, ... `pages` - 1, again and again: the worst for LRU if they do not fit."""
    length, pages = whole("loop", "length", length, least=1), whole("loop", "pages", pages, least=1)
    return np.arange(length, dtype=np.int32) % pages


def pingpong(capacity: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Trace and bits that make one who believes bits miss every time: two pages of bit 1 take turns beside idle ones.

    Returns:
      i32[capacity - 1 + 2 rounds] and its bits: the idle pages come once, with bit 0, and fill all slots but one.
    """
    capacity, rounds = whole("pingpong", "capacity", capacity, least=1), whole("pingpong", "rounds", rounds, least=1)
    idle, turns = np.arange(capacity - 1), np.tile([capacity - 1, capacity], rounds)
    bits = np.repeat([0, 1], [len(idle), len(turns)])
    return np.concatenate([idle, turns]).astype(np.int32), bits.astype(np.uint8)


def numbered(log: Iterable[Hashable]) -> np.ndarray:
    """A log of pages, by whatever names, as a trace: numbers in the order in which names come first."""
    numbers = {}
    return check([numbers.setdefault(page, len(numbers)) for page in log])


# ---- the truth ----


def next_requests(trace: Any) -> np.ndarray:
    """Index of the next request of the same page, i32[T]; `NEVER` if there is none."""
    trace = check(trace)
    following, coming = np.full(len(trace), NEVER, np.int32), {}
    for i in range(len(trace) - 1, -1, -1):
        following[i] = coming.get(trace[i], NEVER)
        coming[trace[i]] = i
    return following


def discard_bits(trace: Any, capacity: int) -> np.ndarray:
    """True discard bits: 1 where the best choice throws the page out between this request and its next one.

    The best choice is `paging.belady`: of pages that never return the smallest leaves first.
    """
    trace = check(trace)
    pages, latest, bits = belady(capacity, trace.tolist()), {}, np.zeros(len(trace), np.uint8)
    for i, page in enumerate(trace.tolist()):
        for gone in pages.request(page):
            bits[latest[gone]] = 1
        latest[page] = i
    return bits


def phases(trace: Any, capacity: int) -> np.ndarray:
    """Number of the phase of each request, i32[T]: longest runs of at most `capacity` different pages."""
    trace, capacity = check(trace), whole("phases", "capacity", capacity, least=1)
    number, now, seen = np.zeros(len(trace), np.int32), 0, set()
    for i, page in enumerate(trace.tolist()):
        if page not in seen and len(seen) == capacity:
            now, seen = now + 1, set()
        seen.add(page)
        number[i] = now
    return number


def phase_bits(trace: Any, capacity: int) -> np.ndarray:
    """True phase bits: 1 where the next phase does not ask for the page; 1 in the last phase."""
    places = list(zip(phases(trace, capacity).tolist(), check(trace).tolist(), strict=True))
    asked = set(places)
    return np.array([(phase + 1, page) not in asked for phase, page in places], np.uint8)


def lasts(trace: Any, capacity: int) -> np.ndarray:
    """Whether a request is the last of its page in its phase, bool[T]: only there phase bits count."""
    return (
        phases(trace, capacity)
        < np.append(phases(trace, capacity), NEVER)[np.minimum(next_requests(trace), len(trace))]
    )


# ---- predictions ----


def flip(bits: Any, probability: float, *, seed: int = 0) -> np.ndarray:
    """Bits, each of which is wrong with `probability`, independently."""
    bits = np.asarray(bits, np.uint8)
    probability = real("flip", "probability", probability, least=0, most=1)
    return bits ^ (_random("flip", seed).random(bits.shape) < probability).astype(np.uint8)


def late(following: Any, sigma: float, *, seed: int = 0) -> np.ndarray:
    """Next requests as someone predicts them who is late by a lognormal time, f64[T]; `NEVER` stays.

    Args:
      following: True times, of `next_requests`.
      sigma: Standard deviation of the logarithm of what is added; 0 adds nothing.
      seed: Of the draws.
    """
    following, sigma = np.asarray(following), real("late", "sigma", sigma, least=0)
    with np.errstate(over="ignore"):  # so late that it is never
        added = np.exp(sigma * _random("late", seed).standard_normal(following.shape)) if sigma else 0.0
    return np.where(following == NEVER, NEVER, following + added)


def reuse_bits(trace: Any, capacity: int) -> np.ndarray:
    """Discard bits that `paging.Reuse` predicts beside an LRU cache of `capacity`: from the past alone, u8[T]."""
    trace = check(trace)
    pages, reuse, bits = lru(capacity), Reuse(), np.zeros(len(trace), np.uint8)
    for i, page in enumerate(trace.tolist()):
        bits[i] = reuse.bit(page)
        reuse.left(pages.request(page))
    return bits


def errors(bits: Any, truth: Any, where: Any = True) -> Errors:
    """Counts wrong bits, at the requests of `where` bool[T] alone: `lasts`, for phase bits."""
    bits, truth = np.asarray(bits, bool), np.asarray(truth, bool)
    if bits.shape != truth.shape:
        raise ValueError(f"errors: bits of shape {bits.shape} and the truth of {truth.shape}; there is one a request.")
    return Errors(int((~bits & truth & where).sum()), int((bits & ~truth & where).sum()))


def check(trace: Any) -> np.ndarray:
    """The trace as i32[T]. Raises ValueError if it is empty, or pages are not whole numbers of 31 bits."""
    found = np.asarray(trace)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(f"trace: {found.dtype}{list(found.shape)} must be a row of whole numbers, one a request.")
    if found.min() < 0 or found.max() > NEVER:
        raise ValueError(f"trace: pages from {found.min()} to {found.max()} must lie in 0..{NEVER}. Number them anew.")
    return found.astype(np.int32)


def _random(where: str, seed: int) -> np.random.Generator:
    return np.random.default_rng(whole(where, "seed", seed, least=0))


def _shares(where: str, pages: int, alpha: float) -> np.ndarray:
    weights = np.arange(1, whole(where, "pages", pages, least=1) + 1) ** -real(where, "alpha", alpha, least=0)
    return weights / weights.sum()
