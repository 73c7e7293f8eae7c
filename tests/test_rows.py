"""Rows of a batch do not affect one another, padding changes nothing, and a row that has stopped changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from tests.methods import every_method, kept_positions
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS = random_params()
TOKENS, LENGTHS, BUDGET, NEW = random_tokens(3, 24), np.array([24, 13, 3]), 10, 6
KEYS = jax.random.split(jax.random.key(5), 3)


def run(row, tokens=TOKENS, lengths=LENGTHS, keys=None, chunk=None, **settings):
    """Decodes with a temperature, so that rows do not end in a loop of one token."""
    keys = jnp.array(KEYS if keys is None else keys, copy=True)
    return kvjax.decode(
        PARAMS,
        row.make(BUDGET),
        jnp.asarray(tokens),
        lengths=lengths,
        max_new_tokens=settings.pop("max_new_tokens", NEW),
        key=keys,
        temperature=1.0,
        chunk=chunk,
        **settings,
    )


def assert_same_row(got, b, want, a):
    """Row b of `got` is row a of `want`: its tokens, logits, and kept positions in every layer."""
    assert_array_equal(got.tokens[b], want.tokens[a])
    # f32, by a product of another shape. Its last bit can turn an f16 step of a tier of integers by 2 ** -11 of itself:
    # one step of mikv does so under wider padding (0.1295 or 0.1294), and moves a logit by 1e-4.
    atol = 2e-4 if got.cache.policy.low is not None and got.cache.policy.low.values is not None else 1e-5
    assert_allclose(got.logits[b], want.logits[a], rtol=1e-5, atol=atol)
    assert int(got.cache.length[b]) == int(want.cache.length[a])
    for new, old in zip(got.cache.layers, want.cache.layers, strict=True):
        assert kept_positions(new, b) == kept_positions(old, a)


def slots_of(cache, b):
    """All that the cache holds for row b, as numpy arrays."""
    aligned = [layer.slot_aligned() for layer in cache.layers]
    return jax.tree.map(lambda leaf: np.asarray(leaf[b]), (aligned, cache.length))


@every_method
def test_the_order_of_rows_changes_nothing(row):
    want, order = run(row), np.array([2, 0, 1])
    got = run(row, TOKENS[order], LENGTHS[order], KEYS[order])
    for b, a in enumerate(order):
        assert_same_row(got, b, want, a)


@every_method
def test_further_rows_change_nothing(row):
    want = run(row)
    got = run(row, jnp.concatenate([random_tokens(1, 24, seed=9), TOKENS]), np.r_[17, LENGTHS], KEYS[np.r_[0, 0, 1, 2]])
    for a in range(3):
        assert_same_row(got, a + 1, want, a)


@pytest.mark.parametrize("chunk", [None, 8])
@every_method
def test_wider_padding_changes_nothing_whatever_it_is(row, chunk):
    if chunk and row.whole:
        pytest.skip("it must see a prompt whole")
    want = run(row, chunk=chunk)
    padding = jnp.asarray([[60], [-7], [10**9]], jnp.int32)
    wide = jnp.where(jnp.arange(32) < LENGTHS[:, None], jnp.pad(TOKENS, ((0, 0), (0, 8))), padding)
    got = run(row, wide, chunk=chunk)
    for b in range(3):
        assert_same_row(got, b, want, b)


@every_method
def test_a_row_without_a_token_in_a_step_keeps_its_cache_bit_for_bit(row):
    policy, step = row.make(BUDGET), kvjax.step
    logits, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, room=2)
    _, cache = step(PARAMS, policy, jnp.asarray([1, 2, 3]), cache)
    all_go, after_all = step(PARAMS, policy, jnp.asarray([4, 5, 6]), cache)
    two_go, after_two = step(PARAMS, policy, jnp.asarray([4, -1, 6]), cache)
    jax.tree.map(assert_array_equal, slots_of(after_two, 1), slots_of(cache, 1))
    for b in (0, 2):
        jax.tree.map(assert_array_equal, slots_of(after_two, b), slots_of(after_all, b))
        assert_array_equal(two_go[b], all_go[b])


@every_method
def test_a_row_that_has_stopped_keeps_its_cache_bit_for_bit_and_the_others_go_on(row):
    def talks():  # until row 1 says a token first after two others, and no other row says it: it ends row 1 alone
        for seed in range(5, 25):
            keys = jax.random.split(jax.random.key(seed), 3)
            free = run(row, keys=keys)
            tokens = np.asarray(free.tokens)
            for i in range(2, NEW):
                if tokens[1, i] not in np.r_[tokens[1, :i], tokens[0], tokens[2]]:
                    return keys, free, tokens, i

    keys, free, tokens, at = talks()
    stopped, short = run(row, keys=keys, stop=[int(tokens[1, at])]), run(row, keys=keys, max_new_tokens=at)
    assert_array_equal(stopped.lengths, [NEW, at, NEW])
    assert_array_equal(stopped.tokens[1], np.r_[tokens[1, :at], [0] * (NEW - at)])
    if row.make(BUDGET).budget is not None:  # the others grow by what may come
        jax.tree.map(assert_array_equal, slots_of(stopped.cache, 1), slots_of(short.cache, 1))
    assert_allclose(stopped.logits[1], short.logits[1], rtol=1e-5, atol=1e-5)
    for b in (0, 2):
        assert_same_row(stopped, b, free, b)


def test_decoding_ends_when_all_rows_have_stopped():
    policy, seen = policies.h2o(BUDGET, window=4), []
    stop = list(range(CONFIG.vocab))
    logits, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    out = kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, max_new_tokens=5, stop=stop, on_token=seen.append)
    assert not seen and not np.any(out.tokens) and not np.any(out.lengths)
    assert_array_equal(out.logits, logits)
    jax.tree.map(assert_array_equal, out.cache, cache)


def test_a_stopped_row_whose_slots_are_full_does_not_hold_up_the_others():
    policy = policies.full()
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)  # row 0 fills its 24 slots
    _, after = kvjax.step(PARAMS, policy, jnp.asarray([-1, 5, 6]), cache)
    assert_array_equal(after.length, [24, 14, 4])
