"""What a caller hands over with each token: the hooks that trained heads use."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies, scorers
from kvjax.policy import evict
from kvjax.tiers import demote
from tests.methods import kept_positions
from tests.tiny import CONFIG, random_params, random_tokens

LEARNED = evict(scorers.given("worth"), budget=4)  # as a retaining head would choose


def gate(shown: str = "shown"):
    """A policy that hides tokens before they are attended to, as a gate would."""
    scorer = scorers.given(shown)
    return evict(
        scorer._replace(score=scorers.recency().score),
        budget=None,
        bias=lambda cache, turn: jnp.where(cache.stats[shown] > 0, 0.0, -jnp.inf),
    )


def vectors(count, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, count, heads, 8), dtype=np.float32) for heads in (4, 2, 2))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.broadcast_to(jnp.arange(count), (2, count))


def test_tokens_are_kept_by_the_score_that_they_brought_along():
    q, k, v, positions = vectors(8)
    worth = np.random.default_rng(1).permuted(np.tile(np.arange(8.0, dtype=np.float32), (2, 2, 1)), axis=2)
    call = {"given": {"worth": worth[..., :6]}}
    _, cache = kvjax.attend(q[:, :6], k[:, :6], v[:, :6], None, LEARNED, positions=positions[:, :6], **call)
    for i in (6, 7):
        one = [x[:, i : i + 1] for x in (q, k, v)]
        _, cache = kvjax.attend(
            *one, cache, LEARNED, positions=positions[:, i : i + 1], given={"worth": worth[..., i : i + 1]}
        )
    for b in range(2):
        for head in range(2):
            first = sorted(range(6), key=lambda p: -worth[b, head, p])[:4]
            for p in (6, 7):
                first = sorted([*first, p], key=lambda p: -worth[b, head, p])[:4]
            assert kept_positions(cache, b)[head] == sorted(first)


def test_a_gate_hides_tokens_from_all_queries_but_their_own():
    q, k, v, positions = vectors(6)
    shown = np.ones((2, 2, 6), np.float32)
    shown[:, 0, 2] = 0  # of the first kv_head alone
    out, _ = kvjax.attend(q, k, v, None, gate(), positions=positions, given={"shown": shown})
    want, _ = kvjax.attend(q, k, v, None, policies.full(), positions=positions)
    assert_allclose(out[:, :3], want[:, :3], atol=1e-6)  # nobody else has seen token 2 yet
    assert_allclose(out[:, :, 2:], want[:, :, 2:], atol=1e-6)  # the second kv_head
    without, _ = kvjax.attend(
        *(jnp.delete(x, 2, axis=1) for x in (q, k, v)), None, policies.full(), positions=positions[:, :5]
    )
    assert_allclose(out[:, 3:, :2], without[:, 2:, :2], atol=1e-6)


def test_a_gate_hides_a_token_in_the_steps_that_follow():
    q, k, v, positions = vectors(5)
    shown = jnp.asarray([[1, 0, 1, 1, 1.0]] * 2)
    want, _ = kvjax.attend(q, k, v, None, gate(), positions=positions, given={"shown": shown})
    cache, outs = None, []
    for i in range(5):
        one = [x[:, i : i + 1] for x in (q, k, v)]
        call = {"positions": positions[:, i : i + 1], "given": {"shown": shown[:, i : i + 1]}}
        out, cache = (
            kvjax.attend(*one, cache, gate_policy, **call, capacity=5)
            if cache is None
            else kvjax.attend(*one, cache, gate_policy, **call)
        )
        outs.append(out)
    assert_allclose(jnp.concatenate(outs, axis=1), want, atol=1e-6)


gate_policy = gate()


def test_a_lower_tier_may_choose_by_what_was_given():
    q, k, v, positions = vectors(9)
    two = demote(scorers.recency(), LEARNED, budget=3)
    worth = jnp.asarray([[5, 0, 4, 1, 3, 2, 9, 9, 9.0]] * 2)
    _, cache = kvjax.attend(q, k, v, None, two, positions=positions, given={"worth": worth})
    assert kept_positions(cache, 0)[0] == [6, 7, 8] and kept_positions(cache.low, 0)[0] == [0, 2, 4, 5]


def test_what_is_not_given_or_not_known_is_refused():
    q, k, v, positions = vectors(3)
    with pytest.raises(ValueError, match=r"must be given \['worth'\]"):
        kvjax.attend(q, k, v, None, LEARNED, positions=positions)
    with pytest.raises(ValueError, match=r"given\['value'\] is no statistic of .*'worth'"):
        kvjax.attend(
            q, k, v, None, LEARNED, positions=positions, given={"worth": k[:, :, 0, 0], "value": k[:, :, 0, 0]}
        )
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), and must be \(2, 3\) or \(2, 2, 3\)"):
        kvjax.attend(q, k, v, None, LEARNED, positions=positions, given={"worth": k[:, :2, 0, 0]})


def test_statistics_that_are_not_given_start_at_nothing():
    q, k, v, positions = vectors(5)
    h2o = policies.h2o(3, window=1)
    _, plain = kvjax.attend(q, k, v, None, h2o, positions=positions)
    _, zero = kvjax.attend(q, k, v, None, h2o, positions=positions, given={"mass": jnp.zeros((2, 5))})
    assert_array_equal(plain.pos, zero.pos)
    _, favoured = kvjax.attend(
        q, k, v, None, h2o, positions=positions, given={"mass": jnp.eye(5)[1:2].repeat(2, 0) * 99}
    )
    assert all(1 in head for head in kept_positions(favoured, 0))


def test_a_model_takes_scores_for_each_layer_and_head_in_prompt_chunk_and_step():
    params, tokens = random_params(), random_tokens(2, 12)
    rng = np.random.default_rng(3)
    worth = rng.standard_normal((CONFIG.layers, 2, CONFIG.kv_heads, 13), dtype=np.float32)
    for chunk in (None, 5):
        _, cache = kvjax.prefill(params, LEARNED, tokens, chunk=chunk, given={"worth": worth[..., :12]})
        _, cache = kvjax.step(params, LEARNED, tokens[:, 0], cache, given={"worth": worth[..., 12]})
        for i, layer in enumerate(cache.layers):
            for b, head in itertools.product(range(2), range(CONFIG.kv_heads)):
                best = sorted(range(13), key=lambda p, i=i, b=b, head=head: -worth[i, b, head, p])[:4]
                assert kept_positions(layer, b)[head] == sorted(best)


def test_one_score_for_all_layers_does_too():
    params, tokens = random_params(), random_tokens(1, 6)
    worth = np.array([[3.0, 9, 1, 8, 7, 2]])
    _, cache = kvjax.prefill(params, LEARNED, tokens, given={"worth": worth.tolist()})
    assert all(kept_positions(layer, 0) == [[0, 1, 3, 4]] * CONFIG.kv_heads for layer in cache.layers)
    _, cache = kvjax.step(params, LEARNED, tokens[:, 0], cache, given={"worth": [5.0]})
    assert all(kept_positions(layer, 0) == [[1, 3, 4, 6]] * CONFIG.kv_heads for layer in cache.layers)


def test_the_model_refuses_what_it_is_not_given():
    params, tokens = random_params(), random_tokens(1, 6)
    with pytest.raises(ValueError, match=r"decode: .* must be given \['worth'\].*Take kvjax.prefill and kvjax.step"):
        kvjax.decode(params, LEARNED, tokens, max_new_tokens=2, given={"worth": np.zeros((1, 6))})
    with pytest.raises(ValueError, match="given is a ndarray, and must be"):
        kvjax.prefill(params, LEARNED, tokens, given=np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"shape \(1, 5\), and must be \(1, 6\), as tokens are, or \(2, 1, 2, 6\)"):
        kvjax.prefill(params, LEARNED, tokens, given={"worth": np.zeros((1, 5))})
