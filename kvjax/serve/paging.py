"""Which pages of a cache stay: paging with predictions of one bit, and its rivals.

A page is what comes and goes as a whole: a block of a key-value cache, or a cached passage. `Pages` knows what is in,
what is pinned, what must not leave before its children, and how much room is left; a rule says what leaves. Each maker
below is one rule. Only keys are held here, nothing of the pages themselves.

    pages = follow_the_leader([mark_zero(64), lru(64)])
    for page, bit in requests:
        for gone in pages.request(page, prediction=bit):
            ...  # free what is stored of it

A bit of 1 says that the page may as well leave: the best choice in hindsight would throw it out before its next
request (`flush_when_zero`, `mark_zero`), or the next phase, of k distinct pages, does not ask for it
(`mark_and_predict`). Without a prediction it counts as 1. Predictions of a next request are times, of any clock;
without one it is never.

Sources: Antoniadis et al. 2022, arXiv:2210.02775, of which only the bounds could be read; the pseudo-code is a
reconstruction that was checked against them. Rivals: Belady 1966; Fiat et al. 1991 (Marker, combinations); Lykouris and
Vassilvitskii 2018, arXiv:1802.05399; Rohatgi 2020, arXiv:1910.12172; Wei 2020, arXiv:2005.13716; arXiv:2507.16242
(Guard). Beyond the papers, which know neither: "some page" and "every page" range over those that may leave, and
pages of unequal sizes leave until there is room, where no bound holds any more.
"""

import contextlib
import heapq
import math
import numbers
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvjax.counts import flag, real, whole

Page = Hashable


class Full(ValueError):
    """Nothing may leave that would make room; nothing has changed."""


class Request(NamedTuple):
    """A touch of `page`: the prediction as the rule has read it, and the page without which it is useless."""

    page: Page
    prediction: Any
    size: int
    parent: Page | None


class Rule(Protocol):
    """Who leaves. Follows what is in the cache through `settle` and `drop`."""

    def read(self, page: Page, prediction: Any) -> Any:
        """The prediction as the rule uses it. Raises ValueError if it makes no sense; changes nothing."""

    def victims(self, asked: Request, pages: "Pages") -> list[Page]:
        """Pages to throw out for the page that is missing, at least one; each of them `pages.may_leave`."""

    def settle(self, asked: Request, hit: bool) -> Iterable[Page] | None:
        """Takes note of a request whose page is now in; returns what should leave already, if it may."""

    def drop(self, page: Page, evicted: bool) -> None:
        """Forgets a page that left, by the rule's choice or else."""


