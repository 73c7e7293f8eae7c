"""A cache with room for every token changes nothing: all methods against a forward pass that has no cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import attention, policies
from kvjax.cache import FREE
from kvjax.policy import Mass
from tests.methods import every_method
from tests.plain import plain_logits
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS = random_params()
TOKENS, LENGTHS, MORE = random_tokens(3, 24), (24, 13, 3), random_tokens(3, 12, seed=1)
ROOM = TOKENS.shape[1] + MORE.shape[1]  # no sequence here is longer


def followed_by(more):
    """Each row's own tokens with `more` [B, n] right behind them, padded on the right: [B, T + n]."""
    more = np.asarray(more)
    both = np.zeros((TOKENS.shape[0], TOKENS.shape[1] + more.shape[1]), np.int32)
    for b, length in enumerate(LENGTHS):
        both[b, : length + more.shape[1]] = np.concatenate([np.asarray(TOKENS[b, :length]), more[b]])
    return both


def last_logits(plain, read):
    """Of logits [B, T, V], those of each row's last token once `read` tokens have followed its own."""
    return np.stack([plain[b, length + read - 1] for b, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("chunk", [None, 8])
@every_method
def test_a_budget_as_long_as_the_sequence_gives_the_logits_of_plain_attention(row, chunk):
    policy, plain = row.make(ROOM), np.asarray(plain_logits(PARAMS, followed_by(MORE)))
    if chunk and row.whole:
        pytest.skip("it must see a prompt whole")
    logits, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, chunk=chunk, room=MORE.shape[1])
    assert_allclose(logits, last_logits(plain, 0), atol=1e-4)
    for i in range(MORE.shape[1]):
        logits, cache = kvjax.step(PARAMS, policy, MORE[:, i], cache)
        assert_allclose(logits, last_logits(plain, i + 1), atol=1e-4)


@every_method
def test_a_budget_as_long_as_the_sequence_decodes_what_plain_attention_decodes(row):
    out = kvjax.decode(PARAMS, row.make(ROOM), TOKENS, lengths=LENGTHS, max_new_tokens=MORE.shape[1])
    plain = np.asarray(plain_logits(PARAMS, followed_by(out.tokens)))
    for i in range(MORE.shape[1]):
        assert_array_equal(out.tokens[:, i], last_logits(plain, i).argmax(axis=-1))
    assert_allclose(out.logits, last_logits(plain, MORE.shape[1]), atol=1e-4)


@every_method
def test_a_second_turn_with_a_budget_as_long_as_the_sequence_gives_the_logits_of_plain_attention(row):
    policy, plain = row.make(ROOM), np.asarray(plain_logits(PARAMS, followed_by(MORE)))
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    logits, cache = kvjax.prefill(PARAMS, policy, MORE, cache=cache)
    assert_allclose(logits, last_logits(plain, MORE.shape[1]), atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_sliding_window_is_that_of_plain_attention(chunk):
    params = random_params(dataclasses.replace(CONFIG, sliding_window=7))
    plain = np.asarray(plain_logits(params, followed_by(MORE)))
    for policy in (policies.full(), policies.streaming_llm(ROOM, sinks=2)):
        logits, cache = kvjax.prefill(params, policy, TOKENS, lengths=LENGTHS, chunk=chunk, room=1)
        assert_allclose(logits, last_logits(plain, 0), atol=1e-4)
        logits, cache = kvjax.step(params, policy, MORE[:, 0], cache)
        assert_allclose(logits, last_logits(plain, 1), atol=1e-4)


def test_a_prompt_that_is_read_in_spans_and_blocks_gives_the_logits_of_plain_attention():
    params = random_params(dataclasses.replace(CONFIG, context=2048))
    tokens = random_tokens(1, 1500)  # 8 spans of 188 queries, each in two blocks
    assert attention.BLOCK_LOGITS // 1500 < 1500 // attention.SPANS
    plain = plain_logits(params, tokens)[:, -1]
    for policy in (policies.full(), policies.h2o(1500, window=4)):
        logits, _ = kvjax.prefill(params, policy, tokens)
        assert_allclose(logits, plain, atol=1e-4)


def attended(q, k, v, q_pos, k_pos, bias, sliding_window):
    """Output [B, H, G, T, D], lse and probabilities [B, H, G, T, N], in float64, with one T x N matrix."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    ago = (q_pos[..., None] - k_pos[:, :, None, :])[:, :, None]  # [B, H, 1, T, N]
    logits = np.einsum("bhgtd,bhnd->bhgtn", q, k) + np.where(ago == 0, 0.0, bias[:, :, None, None])
    visible = (ago >= 0) & (ago < (sliding_window or np.inf)) & (k_pos != FREE)[:, :, None, None]
    e = np.where(visible, np.exp(logits), 0.0)
    total = e.sum(axis=-1)
    p = e / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return np.einsum("bhgtn,bhnd->bhgtd", p, v), np.log(total), p


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in spans and blocks"])
@pytest.mark.parametrize("heads", [1, 2], ids=["one rank for all heads", "own positions for each head"])
@pytest.mark.parametrize("sliding_window", [None, 9])
def test_output_and_statistics_are_those_of_one_matrix_of_probabilities(monkeypatch, sliding_window, heads, cut):
    if cut:
        monkeypatch.setattr(attention, "SPANS", 2)
        monkeypatch.setattr(attention, "BLOCK_LOGITS", 20 * 141)  # spans of 65 queries, blocks of 20
    rng = np.random.default_rng(0)
    count, before = 130, 11
    q = jnp.asarray(rng.standard_normal((2, 2, 3, count, 8)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 2, 2, before + count, 8)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((2, 2, before + count)), jnp.float32)
    own = np.stack([before + np.arange(count)] * 2)
    own[1, 100:] = FREE  # the second row is padded
    older = rng.permuted(np.tile(np.arange(before), (2, 2, 1)), axis=-1)
    older[0, 1, 3] = FREE
    k_pos = np.concatenate([older, np.stack([own, own], axis=1)], axis=-1)
    q_pos = np.stack([own] * heads, axis=1)
    needs = frozenset({Mass(), Mass(last=1), Mass(last=5)})

    got = attention.attend_slots(
        q, k, v, jnp.asarray(q_pos), jnp.asarray(k_pos), needs=needs, bias=bias, sliding_window=sliding_window
    )
    out, lse, p = attended(q, k, v, q_pos, k_pos, bias, sliding_window)
    assert_allclose(got.out, out, atol=1e-5)
    assert_allclose(got.lse, lse, atol=1e-5)
    for need, mass in got.mass.items():
        counted = (own >= 0) & (own > own.max(axis=1, keepdims=True) - (need.last or count))
        assert_allclose(mass, (p.mean(axis=2) * counted[:, None, :, None]).sum(axis=2), atol=1e-4)  # a sum of 130
