"""The D2O oracle against the worked example of its specification, examples by hand, and its properties."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, d2o, full, h2o
from tests.test_oracles import close, heads_together, make_stream, planted, rotate

KEYS = np.array([(1, 0), (0.8, 0.6), (0, 1), (-0.28, 0.96), (-1, 0), (0, -1), (0.6, -0.8), (-0.6, 0.8)])
VALUES = np.array([(1, 0), (2, 2), (0, 2), (4, 0), (1, 1), (0, 1), (5, 5), (1, -1)], float)
COLUMN_SUMS = [3.1, 0.9, 1.2, 0.4, 0.2, 0.2]
STEPS = [  # position, probabilities over what is held then
    (6, {0: 0.25, 2: 0.05, 4: 0.40, 5: 0.20, 6: 0.10}),
    (7, {0: 0.05, 2: 0.00, 5: 0.90, 6: 0.03, 7: 0.02}),
]
SIZES = dict(heavy=2, window=2, sinks=1)


def token(p):
    return common.Token(KEYS[p], VALUES[p])


def tokens(keys, values):
    return {
        p: common.Token(np.array(k, float), np.array(v, float))
        for p, (k, v) in enumerate(zip(keys, values, strict=True))
    }


def holds(hand, wanted, atol=1e-6):
    """wanted: position -> (key, value); the positions not named hold what they came with."""
    for p in hand:
        key, value = wanted.get(p, (KEYS[p], VALUES[p]))
        assert_allclose(hand[p].key, key, atol=atol)
        assert_allclose(hand[p].value, value, atol=atol)


def example(**options):
    """hands, scores before eviction and tau after the prompt and after each step of the worked example."""
    hand, scores, tau = {p: token(p) for p in range(6)}, dict(enumerate(COLUMN_SUMS)), None
    ([hand], tau) = d2o.compress([hand], [scores], tau, **SIZES, **options)
    history = [(hand, scores, tau)]
    for now, probs in STEPS:
        hand = hand | {now: token(now)}
        scores = {p: (0.0 if p == now else scores[p]) + prob for p, prob in probs.items()}
        ([hand], tau) = d2o.compress([hand], [scores], tau, **SIZES, **options)
        history.append((hand, scores, tau))
    return history


def assert_outputs_follow_what_is_held(q, k, v, calls, results):
    """The last query of each call, as one softmax over what the call before held and the call's own tokens."""
    held = [{} for _ in range(k.shape[1])]
    for call, now, c in zip(results, np.cumsum(calls), calls, strict=True):
        for x in range(q.shape[1]):
            h = x * k.shape[1] // q.shape[1]
            new = np.arange(now - c, now)
            keys = np.stack([t.key for t in held[h].values()] + list(rotate(k[new, h], new)))
            values = np.stack([t.value for t in held[h].values()] + list(v[new, h]))
            weights = np.exp(keys @ rotate(q[now - 1 : now, x], [now - 1])[0] / np.sqrt(q.shape[2]))
            assert_allclose(call.out[-1, x], weights @ values / weights.sum(), atol=1e-12)
        held = call.held


# ---- worked example ----


def test_example_similarities():
    hand = {p: token(p) for p in range(6)}
    assert d2o.select(dict(enumerate(COLUMN_SUMS)), **SIZES) == [0, 2, 4, 5]
    u = [[d2o.cosine(KEYS[p], KEYS[c]) for c in (0, 2, 4, 5)] for p in (1, 3)]
    assert_allclose(u, [[0.8, 0.6, -0.8, -0.6], [-0.28, 0.96, 0.28, -0.96]], atol=1e-9)
    found = [d2o.nearest(p, hand, [0, 2, 4, 5]) for p in (1, 3)]
    assert [target for target, _ in found] == [0, 2]
    assert_allclose([x for _, x in found], [0.8, 0.96], atol=1e-9)


def test_example_exp():
    (prompt, _, tau_0), (first, before_first, tau_1), (second, before_second, tau_2) = example()
    merged_2 = (-0.137200, 0.980400), (1.960005, 1.019997)
    merged_7 = (-0.382994, 0.884589), (1.450146, -0.052825)
    assert_allclose([tau_0, tau_1, tau_2], [0.88, 0.361015, 0.721109], atol=1e-6)
    assert [sorted(hand) for hand in (prompt, first, second)] == [[0, 2, 4, 5], [0, 2, 5, 6], [0, 5, 6, 7]]
    holds(prompt, {2: merged_2})
    holds(first, {2: merged_2})
    holds(second, {7: merged_7})
    close(before_first, {0: 3.35, 2: 1.25, 4: 0.6, 5: 0.4, 6: 0.1})
    close(before_second, {0: 3.40, 2: 1.25, 5: 1.30, 6: 0.13, 7: 0.02})
    # the second step's victim carries what token 3 left in it
    assert_allclose(
        [d2o.cosine(first[2].key, KEYS[c]) for c in (0, 5, 6, 7)],
        [-0.138593, -0.990349, -0.875435, 0.875435],
        atol=1e-6,
    )