class Pages:
    """The keys in a cache, and the rule by which they leave.

    Attributes:
      capacity: Units of size that fit in.
      rule: Who leaves.
      used: Units in use.
      evictions: Pages thrown out so far.
    """

    def __init__(self, capacity: int, rule: Rule):
        self.capacity, self.rule = capacity, rule
        self.used = self.evictions = 0
        self._held = 0  # units of pages that cannot leave, whatever leaves before them
        self._size: dict[Page, int] = {}
        self._parent: dict[Page, Page] = {}
        self._children: dict[Page, set[Page]] = {}  # those that are in; the parent may be elsewhere
        self._pins = Counter()
        self._holds = Counter()  # pins of a page, and its children that are held

    def __contains__(self, page: Page) -> bool:
        return page in self._size

    def __len__(self) -> int:
        return len(self._size)

    def request(self, page: Page, *, prediction: Any = None, size: int = 1, parent: Page | None = None) -> list[Page]:
        """Touches a page, and brings it in if it is missing.

        A chain of pages is asked for from its root on; `parent` stays at least as long as `page` does. It need not be
        in this cache, and then may come later.

        Args:
          page: The page.
          prediction: What is known of its future; each maker says what it wants. Belongs to the latest request.
          size: Units that it takes. Counts, as `parent` does, when the page comes in.
          parent: The page before it in its chain.

        Returns:
          The pages that must leave, in order and already forgotten.

        Raises:
          Full: If what may leave does not make room.
          ValueError: If prediction, size or parent make no sense. In both cases nothing has changed.
        """
        size = whole("request", "size", size, least=1)
        if parent == page:
            raise ValueError(f"request: parent={parent!r} is the page itself. The first page of a chain has none.")
        asked = Request(page, self.rule.read(page, prediction), size, parent)
        hit, gone = page in self, []
        if not hit:
            with self._holding(parent):
                if self._held + size > self.capacity:
                    raise Full(
                        f"request: size={size} of page {page!r} does not fit into capacity={self.capacity} beside "
                        f"{self._held} that are pinned or before it in its chain. Unpin pages, or raise the capacity."
                    )
                while self.used + size > self.capacity:
                    gone += self._throw_out(self.rule.victims(asked, self))
            self._bring_in(asked)
        return gone + self._throw_out(filter(self.may_leave, self.rule.settle(asked, hit) or ()))

    def pin(self, page: Page) -> None:
        """Keeps a page, and so those before it in its chain, until it is unpinned as often. ValueError if not in."""
        if page not in self:
            raise ValueError(f"pin: {page!r} is not in the cache. Request it first.")
        self._pins[page] += 1
        self._hold(page, 1)

    def unpin(self, page: Page) -> None:
        """Takes back one `pin`. Raises ValueError if there is none."""
        if not self._pins[page]:
            raise ValueError(f"unpin: {page!r} is not pinned. Each unpin takes back one pin.")
        self._pins[page] -= 1
        self._hold(page, -1)

    def remove(self, page: Page) -> None:
        """Forgets a page that is gone for another reason, pins or not; nothing happens if it is not in."""
        if page in self:
            self._take_out(page, evicted=False)

    def may_leave(self, page: Page) -> bool:
        """Whether it is in, not pinned, and no parent of a page that is in."""
        return page in self._size and not self._holds[page] and not self._children.get(page)

    def _throw_out(self, victims: Iterable[Page]) -> list[Page]:
        victims = list(victims)
        for victim in victims:
            self._take_out(victim, evicted=True)
        self.evictions += len(victims)
        return victims

    def _bring_in(self, asked: Request) -> None:
        page, parent = asked.page, asked.parent
        self._size[page] = asked.size
        self.used += asked.size
        if parent is not None:
            self._parent[page] = parent
            self._children.setdefault(parent, set()).add(page)
        # Its children may have come before it: in a slower tier tails arrive first.
        self._hold(page, sum(self._holds[child] > 0 for child in self._children.get(page, ())))

    def _take_out(self, page: Page, evicted: bool) -> None:
        self._hold(page, -self._holds[page])
        self.used -= self._size.pop(page)
        del self._pins[page], self._holds[page]
        parent = self._parent.pop(page, None)
        if parent is not None:
            self._children[parent].discard(page)
            if not self._children[parent]:
                del self._children[parent]
        self.rule.drop(page, evicted)

    def _hold(self, page: Page, more: int) -> None:
        """Adds to the holds of a page; whether there are any counts for its parent, and so on up."""
        while more and page in self:
            before, self._holds[page] = self._holds[page], self._holds[page] + more
            more = bool(self._holds[page]) - bool(before)
            self._held += more * self._size[page]
            page = self._parent.get(page)

    @contextlib.contextmanager
    def _holding(self, page: Page | None):
        """A parent must not leave to make room for its child."""
        self._hold(page, 1)
        try:
            yield
        finally:
            self._hold(page, -1)


# ---- the makers ----


def lru(capacity: int) -> Pages:
    """Throws out the least recently requested page. At most k times the cost of the best choice, in hindsight."""
    return Pages(_capacity("lru", capacity), _Queue(refresh=True))


def fifo(capacity: int) -> Pages:
    """Throws out the page that came first. At most k times the cost of the best choice."""
    return Pages(_capacity("fifo", capacity), _Queue(refresh=False))


def flush_when_full(capacity: int) -> Pages:
    """Throws out all pages when there is no room. A reference; no cache should."""
    return Pages(_capacity("flush_when_full", capacity), _FlushWhenZero(lazy=False, read=_zero))


