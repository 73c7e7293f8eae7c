"""The oracles against worked examples and against a dense formulation written here."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, full, h2o, keydiff, random_eviction, snapkv, streaming_llm, tova

BASE = 10000.0
KV_HEADS, GROUP, DIM = 2, 3, 8


# ---- helpers ----


def make_stream(n, seed=0, kv_heads=KV_HEADS, group=GROUP, dim=DIM):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(n, kv_heads * group, dim)) * 2.0
    k, v = rng.normal(size=(2, n, kv_heads, dim))
    return q, k, v


def rotate(x, positions, base=BASE):
    """x [m, D] rotated as complex numbers."""
    half = x.shape[1] // 2
    angle = np.asarray(positions)[:, None] * base ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def dense(q, k, v, positions):
    """Causal attention of one head over m tokens at ascending positions, as one masked matrix."""
    logits = rotate(q, positions) @ rotate(k, positions).T / np.sqrt(q.shape[1])
    logits[np.triu_indices(len(q), 1)] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v


def planted(rows, dim):
    """A one-head stream whose probabilities are the given rows: {position: probability} per query.

    Rotated keys are unit vectors e_j, and rotated queries hold log-probabilities times sqrt(dim).
    """
    n = len(rows)
    k, q = np.zeros((n, 1, dim)), np.zeros((n, 1, dim))
    for i, row in enumerate(rows):
        k[i, 0] = rotate(np.eye(dim)[i : i + 1], [-i])[0]
        wanted = np.zeros(dim)
        for j, prob in row.items():
            wanted[j] = np.sqrt(dim) * (np.log(prob) if prob > 0 else -1e3)
        q[i, 0] = rotate(wanted[None], [-i])[0]
    return q, k, np.zeros_like(k)


def heads_together(*streams):
    """Streams of one head each, as the heads of one stream."""
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*streams, strict=True))


def close(scores, wanted, atol=1e-12):
    assert sorted(scores) == sorted(wanted)
    for p, value in wanted.items():
        assert_allclose(scores[p], value, rtol=0, atol=atol)


# ---- common ----


def test_rope_agrees_with_complex_rotation():
    x = np.random.default_rng(0).normal(size=(1, 6))
    assert_allclose(common.rope(x[0], 7), rotate(x, [7])[0], atol=1e-14)


def test_rope_by_hand():
    # D = 4, base 16: frequencies 1 and 16**-0.5 = 1/4; pairs (x0, x2), (x1, x3)
    got = common.rope(np.array([1.0, 1.0, 0.0, 0.0]), 2, base=16.0)
    assert_allclose(got, [np.cos(2), np.cos(0.5), np.sin(2), np.sin(0.5)], atol=1e-15)


def test_equal_scores_keep_the_lower_position():
    assert common.best({5: 1.0, 2: 1.0, 9: 3.0, 1: 1.0}, 3) == [9, 1, 2]


@pytest.mark.parametrize("calls", [[3, 3], [4, 0, 1], [5, -1, 1]])
def test_calls_that_do_not_cover_the_stream_are_refused(calls):
    with pytest.raises(ValueError, match="calls"):
        full.run(*make_stream(5), calls)


# ---- streaming_llm: worked example ----

# one head, D = 2, one radian per position, 2 sinks, 2 recent
KEYS = np.array([(1, 0), (0, 1), (1, 1), (1, -1), (0.5, 0.5), (0, -1), (1, 0.5)])
VALUES = np.array([(1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (3, 0), (0, 3)], float)
QUERY = np.array([1, 0.5])
IN_HAND = {p: common.Token(KEYS[p], VALUES[p]) for p in (0, 1, 4, 5, 6)}


def test_streaming_example_places():
    assert streaming_llm.rank_places(IN_HAND) == {0: 0, 1: 1, 4: 2, 5: 3, 6: 4}
    assert list(streaming_llm.rank_places([0, 1, 2, 3, 6, 7, 8, 9]).values()) == list(range(8))


def test_streaming_example_logits_and_probabilities():
    places = streaming_llm.rank_places(IN_HAND)
    logits = common.scaled_logits(QUERY, 6, IN_HAND, places, BASE)
    close(logits, {0: -0.194626, 1: -0.250228, 4: -0.059953, 5: -0.786036, 6: 0.883883}, atol=1e-6)
    close(common.softmax(logits), {0: 0.151885, 1: 0.143671, 4: 0.173781, 5: 0.084076, 6: 0.446587}, 1e-6)


def test_streaming_example_with_true_positions_differs_in_the_sinks_only():
    places = common.true_places(IN_HAND)
    logits = common.scaled_logits(QUERY, 6, IN_HAND, places, BASE)
    close(logits, {0: 0.777731, 1: -0.577772, 4: -0.059953, 5: -0.786036, 6: 0.883883}, atol=1e-6)
    out, _ = common.attend(QUERY, 6, IN_HAND, places, BASE)
    assert_allclose(out, (0.684210, 1.336880), atol=1e-6)


def test_streaming_example_shifting_the_sinks_is_the_same_as_ranks():
    ranks = common.scaled_logits(QUERY, 6, IN_HAND, streaming_llm.rank_places(IN_HAND), BASE)
    shifted = common.scaled_logits(QUERY, 6, IN_HAND, {0: 2, 1: 3, 4: 4, 5: 5, 6: 6}, BASE)
    close(shifted, ranks)


def test_streaming_example_run():
    q = np.zeros((7, 1, 2))
    q[6, 0] = QUERY
    prompt, step = streaming_llm.run(q, KEYS[:, None], VALUES[:, None], [6, 1], budget=4, sinks=2)
    assert prompt.kept == [[0, 1, 4, 5]]
    assert_allclose(step.out[0, 0], (0.577893, 1.657214), atol=1e-6)
    assert step.kept == [[0, 1, 5, 6]]
    assert step.scores == [{}]


# ---- h2o: worked example ----

MATRIX = [
    [1],
    [0.6, 0.4],
    [0.5, 0.2, 0.3],
    [0.4, 0.1, 0.3, 0.2],
    [0.3, 0.1, 0.4, 0.1, 0.1],
    [0.3, 0.1, 0.2, 0.1, 0.1, 0.2],
]
PROMPT = [dict(enumerate(row)) for row in MATRIX]
STEPS = [
    {0: 0.25, 2: 0.05, 4: 0.40, 5: 0.20, 6: 0.10},
    {0: 0.05, 2: 0.00, 5: 0.90, 6: 0.03, 7: 0.02},
    {0: 0.10, 5: 0.30, 6: 0.30, 7: 0.20, 8: 0.10},
]
COLUMN_SUMS = {0: 3.1, 1: 0.9, 2: 1.2, 3: 0.4, 4: 0.2, 5: 0.2}
BEFORE_EVICTION = [
    {0: 3.35, 2: 1.25, 4: 0.60, 5: 0.40, 6: 0.10},
    {0: 3.40, 2: 1.25, 5: 1.30, 6: 0.13, 7: 0.02},
    {0: 3.50, 5: 1.60, 6: 0.43, 7: 0.22, 8: 0.10},
]
AFTER_STEPS = [[0, 2, 5, 6], [0, 5, 6, 7], [0, 5, 7, 8]]


def restricted(row, survivors, now):
    left = {p: prob for p, prob in row.items() if p in survivors or p == now}
    return {p: prob / sum(left.values()) for p, prob in left.items()}


def greedy(ledger):
    kept = []
    history = []
    for now, row in enumerate(PROMPT):
        ledger.observe(restricted(row, kept, now))
        kept = ledger.evict(now)
        history.append(kept)
    return history


def test_h2o_example_ledger():
    ledger = h2o.Ledger(budget=4, window=2)
    for row in PROMPT:
        ledger.observe(row)
    close(ledger.mass, COLUMN_SUMS)
    assert ledger.evict(now=5) == [0, 2, 4, 5]
    close(ledger.mass, {0: 3.1, 2: 1.2, 4: 0.2, 5: 0.2})
    for now, row, before, kept in zip((6, 7, 8), STEPS, BEFORE_EVICTION, AFTER_STEPS, strict=True):
        ledger.observe(row)
        close(ledger.mass, before)
        assert ledger.evict(now) == kept
        close(ledger.mass, {p: before[p] for p in kept})


def test_h2o_example_run():
    stream = planted(PROMPT + STEPS, dim=10)
    prompt, *steps = h2o.run(*stream, [6, 1, 1, 1], budget=4, window=2)
    close(prompt.scores[0], COLUMN_SUMS)
    assert prompt.kept == [[0, 2, 4, 5]]
    for step, before, kept in zip(steps, BEFORE_EVICTION, AFTER_STEPS, strict=True):
        close(step.scores[0], before)
        assert step.kept == [kept]


def test_h2o_example_greedy():
    wanted = {0: 3.133333, 2: 1.222222, 4: 0.211111, 5: 0.222222}
    ledger = h2o.Ledger(budget=4, window=2)
    assert greedy(ledger)[-1] == [0, 2, 4, 5]
    close(ledger.mass, wanted, atol=1e-6)

    last = h2o.run(*planted(PROMPT, dim=6), [1] * 6, budget=4, window=2)[-1]
    assert last.kept == [[0, 2, 4, 5]]
    close({p: last.scores[0][p] for p in wanted}, wanted, atol=1e-6)


def test_h2o_example_greedy_without_a_window():
    ledger = h2o.Ledger(budget=3, window=0)
    assert greedy(ledger)[2:] == [[0, 1, 2]] * 4
    close(ledger.mass, {0: 3.208333, 1: 0.936111, 2: 1.294444}, atol=1e-6)


def test_h2o_tie_keeps_the_lower_positions():
    ledger = h2o.Ledger(budget=3, window=1, mass=dict.fromkeys(range(4), 1.0))
    assert ledger.evict(now=3) == [0, 1, 3]


def test_h2o_averages_the_group():
    # last rows .6 .2 .2 and .1 .6 .3; column sums of both rows, with row 1 = .5 .5 and row 0 = 1:
    # 0: (2.1 + 1.6) / 2 = 1.85    1: (.7 + 1.1) / 2 = .9    2: (.2 + .3) / 2 = .25
    one = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.6, 1: 0.2, 2: 0.2}], dim=4)
    two = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.1, 1: 0.6, 2: 0.3}], dim=4)
    q, _, _ = heads_together(one, two)
    (call,) = h2o.run(q, one[1], one[2], [3], budget=2, window=1)
    close(call.scores[0], {0: 1.85, 1: 0.9, 2: 0.25})
    assert call.kept == [[0, 2]]


@pytest.mark.parametrize("n", [5, 8, 9])
def test_h2o_oneshot_is_greedy_up_to_one_token_over_budget(n):
    stream = make_stream(n)
    oneshot = h2o.run(*stream, [n], budget=8, window=3)[-1]
    steps = h2o.run(*stream, [1] * n, budget=8, window=3)
    assert oneshot.kept == steps[-1].kept
    assert_allclose(oneshot.out, np.concatenate([step.out for step in steps]), atol=1e-12)
    for a, b in zip(oneshot.scores, steps[-1].scores, strict=True):
        close(a, b)


def test_h2o_mass_sums_to_the_queries_seen_while_nothing_is_dropped():
    for call in h2o.run(*make_stream(12), [5, 4, 1, 1, 1], budget=12, window=3):
        for scores in call.scores:
            assert_allclose(sum(scores.values()), len(scores))


# ---- the others: worked examples ----


def test_snapkv_example():
    # window 2, pool 3, budget 4; the prompt is the matrix above.
    # prompt: queries 4, 5 gave tokens 0..3 .6 .2 .6 .2; tokens 4, 5 count as zero.
    #   pooled: (0+.6+.2)/3, (.6+.2+.6)/3, (.2+.6+.2)/3, (.6+.2+0)/3 = .8/3, 1.4/3, 1/3, .8/3
    # token 6 and token 7: single queries, added as they are.
    # tokens 8, 9: a chunk; it gave 2, 5, 6, 7 the sums .2 .2 .3 .6; pooled by rank:
    #   (0+.2+.2)/3, (.2+.2+.3)/3, (.2+.3+.6)/3, (.3+.6+0)/3 = .4/3, .7/3, 1.1/3, .9/3
    rows = PROMPT + [
        {1: 0.05, 2: 0.20, 4: 0.40, 5: 0.20, 6: 0.15},
        {1: 0.00, 2: 0.10, 5: 0.70, 6: 0.10, 7: 0.10},
        {2: 0.10, 5: 0.10, 6: 0.20, 7: 0.30, 8: 0.30},
        {2: 0.10, 5: 0.10, 6: 0.10, 7: 0.30, 8: 0.20, 9: 0.20},
    ]
    got = snapkv.run(*planted(rows, dim=10), [6, 1, 1, 2], budget=4, window=2, pool=3)
    close(got[0].scores[0], {0: 0.8 / 3, 1: 1.4 / 3, 2: 1 / 3, 3: 0.8 / 3, 4: 0.0, 5: 0.0})
    close(got[1].scores[0], {1: 1.4 / 3 + 0.05, 2: 1 / 3 + 0.2, 4: 0.4, 5: 0.2, 6: 0.15})
    close(got[2].scores[0], {1: 1.4 / 3 + 0.05, 2: 1 / 3 + 0.3, 5: 0.9, 6: 0.25, 7: 0.1})
    wanted = {2: 1.4 / 3 + 0.3, 5: 0.9 + 0.7 / 3, 6: 0.25 + 1.1 / 3, 7: 0.1 + 0.9 / 3, 8: 0.0, 9: 0.0}
    close(got[3].scores[0], wanted)
    assert [call.kept[0] for call in got] == [[1, 2, 4, 5], [1, 2, 5, 6], [2, 5, 6, 7], [2, 5, 8, 9]]


def test_snapkv_chunk_shorter_than_the_window_counts_each_of_its_queries():
    # window 3, pool 1: the prompt of 4 gives votes to token 0 only, from queries 1, 2, 3: .6+.5+.4
    # the chunk 4, 5 then gives tokens 0..2 (now 5, window 3..5) .3+.3, .1+.1, .4+.2
    got = snapkv.run(*planted(PROMPT, dim=6), [4, 2], budget=4, window=3, pool=1)
    close(got[0].scores[0], {0: 1.5, 1: 0.0, 2: 0.0, 3: 0.0})
    close(got[1].scores[0], {0: 2.1, 1: 0.2, 2: 0.6, 3: 0.0, 4: 0.0, 5: 0.0})
    assert got[1].kept == [[0, 3, 4, 5]]


def test_smoothing_pads_with_zeros_and_divides_by_the_whole_pool():
    assert_allclose(snapkv.smooth([5.0, 0.0, 10.0], 5), [3.0, 3.0, 3.0])
    assert snapkv.smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_tova_example():
    # newest query: .6 .3 .1 in one kv head, .1 .5 .4 in the other; mean .35 .40 .25
    one = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.6, 1: 0.3, 2: 0.1}], dim=4)
    two = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.1, 1: 0.5, 2: 0.4}], dim=4)
    (call,) = tova.run(*heads_together(one, two), [3], budget=2)
    for scores in call.scores:
        close(scores, {0: 0.35, 1: 0.40, 2: 0.25})
    assert call.kept == [[0, 1], [0, 1]]


def test_keydiff_example():
    # rotated keys at 0, 10, 20, 120 degrees; lengths must not matter.
    # sum of unit keys (2.424500, 1.381694), at 29.68 degrees: the distances are 29.68 19.68 9.68 90.32
    degrees = np.radians([0, 10, 20, 120])
    keys = np.stack([np.cos(degrees), np.sin(degrees)], axis=1) * [[2.0], [1.0], [3.0], [0.5]]
    k = np.stack([rotate(keys[i : i + 1], [-i]) for i in range(4)])
    (call,) = keydiff.run(np.zeros_like(k), k, k, [4], budget=2)
    anchor = np.arctan2(1.381694, 2.424500)
    close(call.scores[0], {i: -np.cos(degrees[i] - anchor) for i in range(4)}, atol=1e-6)
    assert call.kept == [[0, 3]]


def test_random_example():
    q, k, v = make_stream(5)
    scores = [[0.1, 0.9, 0.5, 0.5, 0.7], [0.5, 0.5, 0.5, 0.9, 0.5]]
    first, second = random_eviction.run(q, k, v, [3, 2], budget=2, scores=scores)
    assert first.kept == [[1, 2], [0, 1]]
    assert second.kept == [[1, 4], [0, 3]]
    assert second.scores == [{1: 0.9, 2: 0.5, 3: 0.5, 4: 0.7}, {0: 0.5, 1: 0.5, 3: 0.9, 4: 0.5}]


# ---- every oracle ----

N = 30
CALLS = {"prompt then tokens": [20] + [1] * 10, "chunks": [7, 7, 6, 10], "tokens": [1] * N, "one": [N]}
DRAWN = np.random.default_rng(1).normal(size=(KV_HEADS, N))
RUN = {
    "streaming_llm": lambda *a, budget: streaming_llm.run(*a, budget=budget, sinks=2),
    "h2o": lambda *a, budget: h2o.run(*a, budget=budget, window=3),
    "snapkv": lambda *a, budget: snapkv.run(*a, budget=budget, window=3, pool=3),
    "tova": lambda *a, budget: tova.run(*a, budget=budget),
    "keydiff": lambda *a, budget: keydiff.run(*a, budget=budget),
    "random_eviction": lambda *a, budget: random_eviction.run(*a, budget=budget, scores=DRAWN),
}

each_method = pytest.mark.parametrize("run", RUN.values(), ids=RUN)
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)


def dense_heads(q, k, v):
    heads = [dense(q[:, x], k[:, x // GROUP], v[:, x // GROUP], np.arange(len(q))) for x in range(q.shape[1])]
    return np.stack(heads, axis=1)


@each_calls
def test_full_is_dense_attention(calls):
    stream = make_stream(N)
    got = full.run(*stream, calls)
    assert_allclose(np.concatenate([call.out for call in got]), dense_heads(*stream), atol=1e-12)
    assert got[-1].kept == [list(range(N))] * KV_HEADS


@each_method
@each_calls
@pytest.mark.parametrize("budget", [N, N + 5])
def test_budget_as_long_as_the_stream_is_full_attention(run, calls, budget):
    stream = make_stream(N)
    got = run(*stream, calls, budget=budget)
    assert_allclose(np.concatenate([call.out for call in got]), dense_heads(*stream), atol=1e-12)
    assert got[-1].kept == [list(range(N))] * KV_HEADS


@each_method
@each_calls
def test_budget_is_filled_and_never_passed(run, calls):
    for call, now in zip(run(*make_stream(N), calls, budget=8), np.cumsum(calls), strict=True):
        assert [len(kept) for kept in call.kept] == [min(8, now)] * KV_HEADS


@each_method
@each_calls
def test_kept_positions_come_from_the_last_call_or_the_one_before(run, calls):
    before = [[]] * KV_HEADS
    start = 0
    for call, c in zip(run(*make_stream(N), calls, budget=8), calls, strict=True):
        for h, kept in enumerate(call.kept):
            assert kept == sorted(set(kept))
            assert set(kept) <= set(before[h]) | set(range(start, start + c))
        before, start = call.kept, start + c


@pytest.mark.parametrize("name", RUN)
@each_calls
def test_outputs_are_dense_attention_over_what_was_in_hand(name, calls):
    q, k, v = make_stream(N)
    before = [[]] * KV_HEADS
    start = 0
    for call, c in zip(RUN[name](q, k, v, calls, budget=8), calls, strict=True):
        for x in range(q.shape[1]):
            h = x // GROUP
            hand = before[h] + list(range(start, start + c))
            positions = np.arange(len(hand)) if name == "streaming_llm" else np.array(hand)
            want = dense(q[hand, x], k[hand, h], v[hand, h], positions)[-c:]
            assert_allclose(call.out[:, x], want, atol=1e-12)
        before, start = call.kept, start + c


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@each_calls
def test_the_newest_tokens_stay(name, calls):
    for call, now in zip(RUN[name](*make_stream(N), calls, budget=8), np.cumsum(calls), strict=True):
        for kept in call.kept:
            assert set(range(max(0, now - 3), now)) <= set(kept)


@each_calls
def test_streaming_keeps_the_first_and_the_newest(calls):
    got = streaming_llm.run(*make_stream(N), calls, budget=8, sinks=2)[-1]
    assert got.kept == [[0, 1, *range(N - 6, N)]] * KV_HEADS


@each_calls
def test_tova_keeps_the_same_tokens_in_every_head(calls):
    for call in tova.run(*make_stream(N), calls, budget=8):
        assert call.kept[0] == call.kept[1]
