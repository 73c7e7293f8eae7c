"""Two tiers of a layer: what one loses the other takes, under one softmax; what does not fit together is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import codecs, policies
from kvjax.policies.kivi import kivi
from kvjax.policy import store
from kvjax.scorers import attention_mass, recency
from kvjax.tiers import demote
from tests.test_policies import CALLS, run_kvjax, streams
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS, TOKENS, LENGTHS = random_params(), random_tokens(3, 24), (24, 13, 3)


def positions(tier, b):
    return [{int(p) for p in head if p >= 0} for head in np.asarray(tier.pos)[b]]


@pytest.mark.parametrize("calls", [CALLS["decode"], CALLS["short prompt"]], ids=["decode", "short prompt"])
def test_a_tier_of_the_newest_above_h2o_is_h2o_of_both(calls):
    prompts, rest = calls
    q, k, v = streams(len(prompts), max(prompts) + sum(rest), seed=4)
    two = run_kvjax(demote(recency(), policies.h2o(6, window=5), budget=4), q, k, v, prompts, rest)
    one = run_kvjax(policies.h2o(10, window=5), q, k, v, prompts, rest)
    for (got, layer), (want, plain) in zip(two, one, strict=True):
        for b, prompt in enumerate(prompts):
            width = prompt if want.shape[1] > 1 else 1
            assert_allclose(got[b, :width], want[b, :width], atol=1e-5)
            for upper, lower, both in zip(
                positions(layer, b), positions(layer.low, b), positions(plain, b), strict=True
            ):
                assert not upper & lower and upper | lower == both


def test_tiers_part_the_tokens_and_nothing_comes_back():
    policy = policies.mikv(0.4, low_bits=4, group=4)
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, room=12)
    below = None
    for step, token in enumerate(random_tokens(3, 12, seed=8).T):
        _, cache = kvjax.step(PARAMS, policy, token, cache)
        layer = cache.layers[0]
        for b, length in enumerate(LENGTHS):
            seen = length + step + 1
            for upper, lower in zip(positions(layer, b), positions(layer.low, b), strict=True):
                assert not upper & lower and upper | lower == set(range(seen))
                assert len(upper) == 2 * seen // 5
        now = [positions(layer.low, b) for b in range(3)]
        for old, new in zip(below or now, now, strict=True):
            assert all(before <= after for before, after in zip(old, new, strict=True))
        below = now


def test_thin_keys_are_the_whole_ones_without_the_channels_that_were_not_chosen():
    _, full = kvjax.prefill(PARAMS, policies.full(), TOKENS)
    _, cache = kvjax.prefill(PARAMS, policies.think(4, recent=6), TOKENS)
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert layer.low.k.shape == (3, CONFIG.kv_heads, 19, 4)
        channels = layer.low.fitted[1]
        assert_array_equal(layer.low.pos[..., :18], jnp.broadcast_to(jnp.arange(18), (3, CONFIG.kv_heads, 18)))
        want = jnp.take_along_axis(whole.k[:, :, :18], channels[:, :, None], axis=-1)
        assert_allclose(layer.low.k[:, :, :18], want, atol=1e-6)
        assert_allclose(layer.low.v[:, :, :18], whole.v[:, :, :18], atol=1e-6)


def test_think_over_an_evicting_policy_is_bounded():
    policy = policies.think(4, recent=4, tokens=policies.h2o(6, window=5))
    sizes = {kvjax.nbytes(kvjax.prefill(PARAMS, policy, random_tokens(3, n))[1]) for n in (9, 24, 60)}
    assert len(sizes) == 1
    out = kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, max_new_tokens=8)
    assert np.isfinite(out.logits).all()
    assert kvjax.nbytes(out.cache) in sizes


def test_the_worked_lengths_of_kivi():
    rounded = []
    policy = kivi(8, group=4, residual=4)
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS[:1, :6], room=3)
    for token in (None, 1, 2, 3):
        if token is not None:
            _, cache = kvjax.step(PARAMS, policy, jnp.asarray([token]), cache)
        carry = cache.layers[0].carry
        rounded.append((int(carry["rounded_keys"][0]), int(carry["rounded_values"][0])))
    assert rounded == [(4, 2), (4, 3), (8, 4), (8, 5)]


def test_the_worked_keys_of_kivi():
    k = jnp.asarray([[1, 10, 0.2, -0.3], [1.5, 12, 0.1, 0.4], [2.5, 10.5, -0.2, 0.3], [4, 13, 0.3, 0.1]])
    codec = codecs.integer(2, group=4)
    by_channel = codecs.by_channel(codec, 4)
    back = by_channel.load(by_channel.store(k[None, None]))[0, 0]
    assert_array_equal(back[:, :2], [[1, 10], [1, 12], [3, 10], [4, 13]])  # 0.5 and 1.5 both round to even
    assert_allclose(jnp.abs(back - k).mean(), 0.110417, atol=1e-6)
    assert_allclose(jnp.abs(codec.load(codec.store(k[None, None]))[0, 0] - k).mean(), 0.341977, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_channels_come_back_within_half_a_step(bits):
    x = np.random.default_rng(0).standard_normal((1, 2, 75, 32)).astype(np.float32)
    by_channel = codecs.by_channel(codecs.integer(bits, group=16), 32)
    tree = by_channel.store(jnp.asarray(x))
    assert {leaf.shape[:3] for leaf in jax.tree.leaves(tree)} == {(1, 2, 75)}
    assert kvjax.nbytes(tree) == 2 * 75 * (32 * bits // 8 + 4 * 32 // 16)
    back = np.asarray(by_channel.load(tree))[:, :, :64].reshape(1, 2, 4, 16, 32)  # whole blocks
    groups = x[:, :, :64].reshape(back.shape)
    step = (groups.max(axis=3) - groups.min(axis=3)) / (2**bits - 1)
    bound = step / 2 * (1 + 2**-10) + 3 * 2**-11 * np.abs(groups).max(axis=3)
    assert (np.abs(back - groups) <= bound[:, :, :, None]).all()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: demote(recency(), policies.ems(10, window=3), budget=4), "cannot take the losers"),
        (lambda: demote(recency(), policies.streaming_llm(10), budget=4), "cannot take the losers"),
        (lambda: demote(recency(), policies.think(4), budget=4), "cannot take the losers"),
        (lambda: demote(recency(), policies.kivi(), budget=4), "cannot take the losers"),
        (lambda: policies.think(4, tokens=policies.kvmerger(10, window=3, heavy=2)), "cannot take the losers"),
        (lambda: policies.think(4, recent=0), "recent=0 must be at least 1"),
        (lambda: policies.think(0), "keep=0"),
        (lambda: policies.think(4, window=0), "window=0"),
        (lambda: kvjax.prefill(PARAMS, policies.think(CONFIG.head_dim), TOKENS), "prunes nothing of 8 channels"),
        (lambda: kvjax.prefill(PARAMS, policies.think(4), TOKENS, chunk=8), "must see a prompt whole"),
        (lambda: policies.mikv(1.5), "ratio=1.5"),
        (lambda: policies.mikv(float("nan")), "ratio=nan"),
        (lambda: policies.mikv(heavy=-0.1), "heavy=-0.1"),
        (lambda: policies.mikv(low_bits=5), "bits=5"),
        (lambda: policies.mikv(low_bits=8, high_bits=4), "no fewer than low_bits=8"),
        (lambda: kvjax.prefill(PARAMS, policies.mikv(group=3), TOKENS), "group=3 does not divide"),
        (lambda: store(policies.mikv(), keys=codecs.prune_channels(4)), "has a lower tier"),
        (lambda: policies.kivi(5), "bits=5"),
        (lambda: policies.kivi(residual=100), "residual=100 must be a multiple of group=32"),
        (lambda: policies.kivi(2, group=4, residual=4), "fill words of 32 bits"),
        (lambda: kvjax.prefill(PARAMS, policies.kivi(), TOKENS), "head_dim=8 must be a multiple of group=32"),
        (lambda: store(policies.kivi(), keys=codecs.integer(8)), "has a form of its own"),
    ],
)
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "policy", [policies.think(4, recent=4), policies.mikv(0.5, group=4), policies.kivi(4, group=4, residual=8)]
)
def test_a_step_without_room_is_refused_and_changes_nothing(policy):
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS)
    with pytest.raises(ValueError, match="Leave room"):
        for token in random_tokens(3, 3).T:
            _, cache = kvjax.step(PARAMS, policy, token, cache)


def test_masses_of_both_tiers_add_up_to_the_queries():
    policy = demote(attention_mass(), policies.h2o(20, window=5), budget=8)
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS)
    for token in random_tokens(3, 3).T:
        _, cache = kvjax.step(PARAMS, policy, token, cache)
    for layer in cache.layers:
        total = sum(jnp.where(tier.pos >= 0, tier.stats["mass"], 0.0).sum(axis=-1) for tier in layer.tiers)
        assert_allclose(total, 27, atol=1e-3)  # nothing was evicted
