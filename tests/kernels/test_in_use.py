"""kvjax through the GPU's kernels, in Triton's interpreter: it does what it does without them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import kvjax
from kvjax import codecs, policies, store
from kvjax.cache import resize, take
from pallas_kernels.dispatch import compiling_for
from tests import tiny
from tests.methods import kept_positions
from tests.tiny import random_params, random_tokens

CONFIG = dataclasses.replace(tiny.CONFIG, layers=1)
PARAMS = random_params(CONFIG)
WAYS = {
    "full": policies.full(),
    "h2o": policies.h2o(8, window=3),  # masses of all queries, selection, writes
    "snapkv": policies.snapkv(8, window=4, pool=3),  # masses of the last queries
    "streaming_llm": policies.streaming_llm(8, sinks=2),  # positions anew
    "d2o": policies.d2o(8, window=3, sinks=1),  # folds a prompt
    "kvmerger": policies.kvmerger(8, window=2, heavy=2, every=2),  # runs, and a bias
    "elastic_cache": policies.elastic_cache(0.5, distance=2),
    "ems": policies.ems(8, window=3),  # two statistics at once
    "int4": store(policies.h2o(8, window=3), keys=codecs.integer(4, group=8), values=codecs.integer(8, group=8)),
    "pruned": store(policies.tova(8), keys=codecs.prune_channels(5)),
    "mikv": policies.mikv(0.4, low_bits=4, group=8),  # two tiers under one softmax
    "think": policies.think(4, recent=4),
}


def run(policy):
    """Logits and caches of an uneven prompt, a short turn and two steps, one of them without one of the rows."""
    tokens, turn = random_tokens(2, 20), random_tokens(2, 3, seed=1)
    out = [kvjax.prefill(PARAMS, policy, tokens, lengths=(20, 18), room=8)]
    out.append(kvjax.prefill(PARAMS, policy, turn, cache=out[-1][1], room=4))
    for token in ((5, 9), (-1, 3)):
        out.append(kvjax.step(PARAMS, policy, jnp.asarray(token, jnp.int32), out[-1][1]))
    return out


@pytest.mark.parametrize("name", WAYS)
def test_a_model_says_the_same_through_the_kernels(name):
    policy = WAYS[name]
    want = run(policy)
    with compiling_for("gpu"):
        got = run(policy)
    for i, ((logits, cache), (their_logits, their_cache)) in enumerate(zip(got, want, strict=True)):
        rows = slice(1, None) if i == 3 else slice(None)  # the first row has stopped, and its logits are arbitrary
        assert_allclose(logits[rows], their_logits[rows], atol=2e-4)  # sums in another order, and rounded codes
        for layer, theirs in zip(cache.layers, their_cache.layers, strict=True):
            for tier, their_tier in zip(layer.tiers, theirs.tiers, strict=True):
                assert [kept_positions(tier, b) for b in (0, 1)] == [kept_positions(their_tier, b) for b in (0, 1)]


@pytest.mark.parametrize("tokens", [5, 7])
@pytest.mark.parametrize("name", ["kvmerger", "d2o", "little pruned", "nothing pruned"])
def test_a_prompt_from_which_little_or_nothing_leaves_keeps_its_tokens(name, tokens):
    shares = {"little pruned": policies.elastic_cache(0.2, distance=2), "nothing pruned": policies.elastic_cache(0.0)}
    policy = shares.get(name) or WAYS[name]
    want, cache = kvjax.prefill(PARAMS, policy, random_tokens(1, tokens), room=4)
    with compiling_for("gpu"):
        got, held = kvjax.prefill(PARAMS, policy, random_tokens(1, tokens), room=4)
        again, _ = kvjax.step(PARAMS, policy, jnp.array([3], jnp.int32), held)
    assert kept_positions(held.layers[0], 0) == kept_positions(cache.layers[0], 0)
    assert_allclose(got, want, atol=1e-4)
    assert_allclose(again, kvjax.step(PARAMS, policy, jnp.array([3], jnp.int32), cache)[0], atol=1e-4)


def test_a_cache_that_is_cut_keeps_the_first_slots_as_without_kernels():
    _, cache = kvjax.prefill(PARAMS, policies.full(), random_tokens(1, 6))
    mixed = take(cache.layers[0], jnp.broadcast_to(jnp.array([4, 1, 5, 0, 2, 3]), (1, 2, 6)))
    with compiling_for("gpu"):
        assert resize(mixed, 2).pos.tolist() == [[[4, 1]] * 2]
        assert resize(mixed, 0).slots == 0
    assert resize(mixed, 2).pos.tolist() == [[[4, 1]] * 2]


def test_a_scale_of_numpy_changes_no_dtype():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 20, heads, 16)), jnp.bfloat16) for heads in (4, 2, 2))
    call = {"positions": jnp.arange(20)[None], "scale": np.float32(0.25)}
    want, _ = kvjax.attend(q, k, v, None, WAYS["h2o"], **call)
    with compiling_for("gpu"):
        got, _ = kvjax.attend(q, k, v, None, WAYS["h2o"], **call)
    assert got.dtype == want.dtype == jnp.bfloat16
    assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=3e-2)  # bf16 has 8 bits


def test_a_prompt_in_chunks_says_the_same_through_the_kernels():
    policy, tokens = policies.h2o(8, window=3), random_tokens(2, 40)
    want, _ = kvjax.prefill(PARAMS, policy, tokens, chunk=20)
    with compiling_for("gpu"):
        got, cache = kvjax.prefill(PARAMS, policy, tokens, chunk=20)
    assert_allclose(got, want, atol=1e-4)
    assert kvjax.nbytes(cache) == CONFIG.layers * 2 * CONFIG.kv_heads * 9 * (2 * CONFIG.head_dim * 4 + 8) + 8


def test_the_report_names_what_attends():
    _, cache = kvjax.prefill(PARAMS, WAYS["int4"], random_tokens(1, 12))
    assert kvjax.report(cache).attention == "reference: there are no kernels for cpu"
    three = store(policies.tova(4), keys=codecs.integer(3, group=8))
    _, without = kvjax.prefill(PARAMS, three, random_tokens(1, 12))
    with compiling_for("gpu"):
        assert kvjax.report(cache).attention.startswith("gpu")
        assert kvjax.report(without).attention == "reference in 1 of 1 layers, whose form no kernel reads; else gpu"
    assert "attention   reference" in str(kvjax.report(cache))


def test_attention_through_kernels_is_attention_without_for_other_statistics():
    from kvjax.attention import attend_slots
    from kvjax.policy import Mass

    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 2, 2, 3, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    )
    q_pos = jnp.asarray([[[6, 7, 8]], [[4, 5, -1]]], jnp.int32)
    k_pos = jnp.tile(jnp.asarray([3, -1, 0, 2, 1, 5, 6, 7, 8], jnp.int32), (2, 2, 1))
    needs = frozenset({Mass(), Mass(1), Mass(by_query_head=True), Mass(2, True)})
    want = attend_slots(q, k, v, q_pos, k_pos, needs=needs)
    with compiling_for("gpu"):
        got = attend_slots(q, k, v, q_pos, k_pos, needs=needs)
    assert_allclose(got.out, want.out, atol=1e-5)
    assert_allclose(got.lse, want.lse, atol=1e-5)
    for need in needs:
        assert_allclose(got.mass[need], want.mass[need], atol=1e-5)
