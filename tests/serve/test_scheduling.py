"""Schedules: a worked example iteration by iteration, and thousands of small ones replayed by a checker."""

import itertools
from collections import Counter

import numpy as np
import pytest

from kvjax.serve.prefix_plan import Group
from kvjax.serve.scheduling import Chunk, Iteration, Scheduler

# The plan of the worked example V1 of test_prefix_plan.py, in its order: groups of 6, 8 and 12 tokens.
LENGTHS = [11, 5, 10, 7, 3, 5]
GROUPS = (Group(2, (1, 4)), Group(4, (3, 5)), Group(9, (0, 2)))
ALONE = tuple(Group(0, (i,)) for i in (4, 1, 5, 3, 2, 0))  # the same without sharing


def scheduler(groups=GROUPS, **settings):
    suffixes = [0] * len(LENGTHS)
    for length, members in groups:
        for i in members:
            suffixes[i] = LENGTHS[i] - length
    return Scheduler(groups, suffixes, [3] * len(LENGTHS), **({"batch_tokens": 8, "memory": 40} | settings))


def run(schedule):
    return list(iter(schedule.next, None))


def tokens(iteration):
    return len(iteration.decode) + sum(chunk.count for chunk in iteration.suffixes + iteration.prefixes)


def test_the_worked_example_iteration_by_iteration():
    assert run(scheduler()) == [
        Iteration((), (), (Chunk(0, 0, 2), Chunk(1, 0, 4), Chunk(2, 0, 2)), 8),
        Iteration((), (Chunk(1, 0, 3), Chunk(4, 0, 1), Chunk(3, 0, 3), Chunk(5, 0, 1)), (), 16),
        Iteration((1, 4, 3, 5), (), (Chunk(2, 2, 4),), 24),
        Iteration((1, 4, 3, 5), (), (Chunk(2, 6, 3),), 31),
        Iteration((), (Chunk(0, 0, 2), Chunk(2, 0, 1)), (), 12),
        Iteration((0, 2), (), (), 14),
        Iteration((0, 2), (), (), 16),
    ]


@pytest.mark.parametrize(
    "groups, memory, resident, iterations, count, peak",
    [
        (GROUPS, 40, None, 7, 38, 31),
        (GROUPS, 24, None, 10, 38, 23),
        (GROUPS, 20, None, 16, 38, 20),
        (GROUPS, 20, 2, 12, 38, None),
        (GROUPS, 20, 1, 13, 38, None),
        (ALONE, 40, None, 9, 53, 29),
        (tuple(sorted(ALONE, key=lambda group: group.members)), 40, None, 9, 53, 30),
    ],
)
def test_worked_examples_take(groups, memory, resident, iterations, count, peak):
    done = run(scheduler(groups, memory=memory, max_resident_groups=resident))
    assert len(done) == iterations
    assert sum(map(tokens, done)) == count
    assert peak in (None, max(iteration.memory for iteration in done))


