"""The EMS oracle against the worked example of its specification, examples by hand, and its properties."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, ems, full, h2o
from tests.test_oracles import GROUP, KV_HEADS, PROMPT, close, heads_together, make_stream, planted, rotate

KEYS = np.array([(2, 0), (1.6, 1.2), (0, 1), (-0.28, 0.96), (-1, 0), (0, -1)])
VALUES = np.array([(1, 0), (2, 1), (0, 2), (1, -1), (1, 1), (0, 1)], float)
GLOBAL = {0: 3.1, 1: 0.9, 2: 1.2, 3: 0.4, 4: 0.2, 5: 0.2}
LOCAL = {0: 0.6, 1: 0.2, 2: 0.6, 3: 0.2, 4: 0.2, 5: 0.2}
STEPS = [{0: 0.25, 2: 0.05, 4: 0.40, 5: 0.20, 6: 0.10}, {0: 0.1, 2: 0.05, 4: 0.5, 5: 0.05, 6: 0.2, 7: 0.1}]
SIZES = dict(budget=4, window=2, max_merge=2)


def tokens(keys, values):
    rows = zip(np.asarray(keys, float), np.asarray(values, float), strict=True)
    return {p: common.Token(key, value) for p, (key, value) in enumerate(rows)}


EXAMPLE = tokens(KEYS, VALUES)


def after_prompt(**options):
    return ems.compress(EXAMPLE, GLOBAL, ems.combined(GLOBAL, LOCAL), **SIZES, **options)


# ---- worked example ----


def test_example_scores():
    (call,) = ems.run(*planted(PROMPT, dim=6), [6], budget=6, window=2, decode="stepwise")
    close(call.s_glo[0], GLOBAL)
    close(call.s_loc[0], LOCAL)
    close(ems.align(GLOBAL, LOCAL), {0: 1.8, 1: 0.6, 2: 1.8, 3: 0.6, 4: 0.6, 5: 0.6})
    wanted = {0: 3.1, 1: 0.9, 2: 1.8, 3: 0.6, 4: 0.6, 5: 0.6}
    close(ems.combined(GLOBAL, LOCAL), wanted)
    close(call.scores[0], wanted)


def test_example_classes():
    scores = {p: ems.combined(GLOBAL, LOCAL)[p] for p in range(4)}
    shares = np.cumsum([3.1, 1.8, 0.9, 0.6]) / sum(scores.values())
    assert_allclose(shares, [0.484375, 0.765625, 0.906250, 1], atol=1e-6)
    assert ems.classify(scores, centres=2, max_merge=2) == ([0, 2], [1, 3], [])
    assert ems.classify(scores, centres=2, max_merge=2, p_keep=0.9) == ([0, 2], [1], [3])


def test_example_redundancy():
    pairs = [[(EXAMPLE[i], EXAMPLE[c]) for c in (0, 2)] for i in (1, 3)]
    of_keys = [[ems.cosine(a.key, b.key) for a, b in row] for row in pairs]
    of_values = [[ems.cosine(a.value, b.value) for a, b in row] for row in pairs]
    assert_allclose(of_keys, [[0.8, 0.6], [-0.28, 0.96]], atol=1e-9)
    assert_allclose(of_values, [[0.894427, 0.447214], [0.707107, -0.707107]], atol=1e-6)
    clipped, raw = ([[ems.redundancy_of(a, b, kind) for a, b in row] for row in pairs] for kind in ("clipped", "raw"))
    assert_allclose(clipped, [[0.715542, 0.268328], [0, 0]], atol=1e-6)
    assert_allclose(raw, [clipped[0], [-0.197990, -0.678823]], atol=1e-6)
    assert [ems.centre_for(EXAMPLE[i], [0, 2], EXAMPLE) for i in (1, 3)] == [0, None]


def test_example_merge():
    hand, s_glo = after_prompt()
    assert list(hand) == [0, 2, 4, 5]
    assert_allclose(hand[0].value, (1.225, 0.225))
    assert_allclose(hand[0].key, (1.980312, 0.279939), atol=1e-6)
    assert_allclose(np.linalg.norm(hand[0].key), 2)
    assert all(hand[p] is EXAMPLE[p] for p in (2, 4, 5))
    close(s_glo, {0: 4.0, 2: 1.2, 4: 0.2, 5: 0.2})


def test_example_decode_block():
    hand, s_glo = after_prompt()
    s_loc = dict.fromkeys(hand, 0.0)
    for now, probs in enumerate(STEPS, 6):
        hand = hand | {now: common.Token(np.array([1.0, 1.0]), np.array([1.0, 1.0]))}
        s_glo, s_loc = ({p: s.get(p, 0.0) + probs[p] for p in probs} for s in (s_glo, s_loc))
    close(s_glo, {0: 4.35, 2: 1.30, 4: 1.10, 5: 0.45, 6: 0.30, 7: 0.10})
    close(s_loc, {0: 0.35, 2: 0.10, 4: 0.90, 5: 0.25, 6: 0.30, 7: 0.10})
    close(ems.align(s_glo, s_loc), {0: 1.33, 2: 0.38, 4: 3.42, 5: 0.95, 6: 1.14, 7: 0.38})
    s = ems.combined(s_glo, s_loc)
    candidates = {p: s[p] for p in (0, 2, 4, 5)}
    close(candidates, {0: 4.35, 2: 1.30, 4: 3.42, 5: 0.95})
    shares = np.cumsum(sorted(candidates.values(), reverse=True)) / sum(candidates.values())
    assert_allclose(shares, [0.434132, 0.775449, 0.905190, 1], atol=1e-6)
    assert ems.classify(candidates, centres=2, max_merge=2) == ([0, 4], [2, 5], [])
    redundancy = [[ems.redundancy_of(hand[i], hand[c]) for c in (0, 4)] for i in (2, 5)]
    assert_allclose(redundancy, [[0.025286, 0], [0, 0]], atol=1e-6)
    after, s_glo = ems.compress(hand, s_glo, s, **SIZES)
    assert list(after) == [0, 4, 6, 7] and all(after[p] is hand[p] for p in after)
    close(s_glo, {0: 4.35, 4: 1.10, 6: 0.30, 7: 0.10})


def test_example_as_a_stream():
    # the same probabilities; orthogonal keys and zero values merge nothing
    prompt, first, second = ems.run(*planted(PROMPT + STEPS, dim=8), [6, 1, 1], budget=4, window=2)
    assert prompt.kept == [[0, 2, 4, 5]] and first.kept == [[0, 2, 4, 5, 6]] and second.kept == [[0, 4, 6, 7]]
    close(prompt.s_loc[0], dict.fromkeys([0, 2, 4, 5], 0.0))
    close(first.s_loc[0], STEPS[0])
    # without the merge of 1 into 0, s_glo sums to 6.7 and the factor is 6.7 / 2
    close(second.scores[0], {0: 3.45, 2: 1.30, 4: 3.015, 5: 0.8375, 6: 1.005, 7: 0.335})
    close(second.s_glo[0], {0: 3.45, 4: 1.10, 6: 0.30, 7: 0.10})
    close(second.s_loc[0], dict.fromkeys([0, 4, 6, 7], 0.0))


# ---- by hand ----


def test_stepwise_example():
    # W = 2: the local score is halved before each step; prompt as above, without merges
    prompt, first, second = ems.run(*planted(PROMPT + STEPS, dim=8), [6, 1, 1], decode="stepwise", budget=4, window=2)
    close(prompt.s_loc[0], {p: LOCAL[p] for p in (0, 2, 4, 5)})
    # global 3.35 1.25 .6 .4 .1, local .55 .35 .5 .3 .1: the factor is 5.7 / 1.8
    loc = {0: 0.55, 2: 0.35, 4: 0.50, 5: 0.30, 6: 0.10}
    close(first.scores[0], {0: 3.35, 2: 1.25, 4: 0.50 * 5.7 / 1.8, 5: 0.30 * 5.7 / 1.8, 6: 0.10 * 5.7 / 1.8})
    assert first.kept == [[0, 4, 5, 6]]
    close(first.s_loc[0], {p: loc[p] for p in first.kept[0]})
    assert len(second.kept[0]) == 4


def test_local_score_after_a_short_prompt():
    # s_loc counts the two queries that see more than 5 entries, no others; the second of them compresses
    stream = make_stream(7)
    calls = ems.run(*stream, [3, 1, 1, 1, 1], budget=5, window=2)
    assert [len(call.kept[0]) for call in calls] == [3, 4, 5, 6, 5]
    assert [sum(call.s_loc[0].values()) > 0 for call in calls] == [False, False, False, True, False]
    assert_allclose(sum(calls[3].s_loc[0].values()), 1)
    assert_allclose(sum(calls[3].s_glo[0].values()), 6)


def test_run_averages_the_group():
    one = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.6, 1: 0.2, 2: 0.2}], dim=4)
    two = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.1, 1: 0.6, 2: 0.3}], dim=4)
    q, _, _ = heads_together(one, two)
    (call,) = ems.run(q, one[1], one[2], [3], budget=2, window=1, combine="glo")
    close(call.scores[0], {0: 1.85, 1: 0.9, 2: 0.25})
    assert call.kept == [[0, 2]]


def test_combinations():
    s_glo, s_loc = {0: 4.0, 1: 2.0}, {0: 0.5, 1: 1.5}
    wanted = {"max": (4, 4.5), "mean": (2.75, 3.25), "glo": (4, 2), "loc": (1.5, 4.5)}
    for combine, (a, b) in wanted.items():
        close(ems.combined(s_glo, s_loc, combine), {0: a, 1: b})
        close(ems.combined(s_glo, {p: 7 * s for p, s in s_loc.items()}, combine), {0: a, 1: b})


def test_classes_at_the_edges():
    scores = {0: 1.0, 3: 4.0, 5: 4.0, 8: 1.0}
    assert ems.classify(scores, centres=1, max_merge=9) == ([3], [5, 0, 8], [])
    assert ems.classify(scores, centres=1, max_merge=0) == ([3], [], [5, 0, 8])
    assert ems.classify(scores, centres=1, max_merge=9, p_keep=0.8) == ([3], [5], [0, 8])  # exactly 0.8 is enough
    assert ems.classify(scores, centres=9, max_merge=9) == ([3, 5, 0, 8], [], [])
    assert ems.classify(dict.fromkeys(scores, 0.0), centres=2, max_merge=9) == ([0, 3], [], [5, 8])


def test_equal_redundancies_take_the_lower_position_and_a_centre_wins_over_the_zero_class():
    hand = tokens([(0, 1), (1, 0), (1, 0)], [(1, 0)] * 3)
    source = common.Token(np.array([3.0, 0]), np.array([2.0, 0]))
    assert ems.centre_for(source, [2, 1, 0], hand) == 1
    assert ems.centre_for(source, [2, 1, 0], hand, tau=1.0) == 1
    assert ems.centre_for(source, [2, 1, 0], hand, tau=1.01) is None


def test_opposite_tokens_are_redundant_to_the_raw_product_only():
    hand = tokens([(1, 0)], [(0, 1)])
    opposite = common.Token(np.array([-1.0, 0]), np.array([0, -1.0]))
    assert [ems.centre_for(opposite, [0], hand, kind=kind) for kind in ("raw", "clipped", "key")] == [0, None, None]
    other_value = common.Token(np.array([1.0, 0]), np.array([0, -1.0]))
    assert [ems.centre_for(other_value, [0], hand, kind=kind) for kind in ("raw", "clipped", "key")] == [None, None, 0]


def test_a_merged_key_keeps_the_mean_norm():
    rng = np.random.default_rng(0)
    parts = [(w, common.Token(*rng.normal(size=(2, 4)))) for w in (3.0, 1.0, 2.0)]
    merged = ems.merge(parts)
    assert_allclose(np.linalg.norm(merged.key), sum(w * np.linalg.norm(t.key) for w, t in parts) / 6)
    assert_allclose(merged.value, sum(w * t.value for w, t in parts) / 6)
    same = ems.merge([parts[0], (2.0, parts[0][1])])
    assert_allclose([same.key, same.value], [parts[0][1].key, parts[0][1].value])
    assert ems.merge([(0.0, parts[0][1]), (0.0, parts[1][1])]) is parts[0][1]


# ---- properties ----

N = 26
SETTINGS = dict(budget=8, window=3)
MERGES = dict(tau=0.05, p_keep=1.0)  # merges often
CALLS = {"prompt then tokens": [16] + [1] * 10, "chunks": [7, 7, 4, 8], "tokens": [1] * N, "mixed": [12, 1, 1, 6, 1, 5]}
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
each_decode = pytest.mark.parametrize("decode", ["block", "stepwise"])
each_space = pytest.mark.parametrize("merge_space", ["rotated", "unrotated"])


def is_merged(call, v):
    return any((call.held[h][p].value != v[p, h]).any() for h in range(KV_HEADS) for p in call.kept[h])


@each_calls
@each_decode
@each_space
def test_budget_as_long_as_the_stream_is_full_attention(calls, decode, merge_space):
    stream = make_stream(N)
    got = ems.run(*stream, calls, budget=N, window=3, decode=decode, merge_space=merge_space)
    for a, b in zip(got, full.run(*stream, calls), strict=True):
        assert_allclose(a.out, b.out, atol=1e-12)
        assert a.kept == b.kept


@each_calls
@each_decode
def test_occupancy(calls, decode):
    results = ems.run(*make_stream(N), calls, decode=decode, **SETTINGS, **MERGES)
    size = 0
    for i, (call, c) in enumerate(zip(results, calls, strict=True)):
        size += c
        if size >= (11 if i and c == 1 and decode == "block" else 9):
            size = 8
        now = sum(calls[: i + 1])
        for kept, scores in zip(call.kept, call.scores, strict=True):
            assert len(kept) == size and kept == sorted(kept)
            assert {*range(max(now - 3, 0), now)} <= set(kept) <= set(scores)


@each_calls
@each_decode
@each_space
@pytest.mark.parametrize("redundancy", ["clipped", "raw", "key"])
def test_outputs_attend_to_what_the_call_before_left(calls, decode, merge_space, redundancy):
    q, k, v = make_stream(N)
    options = dict(decode=decode, merge_space=merge_space, redundancy=redundancy)
    results = ems.run(q, k, v, calls, **SETTINGS, **MERGES, **options)
    assert any(is_merged(call, v) for call in results)
    held = [{}] * KV_HEADS
    for call, now, c in zip(results, np.cumsum(calls), calls, strict=True):
        new = np.arange(now - c, now)
        for x in range(q.shape[1]):
            h = x // GROUP
            old = list(held[h])
            keys = np.stack([t.key for t in held[h].values()] + list(k[new, h]))
            if merge_space == "unrotated":
                keys = rotate(keys, [*old, *new])
            else:
                keys[len(old) :] = rotate(k[new, h], new)
            values = np.stack([t.value for t in held[h].values()] + list(v[new, h]))
            weights = np.exp(keys @ rotate(q[now - 1 : now, x], [now - 1])[0] / np.sqrt(q.shape[2]))
            assert_allclose(call.out[-1, x], weights @ values / weights.sum(), atol=1e-12)
        held = call.held


@each_calls
@each_decode
@pytest.mark.parametrize("options", [{"tau": np.inf}, {"max_merge": 0}])
def test_nothing_redundant_or_to_be_merged_is_eviction(calls, decode, options):
    q, k, v = make_stream(N)
    for call in ems.run(q, k, v, calls, decode=decode, **SETTINGS, **options):
        for h in range(KV_HEADS):
            kept = call.kept[h]
            assert_allclose([call.held[h][p].key for p in kept], rotate(k[kept, h], kept), atol=1e-12)
            assert_allclose([call.held[h][p].value for p in kept], v[kept, h], rtol=0)
            if len(call.scores[h]) > len(kept):
                older = sorted(call.scores[h])[:-3]
                top = sorted(older, key=lambda p: -call.scores[h][p])[:5]
                assert sorted(top) == kept[:-3]


def test_global_score_alone_chooses_a_prompt_as_h2o_does():
    stream = make_stream(N)
    (got,), (want,) = (
        ems.run(*stream, [N], combine="glo", tau=np.inf, **SETTINGS),
        h2o.run(*stream, [N], budget=8, window=3),
    )
    assert got.kept == want.kept
    for a, b in zip(got.scores, want.scores, strict=True):
        close(a, b)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_after_the_prompt_the_factor_is_queries_by_window(n):
    stream = make_stream(n)
    settings = dict(budget=30, window=3, decode="stepwise")  # stepwise keeps the prompt's s_loc
    (call,) = ems.run(*stream, [n], **settings)
    for s_glo, s_loc in zip(call.s_glo, call.s_loc, strict=True):
        close(ems.align(s_glo, s_loc), {p: s * n / min(n, 3) for p, s in s_loc.items()})
        assert_allclose(sum(ems.align(s_glo, s_loc).values()), sum(s_glo.values()))


def test_scores_are_passed_on():
    stream = make_stream(N)
    everything = dict(tau=0.0, p_keep=1.0, max_merge=N)  # nothing is dropped
    (call,), (off,) = (ems.run(*stream, [N], transfer_score=t, **everything, **SETTINGS) for t in (True, False))
    assert off.kept == call.kept
    for h in range(KV_HEADS):
        assert_allclose(sum(call.s_glo[h].values()), N)
        assert sum(off.s_glo[h].values()) < N - 1
        for p in call.kept[h]:
            assert_allclose(call.held[h][p].value, off.held[h][p].value)


@each_calls
def test_heads_do_not_depend_on_each_other(calls):
    q, k, v = make_stream(N)
    both = ems.run(q, k, v, calls, **SETTINGS, **MERGES)
    for h in range(KV_HEADS):
        alone = ems.run(q[:, h * GROUP : (h + 1) * GROUP], k[:, [h]], v[:, [h]], calls, **SETTINGS, **MERGES)
        for a, b in zip(alone, both, strict=True):
            assert a.kept[0] == b.kept[h] and a.s_glo[0] == b.s_glo[h] and a.s_loc[0] == b.s_loc[h]


def test_chunks_take_the_local_score_of_their_own_last_queries():
    stream = make_stream(10)
    _, _, chunk = ems.run(*stream, [7, 1, 2], budget=20, window=3, combine="loc")
    # the chunk has two queries, fewer than the window
    assert_allclose(sum(chunk.scores[0].values()), 10)
    assert max(chunk.s_loc[0].values()) == 0
    (whole,) = ems.run(*stream, [10], budget=20, window=2, combine="loc")
    for a, b in zip(chunk.scores, whole.scores, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    "settings",
    [{"window": 0}, {"window": 8}, {"combine": "sum"}, {"redundancy": "v"}, {"merge_space": "x"}, {"decode": "token"}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError):
        ems.run(*make_stream(5), [5], **(SETTINGS | settings))
