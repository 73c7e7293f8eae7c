"""A cache is a value: turns, questions asked of one context, the caller's own jit, and what the caller still holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from tests.methods import POLICIES, every_method, kept_positions
from tests.plain import plain_logits
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS = random_params(dataclasses.replace(CONFIG, layers=1))  # half the compiling; test_rows and others have two
TOKENS, LENGTHS, BUDGET = random_tokens(3, 24), (24, 13, 3), 10
QUESTIONS = random_tokens(3, 8, seed=1), random_tokens(3, 8, seed=2)


def copied(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same_kept(got: kvjax.Cache, want: kvjax.Cache):
    assert_array_equal(got.length, want.length)
    for new, old in zip(got.layers, want.layers, strict=True):
        for b in range(want.length.shape[0]):
            assert kept_positions(new, b) == kept_positions(old, b)


@every_method
def test_turns_that_split_a_prompt_like_chunks_are_the_chunked_call(row):
    policy = row.make(BUDGET)
    if row.whole:
        with pytest.raises(ValueError, match="must see a prompt whole"):
            kvjax.prefill(PARAMS, policy, TOKENS, chunk=8)
        return
    if row.by_turn:
        pytest.skip("it chooses otherwise where a turn ends")
    want, whole = kvjax.prefill(PARAMS, policy, TOKENS, chunk=8)
    cache = None
    for at in (0, 8, 16):
        logits, cache = kvjax.prefill(PARAMS, policy, TOKENS[:, at : at + 8], cache=cache)
    assert_allclose(logits, want, atol=1e-5)
    assert_same_kept(cache, whole)


@every_method
def test_decode_of_a_second_turn_is_prefill_of_it_and_steps(row):
    policy = row.make(BUDGET)
    _, context = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    out = kvjax.decode(PARAMS, policy, QUESTIONS[0], lengths=(8, 1, 5), cache=context, max_new_tokens=3)
    logits, cache = kvjax.prefill(PARAMS, policy, QUESTIONS[0], lengths=(8, 1, 5), cache=context, room=3)
    for i in range(3):
        token = logits.argmax(axis=-1)
        assert_array_equal(out.tokens[:, i], token)
        logits, cache = kvjax.step(PARAMS, policy, token, cache)
    assert_allclose(out.logits, logits, atol=1e-5)
    assert_same_kept(out.cache, cache)


@every_method
def test_a_turn_of_one_token_is_a_step(row):
    if row.by_turn:
        pytest.skip("it tells a turn from an answer")
    policy = row.make(BUDGET)
    _, context = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, room=1)
    want, after = kvjax.step(PARAMS, policy, TOKENS[:, 0], context)
    logits, cache = kvjax.prefill(PARAMS, policy, TOKENS[:, :1], cache=context)
    assert_allclose(logits, want, atol=1e-5)
    assert_same_kept(cache, after)


@every_method
def test_an_empty_cache_is_where_a_prompt_starts(row):
    policy = row.make(BUDGET)
    want, fresh = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    logits, cache = kvjax.prefill(
        PARAMS, policy, TOKENS, lengths=LENGTHS, cache=kvjax.empty_cache(PARAMS, policy, 3, tokens=0)
    )
    assert_allclose(logits, want, atol=1e-5)
    assert_same_kept(cache, fresh)


@every_method
def test_two_questions_can_be_asked_of_one_context(row):
    policy = row.make(BUDGET)
    _, context = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    before = copied(context)

    def ask(question):
        return kvjax.decode(PARAMS, policy, question, cache=context, max_new_tokens=3)

    alone, _, after_another = ask(QUESTIONS[0]), ask(QUESTIONS[1]), ask(QUESTIONS[0])
    assert_array_equal(after_another.tokens, alone.tokens)
    assert_array_equal(after_another.logits, alone.logits)
    jax.tree.map(assert_array_equal, context, before)


@every_method
def test_nothing_that_the_caller_holds_is_changed_or_deleted(row):
    policy, params = row.make(BUDGET), random_params(PARAMS.config)
    tokens, lengths = random_tokens(3, 24), jnp.asarray(LENGTHS)
    first = kvjax.decode(params, policy, tokens, lengths=lengths, max_new_tokens=2)
    held = params, first, tokens, lengths
    before, in_place = copied(held), jax.jit(kvjax.step, donate_argnames="cache")
    for chunk in (None, 8):
        _, cache = kvjax.prefill(params, policy, tokens, lengths=lengths, cache=first.cache, chunk=chunk, room=1)
        in_place(params, policy, tokens[:, 0], cache)
        kvjax.decode(params, policy, tokens[:, :1], cache=first.cache, max_new_tokens=2, chunk=chunk)
    _, cache = kvjax.prefill(params, policy, tokens[:, :1], cache=first.cache, room=1)
    _, after = kvjax.step(params, policy, tokens[:, 0], cache)
    kvjax.step(params, policy, tokens[:, 1], cache)  # `cache` is still there
    in_place(params, policy, tokens[:, 0], cache)
    kvjax.decode(params, policy, tokens[:, :1], cache=after, max_new_tokens=1)
    jax.tree.map(assert_array_equal, held, before)


@pytest.mark.parametrize("old_style", [False, True])
def test_decode_does_not_delete_the_callers_keys(old_style):
    keys = jax.random.split(jax.random.PRNGKey(0) if old_style else jax.random.key(0), 3)
    for _ in range(2):
        kvjax.decode(PARAMS, policies.tova(BUDGET), TOKENS, max_new_tokens=2, temperature=1.0, key=keys)
    assert not keys.is_deleted()


@pytest.mark.parametrize("mistake", [{"lengths": (25, 1, 1)}, {"temperature": -1.0}, {"on_token": "raises"}])
def test_a_failed_call_leaves_the_cache_as_it_was(mistake):
    policy = policies.random(BUDGET)
    _, context = kvjax.prefill(PARAMS, policy, TOKENS)
    before = copied(context)
    settings = dict(mistake)
    if "on_token" in mistake:
        settings["on_token"] = lambda token: 1 / 0
    with pytest.raises((ValueError, ZeroDivisionError)):
        kvjax.decode(PARAMS, policy, QUESTIONS[0], cache=context, max_new_tokens=4, **settings)
    jax.tree.map(assert_array_equal, context, before)
    kvjax.decode(PARAMS, policy, QUESTIONS[0], cache=context, max_new_tokens=1)


# One of each kind; the others would compile the same once more.
@pytest.mark.parametrize("method", ["full", "streaming_llm", "d2o", "mikv", "think", "locret", "attention_gate"])
def test_prefill_step_and_decode_give_the_same_under_the_callers_jit(method):
    policy = POLICIES[method].make(BUDGET)

    @jax.jit
    def program(params, tokens, lengths, question):
        _, cache = kvjax.prefill(params, policy, tokens, lengths=lengths, room=1)
        logits, cache = kvjax.step(params, policy, question[:, 0], cache)
        return logits, cache, kvjax.decode(params, policy, question, cache=cache, max_new_tokens=3, key=4)

    arguments = PARAMS, TOKENS, jnp.asarray(LENGTHS), QUESTIONS[0]
    logits, cache, out = program(*arguments)
    want, same, answer = program.__wrapped__(*arguments)
    assert_allclose(logits, want, atol=1e-5)
    assert_same_kept(cache, same)
    assert_array_equal(out.tokens, answer.tokens)
    assert_array_equal(out.lengths, answer.lengths)
    assert_allclose(out.logits, answer.logits, atol=1e-5)
    assert_same_kept(out.cache, answer.cache)


def test_decode_under_jit_stops_and_samples_as_it_does_outside():
    policy = policies.h2o(BUDGET, window=4)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20, "key": 3}
    going = np.asarray(kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, **settings).tokens)
    settings["stop"] = [int(going[b, 3 + 2 * b]) for b in range(3)]
    want = kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, **settings)
    got = jax.jit(lambda t: kvjax.decode(PARAMS, policy, t, lengths=LENGTHS, **settings))(TOKENS)
    assert 0 < int(want.lengths.max()) < 12  # so that a stop token and the early end are met
    assert_array_equal(got.tokens, want.tokens)
    assert_array_equal(got.lengths, want.lengths)
    assert_same_kept(got.cache, want.cache)


@every_method
def test_bf16_gives_the_logits_of_f32_and_goes_on(row):
    narrow, policy = random_params(PARAMS.config, dtype=jnp.bfloat16), row.make(64 if row.by_turn else BUDGET)
    logits, cache = kvjax.prefill(narrow, policy, TOKENS, room=4)  # most attend to the whole prompt before they evict
    want = plain_logits(PARAMS, TOKENS)[:, -1]
    # bf16 has 8 bits; roundings of a few operations add up
    assert np.linalg.norm(logits - want) < 5e-2 * np.linalg.norm(want)
    logits, cache = kvjax.step(narrow, policy, TOKENS[:, 0], cache)
    assert {layer.dtype for layer in cache.layers} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(logits).all()


def test_room_left_by_an_earlier_turn_is_used_before_more_is_taken():
    _, cache = kvjax.prefill(PARAMS, policies.full(), TOKENS, lengths=LENGTHS, room=16)
    assert {layer.slots for layer in cache.layers} == {40}
    want, _ = kvjax.prefill(PARAMS, policies.full(), QUESTIONS[0], cache=cache, room=100)
    logits, cache = kvjax.prefill(PARAMS, policies.full(), QUESTIONS[0], cache=cache, room=8)
    assert {layer.slots for layer in cache.layers} == {40}
    assert_array_equal(cache.layers[0].pos.max(axis=-1)[:, 0], np.array(LENGTHS) + 7)
    assert_allclose(logits, want, atol=1e-5)