class Replay:
    """What is in cache, from iterations alone; asserts every rule of a schedule."""

    def __init__(self, groups, suffixes, outputs, settings):
        self.groups, self.suffixes, self.outputs, self.settings = groups, suffixes, outputs, settings
        self.group_of = {i: g for g, group in enumerate(groups) for i in group.members}
        self.prefix, self.cached, self.given = [0] * len(groups), dict.fromkeys(self.group_of, 0), {}
        self.over = set()  # finished, or refused

    def pages(self, count):
        return -(-count // self.settings["page"]) * self.settings["page"]

    def alive(self, g):
        return set(self.groups[g].members) - self.over

    def memory(self):
        whole = sum(self.pages(self.prefix[g]) for g in range(len(self.groups)) if self.alive(g))
        return whole + sum(self.pages(count) for i, count in self.cached.items() if i not in self.over)

    def step(self, iteration):
        most = self.settings
        before, prefixes_before = dict(self.given), list(self.prefix)
        for owner, start, count in iteration.prefixes:
            assert self.alive(owner) and start == self.prefix[owner] and count > 0
            self.prefix[owner] += count
            assert self.prefix[owner] <= self.groups[owner].prefix_length
        for owner, start, count in iteration.suffixes:
            g = self.group_of[owner]
            assert prefixes_before[g] == self.groups[g].prefix_length  # whole, since an earlier iteration
            assert owner not in self.over and start == self.cached[owner] and count > 0
            self.cached[owner] += count
            assert self.cached[owner] <= self.suffixes[owner]
            if self.cached[owner] == self.suffixes[owner]:
                self.given[owner] = 1
        for i in iteration.decode:
            assert i in before and i not in self.over
            self.cached[i] += 1
            self.given[i] += 1
        assert set(iteration.decode) == set(before) - self.over
        for part in (iteration.decode, *([c.owner for c in p] for p in (iteration.suffixes, iteration.prefixes))):
            assert len(set(part)) == len(part)
        assert 0 < tokens(iteration) <= most["batch_tokens"]
        assert iteration.memory == self.memory() <= most["memory"]
        if most["prefix_lanes"]:
            count, wide = most["prefix_lanes"]
            assert len(iteration.prefixes) <= count and all(chunk.count <= wide for chunk in iteration.prefixes)
        if most["suffix_lanes"]:
            count, each, wide = most["suffix_lanes"]
            served = Counter(self.group_of[chunk.owner] for chunk in iteration.suffixes)
            assert len(served) <= count and max(served.values(), default=0) <= each
            assert all(chunk.count <= wide for chunk in iteration.suffixes)
        begun = [i for i, count in self.cached.items() if count and i not in self.over]
        rows = [sum(self.group_of[i] == g for i in begun) for g in range(len(self.groups))]
        assert max(rows) <= (most["rows_per_group"] or max(rows))
        placed = [
            g
            for g, group in enumerate(self.groups)
            if self.alive(g) and (self.prefix[g] or (rows[g] and (most["rows_per_group"] or len(group.members) > 1)))
        ]
        assert len(placed) <= (most["max_resident_groups"] or len(placed))
        self.over |= {i for i in self.given if self.given[i] == self.outputs[i]}


def draw(rng):
    """Groups, suffixes and outputs; members are not in order, and some requests are of no group."""
    total = int(rng.integers(1, 13))
    names = rng.permutation(total + 2)[:total].tolist()
    groups = []
    while names:
        size = int(rng.integers(1, 6))
        groups.append(Group(int(rng.integers(1, 13)) if rng.random() < 0.6 else 0, tuple(names[:size])))
        names = names[size:]
    return groups, rng.integers(1, 9, size=total + 2).tolist(), rng.integers(1, 6, size=total + 2).tolist()


def limit(rng, most):
    return int(rng.integers(1, most + 1)) if rng.random() < 0.5 else None


def test_no_schedule_stalls_or_breaks_a_rule_however_tight_its_limits():
    rng = np.random.default_rng(0)
    refused = stopped = 0
    for _ in range(3000):
        groups, suffixes, outputs = draw(rng)
        page = int(rng.integers(1, 5))
        settings = {
            "batch_tokens": int(rng.integers(1, 17)),
            "page": page,
            "max_resident_groups": limit(rng, 3),
            "rows_per_group": limit(rng, 3),
            "suffix_lanes": tuple(rng.integers(1, (4, 4, 6)).tolist()) if rng.random() < 0.5 else None,
            "prefix_lanes": (int(rng.integers(1, 3)), int(rng.integers(1, 6))) if rng.random() < 0.5 else None,
        }
        replay = Replay(groups, suffixes, outputs, settings)
        needs = {
            i: replay.pages(groups[g].prefix_length) + replay.pages(suffixes[i] + outputs[i] - 1)
            for i, g in replay.group_of.items()
        }
        largest = max(needs.values())
        # Half of them have just what the largest request needs; some have less, and must refuse it alone.
        settings["memory"] = max(1, largest + int(rng.choice([0, 0, 0, 1, 10, 40, -1, -5])))
        schedule = Scheduler(groups, suffixes, outputs, **settings)
        replay.over = {i for i, need in needs.items() if need > settings["memory"]}
        assert schedule.refused == tuple(sorted(replay.over))
        assert all(schedule.fits(i) == (i not in replay.over) for i in needs)
        refused += len(replay.over)
        stops = rng.random() < 0.3
        for iteration in iter(schedule.next, None):
            replay.step(iteration)
            assert all(replay.prefix[g] or not groups[g].prefix_length for g in schedule.resident)
            if stops:
                ended = [i for i in replay.given if i not in replay.over and rng.random() < 0.3]
                schedule.ended(ended)
                replay.over |= set(ended)
                stopped += len(ended)
            assert schedule.in_use == replay.memory()
        assert replay.over == set(replay.group_of)
        assert schedule.in_use == 0 and schedule.resident == ()
        served = {g for i, g in replay.group_of.items() if needs[i] <= settings["memory"]}
        assert replay.prefix == [group.prefix_length if g in served else 0 for g, group in enumerate(groups)]
    assert refused > 100 and stopped > 100


def test_memory_of_those_that_stopped_is_free_for_the_next_iteration():
    schedule = Scheduler([Group(0, (0,)), Group(0, (1,))], [4, 4], [9, 9], batch_tokens=8, memory=12)
    assert schedule.next() == Iteration((), (Chunk(0, 0, 4),), (), 4)
    assert schedule.next() == Iteration((0,), (), (), 5)  # the other waits: 12 + 12 tokens
    schedule.ended([0])
    assert schedule.next() == Iteration((), (Chunk(1, 0, 4),), (), 4)


def test_ended_takes_those_at_their_limit_too():
    schedule = Scheduler([Group(0, (0,))], [2], [1], batch_tokens=8, memory=2)
    schedule.next()
    schedule.ended([0])
    assert schedule.next() is None


def test_no_more_begin_than_an_iteration_can_decode():
    schedule = Scheduler([Group(0, (i,)) for i in range(3)], [1] * 3, [3] * 3, batch_tokens=2, memory=9)
    assert [iteration.decode for iteration in run(schedule)] == [(), (0, 1), (0, 1), (), (2,), (2,)]


def test_a_full_group_does_not_hold_up_the_next_one():
    groups = [Group(1, (0, 1, 2)), Group(1, (3, 4))]
    schedule = Scheduler(groups, [1] * 5, [2] * 5, batch_tokens=8, memory=99, rows_per_group=1)
    owners = [[chunk.owner for chunk in iteration.suffixes] for iteration in run(schedule)]
    assert owners == [[], [0, 3], [], [1, 4], [], [2], []]


def test_packed_requests_start_at_once_and_take_one_place_among_groups():
    groups = [Group(0, (0, 1, 2)), Group(4, (3, 4))]
    schedule = Scheduler(groups, [2] * 5, [2] * 5, batch_tokens=8, memory=99, max_resident_groups=1, rows_per_group=2)
    first = schedule.next()
    assert [chunk.owner for chunk in first.suffixes] == [0, 1] and not first.prefixes
    assert schedule.resident == (0,)
    owners = [sorted({chunk.owner for chunk in iteration.prefixes}) for iteration in run(schedule)]
    assert owners == [[], [], [], [1], [], []]  # its prefix waits until the third one is done


def test_chunks_are_as_wide_as_their_lanes():
    schedule = Scheduler(
        [Group(5, (0, 1))], [4, 4], [1, 1], batch_tokens=99, memory=99, suffix_lanes=(1, 2, 3), prefix_lanes=(2, 4)
    )
    assert [(iteration.suffixes, iteration.prefixes) for iteration in run(schedule)] == [
        ((), (Chunk(0, 0, 4),)),
        ((), (Chunk(0, 4, 1),)),
        ((Chunk(0, 0, 3), Chunk(1, 0, 3)), ()),
        ((Chunk(0, 3, 1), Chunk(1, 3, 1)), ()),
    ]


def test_memory_is_taken_in_pages():
    schedule = Scheduler([Group(4, (0, 1))], [3, 1], [3, 1], batch_tokens=99, memory=99, page=4)
    assert [iteration.memory for iteration in run(schedule)] == [4, 12, 8, 12]


def test_who_never_fits_is_refused_and_the_others_run():
    groups = [Group(4, (0, 1)), Group(9, (2, 3)), Group(0, (4,))]
    schedule = Scheduler(groups, [1, 7, 1, 1, 9], [1] * 5, batch_tokens=8, memory=9)
    assert schedule.refused == (1, 2, 3)
    assert [schedule.fits(i) for i in range(5)] == [True, False, False, False, True]
    done = run(schedule)
    assert [chunk.owner for iteration in done for chunk in iteration.prefixes] == [0]
    assert sorted({chunk.owner for iteration in done for chunk in iteration.suffixes}) == [0, 4]


def test_nothing_to_do_is_over_at_once():
    assert Scheduler([], [], [], batch_tokens=1, memory=1).next() is None
    assert Scheduler([Group(0, (0,))], [2], [1], batch_tokens=1, memory=1).next() is None


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"memory": 0}, "memory=0 must be at least 1"),
        ({"page": 0}, "page=0 must be at least 1"),
        ({"page": 1.5}, "page=1.5 must be a whole number"),
        ({"max_resident_groups": 0}, "max_resident_groups=0 must be at least 1"),
        ({"rows_per_group": 0}, "rows_per_group=0 must be at least 1"),
        ({"suffix_lanes": (0, 4, 4)}, r"suffix_lanes\[0\]=0 must be at least 1"),
        ({"prefix_lanes": (4, 0)}, r"prefix_lanes\[1\]=0 must be at least 1"),
        ({"prefix_lanes": (4,)}, r"prefix_lanes=\(4,\) must be"),
    ],
)
def test_wrong_limits_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        scheduler(**settings)


