"""Caches whose keys and values are stored in another form: outputs, real bytes, composition with every method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import codecs, policies, tasks
from kvjax.policy import store
from tests.methods import POLICIES, kept_positions
from tests.oracles import quantiser
from tests.plain import smollm2
from tests.tiny import CONFIG, random_params, random_tokens

config = dataclasses.replace(CONFIG, head_dim=16, layers=1)
PARAMS, TOKENS, LENGTHS = random_params(config), random_tokens(3, 24), (24, 13, 3)
INT8, INT4 = codecs.integer(8, group=8), codecs.integer(4, group=8)
PRUNED = codecs.pipe(codecs.prune_channels(8), INT4)
BALANCED = codecs.pipe(codecs.balance(), INT4)
FORMS = {
    "int8": {"keys": INT8, "values": INT8},
    "balanced int4": {"keys": BALANCED, "values": INT4},
    "pruned": {"keys": codecs.prune_channels(8)},
    "pruned int4": {"keys": PRUNED, "values": INT4},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def run(policy, q, k, v, counts):
    """Outputs of `attend` for one row, call by call; q is [n, Hq, D], k and v are [n, H, D], not rotated."""
    cache, at, outs = None, 0, []
    for count in counts:
        piece = [jnp.asarray(x[None, at : at + count], jnp.float32) for x in (q, k, v)]
        out, cache = kvjax.attend(*piece, cache, policy, positions=at + jnp.arange(count)[None], capacity=len(q))
        outs.append(np.asarray(out[0]))
        at += count
    return np.concatenate(outs), cache


def expected(q, k, v, counts, keys, values, query):
    """The same in float64: a prompt is exact, later tokens meet what `keys` and `values` make of all tokens."""
    outs, first = [], counts[0]
    group = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        for h in range(q.shape[1]):
            mine = k[: t + 1, h // group], v[: t + 1, h // group]
            exact = t < first
            rows = mine[0] if exact else np.stack([keys(row, h // group) for row in mine[0]])
            logits = rows @ (q[t, h] if exact else query(q[t, h], h // group)) / np.sqrt(q.shape[2])
            p = np.exp(logits - logits.max())
            outs.append(p / p.sum() @ (mine[1] if exact else np.stack([values(row) for row in mine[1]])))
    return np.reshape(outs, q.shape)


def streams(n=14, seed=0):
    rng = np.random.default_rng(seed)
    return (np.float32(rng.standard_normal((n, heads, 16))) for heads in (4, 2, 2))


def test_integers_are_what_attention_reads():
    q, k, v = streams()
    got, _ = run(store(policies.full(), keys=INT8, values=INT4), q, k, v, [9, 1, 1, 1, 1, 1])
    want = expected(
        q, k, v, [9], lambda row, h: quantiser.rounded(row, 8, 8), lambda row: quantiser.rounded(row, 4, 8),
        lambda row, h: row,
    )  # fmt: skip
    assert_allclose(got, want, atol=1e-5)


def test_balanced_integers_are_what_attention_reads():
    q, k, v = streams(seed=1)
    got, _ = run(store(policies.full(), keys=BALANCED), q, k, v, [9, 1, 1, 1, 1, 1])
    scale = [quantiser.balancer(q[:9, 2 * h : 2 * h + 2], k[:9, h]) for h in range(2)]
    want = expected(
        q, k, v, [9], lambda row, h: quantiser.rounded(row * scale[h], 4, 8), lambda row: row,
        lambda row, h: row / scale[h],
    )  # fmt: skip
    assert_allclose(got, want, atol=1e-5)


def test_pruned_keys_are_what_zeroed_channels_would_be():
    q, k, v = streams(seed=2)
    got, cache = run(store(policies.full(), keys=codecs.prune_channels(8, window=4)), q, k, v, [9, 1, 1, 1, 1, 1])
    assert cache.k.shape[-1] == 8

    def channels(h):
        score = (q[5:9, 2 * h : 2 * h + 2] ** 2).mean(axis=(0, 1)) * (k[:9, h] ** 2).mean(axis=0)
        return np.argsort(-score)[:8]

    def zeroed(row, h):
        return np.where(np.isin(np.arange(16), channels(h)), row, 0.0)

    assert_allclose(got, expected(q, k, v, [9], zeroed, lambda row: row, lambda row, h: row), atol=1e-5)


# Every other form for each method, the first and third or the second and fourth, since each is a program to compile.
SOME = [(name, form) for i, name in enumerate(POLICIES) for form in list(FORMS)[i % 2 :: 2]]


@pytest.mark.parametrize("name, form", SOME, ids=["-".join(pair) for pair in SOME])
def test_every_method_keeps_the_same_prompt_in_other_forms(name, form):
    form = FORMS[form]
    policy = POLICIES[name].make(10)
    if policy.ranks is not None and form["keys"].query is not None:
        with pytest.raises(ValueError, match="which cannot be turned"):
            store(policy, **form)
        return
    below = () if policy.low is None else (policy.low.keys, policy.low.values)
    if policy.form is not None or None in below or (below and form["keys"].narrows):
        with pytest.raises(ValueError, match="has a form of its own|has a lower tier"):
            store(policy, **form)
        return
    _, plain = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, room=5)
    smaller = store(policy, **form)
    logits, cache = kvjax.prefill(PARAMS, smaller, TOKENS, lengths=LENGTHS, room=5)
    assert [kept_positions(cache.layers[0], b) for b in range(3)] == [
        kept_positions(plain.layers[0], b) for b in range(3)
    ]
    out = kvjax.decode(PARAMS, smaller, TOKENS[:, :3], cache=cache, max_new_tokens=2)
    assert np.isfinite(out.logits).all()


@every_form
def test_rows_do_not_affect_one_another(form):
    policy = store(policies.h2o(10, window=4), **form)
    want, _ = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS)
    out = kvjax.decode(PARAMS, policy, TOKENS, lengths=LENGTHS, max_new_tokens=4)
    for b, length in enumerate(LENGTHS):
        alone = kvjax.decode(PARAMS, policy, TOKENS[b : b + 1, :length], max_new_tokens=4)
        assert_array_equal(alone.tokens[0], out.tokens[b])
        assert_allclose(alone.logits[0], out.logits[b], atol=1e-4)


@every_form
def test_chunks_and_turns_are_stored_like_one_another(form):
    policy = store(policies.h2o(10, window=4), **form)
    want, whole = kvjax.prefill(PARAMS, policy, TOKENS, chunk=8)
    assert {layer.slots for layer in whole.layers} == {11}
    assert jax.tree.structure(whole) == jax.tree.structure(kvjax.prefill(PARAMS, policy, TOKENS)[1])
    assert np.isfinite(want).all()


@every_form
def test_a_prompt_is_attended_to_exactly_also_in_a_cache_that_was_allocated_before(form):
    policy = store(policies.h2o(30, window=4), **form)
    want, _ = kvjax.prefill(PARAMS, policies.full(), TOKENS)
    for cache in (None, kvjax.empty_cache(PARAMS, policy, 3), kvjax.empty_cache(PARAMS, policy, 3, tokens=24)):
        got, _ = kvjax.prefill(PARAMS, policy, TOKENS, cache=cache)
        assert_allclose(got, want, atol=1e-4)


def test_a_first_chunk_chooses_channels_as_a_prompt_of_its_own_does():
    policy = store(policies.h2o(10, window=4), keys=codecs.prune_channels(4))
    want, first = kvjax.prefill(PARAMS, policy, TOKENS[:, :8])
    want, turns = kvjax.prefill(PARAMS, policy, TOKENS[:, 8:16], cache=first)
    got, chunks = kvjax.prefill(PARAMS, policy, TOKENS[:, :16], chunk=8)
    assert_allclose(got, want, atol=1e-4)
    for one, other in zip(chunks.layers, turns.layers, strict=True):
        assert_array_equal(one.fitted[1], other.fitted[1])


def test_a_step_is_traced_once_and_aliases_the_cache():
    policy = store(policies.h2o(10, window=4), **FORMS["pruned int4"])
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS)
    step = jax.jit(lambda *args: kvjax.step(*args), donate_argnums=3)  # jit of the function itself shares its programs
    memory = step.lower(PARAMS, policy, TOKENS[:, 0], cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kvjax.nbytes(cache)
    for token in random_tokens(3, 4).T:
        logits, cache = step(PARAMS, policy, token, cache)
    assert step._cache_size() == 1 and np.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_are_those_of_the_parts(dtype):
    params = random_params(config, dtype=dtype)
    policy = store(policies.h2o(10, window=4), keys=PRUNED, values=INT4)
    _, cache = kvjax.prefill(params, policy, TOKENS)
    key, value = 8 * 4 // 8 + 4 * 8 // 8, 16 * 4 // 8 + 4 * 16 // 8
    per_layer = config.kv_heads * 3 * (11 * (key + value + 8) + 4 * 8) + 3  # pos, mass; channels, and `begun`
    assert kvjax.nbytes(cache) == config.layers * per_layer + 4 * 3
    report = kvjax.report(cache)
    assert report.total == kvjax.nbytes(cache) == sum(report.by_kind.values())
    assert report.full == kvjax.report(kvjax.prefill(params, policies.full(), TOKENS)[1]).total


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: store(policies.full()), "give a codec"),
        (lambda: store("h2o", keys=INT4), "is no policy"),
        (lambda: store(policies.full(), values=codecs.prune_channels(4)), "no query to make up for it"),
        (lambda: store(store(policies.full(), keys=INT4), values=INT4), "already has codecs"),
        (lambda: kvjax.prefill(PARAMS, store(policies.full(), keys=codecs.integer(4, group=32)), TOKENS), "group=32"),
        (lambda: kvjax.prefill(PARAMS, store(policies.full(), keys=codecs.prune_channels(16)), TOKENS), "16 channels"),
    ],
)
def test_what_cannot_be_stored_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.real_model
def test_evict_merge_prune_and_quantise_in_one_policy_under_four_percent_still_answer():
    model = smollm2()
    policy = store(
        policies.d2o(380, window=190),
        keys=codecs.pipe(codecs.pipe(codecs.prune_channels(48), codecs.balance()), codecs.integer(4, group=16)),
        values=codecs.integer(4),
    )
    text = " ".join(tasks.prose())[:8200] + "\n\nThat was the text. Now a question: What is the capital of France?"
    tokens, lengths = model.encode([model.chat(text)], add_special_tokens=False)
    assert lengths[0] > 1600
    out = kvjax.decode(model.params, policy, tokens, lengths=lengths, max_new_tokens=10, stop=model.stop_tokens)
    report = kvjax.report(out.cache)
    assert report.total < 0.04 * report.full
    assert "Paris" in model.decode(out.tokens[0, : out.lengths[0]])
