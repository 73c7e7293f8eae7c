"""The oracle of Locret against the worked examples and the promises of its specification."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.oracles import common, full, locret
from tests.oracles.streaming_llm import rank_places
from tests.test_oracles import GROUP, KV_HEADS, close, dense, heads_together, make_stream, rotate

H0 = [0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.05, 0.55, 0.95]
H1 = [0.2, 0.9, 0.6, 0.85, 0.1, 0.58, 0.15, 0.05, 0.3, 0.25, 0.35, 0.5]
N = 26
SMALL = dict(budget=6, stabilizers=2, tail=3, chunk=4)
CALLS = {"tokens": [18] + [1] * 8, "prompt": [N], "turns": [14, 1, 1, 7, 1, 2]}

each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
each_mode = pytest.mark.parametrize("position_mode", ["rank", "original"])


def make_scores(n=N, seed=3, kv_heads=KV_HEADS):
    """Few values, so that many scores are equal."""
    return np.random.default_rng(seed).integers(0, 8, size=(n, kv_heads)).astype(float)


def choose(rows, calls=None, **settings):
    """The passes' kept positions, [pass][head], of streams of zeros; `rows` is [head][token]."""
    scores = np.array(rows, float).T
    n, heads = scores.shape
    zeros = np.zeros((n, heads, 2))
    results = locret.run(zeros, zeros, zeros, calls or [n], scores=scores, **settings)
    return [part.kept for call in results for part in call.passes]


def same(results, others, **tolerance):
    for got, want in zip(results, others, strict=True):
        assert_allclose(got.out, want.out, **{"atol": 1e-12, **tolerance})
        assert got.kept == want.kept


# ---- worked examples ----

ANSWER = np.array([[[1, 2], [2, -1], [1, 1], [0, -2]], [[0, 1], [1, 0], [-1, 0], [1, -1]]], float)  # [answer, head, D]
PROMPT = np.array([[[1, 0], [0, 1], [2, 1], [-1, 1], [0, 0]], [[1, 1], [0, 2], [-1, 0], [1, -1], [2, 0]]], float)


def unturned_labels(answer, **settings):
    """Labels of vectors that are rotated already."""
    prompt = PROMPT.transpose(1, 0, 2)
    return locret.labels(answer, prompt, [0] * len(answer), k_positions=[0] * 5, **settings)


def test_example_labels():
    # q[0].k = [1, 2, 4, 1, 0] and [0, 1, 1, 1, 0]; q[1].k = [2, -1, 3, -3, 0] and [1, 0, 2, -1, 0]: largest of four
    # q[2].k = [2, 2, -1, 0, 2] and [-1, 0, 1, -1, -2]; q[3].k = [-2, -4, 0, 2, 0] and [0, -2, -1, 2, 2]
    wanted = np.array([[2, 2, 4, 1, 0], [2, 2, 1, 2, 2]])
    assert_array_equal(unturned_labels(ANSWER, scaled=False), wanted)
    assert_allclose(unturned_labels(ANSWER), wanted / np.sqrt(2), atol=1e-12)
    assert_allclose(unturned_labels(ANSWER)[0, [0, 2, 3]], [1.41421356, 2.82842712, 0.70710678], atol=1e-8)


