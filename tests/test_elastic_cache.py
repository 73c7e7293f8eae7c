"""What sets Elastic Cache apart from the methods of the shared table: it grows, and it must see a prompt whole."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from tests.methods import kept_positions
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS, TOKENS = random_params(), random_tokens(3, 24)
HALF = policies.elastic_cache(0.5, distance=3)


def test_it_keeps_its_share_of_prompt_and_answer_in_every_row():
    out = kvjax.decode(PARAMS, HALF, TOKENS, lengths=(24, 13, 3), max_new_tokens=11)
    for layer in out.cache.layers:
        for b, seen in enumerate((35, 24, 14)):
            assert {len(kept) for kept in kept_positions(layer, b)} == {seen - seen // 2}


def test_bytes_are_those_of_its_share_and_one_slot():
    _, cache = kvjax.prefill(PARAMS, HALF, TOKENS, room=7)
    slots = 31 - 31 // 2 + 1
    per_slot = 2 * CONFIG.head_dim * 4 + 8
    assert kvjax.nbytes(cache) == CONFIG.layers * 3 * CONFIG.kv_heads * slots * per_slot + 4 * 3


def test_nothing_pruned_is_the_full_cache():
    want = kvjax.decode(PARAMS, policies.full(), TOKENS, lengths=(24, 13, 3), max_new_tokens=6)
    got = kvjax.decode(PARAMS, policies.elastic_cache(0.0), TOKENS, lengths=(24, 13, 3), max_new_tokens=6)
    assert_array_equal(got.tokens, want.tokens)
    assert_allclose(got.logits, want.logits, atol=1e-4)


def test_marked_tokens_stay_as_they_are_and_only_others_are_merged():
    q, k, v, positions = prompt_of(12)
    text = np.isin(np.arange(12), (1, 4, 5, 9))
    given = {"permanent": np.broadcast_to(text, (1, 12)).astype(np.float32)}
    _, cache = kvjax.attend(q, k, v, None, HALF, positions=positions, given=given, capacity=20)
    assert {*np.flatnonzero(text), 0, 11} == set(kept_positions(cache, 0)[0])  # 6 of 12 stay, and none is left to join
    for slot, pos in enumerate(np.asarray(cache.pos)[0, 0]):
        if pos >= 0:
            assert_array_equal(cache.k[0, 0, slot], k[0, pos, 0])

    given = {"permanent": given["permanent"] * (np.arange(12) < 5)}  # 0, 1, 4, 11 stay, and 2 anchors take in 6 others
    _, cache = kvjax.attend(q, k, v, None, HALF, positions=positions, given=given, capacity=20)
    kept = kept_positions(cache, 0)[0]
    assert len(kept) == 6 and {0, 1, 4, 11} < set(kept)
    anchors = sorted(set(kept) - {0, 1, 4, 11})
    others = [p for p in range(12) if p not in (0, 1, 4, 11)]
    near = [min(anchors, key=lambda a, p=p: (abs(a - p), a)) for p in others]
    for anchor in anchors:
        want = np.mean([k[0, p, 0] for p, a in zip(others, near, strict=True) if a == anchor], axis=0)
        assert_allclose(cache.k[0, 0, int(np.argmax(cache.pos[0, 0] == anchor))], want, atol=1e-6)


def test_marks_are_for_the_model_too_and_more_of_them_than_the_share_are_let_go():
    mask = np.ones((3, 24), np.float32)
    _, marked = kvjax.prefill(PARAMS, HALF, TOKENS, given={"permanent": mask})
    _, plain = kvjax.prefill(PARAMS, HALF, TOKENS)
    assert [kept_positions(layer, 1) for layer in marked.layers] == [kept_positions(layer, 1) for layer in plain.layers]
    with pytest.raises(ValueError, match="'visual'.*no statistic of elastic_cache.*'permanent'"):
        kvjax.prefill(PARAMS, HALF, TOKENS, given={"visual": mask})
    with pytest.raises(ValueError, match="shape .3, 5., and must be .3, 24., as tokens are"):
        kvjax.prefill(PARAMS, HALF, TOKENS, given={"permanent": mask[:, :5]})


def prompt_of(count):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, count, heads, 8), dtype=np.float32) for heads in (4, 2, 2))
    return q, k, v, np.arange(count)[None]


def test_a_later_turn_is_as_many_steps():
    _, cache = kvjax.prefill(PARAMS, HALF, TOKENS, room=8)
    want, turn = kvjax.prefill(PARAMS, HALF, random_tokens(3, 5, seed=1), cache=cache)
    for token in random_tokens(3, 5, seed=1).T:
        logits, cache = kvjax.step(PARAMS, HALF, token, cache)
    assert_allclose(logits, want, atol=1e-5)
    assert [kept_positions(layer, 0) for layer in cache.layers] == [kept_positions(layer, 0) for layer in turn.layers]


def test_a_prompt_in_chunks_is_refused():
    with pytest.raises(ValueError, match="must see a prompt whole; leave out chunk=8"):
        kvjax.prefill(PARAMS, HALF, TOKENS, chunk=8)


def test_a_step_without_room_is_refused_and_under_jit_is_nan():
    _, cache = kvjax.prefill(PARAMS, policies.elastic_cache(0.1), random_tokens(1, 9))
    logits, cache = kvjax.step(PARAMS, policies.elastic_cache(0.1), TOKENS[:1, 0], cache)
    with pytest.raises(ValueError, match="room=64"):
        kvjax.step(PARAMS, policies.elastic_cache(0.1), TOKENS[:1, 0], cache)
    assert np.isfinite(logits).all()
    step = jax.jit(kvjax.step)
    _, cache = step(PARAMS, policies.elastic_cache(0.1), TOKENS[:1, 0], cache)  # takes the last slot
    lost, _ = step(PARAMS, policies.elastic_cache(0.1), TOKENS[:1, 0], cache)
    assert np.isnan(lost).all()
