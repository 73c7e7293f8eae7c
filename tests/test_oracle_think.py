"""The ThinK oracle against its worked example and the properties of its specification."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, full, think

KV_HEADS, GROUP, DIM, N = 2, 3, 8, 24
SMALL = {"window": 5, "recent": 4}
CALLS = {"prompt then tokens": [14] + [1] * 10, "turns": [14, 6, 1, 3], "one": [N], "short": [3] + [1] * 21}
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


def frobenius(q, k):
    """|q_j k_j^T|_F per channel, from the outer products."""
    return np.array([np.linalg.norm(np.outer(q[:, j], k[:, j])) for j in range(k.shape[1])])


def close_logits(hand, wanted):
    got = common.scaled_logits(np.array([1, 0.5, -1, 2]), 4, hand, dict.fromkeys(hand, 0), 1.0)
    assert_allclose([got[p] for p in range(5)], wanted, atol=1e-12)


# ---- worked example ----

Q = np.array([[[1, 0, 2, 1], [0, 1, 2, 0]], [[1, 1, 0, 0], [2, 0, 1, 1.0]]])  # the window: [query, head, channel]
K = np.array([[1, 0.5, 0, 2], [0, 1, 1, 2], [1, 0, 2, 0], [2, 1, 1, 1]])
V = np.array([[1, 0], [0, 1], [1, 1], [2, 0.0]])
PROMPT_Q = np.concatenate([np.zeros((2, 2, 4)), Q])


def test_example_frobenius_norms():
    norms = [frobenius(Q[:, x], K) for x in range(2)]
    assert_allclose(norms, [[3.464102, 1.5, 4.898979, 3], [4.898979, 1.5, 5.477226, 3]], atol=5e-7)
    for x in range(2):
        assert_allclose(norms[x], np.linalg.norm(Q[:, x], axis=0) * np.linalg.norm(K, axis=0))
        assert think.keep_channels(norms[x], 2) == [0, 2]


def test_example_grouped_score():
    assert_allclose((Q**2).mean(axis=0), [[1, 0.5, 2, 0.5], [2, 0.5, 2.5, 0.5]])
    assert_allclose((K**2).mean(axis=0), [1.5, 0.5625, 1.5, 2.25])
    scores = think.channel_scores(Q, K)
    assert_allclose(scores, [2.25, 0.28125, 3.375, 1.125])
    assert think.keep_channels(scores, think.kept_count(4, 0.5)) == [0, 2]


def test_example_decode():
    values = np.concatenate([V, np.zeros((4, 2))], axis=1)
    head = think.Head(count=2, window=2, recent=1, paired=False, demote_tail=None)
    head.call(PROMPT_Q, K, values)
    assert head.keep == [0, 2]
    assert head.tail == [3]
    assert [head.held[p].key[head.keep].tolist() for p in range(3)] == [[1, 0], [0, 1], [1, 2]]
    assert head.held[3].key.tolist() == [2, 1, 1, 1]

    q, k, v = np.array([[[1, 0.5, -1, 2]]]), np.full((1, 4), 0.5), np.array([[0, 3, 0, 0.0]])
    out = head.call(q, k, v)
    close_logits(head.held, [0.5, -0.5, -0.5, 1.75, 0.625])
    _, probs = common.attend(q[0, 0], 4, head.held, dict.fromkeys(range(5), 0), 1.0)
    assert_allclose(list(probs.values()), [0.157251, 0.057849, 0.057849, 0.548861, 0.178189], atol=5e-7)
    assert_allclose(out[0, 0, :2], [1.312822, 0.650266], atol=5e-7)
    assert head.tail == [3, 4]

    whole = think.Head(count=4, window=2, recent=1, paired=False, demote_tail=None)
    whole.call(PROMPT_Q, K, values)
    assert_allclose(whole.call(q, k, v)[0, 0, :2], [0.932769, 0.430604], atol=5e-7)
    close_logits(whole.held, [2.625, 1.75, -0.5, 1.75, 0.625])


@pytest.mark.parametrize(
    ("dim", "ratio", "count"),
    [(128, 0.4, 77), (64, 0.4, 39), (256, 0.4, 154), (128, 0.3, 90), (128, 0.5, 64), (128, 0.6, 52)],
)
def test_example_counts(dim, ratio, count):
    assert think.kept_count(dim, ratio) == count


def test_counts_rounded_up_and_in_pairs():
    assert [think.kept_count(128, ratio, 8) for ratio in (0.3, 0.4, 0.5, 0.6)] == [96, 80, 64, 56]
    assert think.kept_count(128, 0.6, 16) == 64
    assert think.kept_count(128, 0.4, paired=True) == 128 - 50
    assert think.kept_count(6, 0.3, 4) == 6


# ---- choosing channels ----


def test_score_is_the_square_of_the_frobenius_norm():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(5, 1, 8)), rng.normal(size=(11, 8))
    assert_allclose(think.channel_scores(q, k) * 5 * 11, frobenius(q[:, 0], k) ** 2)


def test_ties_keep_the_lower_channel():
    assert think.keep_channels(np.ones(5), 3) == [0, 1, 2]
    assert think.keep_channels(np.ones(6), 4, paired=True) == [0, 1, 3, 4]


def test_pairs_go_by_their_sum():
    assert think.keep_channels(np.array([9, 1, 5, 0, 3, 6.0]), 4, paired=True) == [0, 2, 3, 5]


def test_the_set_follows_a_permutation_and_not_a_change_of_scale():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(5, 3, 8)), rng.normal(size=(11, 8))
    keep = think.keep_channels(think.channel_scores(q, k), 5)
    order = rng.permutation(8)
    moved = think.keep_channels(think.channel_scores(q[..., order], k[:, order]), 5)
    assert sorted(order[moved]) == keep
    c = rng.uniform(0.1, 10, size=8)
    assert think.keep_channels(think.channel_scores(q * c, k / c), 5) == keep
    assert think.keep_channels(think.channel_scores(q * 7, k), 5) == keep


def test_channels_that_are_zero_go_first():
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(5, 3, 8)), rng.normal(size=(11, 8))
    q[..., 2], k[:, 6] = 0, 0
    assert think.keep_channels(think.channel_scores(q, k), 6) == [0, 1, 3, 4, 5, 7]


def test_identical_heads_count_as_one():
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(5, 1, 8)), rng.normal(size=(11, 8))
    assert_allclose(think.channel_scores(np.repeat(q, 4, axis=1), k), think.channel_scores(q, k))


def test_truncation_error_is_within_the_sum_of_dropped_scores():
    rng = np.random.default_rng(4)
    for _ in range(20):
        q, k = rng.normal(size=(5, 8)), rng.normal(size=(11, 8))
        scores = frobenius(q, k)
        drop = [j for j in range(8) if j not in think.keep_channels(scores, 5)]
        assert np.sum((q[:, drop] @ k[:, drop].T) ** 2) <= scores[drop].sum() ** 2 + 1e-12


# ---- runs ----


@each_calls
@pytest.mark.parametrize("settings", [{"ratio": 0.0, **SMALL}, {"recent": N}], ids=["no channel", "no token"])
def test_dropping_nothing_is_the_full_cache(calls, settings):
    stream = make_stream()
    got = think.run(*stream, calls, **settings)
    assert_allclose(outputs(got), outputs(full.run(*stream, calls)), atol=1e-12)


@each_calls
@pytest.mark.parametrize("paired", [False, True])
def test_state(calls, paired):
    q, k, v = make_stream()
    got = think.run(q, k, v, calls, paired=paired, **SMALL)
    prompt = calls[0]
    q, k = rotated(q), rotated(k)
    for h in range(KV_HEADS):
        window = q[max(prompt - 5, 0) : prompt, h * GROUP : (h + 1) * GROUP]
        keep = think.keep_channels(think.channel_scores(window, k[:prompt, h]), 6 if paired else 5, paired)
        assert keep == sorted(set(keep))
        for call, t in zip(got, np.cumsum(calls), strict=True):
            assert call.kept[h] == list(range(max(prompt - 4, 0), t))
            for p in range(t):
                wanted = k[p, h].copy()
                if p not in call.kept[h]:
                    wanted[[j for j in range(DIM) if j not in keep]] = 0
                assert_allclose(call.held[h][p].key, wanted, atol=0)
                assert_allclose(call.held[h][p].value, v[p, h], atol=0)


@each_calls
def test_outputs_are_two_segments_under_one_softmax(calls):
    q, k, v = make_stream()
    got = think.run(q, k, v, calls, **SMALL)
    prompt = calls[0]
    thin = max(prompt - 4, 0)
    q, k = rotated(q), rotated(k)
    for x in range(q.shape[1]):
        h = x // GROUP
        window = q[max(prompt - 5, 0) : prompt, h * GROUP : (h + 1) * GROUP]
        keep = think.keep_channels(think.channel_scores(window, k[:prompt, h]), 5)
        for p in range(prompt, N):
            logits = [k[:thin, h][:, keep] @ q[p, x, keep], k[thin : p + 1, h] @ q[p, x]]
            weights = np.exp(np.concatenate(logits) / np.sqrt(DIM))
            assert_allclose(outputs(got)[p, x], weights @ v[: p + 1, h] / weights.sum(), atol=1e-12)
    assert_allclose(got[0].out, full.run(*[x[:prompt] for x in make_stream()], [prompt])[0].out, atol=1e-12)


def test_a_later_call_of_several_tokens_is_as_many_steps():
    stream = make_stream()
    for settings in (SMALL, {**SMALL, "demote_tail": 3}):
        turns = think.run(*stream, [14, 6, 4], **settings)
        steps = think.run(*stream, [14] + [1] * 10, **settings)
        assert_allclose(outputs(turns), outputs(steps), atol=1e-12)
        assert turns[-1].kept == steps[-1].kept


def test_demoting_the_tail():
    lengths = [len(call.kept[0]) for call in think.run(*make_stream(), [14] + [1] * 10, **SMALL, demote_tail=3)]
    assert lengths == [4, *itertools.islice(itertools.cycle([5, 6, 4]), 10)]
    last = think.run(*make_stream(), [14] + [1] * 10, **SMALL, demote_tail=3)[-1]
    zeros = [np.flatnonzero(last.held[0][p].key == 0).tolist() for p in range(N)]
    assert zeros == [zeros[0]] * 19 + [[]] * 5
    assert len(zeros[0]) == 3


def test_a_prompt_no_longer_than_the_recent_tokens_is_all_tail():
    prompt, *_, last = think.run(*make_stream(), [4] + [1] * 20, **SMALL)
    assert prompt.kept == [[0, 1, 2, 3]] * KV_HEADS
    assert last.kept == [list(range(N))] * KV_HEADS


def test_recent_zero_thins_the_whole_prompt():
    prompt, step = think.run(*make_stream(), [N - 1, 1], window=5, recent=0)
    assert prompt.kept == [[]] * KV_HEADS
    assert step.kept == [[N - 1]] * KV_HEADS


def test_pairs_can_be_turned_further():
    stream = make_stream()
    (call,) = think.run(*stream, [N], paired=True, **SMALL)
    k = rotated(stream[1])
    keep = np.flatnonzero(call.held[0][0].key)
    further = common.rope(k[0, 0], 5)
    assert_allclose(common.rope(call.held[0][0].key, 5)[keep], further[keep], atol=1e-12)


def test_number_of_channels_can_be_given():
    (call,) = think.run(*make_stream(), [N], keep_count=3, **SMALL)
    assert np.count_nonzero(call.held[0][0].key) == 3


@pytest.mark.parametrize("settings", [{"window": 0}, {"recent": -1}, {"ratio": 1.0}, {"keep_count": 9}])
def test_what_does_not_fit_is_refused(settings):
    with pytest.raises(ValueError, match=r"needs|cannot"):
        think.run(*make_stream(5), [5], **settings)