def test_example_labels_of_each_query_head():
    per_head = np.array([[1, 2, 4, 1, 0], [2, 0, 3, -1, 0], [2, 2, 1, 0, 2], [0, -2, 0, 2, 2]])
    for x in range(4):
        key = PROMPT[[x // 2]].transpose(1, 0, 2)
        got = locret.labels(ANSWER[:, [x]], key, [0, 0], k_positions=[0] * 5, scaled=False)
        assert_array_equal(got, per_head[[x]])


S = np.array([[[0.5, 1, -0.5], [2, 0, 0.25]], [[1, 1.5, 3], [-1, 0, 0]]])
WANTED = np.array([[[1, 1, 1.5], [0.5, 0, 0]], [[1, 2, 0.5], [0, 0.5, 0]]])


def test_example_loss():
    # differences [-.5, 0, -2], [1.5, 0, .25]; [0, -.5, 2.5], [-1, -.5, 0]
    errors = [[[0.125, 0, 1.5], [1, 0, 0.03125]], [[0, 0.125, 2], [0.5, 0.125, 0]]]
    assert_array_equal(np.vectorize(locret.smooth_l1)(S - WANTED), errors)
    # sums 2.65625 and 2.75, over six
    assert_allclose([locret.regression(*pair) for pair in zip(S, WANTED, strict=True)], [2.65625 / 6, 2.75 / 6])
    # steps [.5, -1.5], [-2, .25]; [.5, 1.5], [1, 0]: squares sum to 6.5625 and 3.5, over four
    assert_allclose([locret.roughness(s) for s in S], [1.640625, 0.875])
    assert_allclose(locret.loss(S, WANTED), 0.45680990, atol=1e-8)
    assert_allclose(locret.loss(S, WANTED, smooth_reduction="mean"), 0.45366537, atol=1e-8)


@pytest.mark.parametrize(
    "x, scores", [([1, -1, 2, 0.5], [2.17353541, -2.84823739]), ([0, 1, -1, 2], [2.92506531, 3.39434739])]
)
def test_example_head(x, scores):
    # x W1 = [2.5, -1.5, -1] and [1.5, 3.5, 2.5]
    w1 = np.array([[1, 0, -1], [0, 1, 0.5], [0.5, -0.5, 0], [1, 1, 1]])
    w2 = np.array([[1, -1], [0.5, 0], [0, 2]])
    assert_allclose(locret.perceptron(np.array(x, float), w1, w2), scores, atol=1e-8)


D = dict(budget=5, stabilizers=2, tail=2, chunk=4)
ROWS = [H0 + [0.0, 0.0], H1 + [0.0, 0.0]]


def test_example_eviction():
    # [4, 8): 6 and 7 stay; the best three of the others are .9 .8 .5 (0 4 2) and .9 .85 .6 (1 3 2)
    # [8, 12): the last, no stabilizers: .95 .9 .8 .7 .6 and .9 .85 .6 .5 .35
    assert choose(ROWS, **D) == [
        [[0, 1, 2, 3]] * 2,
        [[0, 2, 4, 6, 7], [1, 2, 3, 6, 7]],
        [[0, 4, 6, 8, 11], [1, 2, 3, 10, 11]],
        [[0, 4, 6, 8, 11, 12, 13], [1, 2, 3, 10, 11, 12, 13]],
    ]


def test_example_best_of_all():
    best = [sorted(common.best(dict(enumerate(row)), 5)) for row in (H0, H1)]
    assert best == [[0, 4, 6, 8, 11], [1, 2, 3, 5, 11]]


def test_example_without_stabilizers():
    # [4, 8) keeps 0 2 4 6 7 and, of .9 .85 .6 .58 .2, 0 1 2 3 5
    got = choose(ROWS, **{**D, "stabilizers": 0})
    assert got[1] == [[0, 2, 4, 6, 7], [0, 1, 2, 3, 5]]
    assert got[2] == [[0, 4, 6, 8, 11], [1, 2, 3, 5, 11]]


def test_example_ragged_last_chunk():
    got = choose([ROWS[0][:13]], **D)
    assert got[1:] == [[[0, 2, 4, 6, 7]], [[0, 4, 6, 8, 10]], [[0, 4, 6, 8, 10, 11, 12]]]


def test_example_stabilizers_of_several_chunks():
    # [4, 6): 3 4 5 stay, with .9 .5; [6, 8): 5 6 7, with .9 .8; then 7 8 9, with .9 .8; the last: .95 .9 .8 .6 .55
    # of 0 4 7 8 9 10 11, so 6 (.7), lost to 7 8 9, is missing
    got = choose([ROWS[0]], **{**D, "stabilizers": 3, "chunk": 2})
    assert [kept for (kept,) in got[:-1]] == [
        [0, 1],
        [0, 1, 2, 3],
        [0, 2, 3, 4, 5],
        [0, 4, 5, 6, 7],
        [0, 4, 7, 8, 9],
        [0, 4, 8, 10, 11],
    ]


@pytest.mark.parametrize("position_mode, gaps", [("rank", [2, 4]), ("original", [4, 6])])
def test_example_slots(position_mode, gaps):
    # held 0 4 6 8 11, slots 0..4; token 8 is in slot 3, token 12 in slot 5 and token 14, decoded, in slot 7.
    # Only token 8 has a key and a value, so a query of (1, 0) gives it w of w + the number of others, with
    # w = exp(cos(gap) / sqrt 2)
    q, k, v = np.zeros((3, 15, 1, 2))
    k[8, 0], v[8, 0], q[12, 0], q[14, 0] = [(1, 0)] * 4
    scores = np.array([*H0, 0, 0, 0])[:, None]
    prompt, step = locret.run(q, k, v, [14, 1], scores=scores, **D, position_mode=position_mode)
    w = np.exp(np.cos(gaps) / np.sqrt(2))
    assert_allclose(prompt.out[12, 0, 0], w[0] / (w[0] + 5), atol=1e-12)
    assert_allclose(step.out[0, 0, 0], w[1] / (w[1] + 7), atol=1e-12)


def test_example_slot_logit():
    hand = {p: common.Token(np.array([1.0, 0.0]), np.zeros(2)) for p in (0, 4, 6, 8, 11, 12)}
    for places, logit in ((rank_places(hand), -0.41614684), (common.true_places(hand), -0.65364362)):
        got = common.scaled_logits(np.array([1.0, 0.0]), 12, hand, places, 10000.0)
        assert_allclose(got[8] * np.sqrt(2), logit, atol=1e-8)


def test_example_ties():
    assert locret.survivors(dict(enumerate([1.0, 1, 1, 0])), 2) == [0, 1]


@pytest.mark.parametrize("step, rate", [(0, 0), (1000, 2.5e-4), (2000, 5e-4), (2500, 2.5e-4), (2999, 5e-7), (3000, 0)])
def test_example_learning_rate(step, rate):
    assert locret.learning_rate(step) == pytest.approx(rate, abs=1e-15)


def test_learning_rate_of_the_short_warm_up():
    # 300 of 3000: 150 / 300 and 1350 / 2700 of the peak
    assert [locret.learning_rate(t, 300) for t in (150, 300, 1650)] == pytest.approx([2.5e-4, 5e-4, 2.5e-4])


# ---- the head, labels and loss ----


def test_head_reads_query_key_and_value_in_that_order():
    q, k, v = np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 6]]), np.array([[7.0, 8]])
    for i in range(8):
        got = locret.head(q, k, v, np.eye(8)[:, [i]], np.array([[3.0]]))
        assert_allclose(got, [3 * (i + 1) / (1 + np.exp(-(i + 1.0)))])