@pytest.mark.parametrize(
    "groups, suffixes, outputs, said",
    [
        ([Group(0, (0,))], [1], [1, 1], "1 suffix_lengths and 2 outputs"),
        ([Group(0, (1,))], [1], [1], r"member 1, which is outside 0\.\.0"),
        ([Group(0, (0,)), Group(1, (1, 0))], [1, 1], [1, 1], "request 0 is in groups 0 and 1"),
        ([Group(-1, (0,))], [1], [1], "prefix_length of group 0=-1 must be at least 0"),
        ([Group(0, (0,))], [0], [1], r"suffix_lengths\[0\]=0 must be at least 1"),
        ([Group(0, (0,))], [1], [0], r"outputs\[0\]=0 must be at least 1"),
    ],
)
def test_groups_and_lengths_that_do_not_match_are_refused(groups, suffixes, outputs, said):
    with pytest.raises(ValueError, match=said):
        Scheduler(groups, suffixes, outputs, batch_tokens=1, memory=9)


def test_what_has_not_begun_cannot_end_and_loses_nothing():
    schedule = scheduler()
    done = list(itertools.islice(iter(schedule.next, None), 2))
    with pytest.raises(ValueError, match="ended: request 0 has given no token yet"):
        schedule.ended([1, 0])
    with pytest.raises(ValueError, match="ended: request 6 is of no group"):
        schedule.ended([6])
    with pytest.raises(ValueError, match="fits: request 6 is of no group"):
        schedule.fits(6)
    assert done + run(schedule) == run(scheduler())
