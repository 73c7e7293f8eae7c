"""The MiKV oracle against its worked example and the properties of its specification."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, full, mikv, quantiser

KV_HEADS, GROUP, DIM, N = 2, 3, 8, 24
CALLS = {"prompt then tokens": [14] + [1] * 10, "chunks": [7, 6, 1, 10], "tokens": [1] * N, "one": [N]}
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)


def make_stream(n=N, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(n, KV_HEADS * GROUP, DIM)) * 2.0
    k, v = rng.normal(size=(2, n, KV_HEADS, DIM))
    return q, k, v


def outputs(calls):
    return np.concatenate([call.out for call in calls])


def rotated(x):
    return np.array([[common.rope(head, p) for head in row] for p, row in enumerate(x)])


# ---- worked example ----

MASS = [5, 0.2, 1.1, 0.4, 2, 0.3, 0.9, 0.1, 0.2, 0.1]
STEPS = [  # t, added mass, n_hi and n_rec, demoted with its mass, high after with its masses
    (11, {0: 0.30, 4: 0.10, 8: 0.05, 9: 0.20, 10: 0.10}, (4, 2), {8: 0.25}, {0: 5.30, 4: 2.10, 9: 0.30, 10: 0.10}),
    (12, {0: 0.20, 4: 0.10, 9: 0.05, 10: 0.30, 11: 0.15}, (4, 2), {9: 0.35}, {0: 5.50, 4: 2.20, 10: 0.40, 11: 0.15}),
    (
        13,
        {0: 0.20, 4: 0.10, 10: 0.30, 11: 0.05, 12: 0.10},
        (5, 2),
        {},
        {0: 5.70, 4: 2.30, 10: 0.70, 11: 0.20, 12: 0.10},
    ),
    (
        14,
        {0: 0.10, 4: 0.10, 10: 0.05, 11: 0.02, 12: 0.30, 13: 0.20},
        (5, 2),
        {11: 0.22},
        {0: 5.80, 4: 2.40, 10: 0.75, 12: 0.40, 13: 0.20},
    ),
]


def test_example_tiers():
    mass = dict(enumerate(MASS))
    assert mikv.tier_sizes(10, 0.4) == (4, 2)
    high = mikv.first_high(mass, 4, 2)
    assert high == [0, 4, 8, 9]
    for t, added, sizes, demoted, after in STEPS:
        mass = {p: mass.get(p, 0.0) + added.get(p, 0.0) for p in range(t)}
        assert mikv.tier_sizes(t, 0.4) == sizes
        before = [*high, t - 1]
        high = mikv.demote(before, mass, t, *sizes)
        assert high == list(after)
        assert set(before) - set(high) == set(demoted)
        for p, m in (demoted | after).items():
            assert_allclose(mass[p], m, atol=1e-12)
    assert mikv.tier_sizes(15, 0.4) == mikv.tier_sizes(16, 0.4) == (6, 3)


def test_tier_sizes_are_counted_in_integers():
    assert mikv.tier_sizes(180, 0.65)[0] == 117
    assert mikv.tier_sizes(50, 0.2, heavy_share=0.0) == (10, 10)
    assert mikv.tier_sizes(50, 0.2, heavy_share=1.0) == (10, 0)


def test_ties_keep_the_lower_position():
    even = dict.fromkeys(range(6), 1.0)
    assert mikv.first_high(even, 3, 1) == [0, 1, 5]
    assert mikv.demote([0, 1, 2, 3, 5], even, 6, 3, 1) == [0, 1, 5]


# ---- properties ----


@each_calls
@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"low_bits": 16}], ids=["all high", "nothing rounded"])
def test_without_rounding_it_is_the_full_cache(calls, settings):
    stream = make_stream()
    got = mikv.run(*stream, calls, **settings)
    assert_allclose(outputs(got), outputs(full.run(*stream, calls)), atol=1e-12)


def test_all_tokens_of_ratio_one_are_high():
    assert mikv.run(*make_stream(), [N - 1, 1], ratio=1.0)[-1].kept == [list(range(N))] * KV_HEADS


def test_prompt_outputs_are_exact():
    stream = make_stream()
    (got,) = mikv.run(*stream, [N])
    assert_allclose(got.out, full.run(*stream, [N])[0].out, atol=1e-12)


def test_ratio_zero_rounds_everything_but_the_token_that_attends():
    q, k, v = make_stream()
    got = mikv.run(q, k, v, [N - 2, 1, 1], ratio=0.0, balance=False)
    q, k = rotated(q), rotated(k)
    assert [call.kept for call in got] == [[[]] * KV_HEADS] * 3
    for p in (N - 2, N - 1):
        for x in range(q.shape[1]):
            keys = [quantiser.rounded(key, 2, DIM // 2) for key in k[:p, x // GROUP]] + [k[p, x // GROUP]]
            values = [quantiser.rounded(value, 2, DIM // 2) for value in v[:p, x // GROUP]] + [v[p, x // GROUP]]
            weights = np.exp(np.array(keys) @ q[p, x] / np.sqrt(DIM))
            want = weights @ np.array(values) / weights.sum()
            assert_allclose(got[p - N + 3].out[0, x], want, atol=1e-12)


@each_calls
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.65])
def test_tiers(calls, ratio):
    q, k, v = make_stream()
    turned = rotated(k)
    before = None
    start = 0
    for call, t in zip(mikv.run(q, k, v, calls, ratio=ratio), np.cumsum(calls), strict=True):
        n_hi, n_rec = mikv.tier_sizes(int(t), ratio)
        for h, high in enumerate(call.kept):
            assert len(high) == n_hi
            assert set(range(t - n_rec, t)) <= set(high)
            assert sorted(call.held[h]) == list(range(t))
            assert_allclose(sum(call.scores[h].values()), GROUP * t)
            if before is not None:
                assert set(high) <= set(before[h]) | set(range(start, t))  # once low, always low
            for p, token in call.held[h].items():
                whole = np.array_equal(token.key, turned[p, h]) and np.array_equal(token.value, v[p, h])
                assert whole == (p in high)
        before, start = call.kept, t


def test_policy_local():
    for call, t in zip(mikv.run(*make_stream(), [14] + [1] * 10, heavy_share=0.0), range(14, 25), strict=True):
        assert call.kept == [list(range(t - t // 5, t))] * KV_HEADS


def test_low_tokens_are_rounded_after_balancing_and_the_balancer_is_frozen():
    q, k, v = make_stream()
    got = mikv.run(q, k, v, [14] + [1] * 10)
    q, k = rotated(q), rotated(k)
    for h in range(KV_HEADS):
        bal = quantiser.balancer(q[:14, h * GROUP : (h + 1) * GROUP], k[:14, h])
        for p in set(range(N)) - set(got[-1].kept[h]):
            token = got[-1].held[h][p]
            assert_allclose(token.key, quantiser.rounded(k[p, h] * bal, 2, DIM // 2) / bal)
            assert_allclose(token.value, quantiser.rounded(v[p, h], 2, DIM // 2))


def test_logit_error_bound():
    q, k, v = make_stream()
    (got,) = mikv.run(q, k, v, [N])
    q, k = rotated(q), rotated(k)
    half = DIM // 2
    for h in range(KV_HEADS):
        bal = quantiser.balancer(q[:, h * GROUP : (h + 1) * GROUP], k[:, h])
        for p, token in got.held[h].items():
            x = (k[p, h] * bal).reshape(2, half)
            alpha = quantiser.quantise(x.ravel(), 2, half).alpha
            bound = [a / 2 + 3 * 2**-11 * np.abs(part).max() + 3 * 2**-24 for a, part in zip(alpha, x, strict=True)]
            for query in q[:, h * GROUP : (h + 1) * GROUP].reshape(-1, DIM):
                error = abs(query @ (token.key - k[p, h]))
                assert error <= np.abs(query / bal) @ np.repeat(bound, half) + 1e-12


def test_low_high_bits_are_encoded_at_once_and_attend_so():
    q, k, v = make_stream()
    prompt, step = mikv.run(q, k, v, [N - 1, 1], high_bits=8)
    q, k = rotated(q), rotated(k)
    for h in range(KV_HEADS):
        bal = quantiser.balancer(q[:-1, h * GROUP : (h + 1) * GROUP], k[:-1, h])
        new = mikv.coded(common.Token(k[-1, h], v[-1, h]), 8, DIM // 2, bal)
        assert_allclose(step.held[h][N - 1].key, new.key)
        hand = prompt.held[h] | {N - 1: new}
        keys, values = (np.array([getattr(hand[p], what) for p in range(N)]) for what in ("key", "value"))
        for x in range(h * GROUP, (h + 1) * GROUP):
            weights = np.exp(keys @ q[-1, x] / np.sqrt(DIM))
            assert_allclose(step.out[0, x], weights @ values / weights.sum(), atol=1e-12)


def test_rounding_twice_matters_below_16_bits_only():
    stream, calls = make_stream(), CALLS["prompt then tokens"]
    once, twice = (mikv.run(*stream, calls, twice=twice) for twice in (False, True))
    assert_allclose(outputs(once), outputs(twice), atol=0)
    once, twice = (mikv.run(*stream, calls, high_bits=3, twice=twice) for twice in (False, True))
    assert not np.allclose(outputs(once), outputs(twice))


def test_a_later_call_of_several_tokens_attends_before_it_demotes():
    stream = make_stream()
    together = mikv.run(*stream, [N - 6, 6])[-1]
    for h in range(KV_HEADS):
        before = mikv.run(*[x[: N - 6] for x in stream], [N - 6])[0]
        high = [*before.kept[h], *range(N - 6, N)]
        assert together.kept[h] == mikv.demote(high, together.scores[h], N, *mikv.tier_sizes(N, 0.2))


def test_error_falls_with_bits_and_ratio():
    def error(**settings):
        total = 0.0
        for seed in range(6):
            stream = make_stream(seed=seed)
            exact = outputs(full.run(*stream, CALLS["prompt then tokens"]))
            total += np.abs(outputs(mikv.run(*stream, CALLS["prompt then tokens"], **settings)) - exact).mean()
        return total

    by_bits = [error(low_bits=bits) for bits in (2, 3, 4, 8)]
    by_ratio = [error(ratio=ratio) for ratio in (0.1, 0.3, 0.6, 0.9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_ratio == sorted(by_ratio, reverse=True)


@pytest.mark.parametrize("calls", [[3, 3], [4, 0, 1]])
def test_calls_that_do_not_cover_the_stream_are_refused(calls):
    with pytest.raises(ValueError, match="calls"):
        mikv.run(*make_stream(5), calls)
