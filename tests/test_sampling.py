"""Which token comes next: the same for the same key, row by row, and only from what the settings allow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from kvjax.sampling import make_draw, row_keys, sample
from tests.methods import every_method, kept_positions
from tests.tiny import random_params, random_tokens

PARAMS = random_params()
TOKENS, LENGTHS, BUDGET = random_tokens(3, 24), (24, 13, 3), 10
POLICY = policies.h2o(BUDGET, window=4)


def decode(**settings):
    settings = {"temperature": 1.0, "max_new_tokens": 20} | settings
    return kvjax.decode(PARAMS, POLICY, TOKENS, lengths=LENGTHS, **settings)


def test_the_same_key_gives_the_same_tokens():
    assert_array_equal(decode(key=3).tokens, decode(key=jax.random.key(3)).tokens)
    assert_array_equal(decode(key=3).tokens, decode(key=jax.random.PRNGKey(3)).tokens)


def test_no_key_is_seed_0():
    assert_array_equal(decode().tokens, decode(key=0).tokens)


def test_other_keys_give_other_tokens_in_every_row():
    assert (decode(key=3).tokens != decode(key=4).tokens).any(axis=1).all()


def test_rows_draw_apart_from_one_another():
    tokens = jnp.broadcast_to(TOKENS[:1], TOKENS.shape)
    out = kvjax.decode(PARAMS, POLICY, tokens, lengths=(24, 24, 24), temperature=1.0, key=3, max_new_tokens=20)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3


def test_a_row_with_its_own_key_draws_the_same_wherever_it_stands():
    keys = jax.random.split(jax.random.key(3), 3)
    again = np.array([2, 0, 1])
    want = decode(key=jnp.array(keys, copy=True)).tokens
    got = kvjax.decode(
        PARAMS,
        POLICY,
        TOKENS[again],
        lengths=np.asarray(LENGTHS)[again],
        temperature=1.0,
        key=keys[again],
        max_new_tokens=20,
    )
    assert_array_equal(got.tokens, want[again])


def test_tokens_come_one_by_one_as_they_stand_in_the_result():
    stop = [int(decode(key=3).tokens[1, 2])]
    come = []
    out = decode(key=3, stop=stop, on_token=lambda token: come.append(token.copy()))
    assert_array_equal(out.tokens, decode(key=3, stop=stop).tokens)
    assert len(come) == int(out.lengths.max())
    for b, length in enumerate(out.lengths):
        said = np.stack(come)[:, b]
        assert_array_equal(said[:length], out.tokens[b, :length])
        assert (said[length:] == -1).all()


@every_method
def test_decoding_goes_on_from_the_result_as_if_it_had_never_stopped(row):
    policy = row.make(BUDGET)
    whole = kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, max_new_tokens=20)
    half = kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, max_new_tokens=10)
    assert_array_equal(half.tokens, whole.tokens[:, :10])
    logits, cache = half.logits, half.cache
    if policy.budget is None:  # no slot is left: a turn gives it more
        token = logits.argmax(axis=-1)
        assert_array_equal(token, whole.tokens[:, 10])
        logits, cache = kvjax.prefill(PARAMS, policy, token[:, None], cache=cache, room=9)
    for i in range(11 if policy.budget is None else 10, 20):
        token = logits.argmax(axis=-1)
        assert_array_equal(token, whole.tokens[:, i])
        logits, cache = kvjax.step(PARAMS, policy, token, cache)
    assert_allclose(logits, whole.logits, atol=1e-5)
    for got, want in zip(cache.layers, whole.cache.layers, strict=True):
        assert all(kept_positions(got, b) == kept_positions(want, b) for b in range(3))


def test_a_seed_draws_the_same_tokens_in_one_call_and_in_two():
    whole, half = decode(key=3, max_new_tokens=12), decode(key=3, max_new_tokens=5)
    token = sample(half.logits, make_draw(1.0, None, None), row_keys(3, 3), half.cache.length)
    assert_array_equal(token, whole.tokens[:, 5])
    rest = kvjax.decode(PARAMS, POLICY, token[:, None], cache=half.cache, temperature=1.0, key=3, max_new_tokens=6)
    assert_array_equal(rest.tokens, whole.tokens[:, 6:])


# What `sample` may draw from, by numpy.


def allowed(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities [V]: top_k, then of what is left the fewest likeliest tokens that together reach top_p."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    p /= p[order].sum()
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i]
        if top_p is not None and total >= top_p:
            break
    out = np.zeros(len(p))
    out[kept] = p[kept] / p[kept].sum()
    return out


LOGITS = np.array([0.3, 2.0, -1.0, 1.5, 1.5, 0.0, 1.0, -3.0], np.float32)  # ids 3 and 4 tie
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_have_the_probabilities_that_the_settings_give(settings):
    count = 4000
    draw = make_draw(settings["temperature"], settings.get("top_k"), settings.get("top_p"))
    drawn = sample(
        jnp.broadcast_to(jnp.asarray(LOGITS), (count, LOGITS.size)),
        draw,
        row_keys(0, count),
        jnp.zeros(count, jnp.int32),
    )
    share, p = np.bincount(drawn, minlength=LOGITS.size) / count, allowed(LOGITS, **settings)
    assert not share[p == 0].any()
    assert_allclose(share, p, atol=4 * np.sqrt(0.25 / count))  # four standard deviations of a share


def test_a_row_draws_other_tokens_at_other_positions():
    keys, logits = row_keys(0, 1), jnp.zeros((1, 1000))
    draw = make_draw(1.0, None, None)
    assert len({int(sample(logits, draw, keys, jnp.asarray([at]))[0]) for at in range(8)}) > 1


def test_greedy_ties_go_to_the_lowest_id():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-jnp.inf, -jnp.inf, 0.0, 0.0]])
    assert_array_equal(sample(logits, None, row_keys(0, 3), jnp.zeros(3, jnp.int32)), [1, 0, 2])


def test_a_temperature_near_0_takes_the_likeliest():
    # 1e-40 is below the smallest normal f32
    for temperature in (1e-4, 1e-20, 1e-40):
        drawn = sample(jnp.asarray(LOGITS)[None], make_draw(temperature, None, None), row_keys(0, 1), jnp.asarray([5]))
        assert_array_equal(drawn, [1], err_msg=str(temperature))
