"""How well a chunk that was cached in one context fits another. Cache-Craft, Agarwal et al. 2025, arXiv:2502.15734.

Host code in f64. Its authors released no code; what is ours is said where it is.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """What a chunk remembers of the context in which it was computed.

    Attributes:
      inter: f64[chunks before it], attention that its tokens gave to each in sum, mean over layers and heads.
      cci: Contextual impact: 1/2 for a chunk that looked at itself only, nearly 1 for one that looked elsewhere.
      ext: f64[tokens], attention that each of its tokens gave to the chunks before it, likewise.
    """

    inter: np.ndarray
    cci: float
    ext: np.ndarray


@dataclasses.dataclass(frozen=True)
class Variant:
    """One cached form of a chunk.

    Attributes:
      name: Of its entry in the store.
      context: The chunks before it, in order, each once.
      before: A digest of all tokens before it.
      statistics: Of that context.
      exact: Whether it was computed in full, after nothing but what was, too.
      score: Of its uses, see `Scores`.
      made: When; a larger number is later.
    """

    name: str
    context: tuple[str, ...]
    before: str
    statistics: Statistics
    exact: bool
    score: float = 1.0
    made: int = 0


class Fit(NamedTuple):
    """How a variant fits.

    Attributes:
      cfo: Cache fix overhead: the share of its tokens to compute again.
      tokens: i64[n], their places in the chunk, ascending: those that looked outside most.
      exact: Whether it is what computing would give; then no token need be computed again.
    """

    cfo: float
    tokens: np.ndarray
    exact: bool


def statistics(mass: np.ndarray, sizes: Sequence[int], chunk: int) -> Statistics:
    """Statistics of one chunk.

    A token's own place counts as its chunk's, and a system prompt as nobody's: both are ours.

    Args:
      mass: [L, tokens of the chunk, C], attention that each gives to each chunk in sum, mean over heads.
      sizes: Tokens of each of the C chunks.
      chunk: Which of them it is.
    """
    mass = np.asarray(mass, np.float64)
    inter = mass[:, :, :chunk].sum(axis=1).mean(axis=0)
    outside = (inter / (sizes[chunk] * np.asarray(sizes[:chunk], np.float64))).sum()
    inside = mass[:, :, chunk].sum(axis=1).mean() / sizes[chunk] ** 2
    return Statistics(inter, 1 / (1 + math.exp(-outside / inside)), mass[:, :, :chunk].sum(axis=2).mean(axis=0))


def overlap(context: Sequence[str], inter: np.ndarray, new: Sequence[str]) -> float:
    """How much of the attention to the old context went to chunks that the new one has, too (beta).

    A chunk that saw nothing before it fits an empty context, and no other: ours.
    """
    total = float(np.sum(inter))
    if not total > 0:
        return float(not new)
    return float(sum(mass for chunk, mass in zip(context, inter, strict=True) if chunk in set(new))) / total


def disorder(context: Sequence[str], new: Sequence[str]) -> float:
    """The share of pairs of common chunks that stand the other way round (gamma)."""
    there = {chunk: i for i, chunk in enumerate(new)}
    places = [there[chunk] for chunk in context if chunk in there]
    pairs = len(places) * (len(places) - 1) // 2
    turned = sum(a > b for i, a in enumerate(places) for b in places[i + 1 :])
    return turned / pairs if pairs else 0.0


def fit(variant: Variant, new: Sequence[str], before: str, *, alpha: float = 1.0) -> Fit:
    """How a variant fits behind other chunks.

    Args:
      variant: Cached.
      new: The chunks before it now, in order, each once.
      before: A digest of all tokens before it now. The paper compares chunks and positions, which a chunk that comes
        twice deceives.
      alpha: Factor of the share.
    """
    inter, cci, ext = variant.statistics
    kept = overlap(variant.context, inter, new) * (1 - disorder(variant.context, new))
    cfo = min(max(alpha * cci * (1 - kept), 0.0), 1.0)
    return Fit(cfo, largest(ext, math.ceil(cfo * len(ext) - 1e-9)), variant.exact and variant.before == before)


def largest(score: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest, ascending; of equals, the first."""
    return np.sort(np.argsort(-np.asarray(score, np.float64), kind="stable")[:count])


def choose(variants: Sequence[Variant], new: Sequence[str], before: str, *, alpha: float = 1.0):
    """The variant that costs least to fix, and its `Fit`; of equals the exact one, then the one used most, and newest.

    Returns:
      (Variant, Fit), or None if there are none.
    """
    fits = [(variant, fit(variant, new, before, alpha=alpha)) for variant in variants]
    if not fits:
        return None
    return min(fits, key=lambda one: (one[1].cfo, not one[1].exact, -one[0].score, -one[0].made, one[0].name))


class Scores:
    """How useful variants have been: each use adds more, the cheaper it was. The increments are ours.

    Args:
      least: CFO of a use that costs nothing.
      decay: Factor of all scores after every `period` uses, so that old favourites leave.
      period: See `decay`.
    """

    def __init__(self, *, least: float = 0.01, decay: float = 0.5, period: int = 10_000):
        self._least, self._decay, self._period = least, decay, period
        self._score: dict[str, float] = {}  # in order of last use
        self._uses = 0

    def __getitem__(self, name: str) -> float:
        return self._score.get(name, 1.0)

    def use(self, name: str, cfo: float = 1.0) -> None:
        """A use at this CFO; 1 for a variant that was made because nothing fitted."""
        self._score[name] = self._score.pop(name, 0.0) + 1 / max(cfo, self._least)
        self._uses += 1
        if self._uses % self._period == 0:
            self._score = {each: score * self._decay for each, score in self._score.items()}

    def worst(self, names: Sequence[str]) -> str:
        """The one to evict: of the lowest score, and of equals the one not used for longest."""
        order = {name: i for i, name in enumerate(self._score)}
        return min(names, key=lambda name: (self[name], order.get(name, -1), name))

    def forget(self, name: str) -> None:
        """It has been evicted."""
        self._score.pop(name, None)


class Focus(NamedTuple):
    """When to stop fixing chunks that the question does not look at; the rule is ours, the observation the paper's.

    Attributes:
      first: The layer from which on the rule is checked.
      repeats: Layers that must agree.
    """

    first: int = 10
    repeats: int = 3


def focused(totals: Sequence[float]) -> frozenset[int]:
    """The chunks before the largest gap in attention per token; one chunk alone is focused."""
    order = sorted(range(len(totals)), key=lambda i: (-totals[i], i))
    gaps = [totals[a] - totals[b] for a, b in zip(order, order[1:], strict=False)]
    return frozenset(order[: 1 + gaps.index(max(gaps))] if gaps else order)