def test_head_is_two_matrix_products():
    q, k, v = make_stream(1)
    x = np.concatenate([part.ravel() for part in (q, k, v)])
    w1 = np.random.default_rng(1).normal(size=(len(x), 5))
    w2 = np.random.default_rng(2).normal(size=(5, KV_HEADS))
    pre = x @ w1
    assert_allclose(locret.head(q[0], k[0], v[0], w1, w2), (pre * 0.5 * (1 + np.tanh(pre / 2))) @ w2, atol=1e-12)


PROMPT_LENGTH = 5


def answer_labels(rows=slice(None), heads=slice(None), kv_heads=slice(None)):
    q, k, _ = make_stream(9)
    at = np.arange(PROMPT_LENGTH, 9)[rows]
    return locret.labels(q[at][:, heads], k[:PROMPT_LENGTH, kv_heads], at)


def test_labels_are_the_largest_logits_at_true_positions():
    q, k, _ = make_stream(9)
    for h, row in enumerate(answer_labels()):
        key = rotate(k[:PROMPT_LENGTH, h], range(PROMPT_LENGTH))
        logits = [
            rotate(q[PROMPT_LENGTH:, x], range(PROMPT_LENGTH, 9)) @ key.T for x in range(h * GROUP, (h + 1) * GROUP)
        ]
        assert_allclose(row, np.max(logits, axis=(0, 1)) / np.sqrt(8), atol=1e-12)


