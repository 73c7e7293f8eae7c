"""What makes this a compression library, read off real buffers and programs: bytes, copies, what is compiled."""

import dataclasses
import gc
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import policies
from kvjax.policy import Mass, Scorer, evict
from tests.methods import POLICIES, bounded_methods, every_bounded_method, every_method
from tests.tiny import CONFIG, random_params, random_tokens

decoding = sys.modules["kvjax.decoding"]
PARAMS = random_params()
BUDGET = 10


def documented_bytes(
    policy: kvjax.Policy, *, config, batch: int, tokens: int, number: int, under: str = "Bytes"
) -> int:
    """The formula in a method's docstring, such as `L B H (budget + 1) (2 D b + 4) + 4 B`, with numbers put in."""
    method, settings = policy.name.split("(", 1)
    formula = re.search(rf"{under}: ([^,.]+)", inspect.getdoc(getattr(policies, method))).group(1)
    names = {
        "L": config.layers,
        "B": batch,
        "H": config.kv_heads,
        "D": config.head_dim,
        "b": number,
        "n": tokens,
    }
    defaults = {key: one.default for key, one in inspect.signature(getattr(policies, method)).parameters.items()}
    names |= defaults | {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)\b", settings)}
    names["group"] = names.get("group") or config.head_dim // 2
    return eval(re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", " ".join(formula.split())), names)


def kv_bytes(slots: int, *, config=CONFIG, batch: int) -> int:
    """Bytes of one layer's keys and values in f32."""
    return 2 * batch * config.kv_heads * slots * config.head_dim * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", POLICIES)
def test_nbytes_is_the_formula_in_the_docstring(method, dtype):
    policy, params = POLICIES[method].make(BUDGET), random_params(dtype=dtype)
    _, cache = jax.eval_shape(lambda: kvjax.prefill(params, policy, random_tokens(3, 24), lengths=(24, 13, 3)))
    size = jnp.dtype(dtype).itemsize
    assert kvjax.nbytes(cache) == documented_bytes(policy, config=CONFIG, batch=3, tokens=24, number=size)


@pytest.mark.parametrize("high_bits", [8, 4])
def test_nbytes_of_mikv_with_two_rounded_tiers_is_the_other_formula_in_its_docstring(high_bits):
    policy, tokens = policies.mikv(0.2, low_bits=4, high_bits=high_bits), random_tokens(3, 25)  # a fifth is whole
    _, cache = jax.eval_shape(lambda: kvjax.prefill(PARAMS, policy, tokens, lengths=(25, 13, 3)))
    documented = documented_bytes(policy, config=CONFIG, batch=3, tokens=25, number=4, under="Bytes at fewer")
    assert kvjax.nbytes(cache) == documented


@every_method
def test_report_accounts_for_every_byte(row):
    _, cache = kvjax.prefill(PARAMS, row.make(BUDGET), random_tokens(3, 24), lengths=(24, 13, 3))
    report = kvjax.report(cache)
    assert report.total == sum(report.by_kind.values()) == kvjax.nbytes(cache)


@every_bounded_method
def test_nbytes_of_a_bounded_cache_does_not_depend_on_the_prompt(row):
    policy = row.make(BUDGET)

    def size(count, chunk=None):
        tokens = jax.ShapeDtypeStruct((3, count), jnp.int32)
        return kvjax.nbytes(jax.eval_shape(lambda t: kvjax.prefill(PARAMS, policy, t, chunk=chunk)[1], tokens))

    assert {size(1), size(7), size(24), size(200), size(200, chunk=16)} == {
        kvjax.nbytes(kvjax.empty_cache(PARAMS, policy, 3))
    }


@pytest.fixture
def alive(monkeypatch):
    """Shapes of what is alive after each layer of a prefill, and (slots in, tokens, slots out) of its programs."""
    shapes, calls, layer = set(), [], decoding.run_layer
    gc.collect()
    before = jax.live_arrays()  # of other tests; held, so that no new array gets the id of an old one
    old = {id(array) for array in before}

    def spy(block, x, cache, *rest):
        x_out, cache_out = layer(block, x, cache, *rest)
        calls.append((0 if cache is None else cache.slots, x.shape[1], cache_out.slots))
        shapes.update(array.shape for array in jax.live_arrays() if id(array) not in old)
        return x_out, cache_out

    monkeypatch.setattr(decoding, "run_layer", spy)
    return shapes, calls


def slots_at(length, shapes):
    """Shapes [B, H, N, ...] of keys, values, positions or statistics with at least `length` slots."""
    return {shape for shape in shapes if len(shape) > 2 and shape[1] == CONFIG.kv_heads and shape[2] >= length}


def test_between_layers_the_slots_of_a_full_cache_are_seen_at_full_length(alive):
    shapes, _ = alive
    kvjax.prefill(PARAMS, policies.full(), random_tokens(3, 199))
    assert slots_at(199, shapes) == {(3, 2, 199), (3, 2, 199, 8)}  # so the tests below can fail


@every_bounded_method
def test_between_layers_a_prefill_holds_no_slots_at_full_length(row, alive):
    shapes, calls = alive
    kvjax.prefill(PARAMS, row.make(BUDGET), random_tokens(3, 199))
    assert len(calls) == CONFIG.layers  # each program sees one layer, and so one at most is at full length
    assert not slots_at(BUDGET + 2, shapes)


@every_bounded_method
def test_a_prefill_in_chunks_never_has_a_layer_at_full_length(row, alive):
    shapes, calls = alive
    kvjax.prefill(PARAMS, row.make(BUDGET), random_tokens(3, 199), chunk=16)
    assert len(calls) == CONFIG.layers * -(-199 // 16)
    assert set(calls) == {(BUDGET + 1, 16, BUDGET + 1)}  # a program has the slots it is given, and those of the chunk
    assert not slots_at(BUDGET + 2, shapes)


def test_a_prefill_under_jit_holds_no_more_layers_at_full_length_when_the_model_has_more():
    # Short enough for attention and MLP to need no loop: on a CPU, XLA zeroes the outputs of all loops at the start.
    batch, count, head_dim = 2, 256, 64

    def temporaries(layers):
        params = random_params(dataclasses.replace(CONFIG, layers=layers, context=count, head_dim=head_dim))
        run = jax.jit(kvjax.prefill).lower(params, policies.h2o(BUDGET, window=4), random_tokens(batch, count))
        return run.compile().memory_analysis().temp_size_in_bytes

    layer = 2 * batch * CONFIG.kv_heads * count * head_dim * 4
    assert temporaries(6) - temporaries(2) < 2 * layer  # four layers more would add 4 * layer, were they kept whole


def compiled_step(policy, config, batch, slots):
    def make():
        params = random_params(config)
        return params, kvjax.empty_cache(params, policy, batch, tokens=slots)

    params, cache = jax.eval_shape(make)
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(kvjax.step, donate_argnames="cache").lower(params, policy, token, cache).compile()
    return step.memory_analysis(), kvjax.nbytes(cache)


@every_method
def test_a_step_writes_in_place_and_copies_nothing_of_the_caches_size(row):
    # streaming_llm and keydiff turn or norm the keys of one layer at a time: 0.8 of its bytes, whatever the layers.
    config = dataclasses.replace(CONFIG, layers=10, head_dim=64, context=1024)
    # Methods that compress now and then gather what they compress: 2.6 layers, of SmolLM2's cache 8 %.
    memory, size = compiled_step(row.make(512), config, batch=2, slots=512)
    assert memory.alias_size_in_bytes == size
    # kivi loads the keys and values of one layer, of which there are ten, and its cache is smaller than they are.
    assert memory.temp_size_in_bytes < (0.27 if row.slack or row.make(512).form else 0.1) * size


def counting(traces):
    """A policy that uses all that a policy can, and notes when Python runs it."""

    def observe(cache, seen):
        traces.append(cache.slots)
        return {"mass": cache.stats["mass"] + seen.mass[Mass()]}

    return evict(
        Scorer(frozenset({Mass()}), {"mass": ()}, observe, lambda cache, seen: cache.stats["mass"]), budget=BUDGET
    )


def test_twenty_steps_trace_once():
    traces = []
    policy = counting(traces)
    _, cache = kvjax.prefill(PARAMS, policy, random_tokens(3, 24))
    traces.clear()
    step = jax.jit(kvjax.step, donate_argnames="cache")
    for i in range(20):
        _, cache = step(PARAMS, policy, random_tokens(3, 1, seed=i)[:, 0], cache)
    assert traces == [BUDGET + 1]  # once for both layers


def test_a_prompt_of_any_number_of_chunks_traces_once():
    traces = []
    policy = counting(traces)
    for count in (16, 40, 61, 200):
        kvjax.prefill(PARAMS, policy, random_tokens(3, count), chunk=8)
    assert traces == [BUDGET + 1 + 8]


def test_other_lengths_of_rows_trace_nothing_new():
    traces = []
    policy = counting(traces)
    for lengths in (None, (24, 13, 3), (1, 1, 24)):
        kvjax.prefill(PARAMS, policy, random_tokens(3, 24), lengths=lengths)
    assert traces == [24]


@pytest.mark.parametrize("method", bounded_methods)
def test_decoding_more_tokens_compiles_nothing_new(method):
    policy = POLICIES[method].make(BUDGET)

    def programs():
        return decoding._burst_in_place._cache_size(), decoding.run_layer._cache_size()

    def decode(count, **settings):
        kvjax.decode(PARAMS, policy, random_tokens(3, 24), lengths=(24, 13, 3), max_new_tokens=count, **settings)
        return programs()

    assert decode(5) == decode(40)


def test_other_settings_of_sampling_compile_nothing_new():
    def decode(**settings):
        kvjax.decode(
            PARAMS, policies.tova(BUDGET), random_tokens(3, 24), lengths=(24, 13, 3), max_new_tokens=5, **settings
        )
        return decoding._burst_in_place._cache_size()

    first = decode(temperature=0.7, top_k=5, top_p=0.9, key=0, stop=(1, 2))
    assert decode(temperature=1.3, top_k=9, top_p=0.4, key=jax.random.key(3), stop=(60, 4)) == first