def flush_when_zero(capacity: int, *, lazy: bool = True) -> Pages:
    """Throws out the least recently requested page whose bit is 1; flushes when there is none.

    OPT + (k - 1) e0 + e1 faults at most, of e0 bits that are wrongly 0 and e1 wrongly 1. Not robust: by itself it
    believes any number of wrong bits. O(1) a request, and a step for each page that it passes over.

    Args:
      capacity: Units that fit in.
      lazy: To flush is to set all bits to 1, which never costs more; False throws everything out.
    """
    return Pages(
        _capacity("flush_when_zero", capacity), _FlushWhenZero(flag("flush_when_zero", "lazy", lazy), read=_bit)
    )


def mark_zero(capacity: int, *, seed: int = 0, lazy: bool = True, replay: bool = False) -> Pages:
    """Marks pages whose bit is 0; throws out pages whose bit is 1, or else a random one that has no mark.

    OPT + 2 H_k e0 + e1 faults at most, in expectation, of e0 bits that are wrongly 0 and e1 wrongly 1. Not robust by
    itself; all bits 0 make it `marker`. O(1) a request, amortised.

    Args:
      capacity: Units that fit in.
      seed: Of the draws.
      lazy: A page of bit 1 stays until there is need of room, the least recently requested goes first. False throws it
        out at once, so that `request` may return the page that it was asked for.
      replay: Draws as `simulate` does, in O(k) and for whole numbers as pages alone.
    """
    return Pages(
        _capacity("mark_zero", capacity), _MarkZero(_Draws("mark_zero", seed, replay), flag("mark_zero", "lazy", lazy))
    )


def mark_and_predict(capacity: int, *, seed: int = 0, replay: bool = False) -> Pages:
    """Marker, which throws out a page whose bit is 1 if one without a mark has it.

    A bit of 1 says that the next phase, of k distinct pages, does not ask for the page. In expectation 2 OPT + H_k e0
    + e1 faults at most, with errors counted at the last request of each page in a phase, and always O(log k) times OPT.

    Args:
      capacity: Units that fit in.
      seed: Of the draws.
      replay: As in `mark_zero`.
    """
    return Pages(_capacity("mark_and_predict", capacity), _Marker(_Draws("mark_and_predict", seed, replay), read=_bit))


def marker(capacity: int, *, seed: int = 0, replay: bool = False) -> Pages:
    """Throws out a random page of those not requested in this phase. At most 2 H_k - 1 times OPT, in expectation."""
    return Pages(_capacity("marker", capacity), _Marker(_Draws("marker", seed, replay), read=_zero))


def belady(capacity: int, trace: Sequence[Page]) -> Pages:
    """The best choice in hindsight, for unit pages: throws out what is requested last of all, in `trace`.

    Its requests must be those of `trace`, in order. Of pages that never return the smallest leaves.
    """
    return Pages(_capacity("belady", capacity), _Belady(list(trace)))


def blind_oracle(capacity: int) -> Pages:
    """Throws out the page whose predicted next request is last. Not robust. O(log k) a request.

    Of equal predictions the smallest page leaves, here and below: pages must be of a kind that has an order.
    """
    return Pages(_capacity("blind_oracle", capacity), _Farthest(read=_time))


def predictive_marker(capacity: int, *, seed: int = 0) -> Pages:
    """Marker, which believes the predicted next requests until a chain of evictions is longer than H_k."""
    capacity = _capacity("predictive_marker", capacity)
    limit = sum(1 / i for i in range(1, capacity + 1)) if capacity < 1e4 else math.log(capacity) + 0.5772156649
    return Pages(capacity, _PredictiveMarker(_Draws("predictive_marker", seed), limit))


def lmarker(capacity: int, *, seed: int = 0) -> Pages:
    """Marker, which believes the predicted next requests where what comes in was not here when the phase began."""
    return Pages(_capacity("lmarker", capacity), _PredictiveMarker(_Draws("lmarker", seed), limit=1))


def guard(capacity: int, *, seed: int = 0) -> Pages:
    """Believes the predicted next requests, but keeps for a phase what it threw out in it and had to bring back.

    OPT with true predictions, and at most 2 H_(k-1) + 2 times OPT with any, in expectation.
    """
    return Pages(_capacity("guard", capacity), _Guard(_Draws("guard", seed)))