def test_labels_of_blocks_of_queries_join_by_their_maximum():
    blocks = [answer_labels([0]), answer_labels([1, 2]), answer_labels([3])]
    assert_array_equal(np.max(blocks, axis=0), answer_labels())


def test_an_answer_token_twice_changes_no_label():
    assert_array_equal(answer_labels([0, 1, 1, 2, 3, 0]), answer_labels())


def test_labels_of_a_group_are_the_largest_of_its_heads():
    for h in range(KV_HEADS):
        mine = [answer_labels(heads=[h * GROUP + x], kv_heads=[h])[0] for x in range(GROUP)]
        assert_array_equal(np.max(mine, axis=0), answer_labels()[h])


def test_a_single_token_has_no_roughness():
    # differences 1 and .5: errors .5 and .125
    assert locret.loss(np.array([[[1.0], [0.5]]]), np.zeros((1, 2, 1))) == 0.3125


def test_loss_of_the_labels_is_their_roughness():
    assert locret.loss(WANTED, WANTED, alpha=0) == 0
    assert_allclose(locret.loss(WANTED, WANTED, alpha=1), np.square(np.diff(WANTED)).mean(axis=(1, 2)).sum())


def test_recall_by_hand():
    # of 20 tokens, two: labels 18 19; scores 19 0, then 18 19, then 0 1
    wanted = np.arange(20.0)
    first = np.where(np.arange(20) == 0, 18.5, wanted)
    assert locret.recall(np.array([[first, wanted], [-wanted, wanted]]), np.array([[wanted] * 2] * 2)) == 2.5 / 4


@pytest.mark.parametrize("length", [1, 9, 10, 25])
def test_recall_of_the_labels_is_one(length):
    wanted = np.random.default_rng(0).normal(size=(2, 3, length))
    assert locret.recall(wanted, wanted) == 1


# ---- by hand ----


def test_a_later_turn_takes_tail_and_answer_as_candidates():
    # prompt 0..4: {0 1}; of .5 .9 .1 .3 three: 0 1 3; tail 4. Step 5. Turn 6..9: [6, 8) on 0 1 3 4 5, 7 stays, and the
    # best two of .5 .9 .3 .2 .7 .05; [8, 9), the last, on 1 5 7: the best three of .9 .7 .6 .8; tail 9
    row = [0.5, 0.9, 0.1, 0.3, 0.2, 0.7, 0.05, 0.6, 0.8, 0.4]
    got = choose([row], [5, 1, 4], budget=3, stabilizers=1, tail=1, chunk=2)
    assert [kept for (kept,) in got] == [
        [0, 1],
        [0, 1, 3],
        [0, 1, 3, 4],
        [0, 1, 3, 4, 5],
        [1, 5, 7],
        [1, 5, 8],
        [1, 5, 8, 9],
    ]


SHORT_TURN = dict(budget=3, stabilizers=1, tail=2, chunk=4, max_new=2)


@pytest.mark.parametrize("capacity", [None, 11])
def test_a_short_turn_that_fits_evicts_nothing(capacity):
    # 3 + 2 of the prompt, 2 steps, 2 of the turn and room for 2 more: 11
    got = choose([range(9)], [5, 1, 1, 2], **SHORT_TURN, capacity=capacity)
    assert got[-1] == [list(range(9))]


def test_a_short_turn_that_does_not_fit_evicts_before_its_tail():
    # 0..6 in hand: 6 stays, and the best two of the others, 0 and 5 (9 and 8)
    row = [9, 1, 2, 3, 4, 8, 0, 5, 5]
    got = choose([row], [5, 1, 1, 2], **SHORT_TURN, capacity=10)
    assert got[-3:] == [[[0, 1, 2, 3, 4, 5, 6]], [[0, 5, 6]], [[0, 5, 6, 7, 8]]]


