"""The oracle of Elastic Cache against the worked example and the promises of its specification."""

from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.oracles import common, elastic_cache, full
from tests.test_oracles import GROUP, KV_HEADS, close, dense, heads_together, make_stream, planted, rotate

IMPORTANCE = dict(enumerate([4, 1.2, 2.5, 0.6, 0.9, 1.8, 0.3, 0.8, 1.4, 0.5]))
HAND = {j: common.Token(np.array([10.0 * j]), np.array([float(j)])) for j in range(10)}
N = 30
CALLS = {"tokens": [18] + [1] * 12, "turns": [18, 5, 1, 6]}

each_r = pytest.mark.parametrize("r", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)


def slots(hand):
    return {p: (float(token.key[0]), float(token.value[0])) for p, token in hand.items()}


def decode(length, r, distance, steps, start_size=1):
    """Kept positions, and what each step dropped, from the lengths alone; the prompt keeps its first tokens."""
    left = length - elastic_cache.removed(length, r)
    order = list(range(left))
    fixed = elastic_cache.fixed_point(left, start_size, distance)
    dropped = []
    for n in range(length + 1, length + steps + 1):
        order.append(n - 1)
        gone = elastic_cache.victim(order, n, fixed, r)
        order = [p for p in order if p != gone]
        dropped.append(gone)
    return order, dropped


# ---- worked example ----


def test_example_prompt():
    buckets = elastic_cache.plan(IMPORTANCE, 0.5)
    assert {p: sorted(members) for p, members in buckets.items()} == {
        0: [0],
        2: [1, 2, 3],
        5: [4, 5, 6],
        8: [7, 8],
        9: [9],
    }
    assert slots(elastic_cache.merge(HAND, buckets)) == {0: (0, 0), 2: (20, 2), 5: (50, 5), 8: (75, 7.5), 9: (90, 9)}


def test_example_tie_goes_left():
    assert elastic_cache.nearest(4, [2, 6]) == 2


def test_example_decode():
    order, seen = [0, 2, 5, 8, 9], 10  # positions 10, 11, .. are g1, g2, ..
    fixed = elastic_cache.fixed_point(5, 1, 2)
    assert fixed == 3
    lengths, dropped = [], {}
    for step in range(1, 9):
        order.append(seen)
        seen += 1
        gone = elastic_cache.victim(order, seen, fixed, 0.5)
        if gone is not None:
            order.remove(gone)
            dropped[step] = gone
        lengths.append(len(order))
    assert lengths == [6, 6, 7, 7, 8, 8, 9, 9]
    assert dropped == {2: 8, 4: 9, 6: 10, 8: 11}
    assert order == [0, 2, 5, *range(12, 18)]


@pytest.mark.parametrize(
    "r, gone, left, steps, length",
    [
        (0.2, 20, 80, [5, 10, 15, 20], 96),
        (0.5, 50, 50, list(range(2, 21, 2)), 60),
        (0.8, 80, 20, [2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19, 20], 24),
    ],
)
def test_example_schedule(r, gone, left, steps, length):
    assert elastic_cache.removed(100, r) == gone
    assert 100 - gone == left
    order, dropped = decode(100, r, 25, 20)
    assert [i for i, p in enumerate(dropped, 1) if p is not None] == steps
    assert len(order) == length


def test_example_official_selection():
    buckets = elastic_cache.plan(IMPORTANCE, 0.5, selection="official")
    assert {p: sorted(members) for p, members in buckets.items()} == {0: [0], 3: [0, 1, 3, 3, 4], 6: [6, 6, 7], 9: [9]}
    got = slots(elastic_cache.merge(HAND, buckets))
    assert_allclose([got[p][0] for p in (0, 3, 6, 9)], [0, 22, 63.333333, 90], atol=1e-6)


