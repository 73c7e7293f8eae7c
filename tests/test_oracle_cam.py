"""The CaM oracle against the worked example of its specification, examples by hand, and its properties."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import cam, common, full, h2o, streaming_llm
from tests.test_oracle_d2o import assert_outputs_follow_what_is_held
from tests.test_oracles import MATRIX, close, make_stream, planted

VALUES = np.array([(1, 0), (2, 2), (0, 2), (4, 0), (1, 1), (0, 1)], float)


def always(head, position):
    return 0.0


def never(head, position):
    return 1.0


def hand_of(values):
    return {p: common.Token(np.zeros(2), value) for p, value in enumerate(np.array(values, float))}


def holds(hand, wanted):
    assert sorted(hand) == sorted(wanted)
    for p, value in wanted.items():
        assert_allclose(hand[p].value[:2], value, atol=1e-6)


# ---- worked example ----


def test_example_run():
    q, k, v = planted([dict(enumerate(row)) for row in MATRIX], dim=6)
    v[:, 0, :2] = VALUES
    options = dict(select="recency", budget=4, sinks=1, targets=2, draw=lambda head, position: 0.5)
    *_, third, fourth, fifth = cam.run(q, k, v, [1] * 6, **options)

    close(third.scores[0], {0: 2.5, 1: 0.7, 2: 0.6, 3: 0.2})
    assert_allclose(third.out[0, 0, :2], (1.4, 0.8))
    holds(third.held[0], dict(enumerate(VALUES[:4])))

    close(fourth.scores[0], {0: 2.8, 1: 0.8, 2: 1.0, 3: 0.3, 4: 0.1})
    assert_allclose(fourth.out[0, 0, :2], (1.0, 1.1))
    holds(fourth.held[0], {0: (1, 0), 2: (1, 3), 3: (5, 1), 4: (1, 1)})

    abar = {0: 3.133333, 2: 1.222222, 3: 0.411111, 4: 0.211111, 5: 0.222222}
    close(fifth.scores[0], abar, atol=1e-6)
    assert_allclose(fifth.out[0, 0, :2], (1.222222, 1.111111), atol=1e-6)
    holds(fifth.held[0], {0: (1, 0), 3: (5.5, 2.5), 4: (1.5, 2.5), 5: (0, 1)})


def test_example_ratios():
    assert cam.chance(0.8, [1.0, 0.3]) == 1.0
    assert cam.chance(0.3, [0.4, 0.8]) == pytest.approx(0.5)
    assert cam.chance(0.3, [0, 0]) == 1.0
    assert cam.chance(0.0, [0, 0]) == 0.0
    assert cam.chance(0.3, []) == 0.0


@pytest.mark.parametrize("u, merges", [(0.49, True), (0.50, False)])
def test_example_gate(u, merges):
    hand = hand_of([(2, 2), (0, 0), (0, 0)])
    after = cam.spread(hand, {0: 0.3, 1: 0.4, 2: 0.8}, [1, 2], targets=2, draw=lambda p: u)
    holds(after, dict.fromkeys([1, 2], (1, 1) if merges else (0, 0)))


# ---- by hand ----


def test_evicted_tokens_pass_on_what_they_took():
    # 0 into 1, 2 (half each); 1, now (2, 1), into 2, 3; 2 and 3 stay
    hand = hand_of([(2, 0), (1, 1), (0, 0), (0, 0)])
    after = cam.spread(hand, dict.fromkeys(hand, 1.0), [2, 3], targets=2, draw=lambda p: 0.5)
    holds(after, {2: (2, 0.5), 3: (1, 0.5)})


def test_few_targets_share_the_whole():
    # 2 leaves; only 3 follows it
    after = cam.spread(hand_of([(1, 0)] * 4), dict.fromkeys(range(4), 1.0), [0, 1, 3], targets=8, draw=lambda p: 0)
    holds(after, {0: (1, 0), 1: (1, 0), 3: (2, 0)})


def test_nothing_follows_the_newest():
    after = cam.spread(hand_of([(1, 0)] * 2), {0: 1.0, 1: 1.0}, [0], targets=2, draw=lambda p: 0)
    holds(after, {0: (1, 0)})


def test_targets_are_the_next_ones_in_hand():
    hand = {p: common.Token(np.zeros(2), np.array([p, 0.0])) for p in (0, 3, 7, 8, 20)}
    after = cam.spread(hand, dict.fromkeys(hand, 1.0), [0, 7, 8, 20], targets=2, draw=lambda p: 0.0)
    holds(after, {0: (0, 0), 7: (8.5, 0), 8: (9.5, 0), 20: (20, 0)})


def test_choices():
    mass = {0: 1.0, 1: 5.0, 4: 1.0, 6: 1.0, 7: 0.0}
    assert cam.keep_recency(mass, budget=3, sinks=1) == [0, 6, 7]
    assert cam.keep_recency(mass, budget=2, sinks=0) == [6, 7]
    assert cam.keep_h2o(mass, budget=4, window=2) == [0, 1, 6, 7]
    assert cam.keep_h2o(mass, budget=2, window=1) == [1, 7]


def test_each_head_and_position_has_its_own_draw():
    asked = []
    stream = make_stream(8)
    cam.run(*stream, [6, 1, 1], select="recency", budget=4, sinks=1, draw=lambda *at: asked.append(at) or 0.5)
    assert sorted(asked) == [(h, p) for h in range(2) for p in (1, 2, 3, 4)]


# ---- properties ----

N = 24
CALLS = {"prompt then tokens": [16] + [1] * 8, "chunks": [7, 7, 4, 6], "tokens": [1] * N, "one": [N]}
BASES = {
    "recency": dict(select="recency", budget=8, sinks=2),
    "h2o": dict(select="h2o", budget=8, window=3),
}
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
each_base = pytest.mark.parametrize("options", BASES.values(), ids=BASES)
each_mode = pytest.mark.parametrize("prefill_mode", ["cascade", "drop"])


def base_run(stream, calls, options):
    if options["select"] == "h2o":
        return h2o.run(*stream, calls, budget=options["budget"], window=options["window"])

    def choose(seen):
        kept = [streaming_llm.trim(hand, options["budget"], options["sinks"]) for hand in seen.hands]
        return kept, [{} for _ in kept]

    return common.replay(*stream, calls, base=10000.0, choose=choose)


@each_calls
@each_base
@each_mode
def test_no_eviction_is_full_attention(calls, options, prefill_mode):
    stream = make_stream(N)
    results = cam.run(*stream, calls, **(options | {"budget": N}), draw=always, prefill_mode=prefill_mode)
    for got, want in zip(results, full.run(*stream, calls), strict=True):
        assert_allclose(got.out, want.out, atol=1e-12)
        assert got.kept == want.kept


@each_calls
@each_base
def test_without_merging_it_is_the_base(calls, options):
    stream = make_stream(N)
    results = cam.run(*stream, calls, **options, targets=3, draw=never)
    for got, want in zip(results, base_run(stream, calls, options), strict=True):
        assert_allclose(got.out, want.out, atol=1e-12)
        assert got.kept == want.kept
        for a, b in zip(got.scores, want.scores, strict=True):
            if b:
                close(a, b)


@each_calls
@each_base
def test_keys_and_choices_do_not_depend_on_the_draw(calls, options):
    # what a call keeps follows from queries and keys, so merged values of THIS layer change nothing
    q, k, v = make_stream(N)
    draws = np.random.default_rng(2).random((2, N))
    drawn = cam.run(q, k, v, calls, **options, targets=3, draw=lambda h, p: draws[h, p])
    for got, want in zip(drawn, cam.run(q, k, v, calls, **options, targets=3, draw=never), strict=True):
        assert got.kept == want.kept and got.scores == want.scores
        for h, hand in enumerate(got.held):
            for p, token in hand.items():
                assert_allclose(token.key, common.rope(k[p, h], p), atol=1e-12)


@each_calls
@each_base
def test_values_add_up_when_everything_merges(calls, options):
    q, k, v = make_stream(N)
    for call, now in zip(cam.run(q, k, v, calls, **options, targets=3, draw=always), np.cumsum(calls), strict=True):
        for h, hand in enumerate(call.held):
            assert_allclose(sum(token.value for token in hand.values()), v[:now, h].sum(axis=0), atol=1e-12)


@each_base
def test_token_by_token_is_as_many_calls(options):
    q, k, v = make_stream(N)
    settings = dict(targets=3, draw=lambda h, p: 0.5, **options)
    whole = cam.run(q, k, v, [18, 6], prefill_mode="token", **settings)
    steps = cam.run(q, k, v, [1] * N, **settings)
    for call, start, stop in zip(whole, (0, 18), (18, N), strict=True):
        assert_allclose(call.out, np.concatenate([step.out for step in steps[start:stop]]), atol=1e-12)
        assert call.kept == steps[stop - 1].kept


def test_rolling_without_merging_is_streaming_llm():
    stream, calls = make_stream(N), [18, 1, 1, 1, 1, 1, 1]
    got = cam.run(*stream, calls, select="recency", budget=6, sinks=2, draw=never, positions="rolling")
    for a, b in zip(got, streaming_llm.run(*stream, calls, budget=6, sinks=2), strict=True):
        assert_allclose(a.out, b.out, atol=1e-12)
        assert a.kept == b.kept


@each_base
def test_drop_merges_in_steps_only(options):
    q, k, v = make_stream(N)
    prompt, chunk, step = cam.run(q, k, v, [18, 5, 1], **options, targets=3, draw=always, prefill_mode="drop")
    for call in (prompt, chunk):
        for h, hand in enumerate(call.held):
            assert all(np.array_equal(token.value, v[p, h]) for p, token in hand.items())
    for h, hand in enumerate(step.held):
        (gone,) = {*chunk.kept[h], N - 1} - set(hand)
        total = v[[*chunk.kept[h], N - 1], h].sum(axis=0)
        assert gone < N - 1
        assert_allclose(sum(token.value for token in hand.values()), total, atol=1e-12)


@each_calls
@each_base
def test_outputs_attend_to_what_the_call_before_left(calls, options):
    q, k, v = make_stream(N)
    results = cam.run(q, k, v, calls, **options, targets=3, draw=always)
    assert_outputs_follow_what_is_held(q, k, v, calls, results)