def test_example_code_mean():
    prompt, *_ = example(weights="code_mean")
    holds(prompt[0], {2: ((-0.1344, 0.9608), (1.92, 1.00))})


def test_sinks_that_are_no_targets_are_not_compared_with():
    (hand, _, tau), *_ = example(into_sinks=False)
    assert_allclose(tau, 0.78, atol=1e-12)  # of .6, for token 1 at 2 and no longer .8 at the sink, and .96
    holds(hand, {2: ((-0.1372, 0.9804), (1.960005, 1.019997))})


def test_example_beta():
    _, (first, _, tau), _ = example(beta=0.5)
    assert_allclose(tau, 0.509296, atol=1e-6)
    holds(first, {2: ((-0.137200, 0.980400), (1.960005, 1.019997))})


def test_example_layers():
    f = [0.1, 0.3, 0.5, 0.9]
    assert_allclose(d2o.layer_weights(f), [0.340324, 0.278633, 0.228126, 0.152917], atol=1e-6)
    assert_allclose(d2o.layer_shares(f, 0.2), [0.272259, 0.222907, 0.182501, 0.122334], atol=1e-6)
    assert_allclose(d2o.layer_shares(f, 0.6), [0.816777, 0.668720, 0.547502, 0.367001], atol=1e-6)
    assert d2o.allocate(f, 0.1, 0.1, 101, exempt=()) == [(13, 13), (11, 11), (9, 9), (6, 6)]
    assert d2o.allocate(f, 0.3, 0.3, 101, exempt=()) == [(41, 41), (33, 33), (27, 27), (18, 18)]


def test_example_density():
    columns = np.array([COLUMN_SUMS, np.ones(6), [2, 1, 1, 1, 0.5, 0.5]])
    assert_allclose(d2o.density_of_columns(columns), 0.415300, atol=1e-6)
    rows = np.zeros((3, 6, 6))
    rows[:, 0] = columns
    assert d2o.density(rows) == d2o.density_of_columns(columns)


# ---- by hand ----


def test_layers_exempt_and_smallest():
    assert d2o.allocate([0.5] * 5, 0.1, 0.1, 100) == [None, None, (10, 10), (10, 10), None]
    assert d2o.allocate([0.5] * 4, 0.1, 0.1, 10) == [None, None, (5, 1), None]
    assert d2o.density(np.ones((2, 1, 1))) == 0


def two_heads():
    """Five tokens a head; positions 1 and 2 leave. Best cosines .6 and 1 in the first head, 1 and 0 in the second."""
    one = tokens([(1, 0), (0.6, -0.8), (1, 0), (0, 1), (-1, 0)], [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0)])
    two = tokens([(1, 0), (2, 0), (0, -1), (0, 1), (-1, 0)], [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)])
    return [one, two], [{0: 3.0, 1: 0.1, 2: 0.1, 3: 0.5, 4: 0.1}] * 2


@pytest.mark.parametrize("gate", ["rank_mean", "per_head"])
def test_gates_of_a_first_compression(gate):
    # tau = (.6 + 1 + 1 + 0) / 4; means by rank .8 and .5: every head merges 1, none merges 2.
    # head by head: the first merges 2 (cosine 1), the second 1 (cosine 1)
    w = np.exp(0.6) / (np.exp(0.6) + np.e)
    wanted = {
        "rank_mean": [((1 - 0.4 * w, -0.8 * w), (1 + w, 0)), ((1.5, 0), (0, 1.5))],
        "per_head": [((1, 0), (2, 0)), ((1.5, 0), (0, 1.5))],
    }
    hands, scores = two_heads()
    after, tau = d2o.compress(hands, scores, None, heavy=1, window=2, sinks=1, gate=gate)
    assert_allclose(tau, 0.65)
    for hand, before, (key, value) in zip(after, hands, wanted[gate], strict=True):
        assert sorted(hand) == [0, 3, 4]
        assert_allclose(hand[0].key, key, atol=1e-9)
        assert_allclose(hand[0].value, value, atol=1e-9)
        assert hand[3] is before[3] and hand[4] is before[4]


def test_a_chunk_moves_tau_by_the_mean_of_all_it_evicts():
    hands, scores = two_heads()
    after, tau = d2o.compress(hands, scores, 0.9, heavy=1, window=2, sinks=1, beta=0.5)
    assert_allclose(tau, 0.5 * 0.9 + 0.5 * 0.65)  # .775: token 1 passes with .8
    assert not np.array_equal(after[0][0].key, hands[0][0].key)
    _, tau = d2o.compress(hands, scores, 0.95, heavy=1, window=2, sinks=1, beta=0.0)
    assert tau == 0.95