def greedy_dual(capacity: int) -> Pages:
    """For pages of unequal size and cost: throws out the least of clock + requests * cost / size.

    The clock is that of the last page thrown out. A prediction is the cost of bringing the page back, in any unit and
    by default its size. The requests count while the page is in.

    Source: greedy-dual-size-frequency, as in RAGCache, arXiv:2404.12457.
    """
    return Pages(_capacity("greedy_dual", capacity), _GreedyDual())


def combine(shadows: Sequence[Pages], weights: Sequence[float] | None = None) -> Pages:
    """Follows several policies so that none is much better: at most F_i / w_i faults, whatever the predictions.

    Each policy runs beside, on keys alone, and F_i are its own faults. Each eviction is charged to one of them, by
    weight, and takes the least recently requested page that this one does not hold.

    Args:
      shadows: New policies of equal capacity, the predictor first. They belong to the combination from now on, take
        the same predictions, and know nothing of pins.
      weights: Positive, one a policy, of sum 1; None gives all the same. (1/2, 1/2) costs at most twice the better;
        (1/(1+e), e/(1+e)) at most 1+e times the first and 1+1/e times the second.
    """
    shadows = _shadows("combine", shadows)
    weights = [Fraction(1, len(shadows))] * len(shadows) if weights is None else _weights(weights, len(shadows))

    def pick(rule: _Combination) -> int:
        return min(range(len(weights)), key=lambda i: (rule.charged[i] + 1) / weights[i])

    return Pages(shadows[0].capacity, _Combination(shadows, pick))


def follow_the_leader(shadows: Sequence[Pages], *, hysteresis: float = 0.0) -> Pages:
    """Follows the first policy until its faults are above 1 + `hysteresis` times those of another; then that one.

    As `combine`, but a heuristic: no bound of twice the better. It keeps what a good predictor gains.
    """
    shadows = _shadows("follow_the_leader", shadows)
    factor = 1 + real("follow_the_leader", "hysteresis", hysteresis, least=0)

    def pick(rule: _Combination) -> int:
        best = min((i for i in range(len(shadows)) if i != rule.followed), key=lambda i: rule.faults[i])
        return best if rule.faults[rule.followed] > factor * rule.faults[best] else rule.followed

    return Pages(shadows[0].capacity, _Combination(shadows, pick))


# ---- where bits come from ----


def bits_of_gaps(gaps: Any, *, residence: float) -> np.ndarray:
    """Discard bits from reuse: 1 where a page is expected back later than a page stays in this cache.

    Args:
      gaps: Predicted times until the next request, [...]; inf for never.
      residence: Mean time from coming in to leaving, by the same clock.

    Returns:
      u8[...].
    """
    gaps = np.asarray(gaps, np.float64)
    if np.isnan(gaps).any() or (gaps < 0).any():
        raise ValueError("bits_of_gaps: gaps must be 0 or above, or inf; some are negative or nan.")
    return (gaps > real("bits_of_gaps", "residence", residence, least=0)).astype(np.uint8)


def bits_of_scores(scores: Any, page: int, *, threshold: float = 0.5) -> np.ndarray:
    """Discard bits from retaining heads or gates: 1 where no head wants any token of the page.

    Args:
      scores: What heads say of each token, higher stays, f[..., tokens]: layers and heads in front.
      page: Tokens of a page; the last page may have fewer.
      threshold: Below it a token may go. A wrong 0 costs more than a wrong 1, so rather higher than accuracy asks for.

    Returns:
      u8[pages].
    """
    page, scores = whole("bits_of_scores", "page", page, least=1), np.asarray(scores, np.float32)
    threshold = real("bits_of_scores", "threshold", threshold)
    if not scores.ndim or not scores.size or np.isnan(scores).any():
        raise ValueError(
            f"bits_of_scores: scores of shape {scores.shape} must be numbers f[..., tokens], none of them nan."
        )
    best = scores.reshape(-1, scores.shape[-1]).max(axis=0)  # so one head that wants a token keeps it
    return (np.maximum.reduceat(best, np.arange(0, len(best), page)) < threshold).astype(np.uint8)


