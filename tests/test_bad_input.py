"""What a caller gets wrong is a ValueError that names it, before anything is computed or lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import policies
from kvjax.cache import LayerShape
from kvjax.policy import Mass, Scorer, evict
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS, TOKENS = random_params(), random_tokens(3, 24)
FULL, H2O, STREAMING = policies.full(), policies.h2o(10, window=4), policies.streaming_llm(10, sinks=2)


def refuses(match):
    return pytest.raises(ValueError, match=match)


def cases(names, table):
    """Runs a test once for each row of `table`, under the name of the row."""
    return pytest.mark.parametrize(names, table.values(), ids=table)


def with_id(value, row=1, at=5):
    return TOKENS.at[row, at].set(value)


# Policies.


@cases(
    "make, match",
    {
        "window as long as the budget": (lambda: policies.h2o(8, window=8), r"h2o: window=8 is outside 1\.\.7"),
        "no window": (lambda: policies.h2o(8, window=0), r"h2o: window=0 is outside 1\.\.7"),
        "snapkv's window": (lambda: policies.snapkv(64), r"snapkv: window=64 is outside 1\.\.63"),
        "even pool": (lambda: policies.snapkv(65, pool=4), "snapkv: pool=4"),
        "negative pool": (lambda: policies.snapkv(65, pool=-1), "snapkv: pool=-1"),
        "sinks as many as the budget": (lambda: policies.streaming_llm(4), r"sinks=4 is outside 0\.\.3"),
        "negative sinks": (lambda: policies.streaming_llm(8, sinks=-1), r"sinks=-1 is outside 0\.\.7"),
        "tova without a slot": (lambda: policies.tova(0), "tova: budget=0"),
        "keydiff without a slot": (lambda: policies.keydiff(-3), "keydiff: budget=-3"),
        "random without a slot": (lambda: policies.random(0), "random: budget=0"),
        "a seed beyond 32 bits": (lambda: policies.random(8, seed=-1), "seed=-1"),
        "a budget of half a slot": (lambda: policies.keydiff(8.5), r"budget=8\.5"),
    },
)
def test_settings_of_a_policy(make, match):
    with refuses(match):
        make()


def test_a_whole_number_that_is_a_float_does_not_spoil_the_policy_for_the_integer():
    try:
        policies.tova(11.0)
    except ValueError:
        pass
    logits, _ = kvjax.prefill(PARAMS, policies.tova(11), TOKENS)
    assert np.isfinite(logits).all()


# Prompts.


@cases(
    "tokens, settings, match",
    {
        "id beyond the vocabulary": (with_id(61), {}, r"tokens\[1, 5\]=61 is outside 0\.\.60"),
        "negative id": (with_id(-1), {}, r"tokens\[1, 5\]=-1 is outside 0\.\.60"),
        "floats": (TOKENS.astype(jnp.float32), {}, r"float32\[3, 24\]"),
        "booleans": (TOKENS > 3, {}, r"bool\[3, 24\]"),
        "one row without its batch": (TOKENS[0], {}, r"int32\[24\]"),
        "no token": (TOKENS[:, :0], {}, r"\(3, 0\).*empty"),
        "no row": (TOKENS[:0], {}, r"\(0, 24\).*empty"),
        "length beyond T": (TOKENS, {"lengths": (24, 25, 1)}, r"lengths\[1\]=25 is outside 1\.\.24"),
        "length 0": (TOKENS, {"lengths": (24, 24, 0)}, r"lengths\[2\]=0 is outside 1\.\.24"),
        "negative length": (TOKENS, {"lengths": (-1, 24, 24)}, r"lengths\[0\]=-1"),
        "lengths of another batch": (TOKENS, {"lengths": (24, 24)}, r"lengths have shape \(2,\)"),
        "one length": (TOKENS, {"lengths": 24}, r"lengths have shape \(\)"),
        "lengths that are not whole": (TOKENS, {"lengths": (3.7, 2.0, 1.0)}, "lengths"),
        "beyond the context": (random_tokens(3, 257), {}, "position 256 is beyond the model's context of 256"),
        "room beyond the context": (TOKENS, {"room": 233}, "position 256 is beyond"),
        "chunk 0": (TOKENS, {"chunk": 0}, "chunk=0"),
        "negative chunk": (TOKENS, {"chunk": -4}, "chunk=-4"),
        "negative room": (TOKENS, {"room": -1}, "room=-1"),
        "half a chunk": (TOKENS, {"chunk": 2.5}, r"chunk=2\.5 must be a whole number"),
        "half a room": (TOKENS, {"room": 0.5}, r"room=0\.5 must be a whole number"),
        "lists of different lengths": ([[1, 2, 3], [4]], {}, "tokens has rows of different lengths"),
        "a length that would wrap": (TOKENS, {"lengths": [2**32 + 4, 24, 24]}, r"lengths\[0\]=4294967300 is outside"),
    },
)
def test_arguments_of_prefill(tokens, settings, match):
    with refuses(match):
        kvjax.prefill(PARAMS, H2O, tokens, **settings)


def test_lists_are_as_good_as_arrays():
    want, _ = kvjax.prefill(PARAMS, H2O, TOKENS)
    got, _ = kvjax.prefill(PARAMS, H2O, np.asarray(TOKENS).tolist())
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("policy", [None, "h2o", policies.h2o], ids=["None", "name", "function"])
def test_a_policy_that_is_none(policy):
    _, cache = kvjax.prefill(PARAMS, H2O, TOKENS)
    with refuses("is no policy. Make one with kvjax.policies"):
        kvjax.prefill(PARAMS, policy, TOKENS)
    with refuses("is no policy"):
        kvjax.decode(PARAMS, policy, TOKENS, max_new_tokens=1)
    with refuses("is no policy"):
        kvjax.step(PARAMS, policy, TOKENS[:, 0], cache)


def test_arguments_that_are_something_else():
    logits, cache = kvjax.prefill(PARAMS, H2O, TOKENS)
    for wrong in (None, CONFIG):
        with refuses("pass model.params"):
            kvjax.decode(wrong, H2O, TOKENS, max_new_tokens=1)
    for wrong in ((logits, cache), cache.layers[0]):
        with refuses("must be a kvjax.Cache"):
            kvjax.step(PARAMS, H2O, TOKENS[:, 0], wrong)
        with refuses("must be a kvjax.Cache"):
            kvjax.report(wrong)
    with refuses("tokens=-3 must be at least 0"):
        kvjax.empty_cache(PARAMS, H2O, 2, tokens=-3)
    for settings in ({"temperature": "1"}, {"temperature": 1.0, "top_p": "x"}, {"temperature": 1.0, "key": 2**70}):
        with refuses("sampling: "):
            kvjax.decode(PARAMS, H2O, TOKENS, max_new_tokens=1, **settings)
    with refuses("source=3 must be"):
        kvjax.load(3)


def test_heads_that_are_no_dictionary():
    with refuses("with_heads: heads=3 must be a dictionary"):
        kvjax.with_heads(PARAMS, 3)
    with refuses(r"heads\['locret'\] has a int, and must be a sequence of one head for each of the model's 2 layers"):
        kvjax.with_heads(PARAMS, {"locret": 3})


def test_a_token_without_a_slot_is_refused_and_under_jit_is_nan():
    _, cache = kvjax.prefill(PARAMS, FULL, TOKENS, lengths=(24, 23, 24))
    with refuses("all 24 slots are taken"):
        kvjax.step(PARAMS, FULL, TOKENS[:, 0], cache)
    logits, _ = jax.jit(kvjax.step)(PARAMS, FULL, TOKENS[:, 0], cache)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all() and np.isnan(logits[2]).all()
    stopped, _ = jax.jit(kvjax.step)(PARAMS, FULL, jnp.array([-1, 3, -1]), cache)
    assert np.isfinite(stopped).all()
    layer = cache.layers[0]
    q = jnp.ones((3, 1, CONFIG.q_heads, CONFIG.head_dim))
    k = jnp.ones((3, 1, CONFIG.kv_heads, CONFIG.head_dim))
    with refuses("attend: all 24 slots of a row hold tokens"):
        kvjax.attend(q, k, k, layer, FULL, positions=jnp.full((3, 1), 24))


def test_padding_is_neither_checked_for_ids_nor_for_the_context():
    tokens = jnp.full((3, 300), 10**6, jnp.int32).at[:, :4].set(TOKENS[:, :4])
    logits, _ = kvjax.prefill(PARAMS, H2O, tokens, lengths=(4, 3, 4))
    assert np.isfinite(logits).all()


def test_a_second_turn_beyond_the_context():
    _, cache = kvjax.prefill(PARAMS, H2O, random_tokens(1, 250))
    with refuses("position 256 is beyond"):
        kvjax.prefill(PARAMS, H2O, random_tokens(1, 7), cache=cache)


def test_streaming_beyond_the_context_is_allowed_as_far_as_it_numbers_tokens_anew():
    long = random_tokens(1, 300)
    with refuses("context of 256.*chunk"):
        kvjax.prefill(PARAMS, STREAMING, long)
    logits, _ = kvjax.prefill(PARAMS, STREAMING, long, chunk=32)
    assert np.isfinite(logits).all()


def test_streaming_with_a_budget_beyond_the_context():
    with refuses("context of 256"):
        kvjax.decode(PARAMS, policies.streaming_llm(1000), TOKENS, max_new_tokens=300)


# Caches.


def small_cache(policy=H2O, params=PARAMS, batch=3, tokens=0):
    return kvjax.empty_cache(params, policy, batch, tokens=tokens)


@cases(
    "cache, match",
    {
        "another model": (
            small_cache(params=random_params(dataclasses.replace(CONFIG, layers=1))),
            "cache was made for .*layers=1.* this model is .*layers=2",
        ),
        "another batch": (small_cache(batch=2), "cache holds 2 rows and tokens have 3"),
        "another policy": (
            small_cache(STREAMING),
            r"made by streaming_llm\(budget=10, sinks=2\).* given is h2o\(budget=10, window=4\)",
        ),
        "another budget": (small_cache(policies.h2o(11, window=4)), "budget=11.*budget=10"),
        "another dtype": (small_cache(params=random_params(dtype=jnp.bfloat16)), "bfloat16.*float32"),
    },
)
@pytest.mark.parametrize("call", ["prefill", "step", "decode"])
def test_a_cache_that_was_made_for_something_else(call, cache, match):
    with refuses(match):
        match call:
            case "prefill":
                kvjax.prefill(PARAMS, H2O, TOKENS, cache=cache)
            case "step":
                kvjax.step(PARAMS, H2O, TOKENS[:, 0], cache)
            case "decode":
                kvjax.decode(PARAMS, H2O, TOKENS, cache=cache, max_new_tokens=1)


@cases(
    "token, match",
    {
        "two tokens a row": (TOKENS[:, :2], r"token has shape \(3, 2\)"),
        "one number": (TOKENS[0, 0], r"token has shape \(\)"),
        "floats": (TOKENS[:, 0].astype(jnp.float32), "float32"),
        "id beyond the vocabulary": (jnp.asarray([1, 61, 1]), "61 is outside"),
    },
)
def test_arguments_of_step(token, match):
    with refuses(match):
        kvjax.step(PARAMS, H2O, token, small_cache())


@pytest.mark.parametrize("tokens", [0, 4])
def test_a_step_into_a_full_cache_without_room(tokens):
    cache = small_cache(FULL)
    if tokens:
        _, cache = kvjax.prefill(PARAMS, FULL, TOKENS[:, :tokens])
    with refuses(f"all {tokens} slots are taken.*room="):
        kvjax.step(PARAMS, FULL, TOKENS[:, 0], cache)


def test_a_step_beyond_the_context():
    _, cache = kvjax.prefill(PARAMS, H2O, random_tokens(1, 256))
    with refuses("position 256 is beyond"):
        kvjax.step(PARAMS, H2O, TOKENS[0, :1], cache)


# Decoding.


@cases(
    "settings, match",
    {
        "nothing to say": ({"max_new_tokens": 0}, "max_new_tokens=0"),
        "less than nothing": ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        "beyond the context": ({"max_new_tokens": 233}, "position 256 is beyond"),
        "half a token": ({"max_new_tokens": 1.5}, r"max_new_tokens=1\.5 must be a whole number"),
        "half a top_k": ({"temperature": 1.0, "top_k": 2.5}, r"top_k=2\.5 must be a whole number"),
        "a stop token beyond the vocabulary": ({"stop": (3, 61)}, r"stop=\(3, 61\): 61 is outside 0\.\.60"),
        "negative temperature": ({"temperature": -0.1}, r"temperature=-0\.1"),
        "nan": ({"temperature": float("nan")}, "temperature=nan"),
        "top_k 0": ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        "top_p 0": ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0"),
        "top_p above 1": ({"temperature": 1.0, "top_p": 1.1}, r"top_p=1\.1"),
        "top_k without a temperature": ({"top_k": 5}, "no effect at temperature=0"),
        "top_p without a temperature": ({"top_p": 0.5}, "no effect at temperature=0"),
        "keys of another batch": ({"key": jax.random.split(jax.random.key(0), 2)}, r"key has shape \(2,\)"),
        "a key that is none": ({"key": 0.5}, "key"),
        "a stop token that is not in a sequence": ({"stop": 3}, "stop"),
    },
)
def test_settings_of_decode(settings, match):
    with refuses(match):
        kvjax.decode(PARAMS, H2O, TOKENS, **({"max_new_tokens": 1} | settings))


def test_a_seed_may_be_an_integer_of_numpy():
    got, want = (
        kvjax.decode(PARAMS, H2O, TOKENS, max_new_tokens=2, temperature=1.0, key=key).tokens for key in (np.int64(3), 3)
    )
    np.testing.assert_array_equal(got, want)


def test_tokens_cannot_be_had_one_by_one_under_jit():
    with refuses("on_token cannot be called from within jit"):
        jax.jit(lambda t: kvjax.decode(PARAMS, H2O, t, max_new_tokens=2, on_token=print))(TOKENS)


def test_shapes_are_checked_under_jit_as_well():
    for tokens, lengths in ((TOKENS[0], None), (TOKENS, jnp.ones(2, jnp.int32))):
        with refuses("tokens"):
            jax.jit(lambda t, n: kvjax.prefill(PARAMS, H2O, t, lengths=n))(tokens, lengths)


# Attention for other people's models.


def pieces(count=4, q_heads=4, kv_heads=2, dim=8, batch=2, dtype=jnp.float32):
    def ones(heads):
        return jnp.ones((batch, count, heads, dim), dtype)

    return {
        "q": ones(q_heads),
        "k": ones(kv_heads),
        "v": ones(kv_heads),
        "positions": jnp.tile(jnp.arange(count), (batch, 1)),
    }


def layer(policy, batch=2, kv_heads=2, slots=11, dim=8, dtype=jnp.float32):
    return policy.empty(LayerShape(batch, kv_heads, slots, dim, dtype, 0))


@cases(
    "changes, match",
    {
        "q_heads that kv_heads do not divide": (
            pieces(q_heads=3),
            "q has 3 heads and k has 2; q_heads must be a multiple of kv_heads",
        ),
        "no kv_heads": (pieces(kv_heads=0), "0"),
        "k and v apart": ({"v": jnp.ones((2, 4, 1, 8))}, r"k \(2, 4, 2, 8\) and v \(2, 4, 1, 8\)"),
        "k of another length": ({"k": jnp.ones((2, 5, 2, 8)), "v": jnp.ones((2, 5, 2, 8))}, r"k \(2, 5, 2, 8\)"),
        "k of another width": ({"k": jnp.ones((2, 4, 2, 6)), "v": jnp.ones((2, 4, 2, 6))}, r"k \(2, 4, 2, 6\)"),
        "q without its batch": ({"q": jnp.ones((4, 4, 8))}, r"q \(4, 4, 8\)"),
        "k without its heads": ({"k": jnp.ones((2, 4, 8)), "v": jnp.ones((2, 4, 8))}, r"k \(2, 4, 8\)"),
        "positions that are floats": ({"positions": jnp.zeros((2, 4))}, "positions are float32"),
        "positions of one row": ({"positions": jnp.arange(4)}, r"positions have shape \(4,\)"),
        "a cache of another batch": (
            {"cache": layer(H2O, batch=3)},
            r"= \[3, 2, 11\], and k of this call",
        ),
        "a cache of another model": ({"cache": layer(H2O, kv_heads=1)}, r"float32 keys in .* = \[2, 1, 11\]"),
        "a cache of another dtype": ({"cache": layer(H2O, dtype=jnp.bfloat16)}, "holds bfloat16 keys .* float32"),
        "a cache of another policy": ({"cache": layer(STREAMING)}, r"made by streaming_llm.* given is h2o"),
        "a cache of another budget": ({"cache": layer(policies.h2o(5, window=4), slots=6)}, r"made by h2o\(budget=5"),
        "a sliding window of nothing": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        "values of another dtype": ({"v": pieces()["v"].astype(jnp.bfloat16)}, "float32, float32 and bfloat16"),
        "no token": (pieces(count=0), "without a token"),
        "no rope for positions given anew": ({"policy": STREAMING, "rope": None}, "streaming_llm.*rope=kvjax.Rope"),
        "too little capacity for all tokens": ({"policy": FULL, "capacity": 3}, "capacity=3"),
        "capacity that leaves no free slot": ({"capacity": 10}, "capacity=10"),
    },
)
def test_arguments_of_attend(changes, match):
    arguments = pieces() | {"cache": None, "policy": H2O, "rope": kvjax.Rope()} | changes
    with refuses(match):
        kvjax.attend(**arguments)


def test_a_policy_that_reads_a_statistic_it_did_not_ask_for():
    scorer = Scorer(frozenset(), {}, lambda cache, seen: cache.stats, lambda cache, seen: seen.mass[Mass(last=3)])
    with refuses(r"Mass\(last=3\)"):
        kvjax.prefill(PARAMS, evict(scorer, budget=10), TOKENS)
