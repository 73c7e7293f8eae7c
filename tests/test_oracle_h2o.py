"""The variants of the H2O oracle: token-by-token prefill, and positions by rank in the cache.

The worked example of the default is in test_oracles.py.
"""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, h2o
from tests.oracles.streaming_llm import rank_places
from tests.test_oracles import (
    AFTER_STEPS,
    BASE,
    BEFORE_EVICTION,
    COLUMN_SUMS,
    GROUP,
    KV_HEADS,
    PROMPT,
    STEPS,
    close,
    dense,
    make_stream,
    planted,
)

N = 30
CALLS = {"prompt then tokens": [20] + [1] * 10, "chunks": [7, 7, 6, 10], "tokens": [1] * N, "one": [N]}
VARIANTS = [(prefill, positions) for prefill in ("dense", "greedy") for positions in ("true", "rolling")]

each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
each_variant = pytest.mark.parametrize("prefill, positions", VARIANTS)


def outputs(calls):
    return np.concatenate([call.out for call in calls])


# ---- token by token ----


def test_example_greedy():
    (call,) = h2o.run(*planted(PROMPT, dim=6), [6], budget=4, window=2, prefill="greedy")
    assert call.kept == [[0, 2, 4, 5]]
    wanted = {0: 3.133333, 2: 1.222222, 4: 0.211111, 5: 0.222222}
    close({p: call.scores[0][p] for p in wanted}, wanted, atol=1e-6)


def test_example_steps_after_either_prefill():
    # the prompt's scores differ, the later choices do not
    for prefill in ("dense", "greedy"):
        prompt, *steps = h2o.run(*planted(PROMPT + STEPS, dim=10), [6, 1, 1, 1], budget=4, window=2, prefill=prefill)
        assert [call.kept for call in steps] == [[kept] for kept in AFTER_STEPS]
        if prefill == "dense":
            close(prompt.scores[0], COLUMN_SUMS)
            for step, before in zip(steps, BEFORE_EVICTION, strict=True):
                close(step.scores[0], before)


@each_calls
@pytest.mark.parametrize("positions", ["true", "rolling"])
def test_greedy_does_not_depend_on_the_calls(calls, positions):
    stream = make_stream(N)
    settings = dict(budget=8, window=3, positions=positions)
    got = h2o.run(*stream, calls, prefill="greedy", **settings)
    steps = h2o.run(*stream, [1] * N, **settings)
    assert_allclose(outputs(got), outputs(steps), atol=1e-12)
    for call, now in zip(got, np.cumsum(calls), strict=True):
        assert call.kept == steps[now - 1].kept
        assert call.scores == steps[now - 1].scores


@pytest.mark.parametrize("n", [5, 8, 9])
def test_greedy_is_oneshot_up_to_one_token_over_budget(n):
    (a,), (b,) = (h2o.run(*make_stream(n), [n], budget=8, window=3, prefill=p) for p in ("dense", "greedy"))
    assert a.kept == b.kept
    assert_allclose(a.out, b.out, atol=1e-12)
    for x, y in zip(a.scores, b.scores, strict=True):
        close(x, y)


def test_greedy_differs_from_oneshot_beyond():
    (a,), (b,) = (h2o.run(*make_stream(N), [N], budget=8, window=3, prefill=p) for p in ("dense", "greedy"))
    assert np.abs(a.out[:9] - b.out[:9]).max() < 1e-12
    assert np.abs(a.out[9:] - b.out[9:]).max() > 1e-3


# ---- positions ----


@each_variant
@each_calls
def test_outputs_are_dense_attention_over_what_was_in_hand(prefill, positions, calls):
    q, k, v = make_stream(N)
    settings = dict(budget=8, window=3, prefill=prefill, positions=positions)
    if prefill == "greedy":
        calls = [1] * N
    before, start = [[]] * KV_HEADS, 0
    for call, c in zip(h2o.run(q, k, v, calls, **settings), calls, strict=True):
        for x in range(q.shape[1]):
            h = x // GROUP
            hand = before[h] + list(range(start, start + c))
            places = np.arange(len(hand)) if positions == "rolling" else np.array(hand)
            want = dense(q[hand, x], k[hand, h], v[hand, h], places)[-c:]
            assert_allclose(call.out[:, x], want, atol=1e-12)
        before, start = call.kept, start + c


@pytest.mark.parametrize("prefill", ["dense", "greedy"])
@each_calls
def test_rolling_is_true_until_a_token_goes(prefill, calls):
    stream = make_stream(N)
    a = h2o.run(*stream, calls, budget=N, window=3, prefill=prefill, positions="rolling")
    b = h2o.run(*stream, calls, budget=N, window=3, prefill=prefill)
    assert_allclose(outputs(a), outputs(b), atol=1e-12)
    assert [call.kept for call in a] == [call.kept for call in b]


def test_oneshot_prefill_uses_true_positions():
    stream = make_stream(N)
    (a,), (b,) = (h2o.run(*stream, [N], budget=8, window=3, positions=p) for p in ("true", "rolling"))
    assert_allclose(a.out, b.out, atol=1e-12)
    assert a.kept == b.kept


def test_rolling_does_not_feel_a_shift_of_all_positions():
    q, k, v = make_stream(5)
    outs = []
    for shift in (0, 1000):
        hand = {p + shift: common.Token(k[p, 0], v[p, 0]) for p in (0, 1, 4)}
        outs.append(common.attend(q[4, 0], 4 + shift, hand, rank_places(hand), BASE)[0])
    assert_allclose(outs[0], outs[1], atol=1e-12)


# ---- promises of all variants ----


@each_variant
@each_calls
def test_budget_and_window_hold(prefill, positions, calls):
    got = h2o.run(*make_stream(N), calls, budget=8, window=3, prefill=prefill, positions=positions)
    for call, now in zip(got, np.cumsum(calls), strict=True):
        for kept, scores in zip(call.kept, call.scores, strict=True):
            assert len(kept) == min(8, now)
            assert set(range(max(0, now - 3), now)) <= set(kept) <= set(scores)
            assert min(scores.values()) >= 0


@each_variant
def test_uniform_attention_keeps_the_oldest(prefill, positions):
    _, k, v = make_stream(20)
    q = np.zeros((20, KV_HEADS * GROUP, k.shape[2]))
    (call,) = h2o.run(q, k, v, [20], budget=8, window=3, prefill=prefill, positions=positions)
    assert call.kept == [[0, 1, 2, 3, 4, 17, 18, 19]] * KV_HEADS


@each_variant
@each_calls
def test_repeating_query_heads_changes_nothing(prefill, positions, calls):
    q, k, v = make_stream(N)
    settings = dict(budget=8, window=3, prefill=prefill, positions=positions)
    once = h2o.run(q, k, v, calls, **settings)
    twice = h2o.run(np.repeat(q, 2, axis=1), k, v, calls, **settings)
    assert [call.kept for call in once] == [call.kept for call in twice]


def test_variants_that_do_not_exist_are_refused():
    for settings in ({"prefill": "oneshot"}, {"positions": "original"}):
        with pytest.raises(ValueError, match="no such variant"):
            h2o.run(*make_stream(5), [5], budget=4, window=2, **settings)