def test_example_run():
    # Queries 0 to 8 give all to token 0, and query 9 gives .1 to the anchors of the example, 2, 5 and 8.
    # The rotated key of token j is e_j, so that a bucket's key is a mean of unit vectors.
    rows = [{j: float(j == 0) for j in range(i + 1)} for i in range(9)]
    rows.append({j: {0: 0.7, 2: 0.1, 5: 0.1, 8: 0.1}.get(j, 0.0) for j in range(10)})
    q, k, _ = planted(rows, dim=10)
    v = np.repeat(np.arange(10.0), 10).reshape(10, 1, 10)
    (call,) = elastic_cache.run(q, k, v, [10])
    close(call.scores[0], {j: {0: 9.7, 2: 0.1, 5: 0.1, 8: 0.1}.get(j, 0.0) for j in range(10)})
    assert call.kept == [[0, 2, 5, 8, 9]]
    unit = np.eye(10)
    for p, members in {0: [0], 2: [1, 2, 3], 5: [4, 5, 6], 8: [7, 8], 9: [9]}.items():
        assert_allclose(call.held[0][p].key, unit[members].mean(axis=0), atol=1e-12)
        assert_allclose(call.held[0][p].value, np.full(10, np.mean(members)), atol=1e-12)


# ---- lengths ----


def test_share_is_exact():
    assert int(0.7 * 90) == 62
    assert elastic_cache.removed(90, 0.7) == 63


@each_r
def test_removed_is_the_floor(r):
    for length in range(1, 2049):
        assert elastic_cache.removed(length, r) == Fraction(str(r)) * length // 1 == int(length - length * (1 - r))


@each_r
def test_length_follows_the_share_and_never_falls(r):
    for length in (1, 2, 3, 7, 30, 50):
        left = length - elastic_cache.removed(length, r)
        fixed = elastic_cache.fixed_point(left, 1, 4)
        order = list(range(left))
        for n in range(length + 1, length + 61):
            before = len(order)
            order.append(n - 1)
            gone = elastic_cache.victim(order, n, fixed, r)
            order = [p for p in order if p != gone]
            assert len(order) >= before
            assert order[0] == 0 and order[-1] == n - 1
            assert order[:fixed] == list(range(fixed))
            assert len(order) - n * (1 - Fraction(str(r))) < 1 or len(order) == fixed + 1


@each_r
@pytest.mark.parametrize("distance", [0, 3, 25])
def test_the_oldest_token_that_is_not_permanent_goes_first(r, distance):
    length = 40
    left = length - elastic_cache.removed(length, r)
    fixed = elastic_cache.fixed_point(left, 1, distance)
    order, dropped = decode(length, r, distance, 60)
    queue = [*range(fixed, left), *range(length, length + 60)]
    gone = [p for p in dropped if p is not None]
    assert gone == queue[: len(gone)]
    assert order == [*range(fixed), *queue[len(gone) :]]


def test_fixed_point_keeps_the_first_and_not_the_newest():
    assert elastic_cache.fixed_point(80) == 55
    assert elastic_cache.fixed_point(10) == 1
    assert elastic_cache.fixed_point(10, 1, 0) == 9
    assert elastic_cache.fixed_point(2, 4, 25) == 2


# ---- merging ----