def test_one_target_takes_several():
    target = common.Token(np.array([1.0, 0]), np.array([6.0, 0]))
    part = common.Token(np.array([0, 1.0]), np.array([0, 6.0]))
    both = d2o.fold(target, [(part, 0.0), (part, 0.0)], "exp")
    assert_allclose(both.key, (np.e / (np.e + 2), 2 / (np.e + 2)))
    both = d2o.fold(target, [(part, 0.5), (part, 1.0)], "code_mean")
    assert_allclose([both.key, both.value], [(1 / 3, 0.5), (2, 3)])
    same = d2o.fold(target, [(target, 1.0)], "exp")
    assert_allclose([same.key, same.value], [target.key, target.value])


def test_equal_cosines_take_the_lower_position():
    hand = tokens([(0, 1), (1, 0), (1, 0), (0, -1)], np.zeros((4, 2)))
    assert d2o.nearest(1, hand, [3, 0]) == (0, 0.0)


@pytest.mark.parametrize("heads", [1, 3])
def test_first_eviction_of_one_token_merges_in_every_head(heads):
    rng = np.random.default_rng(0)
    hands = [tokens(*rng.normal(size=(2, 5, 4))) for _ in range(heads)]
    scores = [dict(enumerate(rng.random(5))) for _ in range(heads)]
    after, _ = d2o.compress(hands, scores, None, **SIZES)
    for hand, before in zip(after, hands, strict=True):
        assert sum(hand[p] is not before[p] for p in hand) == 1


def test_run_averages_the_group():
    one = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.6, 1: 0.2, 2: 0.2}], dim=4)
    two = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.1, 1: 0.6, 2: 0.3}], dim=4)
    q, _, _ = heads_together(one, two)
    (call,) = d2o.run(q, one[1], one[2], [3], heavy=1, window=1, sinks=0)
    close(call.scores[0], {0: 1.85, 1: 0.9, 2: 0.25})
    assert call.kept == [[0, 2]]


# ---- properties ----

N = 24
CALLS = {"prompt then tokens": [16] + [1] * 8, "chunks": [7, 7, 4, 6], "tokens": [1] * N, "one": [N]}
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
each_weights = pytest.mark.parametrize("weights", ["exp", "code_mean"])
each_gate = pytest.mark.parametrize("gate", ["rank_mean", "per_head"])


@each_calls
def test_no_eviction_is_full_attention(calls):
    stream = make_stream(N)
    for got, want in zip(d2o.run(*stream, calls, heavy=N - 3, window=3), full.run(*stream, calls), strict=True):
        assert_allclose(got.out, want.out, atol=1e-12)
        assert got.kept == want.kept and got.tau is None


@each_calls
@each_weights
@each_gate
def test_sinks_and_newest_are_kept_and_the_size_is_held(calls, weights, gate):
    results = d2o.run(*make_stream(N), calls, heavy=5, window=3, sinks=2, weights=weights, gate=gate)
    for call, now in zip(results, np.cumsum(calls), strict=True):
        for kept, held in zip(call.kept, call.held, strict=True):
            assert len(kept) == min(8, now) and kept == list(held)
            assert {0, 1, *range(max(0, now - 3), now)} - set(range(now, N)) <= set(kept)
            assert all(np.isfinite([t.key, t.value]).all() for t in held.values())
        assert (call.tau is None) == (now <= 8)


def test_the_prompt_is_chosen_as_h2o_does():
    stream = make_stream(N)
    (got,), (want,) = (
        d2o.run(*stream, [N], heavy=5, window=3, sinks=0),
        h2o.run(*stream, [N], budget=8, window=3),
    )
    assert got.kept == want.kept
    for a, b in zip(got.scores, want.scores, strict=True):
        close(a, b)


@each_gate
def test_thresholds_without_end(gate):
    hands, scores = two_heads()
    never, _ = d2o.compress(hands, scores, np.inf, heavy=1, window=2, sinks=1, gate=gate)
    assert all(hand[p] is before[p] for hand, before in zip(never, hands, strict=True) for p in hand)
    always, _ = d2o.compress(hands, scores, -np.inf, heavy=1, window=2, sinks=1, gate=gate, weights="code_mean")
    # second head: 1 into 0 (cosine 1), 2 into 0 (cosine 0; of equal ones 0 and 4 the lower)
    assert_allclose(always[1][0].key, (1, 0), atol=1e-9)
    assert_allclose(always[1][0].value, (0, 1), atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
def test_the_decision_about_one_token_does_not_depend_on_beta(beta):
    rng = np.random.default_rng(0)
    for alike, tau in rng.uniform(-1, 1, size=(50, 2)):
        given = np.array([[alike]])
        assert d2o.passes(given, d2o.move(tau, given, beta), "rank_mean", first=False).all() == (alike >= tau)


@each_calls
@each_weights
def test_outputs_attend_to_what_the_call_before_left(calls, weights):
    q, k, v = make_stream(N)
    results = d2o.run(q, k, v, calls, heavy=5, window=3, sinks=2, weights=weights)
    assert_outputs_follow_what_is_held(q, k, v, calls, results)