class Reuse:
    """Predicts bits from how often pages were requested so far, and from how long they stay in one cache.

    A page that was first seen t requests ago and asked for n times since is expected back after t / n requests; one
    that is new, never.

    Args:
      memory: Pages whose requests are remembered; those longest unseen are forgotten.
    """

    def __init__(self, memory: int = 100_000):
        self._memory = whole("Reuse", "memory", memory, least=1)
        self._seen: OrderedDict[Page, tuple[int, int]] = OrderedDict()  # first request, requests
        self._since: dict[Page, int] = {}
        self._now, self._left, self._stayed = 0, 0, 0

    def bit(self, page: Page) -> int:
        """Counts a request of `page`; returns the prediction to make it with."""
        self._now += 1
        first, count = self._seen.pop(page, (self._now, 0))
        self._seen[page] = first, count + 1
        if len(self._seen) > self._memory:
            self._since.pop(self._seen.popitem(last=False)[0], None)
        self._since.setdefault(page, self._now)
        gap = (self._now - first) / count if count else math.inf
        return int(gap > self.residence)

    def left(self, pages: Iterable[Page]) -> None:
        """Takes note of pages that have left the cache: what `request` returned."""
        for page in pages:
            self._stayed += self._now - self._since.pop(page, self._now)
            self._left += 1

    @property
    def residence(self) -> float:
        """Mean requests from coming in to leaving; while none has left, those so far."""
        return self._stayed / self._left if self._left else float(self._now)


# ---- the rules ----


class _Queue:
    """By the time of the latest request, or of coming in."""

    def __init__(self, refresh: bool):
        self._refresh, self._queue = refresh, OrderedDict()

    def read(self, page, prediction):
        return None

    def victims(self, asked, pages):
        return [_first(self._queue, pages)]

    def settle(self, asked, hit):
        if self._refresh or not hit:
            self._queue[asked.page] = None
            self._queue.move_to_end(asked.page)

    def drop(self, page, evicted):
        del self._queue[page]


class _FlushWhenZero:
    def __init__(self, lazy: bool, read: Callable):
        self._lazy, self.read = lazy, read
        self._clock = 0
        self._by_bit = (OrderedDict(), OrderedDict())  # page -> time of its latest request, oldest first

    def victims(self, asked, pages):
        zeros, ones = self._by_bit
        oldest = _first(ones, pages)
        if oldest is None and not self._lazy:
            return [page for page in zeros if pages.may_leave(page)]
        if oldest is None:
            merged = sorted([*ones.items(), *zeros.items()], key=lambda item: item[1])  # ones left are pinned, or inner
            self._by_bit = OrderedDict(), OrderedDict(merged)
            oldest = _first(self._by_bit[1], pages)
        return [oldest]

    def settle(self, asked, hit):
        if hit:
            self.drop(asked.page, False)
        self._clock += 1
        self._by_bit[asked.prediction][asked.page] = self._clock

    def drop(self, page, evicted):
        held = self._by_bit[page in self._by_bit[1]]
        del held[page]


class _MarkZero:
    def __init__(self, draws: "_Draws", lazy: bool):
        self._draws, self._lazy = draws, lazy
        self._ones = OrderedDict()  # never marked; least recently requested first
        self._unmarked, self._marked = _Bag(), {}  # a dict, for its order: that of a set differs between processes

    def read(self, page, prediction):
        return _bit(page, prediction)

    def victims(self, asked, pages):
        oldest = _first(self._ones, pages)
        if oldest is not None:
            return [oldest]
        drawn = self._draws.one(self._unmarked, pages)
        if drawn is None:  # a phase ends
            self._unmarked.extend(self._marked)
            self._marked.clear()
            drawn = self._draws.one(self._unmarked, pages)
        return [drawn]

    def settle(self, asked, hit):
        page = asked.page
        if hit:
            self.drop(page, False)
        if asked.prediction == 0:
            self._marked[page] = None
            return ()
        self._ones[page] = None
        return () if self._lazy else (page,)

    def drop(self, page, evicted):
        self._ones.pop(page, None)
        self._marked.pop(page, None)
        self._unmarked.discard(page)