@each_r
@pytest.mark.parametrize("start_size", [0, 1, 4])
def test_buckets(r, start_size):
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 20, 41):
        scores = dict(enumerate(rng.integers(0, 6, size=length).astype(float)))  # ties
        buckets = elastic_cache.plan(scores, r, start_size=start_size)
        left = length - elastic_cache.removed(length, r)
        assert len(buckets) == left
        assert list(buckets) == sorted(buckets)
        if left - start_size - 1 < 1:
            assert all(members == [p] for p, members in buckets.items())
            continue

        middle = range(start_size, length - 1)
        anchors = [p for p in buckets if p in middle]
        loser = max((p for p in middle if p not in anchors), key=lambda p: (scores[p], -p), default=None)
        if loser is not None:
            assert all((scores[a], -a) > (scores[loser], -loser) for a in anchors)
        cuts = [start_size, *((a + b) // 2 + 1 for a, b in zip(anchors, anchors[1:], strict=False)), length - 1]
        for i, anchor in enumerate(anchors):
            assert sorted(buckets[anchor]) == list(range(cuts[i], cuts[i + 1]))
            assert anchor in buckets[anchor]
        assert all(buckets[p] == [p] for p in (*range(start_size), length - 1))


def random_hand(length, dim=4):
    rng = np.random.default_rng(3)
    return {p: common.Token(*rng.normal(size=(2, dim))) for p in range(length)}


@each_r
def test_means_conserve_sums_and_leave_the_protected_alone(r):
    length = 30
    hand = random_hand(length)
    scores = dict(enumerate(np.random.default_rng(4).uniform(size=length)))
    buckets = elastic_cache.plan(scores, r)
    merged = elastic_cache.merge(hand, buckets)
    middle = range(1, length - 1)
    for field in ("key", "value"):
        total = sum(len(buckets[p]) * getattr(merged[p], field) for p in merged if p in middle)
        assert_allclose(total, sum(getattr(hand[p], field) for p in middle), atol=1e-12)
        for p in (0, length - 1):
            assert_array_equal(getattr(merged[p], field), getattr(hand[p], field))


def test_equal_keys_and_keys_on_a_line():
    buckets = elastic_cache.plan(IMPORTANCE, 0.5)
    same = common.Token(np.array([1.0, -2.0]), np.array([3.0, 0.5]))
    for token in elastic_cache.merge(dict.fromkeys(range(10), same), buckets).values():
        assert_allclose(token.key, same.key)
        assert_allclose(token.value, same.value)
    line = elastic_cache.merge(HAND, buckets)
    for p in (2, 5):  # their buckets are symmetric
        assert_allclose(line[p].key, HAND[p].key)


def test_eviction_picks_the_same_tokens_and_keeps_them_as_they_came():
    buckets = elastic_cache.plan(IMPORTANCE, 0.5, stage1="evict")
    assert slots(elastic_cache.merge(HAND, buckets)) == {p: (10 * p, p) for p in (0, 2, 5, 8, 9)}


# ---- streams ----


def test_importance_by_hand():
    one, two = [{0: 1.0}, {0: 0.4, 1: 0.6}], [{0: 1.0}, {0: 0.8, 1: 0.2}]
    close(elastic_cache.importance([one, two]), {0: 1.6, 1: 0.4})
    close(elastic_cache.importance([one, two], "mean"), {0: 0.8, 1: 0.4})


@each_calls
@pytest.mark.parametrize("variant", [{}, {"selection": "official"}, {"stage1": "evict"}])
def test_nothing_removed_is_full_attention(calls, variant):
    stream = make_stream(N)
    want = full.run(*stream, calls)
    for a, b in zip(elastic_cache.run(*stream, calls, r=0.0, **variant), want, strict=True):
        assert a.kept == b.kept
        assert_allclose(a.out, b.out, atol=1e-12)


@each_calls
@each_r
def test_prompt_outputs_are_dense_and_lengths_follow(calls, r):
    stream = make_stream(N)
    got = elastic_cache.run(*stream, calls, r=r, distance=2)
    assert_allclose(got[0].out, full.run(*stream, calls)[0].out, atol=1e-12)
    left = 18 - elastic_cache.removed(18, r)
    assert [len(kept) for kept in got[0].kept] == [left] * KV_HEADS
    _, dropped = decode(18, r, 2, N - 18)
    assert [len(kept) for kept in got[-1].kept] == [left + sum(p is None for p in dropped)] * KV_HEADS


def test_turns_are_decode_steps():
    stream = make_stream(N)
    steps = elastic_cache.run(*stream, CALLS["tokens"], distance=2)
    turns = elastic_cache.run(*stream, CALLS["turns"], distance=2)
    assert turns[-1].kept == steps[-1].kept
    got = np.concatenate([call.out for call in turns])
    assert_allclose(got, np.concatenate([call.out for call in steps]), atol=1e-12)


@pytest.mark.parametrize("position_mode", ["original", "cache_len"])
def test_decode_attends_over_what_is_held(position_mode):
    q, k, v = make_stream(N)
    before, *steps = elastic_cache.run(q, k, v, CALLS["tokens"], distance=2, position_mode=position_mode)
    for t, call in zip(range(18, N), steps, strict=True):
        for x in range(KV_HEADS * GROUP):
            h = x // GROUP
            held = before.held[h]
            place = t if position_mode == "original" else len(held)
            keys = np.stack([*(held[p].key for p in held), rotate(k[t : t + 1, h], [place])[0]])
            values = np.stack([*(held[p].value for p in held), v[t, h]])
            logits = keys @ rotate(q[t : t + 1, x], [place])[0] / np.sqrt(keys.shape[1])
            weights = np.exp(logits - logits.max())
            assert_allclose(call.out[0, x], weights / weights.sum() @ values, atol=1e-12)
            assert_allclose(call.held[h][t].key, keys[-1], atol=1e-12)
        before = call


@each_calls
def test_scores_and_choice_are_one_for_all_heads(calls):
    q, k, v = make_stream(N)
    got = elastic_cache.run(q, k, v, calls, distance=2)
    for call in got:
        assert call.kept[0] == call.kept[1]
        assert call.scores[0] == call.scores[1]
        assert [sorted(hand) for hand in call.held] == call.kept
    assert_allclose(sum(got[0].scores[0].values()), 18)

    twice = elastic_cache.run(np.repeat(q, 2, axis=1), k, v, calls, distance=2)
    close(twice[0].scores[0], got[0].scores[0])
    assert [call.kept for call in twice] == [call.kept for call in got]


def test_importance_is_the_mean_of_all_query_heads():
    one = planted([{0: 1.0}, {0: 0.4, 1: 0.6}, {0: 0.2, 1: 0.5, 2: 0.3}], dim=4)
    two = planted([{0: 1.0}, {0: 0.8, 1: 0.2}, {0: 0.6, 1: 0.1, 2: 0.3}], dim=4)
    (call,) = elastic_cache.run(*heads_together(one, two), [3])
    for scores in call.scores:
        close(scores, {0: 2.0, 1: 0.7, 2: 0.3})


def test_the_permanent_slots_are_untouched():
    first, *steps = elastic_cache.run(*make_stream(N), CALLS["tokens"], distance=2)
    for call in steps:
        for h, hand in enumerate(first.held):
            for p in first.kept[h][: elastic_cache.fixed_point(9, 1, 2)]:
                assert_array_equal(call.held[h][p].key, hand[p].key)
                assert_array_equal(call.held[h][p].value, hand[p].value)


def test_marking_an_image_changes_nothing():
    stream = make_stream(N)
    plain = elastic_cache.run(*stream, CALLS["turns"], distance=2)
    marked = elastic_cache.run(*stream, CALLS["turns"], distance=2, visual=[2 <= p < 12 for p in range(N)])
    for a, b in zip(plain, marked, strict=True):
        assert a.kept == b.kept
        assert_array_equal(a.out, b.out)


def test_evicting_the_prompt_attends_to_the_anchors_alone():
    q, k, v = make_stream(N)
    prompt, step = elastic_cache.run(q[:19], k[:19], v[:19], [18, 1], stage1="evict")
    for x in range(KV_HEADS * GROUP):
        h = x // GROUP
        hand = [*prompt.kept[h], 18]
        assert_allclose(step.out[0, x], dense(q[hand, x], k[hand, h], v[hand, h], hand)[-1], atol=1e-12)