def test_bounded_decode_by_hand():
    # prompt 0..3, of which 3 is the tail: 0 1 2, then 3; after the second step 5 stays, with 9 and 7 (0 and 4);
    # after the fourth 7 stays, with 9 and 8 (0 and 6): 5 was a stabilizer and scores 0
    row = [9, 1, 2, 3, 7, 0, 8, 0]
    got = choose([row], [4, 1, 1, 1, 1], budget=3, stabilizers=1, tail=1, chunk=4, bounded_decode=2)
    assert [kept for (kept,) in got] == [
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 4, 5],
        [0, 4, 5, 6],
        [0, 6, 7],
    ]


def test_bounded_decode_counts_from_the_last_turn():
    row = [9, 1, 2, 3, 7, 4, 0, 8, 0]
    got = choose([row], [4, 1, 2, 1, 1], budget=3, stabilizers=1, tail=3, chunk=4, bounded_decode=2)
    assert [len(kept) for (kept,) in got] == [1, 4, 5, 7, 8, 3]
    assert got[-1] == [[0, 7, 8]]


def test_a_prompt_of_one_token_is_no_decode_step():
    got = choose([[1, 3, 2, 0]], [1] * 4, budget=1, stabilizers=0, tail=0, chunk=4, bounded_decode=2)
    assert [kept for (kept,) in got] == [[0], [0, 1], [1], [1, 3]]


def test_the_query_in_front_by_hand():
    # 0 and 1 are worst; [0, 4) keeps them and 3, the stabilizer, and 2 (the best); [4, 7) the last: with 7 and 6
    row = [0, 0, 5, 1, 7, 3, 6]
    got = choose([row], budget=4, stabilizers=1, tail=0, chunk=4, protect=2)
    assert [kept for (kept,) in got] == [[0, 1, 2, 3], [0, 1, 4, 6]]


@pytest.mark.parametrize(
    "settings",
    [
        dict(stabilizers=6),
        dict(stabilizers=4, protect=2),
        dict(stabilizers=-1),
        dict(chunk=0),
        dict(bounded_decode=0),
        dict(capacity=10, max_new=2),
        dict(position_mode="slot"),
        dict(scores=make_scores(N + 1)),
    ],
)
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError):
        locret.run(*make_stream(N), [N], **{"scores": make_scores(), **SMALL, **settings})


# ---- streams ----


@each_calls
@each_mode
@pytest.mark.parametrize("chunk", [1, 5, 16, N])
def test_a_budget_as_long_as_the_stream_is_full_attention(calls, position_mode, chunk):
    stream = make_stream(N)
    settings = dict(SMALL, budget=N, chunk=chunk, position_mode=position_mode)
    same(locret.run(*stream, calls, scores=make_scores(), **settings), full.run(*stream, calls))


def test_a_budget_for_the_prompt_without_its_tail_is_full_attention():
    stream, calls = make_stream(N), [18] + [1] * 8
    same(locret.run(*stream, calls, scores=make_scores(), **{**SMALL, "budget": 15}), full.run(*stream, calls))
    short = locret.run(*stream, calls, scores=make_scores(), **{**SMALL, "budget": 14})
    assert [len(kept) for kept in short[0].kept] == [17, 17]


@pytest.mark.parametrize("n, tail", [(3, 3), (2, 5), (1, 1)])
def test_a_prompt_within_the_tail_is_read_at_once(n, tail):
    stream = make_stream(n)
    results = locret.run(*stream, [n], scores=make_scores(n), budget=1, stabilizers=0, tail=tail, chunk=1)
    same(results, full.run(*stream, [n]))
    assert len(results[0].passes) == 1