class _Marker:
    def __init__(self, draws: "_Draws", read: Callable):
        self._draws, self.read = draws, read
        self._unmarked = _Bag(), _Bag()  # by bit
        self._marked: dict[Page, int] = {}

    def victims(self, asked, pages):
        drawn = self._draw(pages)
        if drawn is None:  # a phase ends
            for bit, bag in enumerate(self._unmarked):
                bag.extend(page for page, own in self._marked.items() if own == bit)
            self._marked.clear()
            drawn = self._draw(pages)
        return [drawn]

    def _draw(self, pages):
        zeros, ones = self._unmarked
        one = self._draws.one(ones, pages)
        return self._draws.one(zeros, pages) if one is None else one

    def settle(self, asked, hit):
        self.drop(asked.page, False)
        self._marked[asked.page] = asked.prediction

    def drop(self, page, evicted):
        self._marked.pop(page, None)
        for bag in self._unmarked:
            bag.discard(page)


class _Farthest:
    def __init__(self, read: Callable):
        self.read, self._heap = read, _Heap()

    def victims(self, asked, pages):
        return [self._heap.first(pages)]

    def settle(self, asked, hit):
        self._heap.push(asked.page, -asked.prediction)

    def drop(self, page, evicted):
        self._heap.discard(page)


class _Belady:
    def __init__(self, trace: list[Page]):
        self._trace, self._now = trace, 0
        self._next, coming = [math.inf] * len(trace), {}
        for i in range(len(trace) - 1, -1, -1):
            self._next[i] = coming.get(trace[i], math.inf)
            coming[trace[i]] = i
        self._farthest = _Farthest(read=self.read)
        self.victims, self.drop = self._farthest.victims, self._farthest.drop

    def read(self, page, prediction):
        if self._now == len(self._trace) or self._trace[self._now] != page:
            wanted = repr(self._trace[self._now]) if self._now < len(self._trace) else "its end"
            raise ValueError(f"belady: page {page!r} was requested where the trace has {wanted}. Follow the trace.")
        return self._next[self._now]

    def settle(self, asked, hit):
        self._now += 1
        self._farthest.settle(asked, hit)


class _PredictiveMarker:
    def __init__(self, draws: "_Draws", limit: float):
        self._draws, self._limit = draws, limit
        self._unmarked, self._farthest = _Bag(), _Heap()  # the same pages
        self._marked: dict[Page, float] = {}
        self._chain: dict[Page, int] = {}  # of pages evicted in this phase: evictions for one another that led to it

    def read(self, page, prediction):
        return _time(page, prediction)

    def victims(self, asked, pages):
        if not any(map(pages.may_leave, self._unmarked)):
            self._new_phase()
        # In this phase only pages that were here when it began leave: a page without a chain was not.
        length = self._chain.get(asked.page, 0) + 1
        if length > self._limit:
            victim = self._draws.one(self._unmarked, pages)
        else:
            victim = self._farthest.first(pages)
        self._chain[victim] = length
        return [victim]

    def _new_phase(self):
        for page, prediction in self._marked.items():
            self._unmarked.add(page)
            self._farthest.push(page, -prediction)
        self._marked.clear()
        self._chain.clear()

    def settle(self, asked, hit):
        self.drop(asked.page, False)
        self._marked[asked.page] = asked.prediction

    def drop(self, page, evicted):
        self._marked.pop(page, None)
        self._unmarked.discard(page)
        self._farthest.discard(page)


