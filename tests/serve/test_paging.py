"""Paging on the host: the worked example, the oracle, the bounds on all short sequences, and what theory leaves out."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from kvjax.serve import paging, traces
from kvjax.serve.simulate import faults
from tests.oracles import paging as oracle

INF = float("inf")
EXAMPLE = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]  # Belady's sequence
TRUE, PHASE = [0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]  # for three pages
ZEROS, ONES, INVERTED = [0] * 12, [1] * 12, [1 - bit for bit in TRUE]
BAD = [0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0]
NEXT = [5, 6, 10, 11, 8, 9, 12] + [INF] * 5
LATE = [5, 6, 10, 6, 41, 9, 12] + [INF] * 5

BITWISE = {
    "flush_when_zero": paging.flush_when_zero,
    "flush_when_zero, real": lambda k: paging.flush_when_zero(k, lazy=False),
    "mark_zero": paging.mark_zero,
    "mark_zero, at once": lambda k: paging.mark_zero(k, lazy=False),
    "mark_and_predict": paging.mark_and_predict,
}
TIMEWISE = {
    "blind_oracle": paging.blind_oracle,
    "predictive_marker": paging.predictive_marker,
    "lmarker": paging.lmarker,
    "guard": paging.guard,
}
ALONE = {
    "lru": paging.lru,
    "fifo": paging.fifo,
    "flush_when_full": paging.flush_when_full,
    "marker": paging.marker,
}
COMBINED = {
    "combine": lambda k: paging.combine([paging.flush_when_zero(k), paging.lru(k)]),
    "follow_the_leader": lambda k: paging.follow_the_leader([paging.mark_zero(k), paging.lru(k)]),
}
MAKERS = {**BITWISE, **TIMEWISE, **ALONE, **COMBINED, "greedy_dual": paging.greedy_dual}
ORACLES = {
    "flush_when_zero": oracle.flush_when_zero_lazy,
    "flush_when_zero, real": oracle.flush_when_zero,
    "mark_zero": oracle.mark_zero_lazy,
    "mark_zero, at once": oracle.mark_zero,
} | {name: getattr(oracle, name) for name in [*TIMEWISE, *ALONE, "mark_and_predict"]}


@pytest.fixture
def expected(monkeypatch):
    """Expected faults of the real code, the least and the most: every draw is tried with every result."""

    def run(make, trace, predictions, k):
        counts, scripts = {}, [()]
        while scripts:
            script, draws = scripts.pop(), []  # choices made before, and how many there were at each

            def chosen(seed, eviction, number, count, script=script, draws=draws):
                draws.append(count)
                return script[len(draws) - 1] if len(draws) <= len(script) else 0

            monkeypatch.setattr(paging, "_index", chosen)
            pages, missing = make(k), 0
            for page, prediction in zip(trace, predictions, strict=True):
                missing += page not in pages
                pages.request(page, prediction=prediction)
            counts[missing] = counts.get(missing, 0) + Fraction(1, math.prod(draws))
            for i in range(len(script), len(draws)):  # of each choice that was new, the others
                made = (*script, *[0] * (i - len(script)))
                scripts.extend((*made, other) for other in range(1, draws[i]))
        assert sum(counts.values()) == 1
        return sum(missing * share for missing, share in counts.items()), min(counts), max(counts)

    return run


def sequences(length, pages):
    """All of that length, up to names: a page is named by how many came before it."""
    for each in itertools.product(range(pages), repeat=length):
        if all(page <= max(each[:i], default=-1) + 1 for i, page in enumerate(each)):
            yield each


# ---- the worked example; figures of the specification ----


@pytest.mark.parametrize("k, costs", [(3, (7, 10, 9, 12)), (4, (6, 8, 10, 10))])
def test_classic_policies_on_beladys_sequence(k, costs):
    made = paging.belady(k, EXAMPLE), paging.lru(k), paging.fifo(k), paging.flush_when_full(k)
    assert tuple(faults(pages, EXAMPLE).sum() for pages in made) == costs


@pytest.mark.parametrize(
    "name, k, predictions, cost",
    [
        ("marker", 3, ZEROS, (Fraction(28, 3), 7, 12)),
        ("marker", 4, ZEROS, (Fraction(22, 3), 6, 10)),
        ("flush_when_zero, real", 3, TRUE, (7, 7, 7)),
        ("flush_when_zero, real", 3, ZEROS, (12, 12, 12)),
        ("flush_when_zero, real", 3, ONES, (10, 10, 10)),
        ("flush_when_zero, real", 3, BAD, (10, 10, 10)),
        ("flush_when_zero, real", 3, INVERTED, (12, 12, 12)),
        ("flush_when_zero", 3, TRUE, (7, 7, 7)),
        ("flush_when_zero", 3, ZEROS, (10, 10, 10)),
        ("flush_when_zero", 3, ONES, (10, 10, 10)),
        ("flush_when_zero", 3, BAD, (9, 9, 9)),
        ("flush_when_zero", 3, INVERTED, (12, 12, 12)),
        ("mark_zero, at once", 3, TRUE, (7, 7, 7)),
        ("mark_zero, at once", 3, ZEROS, (Fraction(28, 3), 7, 12)),
        ("mark_zero, at once", 3, ONES, (12, 12, 12)),
        ("mark_zero, at once", 3, BAD, (8, None, None)),
        ("mark_zero, at once", 3, INVERTED, (Fraction(65, 6), 10, 12)),
        ("mark_zero", 3, TRUE, (7, 7, 7)),
        ("mark_zero", 3, ZEROS, (Fraction(28, 3), 7, 12)),
        ("mark_zero", 3, ONES, (10, 10, 10)),
        ("mark_zero", 3, BAD, (8, None, None)),
        ("mark_zero", 3, INVERTED, (Fraction(65, 6), 10, 12)),
        ("mark_and_predict", 3, PHASE, (7, 7, 7)),
        ("mark_and_predict", 3, ZEROS, (Fraction(28, 3), 7, 12)),
        ("mark_and_predict", 3, ONES, (Fraction(28, 3), 7, 12)),
        ("mark_and_predict", 3, [*PHASE[:5], 1, *PHASE[6:]], (Fraction(15, 2), 7, 8)),
        ("blind_oracle", 3, NEXT, (7, 7, 7)),
        ("predictive_marker", 3, NEXT, (7, 7, 7)),
        ("lmarker", 3, NEXT, (7, 7, 7)),
        ("guard", 3, NEXT, (7, 7, 7)),
        ("blind_oracle", 3, LATE, (8, 8, 8)),
        ("predictive_marker", 3, LATE, (Fraction(17, 2), 8, 9)),
        ("lmarker", 3, LATE, (Fraction(17, 2), 8, 9)),
        ("guard", 3, LATE, (Fraction(17, 2), 8, 9)),
    ],
)
def test_expected_faults_of_the_worked_example(name, k, predictions, cost, expected):
    found = expected(MAKERS[name], EXAMPLE, predictions, k)
    assert found == tuple(own if own is not None else other for own, other in zip(cost, found, strict=True))
    assert oracle.expected(ORACLES[name], EXAMPLE, predictions, k) == found


def test_true_bits_of_the_worked_example():
    assert traces.discard_bits(EXAMPLE, 3).tolist() == TRUE
    assert traces.phase_bits(EXAMPLE, 3).tolist() == PHASE
    assert [traces.errors(bits, TRUE) for bits in (ZEROS, ONES, BAD, INVERTED)] == [(4, 0), (0, 8), (1, 1), (4, 8)]
    assert (traces.next_requests(EXAMPLE)[:7] + 1).tolist() == NEXT[:7]
    assert (traces.next_requests(EXAMPLE)[7:] == traces.NEVER).all()


@pytest.mark.parametrize(
    "weights, bits, shown, charged",
    [
        ((0.5, 0.5), TRUE, "xxxx..x..xxx", [3, 2]),
        ((0.8, 0.2), TRUE, "xxxx..x..xx.", [4, 0]),
        ((0.5, 0.5), BAD, 8, None),
        ((0.8, 0.2), BAD, 9, None),
    ],
)
def test_combination_of_the_worked_example(weights, bits, shown, charged):
    pages = paging.combine([paging.flush_when_zero(3, lazy=False), paging.lru(3)], weights)
    found = faults(pages, EXAMPLE, bits)
    if charged is None:
        assert found.sum() == shown
    else:
        assert "".join(".x"[missing] for missing in found.astype(int)) == shown
        assert pages.rule.charged == charged


# ---- adversarial families ----


def test_a_loop_one_page_too_long():
    trace = traces.loop(60, pages=5)
    bits = traces.discard_bits(trace, 4)
    half = [paging.flush_when_zero(4, lazy=False), paging.lru(4)]
    assert faults(paging.belady(4, trace.tolist()), trace).sum() == 18
    assert faults(paging.lru(4), trace).sum() == faults(paging.fifo(4), trace).sum() == 60
    assert faults(paging.flush_when_zero(4), trace, bits).sum() == 18
    assert faults(paging.combine(half), trace, bits).sum() == 31
    assert traces.errors(0 * bits, bits) == (14, 0)
    assert faults(paging.flush_when_zero(4, lazy=False), trace, 0 * bits).sum() == 60 == 18 + 3 * 14  # the bound


def test_a_loop_in_random_order_costs_what_the_oracle_expects():
    trace = traces.loop(60, pages=5)
    mean = float(oracle.expected(oracle.mark_zero_lazy, trace.tolist(), [0] * 60, 4)[0])
    assert round(mean, 4) == 33.1667
    found = [faults(paging.mark_zero(4, seed=seed), trace, [0] * 60).sum() for seed in range(400)]
    assert abs(np.mean(found) - mean) < 4 * np.std(found) / 20  # four standard errors of 400 draws


def test_bits_that_are_wrong_without_end_cost_without_end_unless_combined():
    trace, bits = traces.pingpong(4, rounds=30)
    half = [paging.flush_when_zero(4, lazy=False), paging.lru(4)]
    assert faults(paging.belady(4, trace.tolist()), trace).sum() == faults(paging.lru(4), trace).sum() == 5
    assert faults(paging.flush_when_zero(4, lazy=False), trace, bits).sum() == 63
    assert traces.errors(bits, traces.discard_bits(trace, 4)) == (1, 60)  # bound: 5 + 3 + 60
    assert faults(paging.combine(half), trace, bits).sum() == 6


# ---- against the oracle ----


@pytest.mark.parametrize("name", ORACLES)
def test_a_policy_costs_what_the_oracle_expects(name, expected):
    draw = random.Random(name)
    for k, length in ((1, 9), (2, 12), (3, 16), (4, 14)):
        for _ in range(8):
            trace = [draw.randrange(k + 2) for _ in range(length)]
            predictions = [draw.randrange(2 if name in BITWISE else 6) for _ in trace]
            wanted = oracle.expected(ORACLES[name], trace, predictions, k)
            assert expected(MAKERS[name], trace, predictions, k) == wanted, (k, trace, predictions)


@pytest.mark.parametrize("name", [name for name in ORACLES if "mark" not in name and name != "guard"])
def test_a_deterministic_policy_misses_what_the_oracle_misses(name):
    draw = random.Random(name)
    for k in (1, 3, 6):
        trace = [draw.randrange(k + 4) for _ in range(150)]
        predictions = [draw.randrange(2 if name in BITWISE else 99) for _ in trace]
        assert faults(MAKERS[name](k), trace, predictions).tolist() == oracle.pattern(
            ORACLES[name], trace, predictions, k
        )


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2), None])
def test_a_combination_misses_what_the_oracle_misses(weights):
    draw = random.Random(str(weights))
    steps = [oracle.flush_when_zero_lazy, oracle.lru]
    for k in (1, 2, 4, 6):
        trace, bits = [draw.randrange(k + 3) for _ in range(200)], [draw.randrange(2) for _ in range(200)]
        shadows = [paging.flush_when_zero(k), paging.lru(k)]
        pages = paging.combine(shadows, weights) if weights else paging.follow_the_leader(shadows)
        found, charged = oracle.combination(steps, oracle.by_weight(weights) if weights else oracle.leader())(
            trace, bits, k
        )
        assert faults(pages, trace, bits).tolist() == found
        assert pages.rule.charged == charged


def test_the_truth_is_the_oracles_on_random_traces():
    draw = random.Random(0)
    for k in (1, 2, 3, 5):
        trace = [draw.randrange(k + 3) for _ in range(60)]
        found, bits = oracle.lfd(trace, k)
        phase, phase_bits, last = oracle.phase_truth(trace, k)
        assert faults(paging.belady(k, trace), trace).tolist() == found
        assert traces.discard_bits(trace, k).tolist() == bits
        assert traces.phases(trace, k).tolist() == phase
        assert traces.phase_bits(trace, k).tolist() == phase_bits
        assert traces.lasts(trace, k).tolist() == last


# ---- hindsight, and the bounds on all short sequences ----


def test_belady_is_the_best_of_all_choices():  # all sequences of 8 requests for 4 pages, 2 or 3 of which fit
    for trace in sequences(8, 4):
        for k in (2, 3):
            assert faults(paging.belady(k, trace), trace).sum() == oracle.least_faults(trace, k)


def test_more_room_never_costs_belady_more():
    trace = np.random.default_rng(0).integers(12, size=400)
    costs = [faults(paging.belady(k, trace.tolist()), trace).sum() for k in range(1, 13)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("name", ["flush_when_zero", "flush_when_zero, real", "mark_zero", "mark_zero, at once"])
def test_true_bits_cost_nothing(name):
    random = np.random.default_rng(0)
    for k in (1, 2, 5, 8):
        trace = random.integers(k + 4, size=300)
        best = faults(paging.belady(k, trace.tolist()), trace)
        assert faults(MAKERS[name](k), trace, traces.discard_bits(trace, k)).sum() == best.sum()


@pytest.mark.parametrize("name", ["blind_oracle", "guard"])
def test_true_times_cost_nothing(name):
    random = np.random.default_rng(1)
    for k in (1, 2, 5, 8):
        trace = random.integers(k + 4, size=300)
        best = faults(paging.belady(k, trace.tolist()), trace)
        assert faults(MAKERS[name](k), trace, traces.next_requests(trace)).sum() == best.sum()


@pytest.mark.parametrize("name", ["mark_zero", "mark_zero, at once", "mark_and_predict"])
@pytest.mark.parametrize("k, pages, every", [(2, 3, 1), (3, 4, 8)])
def test_expected_faults_stay_below_the_bound_on_all_short_sequences(name, k, pages, every, expected):
    """All sequences of 6 requests for 3 pages (2 fit) with all bits, and for 4 pages (3 fit) with an eighth of them."""
    harmonic = sum(Fraction(1, i) for i in range(1, k + 1))
    for trace in sequences(6, pages):
        found, discard = oracle.lfd(trace, k)
        _, phase, last = oracle.phase_truth(trace, k)
        for number, bits in enumerate(itertools.product((0, 1), repeat=6)):
            if number % every == 0:
                if name == "mark_and_predict":
                    zeros, ones = oracle.wrong(bits, phase, last)
                    bound = 2 * sum(found) + harmonic * zeros + ones
                else:
                    zeros, ones = oracle.wrong(bits, discard)
                    bound = sum(found) + 2 * harmonic * zeros + ones
                assert expected(MAKERS[name], trace, bits, k)[0] <= bound, (trace, bits)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
def test_a_combination_is_never_charged_more_than_a_policys_own_faults(weights):
    draw = random.Random(str(weights))
    for _ in range(60):
        k = draw.randrange(1, 6)
        pages = paging.combine([paging.flush_when_zero(k, lazy=False), paging.lru(k)], weights)
        missing = 0
        for _ in range(60):
            page = draw.randrange(k + 3)
            missing += page not in pages
            pages.request(page, prediction=draw.randrange(2))
            assert all(n <= f for n, f in zip(pages.rule.charged, pages.rule.faults, strict=True))
            assert all(missing <= f / w + 1e-9 for f, w in zip(pages.rule.faults, weights, strict=True))


def test_predictive_marker_draws_when_a_chain_is_longer_than_the_harmonic_number():
    """Pages 0, 1, 2 and 3 are thrown out in this order, and each time the one that has just left is asked for."""
    seen = set()
    for seed in range(20):
        pages = paging.predictive_marker(4, seed=seed)
        for page, time in enumerate((40, 30, 20, 10)):
            pages.request(page, prediction=time)
        assert pages.request(4) == [0]
        assert pages.request(0) == [1]
        seen.add(*pages.request(1))
    assert seen == {2, 3}  # H_4 = 2.08, so the third of the chain is drawn


# ---- what policies become ----


def test_bits_of_1_make_flush_when_zero_lru_fault_by_fault():
    trace = np.random.default_rng(2).integers(12, size=400)
    for lazy in (True, False):
        assert (faults(paging.flush_when_zero(7, lazy=lazy), trace) == faults(paging.lru(7), trace)).all()


def test_bits_of_0_make_a_real_flush_when_zero_flush_when_full():
    trace = np.random.default_rng(3).integers(12, size=400)
    found = faults(paging.flush_when_zero(7, lazy=False), trace, np.zeros(400, int))
    assert (found == faults(paging.flush_when_full(7), trace)).all()


def test_bits_of_0_make_mark_zero_marker_draw_by_draw():
    trace = np.random.default_rng(4).integers(12, size=400)
    found = faults(paging.mark_zero(7, seed=5, replay=True), trace, np.zeros(400, int))
    assert (found == faults(paging.marker(7, seed=5, replay=True), trace)).all()


@pytest.mark.parametrize("name", MAKERS)
def test_short_traces_and_single_pages_miss_first_touches_alone(name):
    assert faults(MAKERS[name](5), [0, 1, 2, 1, 0, 2, 3, 3], [0] * 8).tolist() == [1, 1, 1, 0, 0, 0, 1, 0]
    assert faults(MAKERS[name](1), [4] * 6, [0] * 6).sum() == 1
    assert faults(MAKERS[name](1), [0, 1] * 5, [0] * 10).sum() == 10


@pytest.mark.parametrize("name", [*ALONE, "flush_when_zero", "mark_zero", "guard"])
def test_names_of_pages_change_nothing(name):
    random = np.random.default_rng(5)
    trace, predictions = random.integers(9, size=200), random.integers(2, size=200)
    renamed, named = MAKERS[name](5), MAKERS[name](5)
    for page, prediction in zip(trace.tolist(), predictions.tolist(), strict=True):
        gone = named.request(page, prediction=prediction)
        assert renamed.request(f"{page:03}", prediction=prediction) == [f"{one:03}" for one in gone]


def test_seeds_draw_differently_and_repeat():
    trace = np.random.default_rng(6).integers(20, size=400)
    found = [faults(paging.marker(10, seed=seed), trace) for seed in (1, 1, 2)]
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()


# ---- pins, chains and sizes ----


@pytest.mark.parametrize("name", MAKERS)
def test_what_leaves_was_in_is_not_pinned_and_has_no_children_and_there_is_always_room(name):
    """Random requests, pins and removals, against a model of a few lines."""
    draw = random.Random(name)
    for seed in range(4):
        pages, capacity = MAKERS[name](12), 12
        inside, pins = {}, {}  # page -> (size, parent); pages are tuples, a chain from the root on
        for _ in range(300):
            chain = tuple(draw.randrange(3) for _ in range(draw.randrange(1, 5)))
            act = draw.random()
            if act < 0.7:
                size = 1 if seed < 2 else draw.randrange(1, 5)
                parent = chain[:-1] or None
                held = set()
                for one in [*pins, parent]:
                    while one in inside:  # up to where the chain is not in
                        held.add(one)
                        one = inside[one][1]
                room = capacity - sum(inside[one][0] for one in held)
                if chain not in inside and size > room:
                    with pytest.raises(paging.Full):
                        pages.request(chain, prediction=1, size=size, parent=parent)
                else:
                    hit = chain in inside
                    gone = pages.request(chain, prediction=draw.randrange(2), size=size, parent=parent)
                    inside.setdefault(chain, (size, parent))
                    for one in gone:
                        assert not pins.get(one) and not any(other == one for _, other in inside.values())
                        del inside[one]
                    assert not hit or set(gone) <= {chain}
            elif act < 0.85 and inside:
                held = draw.choice(sorted(inside))
                pages.pin(held)
                pins[held] = pins.get(held, 0) + 1
            elif act < 0.97 and pins:
                held = draw.choice(sorted(pins))
                pages.unpin(held)
                pins[held] -= 1
                if not pins[held]:
                    del pins[held]
            elif inside:
                lost = draw.choice(sorted(inside))
                pages.remove(lost)
                del inside[lost]
                pins.pop(lost, None)
            assert len(pages) == len(inside) and all(one in pages for one in inside)
            assert pages.used == sum(size for size, _ in inside.values()) <= capacity


def test_a_chain_leaves_tail_first():
    pages = paging.lru(3)
    for page, parent in (("a", None), ("b", "a"), ("c", "b")):
        assert pages.request(page, parent=parent) == []
    assert [pages.request(new) for new in "xyz"] == [["c"], ["b"], ["a"]]


def test_a_parent_that_comes_after_its_pinned_child_stays():
    pages = paging.lru(3)
    pages.request("tail", parent="head")
    pages.pin("tail")
    pages.request("head")
    assert pages.request("x") == []
    assert pages.request("y") == ["x"]
    pages.unpin("tail")
    assert pages.request("z") == ["tail"]
    assert pages.request("w") == ["head"]


def test_a_parent_stays_while_its_child_comes_in():
    pages = paging.lru(2)
    pages.request("head")
    pages.request("other")
    assert pages.request("tail", parent="head") == ["other"]


def test_a_phase_ends_when_all_that_may_leave_is_marked():
    pages = paging.marker(3)
    for page in "abc":
        pages.request(page)
    pages.pin("a")
    pages.request("d")  # a phase begins, in which a stays unmarked; one of b and c leaves
    pages.request("b")
    pages.request("c")  # and now both are marked, or new
    assert "a" in pages and pages.request("e") != ["a"]


def test_a_flush_keeps_the_order_of_requests_past_pinned_pages():
    pages = paging.flush_when_zero(3)
    for page, bit in (("a", 1), ("b", 0), ("c", 0)):
        pages.request(page, prediction=bit)
    pages.pin("a")
    assert pages.request("d", prediction=0) == ["b"]  # a flush: c has bit 1 now, as a has
    pages.unpin("a")
    assert [pages.request(page, prediction=0) for page in "ef"] == [["a"], ["c"]]


def test_draws_are_uniform_over_what_is_not_pinned():
    left = []
    for seed in range(900):
        pages = paging.marker(40, seed=seed)
        for page in range(40):
            pages.request(page)
            if page % 13:
                pages.pin(page)
        left += pages.request(40)
    counts = np.array([left.count(page) for page in (0, 13, 26, 39)])
    assert counts.sum() == 900
    assert (abs(counts - 225) < 4 * (900 * 0.25 * 0.75) ** 0.5).all()  # four standard deviations


def test_a_full_cache_is_refused_and_nothing_changes():
    pages = paging.lru(4)
    pages.request("a", size=2)
    pages.request("b", size=1)
    pages.request("c", size=1)
    pages.pin("a")
    with pytest.raises(paging.Full, match=r"size=3 of page 'd' does not fit into capacity=4 beside 2 that are pinned"):
        pages.request("d", size=3)
    assert "b" in pages and "c" in pages and "d" not in pages
    assert pages.request("d", size=2) == ["b", "c"]


def test_only_as_much_leaves_as_is_needed():
    pages = paging.lru(10)
    for page, size in (("a", 3), ("b", 3), ("c", 4)):
        pages.request(page, size=size)
    assert pages.request("d", size=5) == ["a", "b"]
    assert pages.used == 9


def test_greedy_dual_weighs_requests_and_cost_against_size():
    pages = paging.greedy_dual(4)
    pages.request("dear", prediction=8, size=2)  # 0 + 1 x 8 / 2 = 4
    pages.request("often", prediction=1)  # 1, and then 2
    pages.request("often", prediction=1)
    pages.request("cheap", prediction=1.5)  # 1.5
    assert pages.request("new", prediction=1) == ["cheap"]  # the clock is 1.5, so new has 2.5
    assert pages.request("next", prediction=4) == ["often"]
    assert pages.request("last", prediction=9) == ["new"]


@pytest.mark.parametrize("name", MAKERS)
def test_refused_requests_lose_nothing(name):
    pages = MAKERS[name](3)
    for page in (1, 2, 3):
        pages.request(page, prediction=0)
    inside = [page in pages for page in (1, 2, 3)]
    for wrong in ({"size": 0}, {"size": 4}, {"prediction": "often", "size": 1}):
        if name in ALONE and "prediction" in wrong:
            continue  # they read none
        with pytest.raises(ValueError, match="request: |greedy_dual: "):
            pages.request(4, **wrong)
        assert 4 not in pages and [page in pages for page in (1, 2, 3)] == inside


def test_a_combination_forgets_what_was_removed():
    shadows = [paging.mark_zero(2), paging.lru(2)]
    pages = paging.combine(shadows)
    pages.request("a", prediction=0)
    pages.remove("a")
    assert not any("a" in shadow for shadow in shadows)


# ---- where bits come from ----


def test_a_page_expected_back_later_than_pages_stay_may_go():
    assert paging.bits_of_gaps([[0, 5, 5.1], [INF, 4, 6]], residence=5).tolist() == [[0, 0, 1], [1, 0, 1]]


def test_one_head_that_wants_one_token_keeps_its_page():
    scores = np.zeros((2, 3, 7), np.float32)
    scores[1, 2, 4] = 0.7  # a layer, a head, and a token of the second page of three
    assert paging.bits_of_scores(scores, 3).tolist() == [1, 0, 1]
    assert paging.bits_of_scores(scores, 3, threshold=0.8).tolist() == [1, 1, 1]
    assert paging.bits_of_scores(scores - 1, 7, threshold=-0.5).tolist() == [0]


def test_reuse_expects_a_page_back_after_its_mean_gap():
    reuse = paging.Reuse()
    bits = [reuse.bit(page) for page in "abacada"]  # a comes every second time
    assert bits == [1, 1, 0, 1, 0, 1, 0]
    reuse.left("bcd")  # stayed 5, 3 and 1
    assert reuse.residence == 3
    assert reuse.bit("e") == 1 and reuse.bit("a") == 0
    assert reuse.bit("b") == 1  # seen 8 requests ago, once: beyond 3


def test_reuse_forgets_what_was_not_seen_for_long():
    reuse = paging.Reuse(memory=2)
    for page in "aabc":
        reuse.bit(page)
    assert reuse.bit("a") == 1


def test_a_policy_with_bits_of_reuse_beats_lru_on_queries_for_passages():
    trace = traces.rag(4000)
    pages = paging.follow_the_leader([paging.mark_zero(60), paging.lru(60)])
    assert faults(pages, trace, traces.reuse_bits(trace, 60)).sum() < 0.95 * faults(paging.lru(60), trace).sum()


# ---- what is refused ----


@pytest.mark.parametrize("make", [*MAKERS.values(), lambda k: paging.belady(k, [1])], ids=[*MAKERS, "belady"])
@pytest.mark.parametrize("capacity", [0, -1, 2.5, None, True])
def test_a_cache_without_room_is_refused(make, capacity):
    with pytest.raises(ValueError, match=r"\w+: capacity="):
        make(capacity)


def test_predictions_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match=r"faults: 3 predictions for 4 requests\. Give one a request"):
        faults(paging.lru(2), [1, 2, 3, 1], [0, 0, 0])
    with pytest.raises(ValueError, match=r"errors: bits of shape \(3,\)"):
        traces.errors([0, 0, 0], [0, 1])


@pytest.mark.parametrize("prediction", [2, -1, 0.5, "1", float("nan")])
def test_a_bit_that_is_none_is_refused(prediction):
    with pytest.raises(ValueError, match=r"request: prediction=.* for page 7 must be a bit, 0 or 1"):
        paging.mark_zero(2).request(7, prediction=prediction)


def test_requests_beside_beladys_trace_are_refused():
    pages = paging.belady(2, [1, 2])
    pages.request(1)
    with pytest.raises(ValueError, match="belady: page 3 was requested where the trace has 2"):
        pages.request(3)
    pages.request(2)
    with pytest.raises(ValueError, match="where the trace has its end"):
        pages.request(1)


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: paging.combine([paging.lru(2)]), "combine: wanted two policies or more"),
        (lambda: paging.combine([paging.lru(2)] * 2), "combine: wanted two policies or more, each made anew"),
        (lambda: paging.combine([paging.lru(2), paging.lru(3)]), "of equal capacity; theirs are 2, 3"),
        (
            lambda: paging.combine([paging.lru(2), paging.fifo(2)], (0.5, 0.6)),
            r"weights=\[0.5, 0.6\] must be 2 numbers",
        ),
        (lambda: paging.combine([paging.lru(2), paging.fifo(2)], (1, 0)), "weights=0 must be a finite number above 0"),
        (lambda: paging.follow_the_leader([paging.lru(2), paging.fifo(2)], hysteresis=-1), "hysteresis=-1 must be"),
        (lambda: paging.marker(2, seed=-1), "marker: seed=-1 must be at least 0"),
        (lambda: paging.flush_when_zero(2, lazy="no"), "flush_when_zero: lazy='no' must be True or False"),
        (lambda: paging.lru(2).request("a", parent="a"), "request: parent='a' is the page itself"),
        (lambda: paging.lru(2).pin("a"), "pin: 'a' is not in the cache"),
        (lambda: paging.lru(2).unpin("a"), "unpin: 'a' is not pinned"),
        (lambda: paging.bits_of_gaps([1, float("nan")], residence=1), "bits_of_gaps: gaps must be"),
        (lambda: paging.bits_of_gaps([1], residence=-1), "residence=-1 must be"),
        (lambda: paging.bits_of_scores([[0.5, float("nan")]], 2), "bits_of_scores: scores of shape"),
        (lambda: paging.bits_of_scores([], 2), "bits_of_scores: scores of shape"),
        (lambda: paging.bits_of_scores([1.0], 0), "bits_of_scores: page=0 must be at least 1"),
        (lambda: traces.rag(10, chunks=4), "rag: retrieved=5 is above chunks=4"),
        (lambda: traces.check([]), "trace: "),
        (lambda: traces.check([-1]), "trace: pages from -1 to -1 must lie in 0"),
        (lambda: traces.check([0.5]), "must be a row of whole numbers"),
        (lambda: traces.flip([0, 1], 1.5), "flip: probability=1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
