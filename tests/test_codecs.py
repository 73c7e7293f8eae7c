"""Codecs: packed words, error bounds, products that stay what they were, and the bytes that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import codecs
from pallas_kernels.slot_attention.packed import unpack
from tests.oracles import quantiser

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def rows(x):
    """One token of one head."""
    return jnp.asarray(x, jnp.float32)[None, None, None]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@given(seed=st.integers(0, 2**31), count=st.integers(1, 70))
def test_packed_codes_come_back_and_lie_as_the_oracle_says(bits, seed, count):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    words = codecs.pack(jnp.asarray(codes, jnp.uint32), bits)
    assert_array_equal(words, quantiser.pack(codes, bits))
    assert_array_equal(unpack(words, bits, count), codes)


@pytest.mark.parametrize(
    "bits, words, back",
    [  # the worked example: groups of four
        (2, [0xE4E4], [-1, 0, 1, 2, 0.25, 0.5, 0.75, 1]),
        (3, [0xD8C8, 0xCC], [-1, -0.143066, 0.713867, 1.999268, 0.25, 0.464233, 0.785583, 0.999817]),
        (4, [0xFA50F850], [-1, -0.000244, 0.599609, 1.999268, 0.25, 0.499939, 0.749878, 0.999817]),
    ],
)
def test_the_worked_example(bits, words, back):
    codec = codecs.integer(bits, group=4)
    stored = codec.store(rows([-1, 0, 0.5, 2, 0.25, 0.5, 0.75, 1]))
    assert_array_equal(stored.codes.ravel(), words)
    assert_allclose(codec.load(stored).ravel(), back, atol=1e-6)


@BITS
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_what_comes_back_is_within_half_a_step(bits, seed, scale):
    x = scale * np.random.default_rng(seed).standard_normal((1, 2, 3, 64)).astype(np.float32)
    codec = codecs.integer(bits, group=32)
    stored = codec.store(jnp.asarray(x))
    step = np.repeat(np.asarray(stored.step, np.float64), 32, axis=-1)
    most = np.abs(x).reshape(1, 2, 3, 2, 32).max(axis=-1).repeat(32, axis=-1)
    bound = step / 2 + 3 * 2**-11 * most + 2**-24 * (2**bits - 1)
    assert (np.abs(np.asarray(codec.load(stored)) - x) <= bound).all()


@BITS
def test_it_rounds_as_the_oracle_does(bits):
    x = np.random.default_rng(bits).standard_normal((40, 64)).astype(np.float32)
    got = codecs.integer(bits, group=16).load(codecs.integer(bits, group=16).store(jnp.asarray(x)[None, None]))[0, 0]
    want = np.stack([quantiser.rounded(row, bits, 16) for row in x])
    differ = np.abs(got - want) > 1e-6
    assert differ.mean() < 0.02  # where f32 and f64 round a step to another f16
    assert np.abs(got - want).max() < (0.02 if bits == 8 else 1e-6)


@BITS
def test_bytes_are_those_of_the_docstring(bits):
    stored = jax.eval_shape(codecs.integer(bits, group=32).store, jax.ShapeDtypeStruct((3, 2, 5, 128), jnp.float32))
    assert kvjax.nbytes(stored) == 3 * 2 * 5 * (128 * bits // 8 + 4 * 128 // 32)


def test_constant_infinite_and_huge_values_survive_storing():
    x = np.zeros((1, 1, 3, 32), np.float32)
    x[0, 0, 0], x[0, 0, 1, 0], x[0, 0, 2, 3] = 1.5, np.inf, -1e30
    back = np.asarray(codecs.integer(4).load(codecs.integer(4).store(jnp.asarray(x))))
    assert_array_equal(back[0, 0, 0], 1.5)
    assert np.isfinite(back).all()


def example(seed=0, batch=2, heads=2, group=3, count=9, slots=7, dim=16):
    rng = np.random.default_rng(seed)
    k, q = rng.standard_normal((batch, heads, slots, dim)), rng.standard_normal((batch, heads, group, count, dim))
    there, asked = np.ones((batch, heads, slots), bool), np.ones((batch, count), bool)
    return tuple(jnp.asarray(x) for x in (np.float32(k), there, np.float32(q), asked))


def test_pruned_channels_are_those_of_the_worked_example():
    k = jnp.array([[1, 0.5, 0, 2], [0, 1, 1, 2], [1, 0, 2, 0], [2, 1, 1, 1]], jnp.float32)[None, None]
    q = jnp.array([[[9, 9, 9, 9], [1, 0, 2, 1], [1, 1, 0, 0]], [[9, 9, 9, 9], [0, 1, 2, 0], [2, 0, 1, 1]]], jnp.float32)
    codec = codecs.prune_channels(2, window=2)
    channels = codec.fit(k, jnp.ones((1, 1, 4), bool), q[None, None], jnp.ones((1, 3), bool))
    assert_array_equal(channels, [[[0, 2]]])
    assert_array_equal(codec.project(k, channels)[0, 0, :3], [[1, 0], [0, 1], [1, 2]])


def test_padding_and_free_slots_choose_nothing():
    k, there, q, asked = example()
    there, asked = there.at[0, :, 5:].set(False), asked.at[0, 6:].set(False)
    for codec in (codecs.prune_channels(5, window=3), codecs.balance()):
        want = codec.fit(k, there, q, asked)
        noisy = codec.fit(k.at[0, :, 5:].set(1e6), there, q.at[0, :, :, 6:].set(1e6), asked)
        assert_array_equal(noisy, want)
        alone = codec.fit(k[:1, :, :5], there[:1, :, :5], q[:1, :, :, :6], asked[:1, :6])
        assert_allclose(alone, want[:1])


def test_balanced_products_are_what_they_were_and_maxima_agree():
    k, there, q, asked = example()
    codec = codecs.balance()
    scale = codec.fit(k, there, q, asked)
    keys, queries = codec.project(k, scale), codec.query(q, scale)
    assert_allclose(jnp.einsum("bhgtd,bhnd->bhgtn", queries, keys), jnp.einsum("bhgtd,bhnd->bhgtn", q, k), atol=1e-5)
    assert_allclose(jnp.abs(keys).max(axis=2), jnp.abs(queries).max(axis=(2, 3)), rtol=1e-5)
    assert_allclose(scale[0, 0], quantiser.balancer(np.moveaxis(q[0, 0], 0, 1), k[0, 0]), rtol=1e-5)
    assert_array_equal(codec.fit(0 * k, there, q, asked), jnp.ones_like(scale))


def test_a_pipe_is_one_after_the_other():
    k, there, q, asked = example()
    prune, rounding = codecs.prune_channels(8), codecs.integer(8, group=8)
    both = codecs.pipe(prune, rounding)
    fitted, channels = both.fit(k, there, q, asked), prune.fit(k, there, q, asked)
    stored = both.store(both.project(k, fitted))
    assert_array_equal(both.load(stored), rounding.load(rounding.store(prune.project(k, channels))))
    assert_array_equal(both.query(q, fitted), prune.query(q, channels))
    assert stored.codes.shape[-1] == 2 and stored.step.shape[-1] == 1


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: codecs.integer(5), "bits=5 must be 2, 3, 4 or 8"),
        (lambda: codecs.integer(4, group=0), "group=0 must be at least 1"),
        (lambda: codecs.integer(4, group=24).check(64), "group=24 does not divide the 64 channels"),
        (lambda: codecs.integer(4, group=None).check(33), "group=None does not divide the 33 channels"),
        (lambda: codecs.prune_channels(64).check(64), "keep=64 prunes nothing of 64"),
        (lambda: codecs.prune_channels(0), "keep=0 must be at least 1"),
        (lambda: codecs.pipe(codecs.integer(4), codecs.prune_channels(8)), "int4 stores codes.*Put it last"),
        (lambda: codecs.pipe(codecs.prune_channels(40), codecs.integer(4)).check(64), "does not divide the 40"),
    ],
)
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