class _Guard:
    def __init__(self, draws: "_Draws"):
        self._draws = draws
        self._farthest = _Heap()  # pages that are not guarded
        self._guarded: dict[Page, float] = {}
        self._old = _Bag()  # here since the phase began, and not requested in it
        self._evicted: set[Page] = set()  # in this phase
        self._coming = None  # a page to guard once it is in

    def read(self, page, prediction):
        return _time(page, prediction)

    def victims(self, asked, pages):
        if not any(map(pages.may_leave, self._old)):
            self._new_phase()
        if asked.page in self._evicted:
            self._coming = asked.page
            victim = self._draws.one(self._old, pages)
        else:
            victim = self._farthest.first(pages)
            if victim is None:  # what is not guarded is pinned or inner
                self._new_phase()
                victim = self._farthest.first(pages)
        self._evicted.add(victim)
        return [victim]

    def _new_phase(self):
        for page, prediction in self._guarded.items():
            self._farthest.push(page, -prediction)
        self._guarded.clear()
        self._evicted.clear()
        self._coming = None
        self._old = _Bag()
        self._old.extend(self._farthest)

    def settle(self, asked, hit):
        page = asked.page
        self._old.discard(page)
        if page in self._guarded or page == self._coming:
            self._guarded[page] = asked.prediction
        else:
            self._farthest.push(page, -asked.prediction)
        self._coming = None

    def drop(self, page, evicted):
        self._guarded.pop(page, None)
        self._farthest.discard(page)
        self._old.discard(page)


class _GreedyDual:
    def __init__(self):
        self._heap, self._clock, self._requests = _Heap(), 0.0, Counter()
        self._size: dict[Page, int] = {}

    def read(self, page, prediction):
        return None if prediction is None else real("greedy_dual", "prediction", prediction, least=0)

    def victims(self, asked, pages):
        victim = self._heap.first(pages)
        self._clock = self._heap.key(victim)
        return [victim]

    def settle(self, asked, hit):
        page = asked.page
        self._requests[page] += 1
        size = self._size.setdefault(page, asked.size)
        cost = size if asked.prediction is None else asked.prediction
        self._heap.push(page, self._clock + self._requests[page] * cost / size)

    def drop(self, page, evicted):
        self._heap.discard(page)
        del self._requests[page], self._size[page]


class _Combination:
    """Attributes: faults of each policy, evictions charged to each, and which was followed last."""

    def __init__(self, shadows: list[Pages], pick: Callable[["_Combination"], int]):
        self.shadows, self._pick = shadows, pick
        self.faults, self.charged, self.followed = [0] * len(shadows), [0] * len(shadows), 0
        self._queue, self._clock, self._asked = OrderedDict(), 0, None
        self._outside = [_Heap() for _ in shadows]  # pages that a policy has thrown out, by their latest request

    def read(self, page, prediction):
        for shadow in self.shadows:
            shadow.rule.read(page, prediction)
        return prediction

    def victims(self, asked, pages):
        self._advance(asked)
        self.followed = self._pick(self)
        self.charged[self.followed] += 1
        victim = self._outside[self.followed].first(pages)
        # Always there for unit pages without pins: the policy holds the page that is missing here.
        return [_first(self._queue, pages) if victim is None else victim]

    def settle(self, asked, hit):
        self._advance(asked)
        self._asked = None

    def _advance(self, asked):
        """Lets the policies see a request, once, before anything leaves for it."""
        if asked is self._asked:
            return
        self._asked, page = asked, asked.page
        self._clock += 1
        self._queue[page] = self._clock
        self._queue.move_to_end(page)
        for i, (shadow, outside) in enumerate(zip(self.shadows, self._outside, strict=True)):
            self.faults[i] += page not in shadow
            outside.discard(page)
            gone = [page]
            with contextlib.suppress(Full):  # more of its chain is there than here
                gone += shadow.request(page, prediction=asked.prediction, size=asked.size, parent=asked.parent)
            for one in gone:
                if one in self._queue and one not in shadow:
                    outside.push(one, self._queue[one])

    def drop(self, page, evicted):
        del self._queue[page]
        for shadow, outside in zip(self.shadows, self._outside, strict=True):
            outside.discard(page)
            if not evicted:
                shadow.remove(page)


# ---- structures ----


def _first(queue: Iterable[Page], pages: Pages) -> Page | None:
    """The first that may leave. Passes over pinned and inner pages, a step each."""
    return next((page for page in queue if pages.may_leave(page)), None)