@each_calls
@each_mode
@pytest.mark.parametrize("tail", [0, 3])
def test_outputs_attend_to_what_the_pass_before_left_and_to_the_new(calls, position_mode, tail):
    q, k, v = make_stream(N)
    settings = dict(SMALL, tail=tail, position_mode=position_mode, bounded_decode=3)
    results = locret.run(q, k, v, calls, scores=make_scores(), **settings)
    before, start = [[]] * KV_HEADS, 0
    for call in results:
        out = []
        for part in call.passes:
            stop = start + len(part.out)
            for x in range(KV_HEADS * GROUP):
                h = x // GROUP
                held = [*before[h], *range(start, stop)]
                places = range(len(held)) if position_mode == "rank" else held
                want = dense(q[held, x], k[held, h], v[held, h], places)[len(before[h]) :]
                assert_allclose(part.out[:, x], want, atol=1e-12)
            before, start = part.kept, stop
            out.append(part.out)
        assert_array_equal(call.out, np.concatenate(out))
        assert call.kept == before
    assert start == N


def sorted_choice(scores, held, budget, stabilizers, protect):
    """The same choice by one stable sort."""
    t = np.array([scores[p] for p in held])
    t[len(t) - min(stabilizers, len(t)) :] = np.inf
    t[np.array(held) < protect] = np.inf
    order = np.argsort(-t, kind="stable")[:budget]
    return [held[i] for i in np.sort(order)]


@pytest.mark.parametrize("chunk", [1, 4, 7])
@pytest.mark.parametrize("stabilizers, protect", [(0, 0), (2, 0), (5, 0), (3, 2)])
def test_chunks_leave_what_a_stable_sort_leaves(chunk, stabilizers, protect):
    scores, end = make_scores(), N - 3
    settings = dict(SMALL, chunk=chunk, stabilizers=stabilizers, protect=protect)
    *parts, tail = choose(scores.T, **settings)
    held = [[]] * KV_HEADS
    for start, kept in zip(range(0, end, chunk), parts, strict=True):
        stop = min(start + chunk, end)
        forced = stabilizers if stop < end else 0
        held = [
            sorted_choice(scores[:, h], [*held[h], *range(start, stop)], 6, forced, protect) for h in range(KV_HEADS)
        ]
        assert kept == held
        assert all(len(row) == min(6, stop) for row in held)
        for row in held:
            assert row == sorted(row) and set(range(min(protect, stop))) <= set(row)
            if stop < end:
                assert set(range(stop - min(stabilizers, chunk), stop)) <= set(row)
    assert tail == [[*row, end, end + 1, end + 2] for row in held]


@each_calls
def test_scores_are_those_given(calls):
    scores = make_scores()
    results = locret.run(*make_stream(N), calls, scores=scores, **SMALL, bounded_decode=2)
    for call in results:
        for h in range(KV_HEADS):
            assert set(call.kept[h]) <= set(call.scores[h])
            close(call.scores[h], {p: scores[p, h] for p in call.scores[h]})


def test_the_scores_of_a_prompt_are_those_of_all_its_tokens():
    (call,) = locret.run(*make_stream(N), [N], scores=make_scores(), **SMALL)
    assert [sorted(scores) for scores in call.scores] == [list(range(N))] * KV_HEADS


@each_calls
def test_only_the_order_of_scores_counts(calls):
    stream, scores = make_stream(N), make_scores()
    a = locret.run(*stream, calls, scores=scores, **SMALL)
    same(a, locret.run(*stream, calls, scores=np.exp(scores) - 100, **SMALL), atol=0)


@each_calls
def test_heads_choose_apart(calls):
    streams = [make_stream(N, seed, kv_heads=1) for seed in (0, 1)]
    scores = make_scores()
    both = locret.run(*heads_together(*streams), calls, scores=scores, **SMALL)
    assert any(call.kept[0] != call.kept[1] for call in both)
    for h, stream in enumerate(streams):
        alone = locret.run(*stream, calls, scores=scores[:, [h]], **SMALL)
        for got, want in zip(both, alone, strict=True):
            assert got.kept[h] == want.kept[0]
            assert_array_equal(got.out[:, h * GROUP : (h + 1) * GROUP], want.out)


