"""What an offline batch reads and decodes next, bounded by memory: a state machine without any arrays.

Source: BatchLLM, Zheng et al. 2024, arXiv:2412.03594. Ours is how memory is promised, which the paper leaves open: a
request is admitted only if all it may need is free, and a prefix only if any suffix of the groups in memory fits
beside it. So nothing is ever preempted and nothing stalls.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvjax.counts import whole
from kvjax.serve.prefix_plan import Group


class Chunk(NamedTuple):
    """Tokens [start, start + count) of the suffix of request `owner`, or of the prefix of group `owner`."""

    owner: int
    start: int
    count: int


class Iteration(NamedTuple):
    """One pass through the model: a token for each of `decode`, and chunks to be read."""

    decode: tuple[int, ...]  # requests, in the order in which they began to decode
    suffixes: tuple[Chunk, ...]
    prefixes: tuple[Chunk, ...]
    memory: int  # tokens in cache at its end, before what has finished is freed; whole pages


@dataclasses.dataclass
class _Batch:
    """An iteration in the making, and what room there still is in it."""

    tokens: int
    groups: float  # that may still begin to be served with suffix chunks
    each: float  # suffix chunks of one group, in all
    prefix_lanes: float
    suffixes: list[Chunk]
    prefixes: list[Chunk]
    served: dict[int, int]  # suffix chunks of each group

    def has_lane(self, group: int) -> bool:
        """Whether there is room for one more suffix chunk of `group`."""
        return self.served[group] < self.each if group in self.served else self.groups > 0

    def take_lane(self, group: int) -> None:
        """One more suffix chunk of `group`."""
        self.groups -= group not in self.served
        self.served[group] = self.served.get(group, 0) + 1


class Scheduler:
    """Fills iterations with one token of every running request, then chunks of suffixes, then chunks of prefixes.

    A suffix is read from the iteration on that follows the last chunk of its prefix. A request gives its first token in
    the iteration that reads the last chunk of its suffix, and decodes from the next one on until it has given
    `outputs`; the last token is never written into the cache. The prefix of a group is freed with its last member.

    Requests wait in the order of groups and members. Who cannot be admitted holds up those who wait behind for the same
    kind of chunk; but who waits for a row or a lane of their group are passed over.

    Args:
      groups: Of a plan, in the order in which they are to run. Several members without a prefix are packed: they share
        the rows of a group and nothing else.
      suffix_lengths: Tokens of each request that are not of its group's prefix, at least 1. Indexed by member.
      outputs: Tokens to be generated for each request, at most, at least 1. Indexed by member.
      batch_tokens: Tokens of an iteration, at most; hence also requests that run.
      memory: Tokens in cache, at most.
      page: Memory is taken in pages of so many tokens.
      max_resident_groups: Groups in memory at once, at most; less looking ahead. A request without prefix counts only
        if rows_per_group is given: then it takes the rows of a group.
      rows_per_group: Members of a group that run at once, at most.
      suffix_lanes: Of the suffixes in an iteration, (groups, requests of each, tokens of each), at most; a request has
        one chunk.
      prefix_lanes: Of the prefixes, (groups, tokens of each).

    Raises:
      ValueError: If a count is too small, if suffix_lengths and outputs do not match, or if a member is none of the
        requests or in two groups.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        suffix_lengths: Sequence[int],
        outputs: Sequence[int],
        *,
        batch_tokens: int,
        memory: int,
        page: int = 1,
        max_resident_groups: int | None = None,
        rows_per_group: int | None = None,
        suffix_lanes: tuple[int, int, int] | None = None,
        prefix_lanes: tuple[int, int] | None = None,
    ):
        self._batch_tokens = whole("Scheduler", "batch_tokens", batch_tokens, least=1)
        self._memory = whole("Scheduler", "memory", memory, least=1)
        self._page = whole("Scheduler", "page", page, least=1)
        self._most_groups = _limit("max_resident_groups", max_resident_groups)
        self._most_rows = _limit("rows_per_group", rows_per_group)
        self._suffix_lanes = _lanes("suffix_lanes", suffix_lanes, 3)
        self._prefix_lanes = _lanes("prefix_lanes", prefix_lanes, 2)
        self._groups = tuple(Group(*group) for group in groups)
        self._group_of = _group_of(self._groups, suffix_lengths, outputs)

        self._suffix = {i: int(suffix_lengths[i]) for i in self._group_of}
        self._whole = {i: self._suffix[i] + int(outputs[i]) - 1 for i in self._group_of}  # tokens in cache at its end
        self._need = {i: self._pages(count) for i, count in self._whole.items()}
        self._prefix = [self._pages(group.prefix_length) for group in self._groups]
        self._refused = {i for i, g in self._group_of.items() if self._prefix[g] + self._need[i] > self._memory}
        members = [[i for i in group.members if i not in self._refused] for group in self._groups]
        self._tail = [max((self._need[i] for i in own), default=0) for own in members]
        # A request by itself, without prefix, needs nothing kept for it once it is admitted.
        self._by_itself = [
            rows_per_group is None and not group.prefix_length and len(own) == 1
            for group, own in zip(self._groups, members, strict=True)
        ]

        self._waiting = deque(g for g, own in enumerate(members) if own)  # groups, not admitted
        self._pending = [deque(own) for own in members]  # requests, not admitted
        self._left = [len(own) for own in members]  # requests, not finished
        self._rows = [0] * len(members)  # requests, admitted and not finished
        self._resident: dict[int, None] = {}  # groups, admitted and not freed; all dicts here are in order of admission
        self._filling: dict[int, int] = {}  # groups whose prefix is being read: tokens read
        self._ready: dict[int, None] = {}  # groups with their prefix in cache, and pending requests
        self._reading: dict[int, None] = {}  # requests whose suffix is being read
        self._reading_apart: dict[int, None] = {}  # the same, of requests by themselves: they wait among prefixes
        self._running: dict[int, None] = {}  # requests that decode
        self._finished: set[int] = set()
        self._cached = dict.fromkeys(self._group_of, 0)  # tokens of each request
        self._in_use = 0
        self._promised = 0  # in use, or kept free for who is admitted

    @property
    def refused(self) -> tuple[int, ...]:
        """Requests that need more than the whole memory, with their prefix: they never run, and hold up nobody."""
        return tuple(sorted(self._refused))

    @property
    def resident(self) -> tuple[int, ...]:
        """Groups that are admitted and not yet freed, in order of admission."""
        return tuple(self._resident)

    @property
    def in_use(self) -> int:
        """Tokens in cache now, whole pages; what has finished is freed."""
        return self._in_use

    def fits(self, i: int) -> bool:
        """Whether request `i` will run. Raises ValueError if it is of no group."""
        self._known("fits", i)
        return i not in self._refused

    def next(self) -> Iteration | None:
        """What is to be computed next; None when all requests have finished."""
        if len(self._finished) + len(self._refused) == len(self._group_of):
            return None
        decode = tuple(self._running)  # batch_tokens at most: each took one to begin, beside those that ran
        for i in decode:
            self._cache(i, 1)
        left = self._batch_tokens - len(decode)
        batch = _Batch(left, *self._suffix_lanes[:2], self._prefix_lanes[0], [], [], {})
        # Who is admitted goes first: waiting for whom is not, they would never free what those wait for.
        for i in self._reading:
            self._read(batch, i)
        self._admit_ready(batch)
        for i in self._reading_apart:
            self._read(batch, i)
        for g in self._filling:
            self._fill(batch, g)
        self._admit_waiting(batch)
        assert decode or batch.suffixes or batch.prefixes, "a schedule stalled"
        iteration = Iteration(decode, tuple(batch.suffixes), tuple(batch.prefixes), self._in_use)
        self._settle(iteration)
        return iteration

    def ended(self, requests: Iterable[int]) -> None:
        """Frees requests that stopped before their limit in the iteration just done; those at their limit are free.

        Raises:
          ValueError: If one is of no group, or has given no token yet. Then none is freed.
        """
        requests = dict.fromkeys(requests)
        for i in requests:
            self._known("ended", i)
            if i not in self._running and i not in self._finished:
                raise ValueError(f"ended: request {i} has given no token yet. Give those of `decode`, or just read.")
        for i in requests:
            if i in self._running:
                self._finish(i)

    def _known(self, where: str, i: int) -> None:
        if i not in self._group_of:
            raise ValueError(f"{where}: request {i} is of no group. Give the index of a member.")

    def _pages(self, count: int) -> int:
        """Tokens of the pages that hold `count`."""
        return -(-count // self._page) * self._page

    def _cache(self, i: int, count: int) -> None:
        have = self._cached[i]
        self._cached[i] = have + count
        self._in_use += self._pages(have + count) - self._pages(have)

    def _read(self, batch: _Batch, i: int) -> None:
        """Puts a chunk of the suffix of `i` into the batch, if there is room."""
        have = self._cached[i]
        count = min(batch.tokens, self._suffix_lanes[2], self._suffix[i] - have)
        if count and batch.has_lane(self._group_of[i]):
            batch.suffixes.append(Chunk(i, have, count))
            batch.tokens -= count
            batch.take_lane(self._group_of[i])
            self._cache(i, count)

    def _fill(self, batch: _Batch, g: int) -> None:
        """Puts a chunk of the prefix of `g` into the batch, if there is room."""
        have = self._filling[g]
        count = min(batch.tokens, self._prefix_lanes[1], self._groups[g].prefix_length - have)
        if batch.prefix_lanes and count:
            batch.prefixes.append(Chunk(g, have, count))
            batch.tokens -= count
            batch.prefix_lanes -= 1
            self._filling[g] = have + count
            self._in_use += self._pages(have + count) - self._pages(have)

    def _admit_ready(self, batch: _Batch) -> None:
        """Admits requests of groups with their prefix in cache, up to the first that does not fit."""
        for g in list(self._ready):
            if not self._admit_members(batch, g):
                return

    def _admit_members(self, batch: _Batch, g: int) -> bool:
        """Admits requests of one group; whether those of the next one may be admitted too."""
        pending = self._pending[g]
        while pending and self._rows[g] < self._most_rows and batch.served.get(g, 0) < batch.each:
            if not self._admit(batch, pending[0], self._reading):
                return False
            pending.popleft()
        if not pending:
            del self._ready[g]
        return True

    def _admit(self, batch: _Batch, i: int, reading: dict[int, None]) -> bool:
        lane = batch.tokens and batch.has_lane(self._group_of[i])
        if not lane or self._promised + self._need[i] > self._memory:
            return False
        self._promised += self._need[i]
        self._rows[self._group_of[i]] += 1
        reading[i] = None
        self._read(batch, i)
        return True

    def _admit_waiting(self, batch: _Batch) -> None:
        """Admits groups, and requests by themselves, up to the first that does not fit."""
        while self._waiting and batch.tokens:
            g = self._waiting[0]
            if self._by_itself[g]:
                if not self._admit(batch, self._pending[g][0], self._reading_apart):
                    return
                self._pending[g].popleft()
            else:
                # The longest suffix of any group in memory must fit once all that runs has finished.
                tail = max(self._tail[h] for h in (*self._resident, g))
                if len(self._resident) >= self._most_groups or self._promised + self._prefix[g] + tail > self._memory:
                    return
                if self._prefix[g] and not batch.prefix_lanes:
                    return
                self._promised += self._prefix[g]
                self._resident[g] = None
                if self._prefix[g]:
                    self._filling[g] = 0
                    self._fill(batch, g)
                else:
                    self._ready[g] = None
                    self._admit_members(batch, g)
            self._waiting.popleft()

    def _settle(self, iteration: Iteration) -> None:
        """Lets requests decode, and suffixes be read, from the next iteration on; frees who is at the limit."""
        for chunk in iteration.prefixes:
            if self._filling[chunk.owner] == self._groups[chunk.owner].prefix_length:
                del self._filling[chunk.owner]
                self._ready[chunk.owner] = None
        for chunk in iteration.suffixes:
            i = chunk.owner
            if self._cached[i] == self._suffix[i]:
                self._reading.pop(i, None)
                self._reading_apart.pop(i, None)
                self._running[i] = None
        for i in (*iteration.decode, *(chunk.owner for chunk in iteration.suffixes)):
            if i in self._running and self._cached[i] == self._whole[i]:
                self._finish(i)

    def _finish(self, i: int) -> None:
        g = self._group_of[i]
        del self._running[i]
        self._finished.add(i)
        self._promised -= self._need[i]
        self._in_use -= self._pages(self._cached[i])
        self._rows[g] -= 1
        self._left[g] -= 1
        if not self._left[g] and g in self._resident:
            del self._resident[g]
            self._promised -= self._prefix[g]
            self._in_use -= self._prefix[g]


def _limit(name: str, value: int | None) -> float:
    return float("inf") if value is None else whole("Scheduler", name, value, least=1, mend="None sets no limit.")


def _lanes(name: str, lanes: tuple[int, ...] | None, count: int) -> tuple[float, ...]:
    if lanes is None:
        return (float("inf"),) * count
    if len(lanes) != count:
        form = "(groups, requests of each, tokens of each)" if count == 3 else "(groups, tokens of each)"
        raise ValueError(f"Scheduler: {name}={lanes!r} must be {form}, or None.")
    return tuple(whole("Scheduler", f"{name}[{i}]", each, least=1) for i, each in enumerate(lanes))


def _group_of(groups: Sequence[Group], suffix_lengths: Sequence[int], outputs: Sequence[int]) -> dict[int, int]:
    """The group of each member; checks groups, and the lengths of their members."""
    if len(suffix_lengths) != len(outputs):
        raise ValueError(
            f"Scheduler: there are {len(suffix_lengths)} suffix_lengths and {len(outputs)} outputs. Give both for "
            f"every request."
        )
    owner = {}
    for g, (prefix_length, members) in enumerate(groups):
        whole("Scheduler", f"prefix_length of group {g}", prefix_length, least=0)
        for i in members:
            if not 0 <= i < len(outputs):
                raise ValueError(f"Scheduler: group {g} has member {i}, which is outside 0..{len(outputs) - 1}.")
            if i in owner:
                raise ValueError(f"Scheduler: request {i} is in groups {owner[i]} and {g}. Give it to one.")
            owner[i] = g
            whole("Scheduler", f"suffix_lengths[{i}]", suffix_lengths[i], least=1)
            whole("Scheduler", f"outputs[{i}]", outputs[i], least=1)
    return owner