class _Heap:
    """Pages by a key, the smallest first; of equal keys the smallest page. Old keys stay until they surface."""

    def __init__(self):
        self._heap, self._key = [], {}

    def __iter__(self):
        return iter(self._key)

    def key(self, page):
        return self._key[page]

    def push(self, page, key):
        self._key[page] = key
        heapq.heappush(self._heap, (key, page))
        if len(self._heap) > 2 * len(self._key) + 64:
            self._heap = [(key, page) for page, key in self._key.items()]
            heapq.heapify(self._heap)

    def discard(self, page):
        self._key.pop(page, None)

    def first(self, pages: Pages) -> Page | None:
        passed, found = [], None
        while self._heap and found is None:
            key, page = self._heap[0]
            if self._key.get(page) != key:
                heapq.heappop(self._heap)
            elif pages.may_leave(page):
                found = page
            else:
                passed.append(heapq.heappop(self._heap))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found


class _Bag:
    """A set from which one can draw in O(1)."""

    def __init__(self):
        self._items, self._place = [], {}

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)

    def __getitem__(self, i):
        return self._items[i]

    def add(self, page):
        self._place[page] = len(self._items)
        self._items.append(page)

    def extend(self, pages):
        for page in pages:
            self.add(page)

    def discard(self, page):
        place = self._place.pop(page, None)
        if place is not None:
            last = self._items.pop()
            if last != page:
                self._items[place], self._place[last] = last, place


TRIES = 32  # draws before pages that may not leave are sorted out; the result is uniform either way


class _Draws:
    """Draws that depend on the seed and the number of the eviction alone, so that a log can be replayed."""

    def __init__(self, where: str, seed: int, replay: bool = False):
        self._seed, self._replay = whole(where, "seed", seed, least=0), flag(where, "replay", replay)

    def one(self, bag: _Bag, pages: Pages) -> Page | None:
        """A random page of those in `bag` that may leave, or None."""
        if self._replay:
            stream = _mix(self._seed ^ _mix(pages.evictions))
            free = filter(pages.may_leave, bag)
            return min(free, key=lambda page: (_mix(stream ^ _mix(page)), page), default=None)
        for number in range(TRIES if len(bag) else 0):
            page = bag[_index(self._seed, pages.evictions, number, len(bag))]
            if pages.may_leave(page):
                return page
        free = list(filter(pages.may_leave, bag))
        return free[_index(self._seed, pages.evictions, TRIES, len(free))] if free else None


def _index(seed: int, eviction: int, number: int, count: int) -> int:
    """Uniform in 0..count-1."""
    return _mix(_mix(seed ^ _mix(eviction)) ^ _mix(number)) * count >> 32


def _mix(x: int) -> int:
    """`kvjax.draws.mix` of a Python number."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


# ---- what callers can get wrong ----


def _capacity(where: str, capacity: int) -> int:
    return whole(where, "capacity", capacity, least=1, mend="It is the units that fit into the cache.")


def _zero(page: Page, prediction: Any) -> int:
    return 0


def _bit(page: Page, prediction: Any) -> int:
    if prediction is None:
        return 1
    if prediction not in (0, 1):
        raise ValueError(f"request: prediction={prediction!r} for page {page!r} must be a bit, 0 or 1.")
    return int(prediction)


def _time(page: Page, prediction: Any) -> float:
    if prediction is None:
        return math.inf
    if not isinstance(prediction, numbers.Real) or math.isnan(prediction):
        raise ValueError(f"request: prediction={prediction!r} for page {page!r} must be the time of its next request.")
    return float(prediction)


def _shadows(where: str, shadows: Sequence[Pages]) -> list[Pages]:
    shadows = list(shadows)
    if len(shadows) < 2 or len({id(shadow) for shadow in shadows}) < len(shadows):
        raise ValueError(f"{where}: wanted two policies or more, each made anew, and got {len(shadows)}.")
    if len({shadow.capacity for shadow in shadows}) > 1 or any(len(shadow) for shadow in shadows):
        capacities = ", ".join(str(shadow.capacity) for shadow in shadows)
        raise ValueError(f"{where}: the policies must be empty and of equal capacity; theirs are {capacities}.")
    return shadows


def _weights(weights: Sequence[float], count: int) -> list[Fraction]:
    weights = [real("combine", "weights", weight, above=0) for weight in weights]
    if len(weights) != count or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"combine: weights={weights} must be {count} numbers, one a policy, of sum 1.")
    return [Fraction(weight).limit_denominator(10**6) for weight in weights]  # ties stay ties