def test_later_tokens_of_a_chunk_change_nothing_before_them():
    q, k, v = make_stream(N)
    want = locret.run(q, k, v, [N], scores=make_scores(), **SMALL)[0].out
    for x in (q, k, v):
        x[10:] += 1.0
    scores = make_scores()
    scores[8:] += 1.0  # the chunk is 8..11, and its scores count when it ends
    got = locret.run(q, k, v, [N], scores=scores, **SMALL)[0].out
    assert_array_equal(got[:10], want[:10])
    assert (np.abs(got[10] - want[10]) > 1e-6).any()


def test_decoding_adds_a_slot_a_token():
    results = locret.run(*make_stream(N), CALLS["tokens"], scores=make_scores(), **SMALL)
    for steps, call in enumerate(results):
        for h, kept in enumerate(call.kept):
            assert kept == [*results[0].kept[h], *range(18, 18 + steps)]
            assert len(kept) == 6 + 3 + steps


def test_bounded_decode_holds_at_most_budget_tail_and_interval():
    calls = [10] + [1] * 16
    results = locret.run(*make_stream(N), calls, scores=make_scores(), **SMALL, bounded_decode=4)
    for steps, call in enumerate(results):
        base = 6 + 3 if steps < 4 else 6
        assert [len(kept) for kept in call.kept] == [base + steps % 4] * KV_HEADS
        if steps and steps % 4 == 0:
            assert all(kept[-2:] == [8 + steps, 9 + steps] for kept in call.kept)


def test_one_chunk_is_full_attention_then_the_best():
    stream, scores = make_stream(18), make_scores(18)
    (call,) = locret.run(*stream, [18], scores=scores, **{**SMALL, "chunk": 15})
    assert_allclose(call.out[:15], full.run(*stream, [18])[0].out[:15], atol=1e-12)
    for h in range(KV_HEADS):
        assert call.kept[h] == [*sorted(common.best(dict(enumerate(scores[:15, h])), 6)), 15, 16, 17]


def test_by_rank_what_left_might_never_have_been():
    stream = make_stream(N, kv_heads=1)
    prompt, *steps = locret.run(*stream, [18] + [1] * 8, scores=make_scores(kv_heads=1), **SMALL)
    held = steps[-1].kept[0]
    (want,) = full.run(*(x[held] for x in stream), [len(held)])
    got = np.concatenate([prompt.out[-3:], *(step.out for step in steps)])
    assert_allclose(got, want.out[6:], atol=1e-12)


def test_the_position_mode_changes_outputs_and_no_choice():
    stream = make_stream(N)
    rank, true = (
        locret.run(*stream, [N], scores=make_scores(), **SMALL, position_mode=m) for m in ("rank", "original")
    )
    assert rank[0].kept == true[0].kept
    first = np.abs(rank[0].out - true[0].out).max(axis=(1, 2)) > 1e-9
    assert not first[:8].any() and first[8:].all()  # the second chunk is the first to be evicted from


@pytest.mark.parametrize("calls, chunk, highest", [([18] + [1] * 8, 4, 6 + 3 + 8 - 1), ([N], 10, 6 + 10 - 1)])
def test_the_highest_rank_is_budget_and_chunk_or_tail_and_answer(monkeypatch, calls, chunk, highest):
    used = []

    def spy(hand):
        places = rank_places(hand)
        used.extend(places.values())
        return places

    monkeypatch.setattr(locret, "rank_places", spy)
    locret.run(*make_stream(N), calls, scores=make_scores(), **{**SMALL, "chunk": chunk})
    assert max(used) == highest


@pytest.mark.parametrize("protect", [1, 4])
def test_the_query_in_front_outlives_every_eviction(protect):
    scores = make_scores()
    scores[:protect] = -9.0
    settings = dict(SMALL, stabilizers=1, protect=protect, bounded_decode=2)
    results = locret.run(*make_stream(N), [15, *[1] * 4, 6, 1], scores=scores, **settings)
    for call in results:
        for part in call.passes:
            for kept in part.kept:
                assert kept[:protect] == list(range(protect))
