"""Locret: the worked examples of its specification, prompts read in chunks, and what later turns and answers take."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import heads, policies
from kvjax.cache import LayerShape
from kvjax.models.llama import Projected
from tests.methods import kept_positions
from tests.oracles import locret
from tests.test_policies import BASE, KV_HEADS, streams
from tests.tiny import CONFIG, random_params, random_tokens

decoding = sys.modules["kvjax.decoding"]
ATTEND = jax.jit(kvjax.attend, static_argnames=("rope", "capacity"))
STEP = jax.jit(kvjax.step, donate_argnames="cache")
PARAMS = random_params(dataclasses.replace(CONFIG, layers=1))  # half the compiling; test_rows and others have two


def read(policy, q, k, v, scores, turns, *, chunk, room=0):
    """`kvjax.attend` over turns of so many tokens for each row, a chunk at a time; a turn that is 1 is a decode step.

    q, k, v are [B, n, heads, D], scores [B, n, H]. Yields (positions i32[B, T], out, layer) of each call.
    """
    batch, count, kv_heads, dim = k.shape
    capacity = policy.capacity(count, room)
    cache = policy.empty(LayerShape(batch, kv_heads, capacity, dim, jnp.dtype("float32"), 0))
    start = np.zeros(batch, int)
    for turn in turns:
        size, counts = 1 if turn == 1 else chunk, np.broadcast_to(turn, batch)
        whole = None if turn == 1 else kvjax.Turn(*(jnp.asarray(x, jnp.int32) for x in (start, start + counts)), room)
        for at in range(0, counts.max(), size):
            column = at + np.arange(size)
            positions = np.where(column < counts[:, None], start[:, None] + column, -1)
            pick = np.clip(positions, 0, None)[:, :, None]
            piece = [jnp.asarray(np.take_along_axis(x, pick[..., None], axis=1), jnp.float32) for x in (q, k, v)]
            given = {"locret": jnp.asarray(np.take_along_axis(scores, pick, axis=1).swapaxes(1, 2), jnp.float32)}
            out, cache = ATTEND(
                *piece, cache, policy, positions=jnp.asarray(positions, jnp.int32), rope=kvjax.Rope(BASE),
                capacity=capacity, given=given, turn=whole,
            )  # fmt: skip
            yield positions, np.asarray(out), cache
        start = start + counts


# ---- worked examples ----

H0 = [0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.05, 0.55, 0.95]
H1 = [0.2, 0.9, 0.6, 0.85, 0.1, 0.58, 0.15, 0.05, 0.3, 0.25, 0.35, 0.5]


def kept_after_chunks(rows, *, chunk, tail=2, **settings):
    """What heads of scores `rows` [H, n] keep after each chunk of a prompt: [chunk][head]."""
    scores = np.pad(np.asarray(rows, float), ((0, 0), (0, tail))).T[None]
    zeros = np.zeros((*scores.shape, 2))
    policy = policies.locret(tail=tail, **settings)
    return [kept_positions(c, 0) for _, _, c in read(policy, *[zeros] * 3, scores, [(len(scores[0]),)], chunk=chunk)]


def test_a_retaining_head_of_the_example_has_its_scores():
    # x W1 = [2.5, -1.5, -1] and [1.5, 3.5, 2.5]; two query heads, a key and a value of one channel each
    head = heads.RetainingHead(
        dataclasses.replace(CONFIG, q_heads=2, kv_heads=1, head_dim=1), width=3, rngs=nnx.Rngs(0)
    )
    head.w1[...] = jnp.array([[1, 0, -1], [0, 1, 0.5], [0.5, -0.5, 0], [1, 1, 1.0]])
    head.w2 = nnx.Param(jnp.array([[1, -1], [0.5, 0], [0, 2]]))
    x = jnp.array([[1, -1, 2, 0.5], [0, 1, -1, 2]])[None, ..., None]
    said = head(Projected(x, x[:, :, :2], x[:, :, 2:3], x[:, :, 3:], jnp.arange(2)[None]))
    assert_allclose(said[0].T, [[2.17353541, -2.84823739], [2.92506531, 3.39434739]], rtol=1e-6)


def test_each_chunk_leaves_the_best_and_the_newest_and_the_last_one_the_best_alone():
    after = kept_after_chunks([H0, H1], budget=5, stabilizers=2, chunk=4)
    assert after[0] == [[0, 1, 2, 3]] * 2
    assert after[1] == [[0, 2, 4, 6, 7], [1, 2, 3, 6, 7]]  # 6 and 7 are the newest
    assert after[2] == [[0, 4, 6, 8, 11], [1, 2, 3, 10, 11]]  # token 5 (.58) of the second head was lost to those
    assert after[3] == [[0, 4, 6, 8, 11, 12, 13], [1, 2, 3, 10, 11, 12, 13]]  # the tail


def test_without_stabilizers_chunks_leave_the_best_of_all():
    *_, last, _ = kept_after_chunks([H0, H1], budget=5, stabilizers=0, chunk=4)
    assert last == [[0, 4, 6, 8, 11], [1, 2, 3, 5, 11]]


def test_a_ragged_last_chunk_is_a_last_chunk():
    after = kept_after_chunks([H0[:11]], budget=5, stabilizers=2, chunk=4)
    assert after[1] == [[0, 2, 4, 6, 7]]
    assert after[2] == [[0, 4, 6, 8, 10, 11]]  # 11 is the first of the tail, which this chunk straddles
    assert after[3] == [[0, 4, 6, 8, 10, 11, 12]]


def test_stabilizers_reach_back_over_several_chunks():
    after = kept_after_chunks([H0], budget=5, stabilizers=3, chunk=2)
    assert [kept for (kept,) in after[:6]] == [
        [0, 1],
        [0, 1, 2, 3],
        [0, 2, 3, 4, 5],
        [0, 4, 5, 6, 7],
        [0, 4, 7, 8, 9],
        [0, 4, 8, 10, 11],
    ]


def test_of_equal_scores_the_older_stay():
    assert kept_after_chunks([[1, 1, 1, 0]], budget=2, stabilizers=0, chunk=4, tail=0)[-1] == [[0, 1]]


@pytest.mark.parametrize("positions, gaps", [("cache", (2, 4)), ("true", (4, 6))])
def test_logits_are_those_of_places_in_the_cache(positions, gaps):
    # Held are 0 4 6 8 11; token 8 is in slot 3, token 12 in slot 5, and 14, decoded, in slot 7. Only token 8 has a key
    # and a value, (1, 0), so that a query (1, 0) gives it w / (w + the others), and w = exp(cos(gap) / sqrt 2).
    q, k, v = np.zeros((3, 1, 15, 1, 2))
    k[0, 8, 0], v[0, 8, 0], q[0, 12, 0], q[0, 14, 0] = [(1, 0)] * 4
    scores = np.array([*H0, 0, 0, 0])[None, :, None]
    policy = policies.locret(5, stabilizers=2, tail=2, positions=positions)
    *_, (_, tail, _), (_, step, _) = read(policy, q, k, v, scores, [(14,), 1], chunk=4, room=1)
    for out, others, gap in ((tail, 5, gaps[0]), (step, 7, gaps[1])):
        p = out[0, 0, 0, 0]
        assert_allclose(np.log(p * others / (1 - p)) * np.sqrt(2), np.cos(gap), rtol=1e-5)


# ---- chunks, turns and answers against the oracle ----

# Rows end in different chunks; their tails of 3 straddle chunks of 4, and one row is nothing but tail. The second turn
# is all tail, and does not fit beside what the answer left; the third is read in chunks again.
TURNS = [(22, 13, 6, 2), 1, 1, 1, 1, (3, 2, 3, 2), 1, 1, (9, 5, 4, 7), 1]
ROOM = 4
CASES = {
    "unbounded": (
        policies.locret(6, stabilizers=2, tail=3),
        dict(stabilizers=2, capacity=13, max_new=ROOM),
    ),
    "bounded": (
        policies.locret(6, stabilizers=2, tail=3, every=3),
        dict(stabilizers=2, bounded_decode=3, capacity=12, max_new=3),
    ),
    "true positions, sinks": (
        policies.locret(6, stabilizers=3, tail=3, sinks=2, every=3, positions="true"),
        dict(stabilizers=3, protect=2, position_mode="original", bounded_decode=3, capacity=12, max_new=3),
    ),
}


@pytest.mark.parametrize(
    "name, chunk", [("unbounded", 4), ("bounded", 4), ("bounded", 1), ("true positions, sinks", 5)]
)
def test_uneven_rows_read_in_chunks_are_those_of_the_oracle(name, chunk):
    policy, settings = CASES[name]
    total = sum(max(turn) if turn != 1 else 1 for turn in TURNS)
    q, k, v = streams(4, total, seed=5)
    scores = np.random.default_rng(6).integers(0, 8, (4, total, KV_HEADS)).astype(float)  # many are equal
    got = list(read(policy, q, k, v, scores, TURNS, chunk=chunk, room=ROOM))
    assert {layer.slots for _, _, layer in got} == {settings["capacity"]}
    for b in range(4):
        calls = [turn if turn == 1 else turn[b] for turn in TURNS]
        mine = slice(0, sum(calls))
        want = locret.run(
            q[b, mine], k[b, mine], v[b, mine], calls, scores=scores[b, mine], budget=6, tail=3, chunk=chunk,
            base=BASE, **settings,
        )  # fmt: skip
        outs = np.concatenate([out[b][positions[b] >= 0] for positions, out, _ in got])
        assert_allclose(outs, np.concatenate([call.out for call in want]), atol=2e-5)
        done = np.cumsum([(positions[b] >= 0).sum() for positions, _, _ in got])
        for call, seen in zip(want, np.cumsum(calls), strict=True):
            _, _, layer = got[int(np.searchsorted(done, seen))]
            assert kept_positions(layer, b) == call.kept


def test_a_short_turn_that_fits_loses_nothing():
    q, k, v = streams(1, 9, seed=5)
    policy = policies.locret(6, stabilizers=2, tail=3)
    *_, (_, _, layer) = read(policy, q, k, v, np.zeros((1, 9, KV_HEADS)), [(6,), (3,)], chunk=4, room=3)
    assert kept_positions(layer, 0) == [[*range(9)]] * KV_HEADS  # and room for three in 6 + 3 + 3 slots


# ---- through a model ----

TOKENS, LENGTHS = random_tokens(3, 24), (24, 13, 3)


def in_use(cache):
    return max(int((layer.pos >= 0).sum(axis=-1).max()) for layer in cache.layers)


def test_a_bounded_answer_stays_within_budget_tail_and_every():
    policy, used = policies.locret(5, tail=3, every=4), []
    logits, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, chunk=8)
    for _ in range(14):
        logits, cache = STEP(PARAMS, policy, logits.argmax(axis=-1), cache)
        used.append(in_use(cache))
    assert max(used) == 5 + 3 + 4 - 1 and used[3::4] == [5, 5, 5]
    assert {layer.slots for layer in cache.layers} == {5 + 3 + 4}


@pytest.mark.parametrize("every, slots", [(4, 5 + 3 + 4), (None, 5 + 3 + 6)])
def test_a_later_turn_takes_no_more_slots_than_the_first(every, slots):
    policy, cache = policies.locret(5, tail=3, every=every), None
    for width in (24, 3):
        _, cache = kvjax.prefill(PARAMS, policy, TOKENS[:, :width], cache=cache, room=6)
        assert {layer.slots for layer in cache.layers} == {slots}
        assert in_use(cache) <= 5 + 3 + 3


def test_a_prompt_of_any_length_is_read_by_the_same_programs_into_the_same_bytes():
    policy, chunk, room = policies.locret(5, tail=3), 8, 4

    def prefill(count):
        _, cache = kvjax.prefill(PARAMS, policy, random_tokens(2, count), chunk=chunk, room=room)
        return kvjax.nbytes(cache), decoding.run_layer._cache_size()

    first = prefill(16)  # a program's buffers are those of its shapes, which the length of the prompt is not among
    assert {prefill(count) for count in (17, 101, 252)} == {first}
    assert (
        first[0] == 2 * CONFIG.kv_heads * (5 + 3 + room) * (2 * CONFIG.head_dim * 4 + 12) + 4 * 2
    )  # one layer, two rows


def scores_of(cache):
    """{(layer, row, head, position): score} of all that is kept."""
    return {
        (i, b, h, int(p)): float(layer.stats["locret"][b, h, n])
        for i, layer in enumerate(cache.layers)
        for (b, h, n), p in np.ndenumerate(layer.pos)
        if p >= 0
    }


def test_scores_of_retained_tokens_never_change():
    policy = policies.locret(5, tail=3, every=2)
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    before = scores_of(cache)
    for i in range(5):
        _, cache = kvjax.step(PARAMS, policy, TOKENS[:, i], cache)
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS[:, :6], cache=cache)
    after = scores_of(cache)
    both = before.keys() & after.keys()
    assert len(both) >= CONFIG.kv_heads  # so that something is compared
    assert {key: after[key] for key in both} == {key: before[key] for key in both}


def test_the_score_of_a_token_does_not_depend_on_later_ones():
    policy = policies.locret(40, tail=0)
    changed = TOKENS.at[:, 9:].set((TOKENS[:, 9:] + 7) % CONFIG.vocab)
    (_, one), (_, other) = (kvjax.prefill(PARAMS, policy, tokens) for tokens in (TOKENS, changed))
    for got, want in zip(one.layers, other.layers, strict=True):
        assert_array_equal(got.pos, want.pos)
        score, theirs = got.stats["locret"], want.stats["locret"]
        assert_allclose(score[..., :9], theirs[..., :9], rtol=1e-5)  # sums of f32
        assert (jnp.abs(score[..., 9:] - theirs[..., 9:]) > 1e-3).any()


def test_chunks_do_not_matter_where_the_budget_holds_all():
    want, _ = kvjax.prefill(PARAMS, policies.full(), TOKENS, lengths=LENGTHS)
    got, _ = kvjax.prefill(PARAMS, policies.locret(21, tail=3), TOKENS, lengths=LENGTHS, chunk=5)
    assert_allclose(got, want, atol=1e-4)  # of size 10, in f32


# ---- what is refused ----


@pytest.mark.parametrize("call", [kvjax.prefill, kvjax.decode])
def test_a_model_without_heads_is_refused_by_name(call):
    settings = {"max_new_tokens": 1} if call is kvjax.decode else {}
    with pytest.raises(ValueError, match=r"locret\(budget=5\) must be given \['locret'\].*kvjax\.with_heads"):
        call(kvjax.with_heads(PARAMS, {}), policies.locret(5), TOKENS, **settings)


def test_a_step_of_a_model_without_heads_is_refused_by_name():
    _, cache = kvjax.prefill(PARAMS, policies.locret(5), TOKENS, room=1)
    with pytest.raises(ValueError, match=r"locret\(budget=5\) must be given \['locret'\]"):
        kvjax.step(kvjax.with_heads(PARAMS, {}), policies.locret(5), TOKENS[:, 0], cache)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(stabilizers=8), "stabilizers=8 and sinks=0 are kept .* less than budget=8; lower them or raise budget"),
        (dict(stabilizers=4, sinks=4), "stabilizers=4 and sinks=4"),
        (dict(sinks=4), "stabilizers=4 and sinks=4"),  # a half of the budget, where nothing is said
        (dict(positions="rank"), "positions='rank' must be 'cache' or 'true'"),
        (dict(every=0), "every=0 .* None never evicts"),
        (dict(tail=-1), "tail=-1"),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"locret: .*{said}"):
        policies.locret(8, **settings)
