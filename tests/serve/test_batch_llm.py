"""Offline batches: what shares a prefix is answered as if it did not, whatever the shapes are that it runs in."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import kvjax
from kvjax import codecs, policies
from kvjax.cache import nbytes
from kvjax.policy import store
from kvjax.serve import batch_llm
from tests.tiny import CONFIG, random_params

PARAMS = random_params(dataclasses.replace(CONFIG, context=400))
OUT = 6


def words(count, seed):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, count).tolist()


LONG, SHORT = words(40, 1), words(23, 2)
PROMPTS = [
    *([LONG, SHORT][i % 2] + words(3 + i % 5, 10 + i) for i in range(9)),
    words(50, 30),
    LONG,  # no more than what others share
    LONG,
    [7],
]


def alone(prompt, policy=None, **settings):
    policy = policies.full() if policy is None else policy
    out = kvjax.decode(PARAMS, policy, np.array([prompt]), **{"max_new_tokens": OUT, **settings})
    return np.asarray(out.tokens[0, : int(out.lengths[0])])


@pytest.fixture(scope="module")
def wanted():
    return [alone(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def shared():
    return batch_llm.batch(PARAMS, PROMPTS, max_new_tokens=OUT, batch_tokens=64)


def test_shared_answers_are_those_of_each_prompt_alone(shared, wanted):
    for one, want in zip(shared, wanted, strict=True):
        assert one.error is None
        assert_array_equal(one.tokens, want)


@pytest.mark.parametrize(
    "settings", [{"method": "none"}, {"method": "paper", "batch_tokens": 16}, {"memory": 60_000, "batch_tokens": 24}]
)
def test_no_shape_changes_an_answer(settings, wanted):
    found = batch_llm.batch(PARAMS, PROMPTS, max_new_tokens=OUT, **{"batch_tokens": 64, **settings})
    for one, want in zip(found, wanted, strict=True):
        assert_array_equal(one.tokens, want)


def test_logits_of_a_shared_prefix_are_those_of_a_whole_prompt():
    """f32: 1e-4, of what is sampled from."""

    prompts = PROMPTS[:4]
    seen = []
    original = batch_llm.sample

    def spy(values, draw, keys, position):
        jax.debug.callback(lambda v, p: seen.append((np.array(v), np.array(p))), values, position)
        return original(values, draw, keys, position)

    batch_llm.sample = spy
    batch_llm._sample.clear_cache()
    try:
        batch_llm.batch(PARAMS, prompts, max_new_tokens=1, batch_tokens=64)
        jax.effects_barrier()
    finally:
        batch_llm.sample = original
        batch_llm._sample.clear_cache()
    for prompt in prompts:
        want, _ = kvjax.prefill(PARAMS, policies.full(), np.array([prompt]))
        rows = np.concatenate([values[position == len(prompt)] for values, position in seen])
        assert min(np.abs(row - np.asarray(want[0])).max() for row in rows) < 1e-4


def test_tokens_read_are_those_of_the_plan_and_memory_is_real():
    said = []
    batch_llm.batch(PARAMS, PROMPTS, max_new_tokens=OUT, batch_tokens=64, on_progress=said.append)
    assert said[-1].read == said[-1].logical - said[-1].shared < said[-1].logical
    assert said[-1].done == len(PROMPTS)
    assert said[-1].generated == len(PROMPTS) * OUT
    blocks = batch_llm.Blocks(2, 4, 48, 16, 16, (1, 1, 16), (1, 16))
    full = policies.full()
    held = nbytes(batch_llm.pools(PARAMS, full, full, blocks))
    slots = 2 * 48 + 2 * 4 * (16 + 16)
    assert held == CONFIG.layers * slots * CONFIG.kv_heads * (2 * CONFIG.head_dim * 4 + 4)


def test_more_prompts_of_the_same_size_compile_nothing_new():
    prompts = [LONG + words(4, 50 + i) for i in range(4)]
    batch_llm.batch(PARAMS, prompts, max_new_tokens=2, batch_tokens=64)
    before = batch_llm._layer_in_place._cache_size()
    prompts = [words(40, 90 + i // 4) + words(5, 60 + i) for i in range(4)]
    batch_llm.batch(PARAMS, prompts, max_new_tokens=2, batch_tokens=64)
    assert batch_llm._layer_in_place._cache_size() == before


def test_a_stop_token_ends_a_prompt_and_the_others_go_on(wanted):
    stop = int(wanted[0][2])
    found = batch_llm.batch(PARAMS, PROMPTS, max_new_tokens=OUT, batch_tokens=64, stop=[stop])
    for one, want in zip(found, wanted, strict=True):
        assert_array_equal(one.tokens, want[: want.tolist().index(stop)] if stop in want else want)


def test_each_prompt_may_have_its_own_length_and_draws_what_it_draws_alone():
    outputs = [1 + i % 5 for i in range(len(PROMPTS))]
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    found = batch_llm.batch(
        PARAMS, PROMPTS, max_new_tokens=outputs, batch_tokens=64, temperature=1.0, top_k=9, key=keys
    )
    for i in (0, 4, 9, 12):
        want = alone(PROMPTS[i], max_new_tokens=outputs[i], temperature=1.0, top_k=9, key=keys[i : i + 1])
        assert_array_equal(found[i].tokens, want)


@pytest.mark.parametrize(
    "policy",
    [
        policies.h2o(8, window=2),
        policies.d2o(8, window=2),
        policies.keydiff(8),
        store(policies.tova(8), keys=codecs.integer(8, group=8), values=codecs.integer(8, group=8)),
    ],
    ids=str,
)
def test_policies_of_suffixes_keep_their_budget_and_take_fewer_bytes(policy):
    long = [LONG + words(30, 70 + i) for i in range(4)]
    said, plain = [], []
    found = batch_llm.batch(PARAMS, long, policy, max_new_tokens=OUT, batch_tokens=64, on_progress=said.append)
    batch_llm.batch(PARAMS, long, max_new_tokens=OUT, batch_tokens=64, on_progress=plain.append)
    assert all(len(one.tokens) == OUT for one in found)
    assert said[-1].most_bytes < 0.8 * plain[-1].most_bytes


def test_a_budget_that_holds_everything_answers_as_full(wanted):
    policy = policies.h2o(64, window=8)
    found = batch_llm.batch(PARAMS, PROMPTS, policy, prefix_policy=policy, max_new_tokens=OUT, batch_tokens=64)
    for one, want in zip(found, wanted, strict=True):
        assert_array_equal(one.tokens, want)


def test_a_prefix_can_be_compressed_by_itself():
    prompts = [LONG + words(5, 80 + i) for i in range(3)]
    said = []
    small = policies.keydiff(12)
    found = batch_llm.batch(
        PARAMS, prompts, prefix_policy=small, max_new_tokens=OUT, batch_tokens=128, on_progress=said.append
    )
    _, prefix = kvjax.prefill(PARAMS, small, np.array([LONG]))
    assert said[-1].shared == 2 * len(LONG)
    assert all(len(one.tokens) == OUT for one in found)
    assert {layer.slots for layer in prefix.layers} == {13}


def test_parts_are_disjoint_and_whole(shared):
    settings = {"max_new_tokens": OUT, "batch_tokens": 64}
    parts = [list(batch_llm.answers(PARAMS, PROMPTS, part=(p, 2), **settings)) for p in range(2)]
    assert sorted(one.index for part in parts for one in part) == list(range(len(PROMPTS)))
    assert all(parts)
    for one in (one for part in parts for one in part):
        assert_array_equal(one.tokens, shared[one.index].tokens)


def test_what_cannot_be_answered_is_refused_alone(wanted):
    prompts = [*PROMPTS[:2], [], words(500, 4), [3, 99], words(300, 5)]
    found = batch_llm.batch(PARAMS, prompts, max_new_tokens=OUT, batch_tokens=64, memory=100_000)
    assert [one.error for one in found[:2]] == [None, None]
    for one, want in zip(found, wanted[:2], strict=False):
        assert_array_equal(one.tokens, want)
    for one, why in zip(found[2:], ("empty", "context of 400", "99 is not in 0..60", "memory is 100000"), strict=True):
        assert why in one.error and len(one.tokens) == 0


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"policy": policies.streaming_llm(8)}, "streaming_llm.*suffixes.*place in the cache"),
        ({"policy": policies.kivi(bits=4, group=8, residual=32)}, "kivi.*slot of its position"),
        ({"policy": policies.elastic_cache()}, "elastic_cache.*whole"),
        ({"policy": policies.locret(8, tail=2)}, "locret.*trained heads"),
        ({"prefix_policy": policies.streaming_llm(8)}, "streaming_llm.*prefixes"),
        ({"max_new_tokens": [1, 2]}, "2 numbers for 13 prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"memory": 0}, "memory=0"),
        ({"batch_tokens": 1}, "batch_tokens=1"),
        ({"part": (2, 2)}, "part"),
        ({"method": "best"}, "best"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_reason(settings, why):
    with pytest.raises(ValueError, match=why):
        batch_llm.batch(PARAMS, PROMPTS, **settings)


def test_streaming_llm_may_be_used_where_nothing_is_shared():
    policy = policies.streaming_llm(64)
    found = batch_llm.batch(PARAMS, PROMPTS[:2], policy, method="none", max_new_tokens=2, batch_tokens=64)
    for one, prompt in zip(found, PROMPTS[:2], strict=True):
        assert_array_equal(one.tokens, alone(prompt, max_new_tokens=2))


def test_a_nan_does_not_reach_the_prompt_that_gets_its_row_next():
    broken = dataclasses.replace(PARAMS, embed=PARAMS.embed.at[60].set(np.nan), unembed=PARAMS.embed)
    prompts = [[60, 1, 2], [3, 4, 5], [6, 7, 8]]
    one_row = {"method": "none", "memory": 9000, "batch_tokens": 16, "max_new_tokens": 3}
    found = batch_llm.batch(broken, prompts, **one_row)
    for one, prompt in zip(found[1:], prompts[1:], strict=True):
        assert_array_equal(one.tokens, alone(prompt, max_new_tokens=3))


def mixed(count):
    """Groups of many sizes."""
    rng = np.random.default_rng(8)
    for i in range(count):
        shared = words(int(rng.integers(1, 120)), 200 + i)
        yield from (shared + words(int(rng.integers(1, 90)), 300 + 9 * i + j) for j in range(int(rng.integers(1, 4))))


def test_prompts_of_many_sizes_run_in_a_handful_of_shapes_and_memory_holds_one_at_a_time(monkeypatch):
    prompts, held = list(mixed(12)), []
    heads = CONFIG.kv_heads
    start = sum(a.nbytes for a in jax.live_arrays() if a.ndim == 4 and a.shape[1] == heads)

    def spy(progress):
        now = sum(a.nbytes for a in jax.live_arrays() if a.ndim == 4 and a.shape[1] == heads)
        held.append((now - start, progress))

    # shapes are counted, and nothing is compiled for them
    monkeypatch.setattr(batch_llm._Run, "_run", lambda self, work, who: np.zeros(len(who), np.int32))
    memory = 400_000
    batch_llm.batch(PARAMS, prompts, max_new_tokens=2, batch_tokens=64, memory=memory, on_progress=spy)
    assert held[-1][1].programs <= 4 * batch_llm.MOST_SORTS
    assert max(now for now, _ in held) <= memory
    assert held[-1][1].read == held[-1][1].logical - held[-1][1].shared


@pytest.mark.parametrize("bad", [[1.5, 2.0], [[1], [2]], "hi", [2**40], [None]], ids=str)
def test_a_prompt_that_is_no_list_of_ids_is_refused_alone(bad):
    found = batch_llm.batch(PARAMS, [[1, 2], bad], max_new_tokens=2, batch_tokens=64)
    assert found[0].error is None
    assert found[1].error


@pytest.mark.parametrize(
    "settings, why",
    [({"part": (0, 2)}, "part would leave"), ({"done": [0]}, "done would leave"), ({"memory": float("inf")}, "memory")],
)
def test_what_batch_cannot_take_is_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        batch_llm.batch(PARAMS, PROMPTS, **settings)


@pytest.mark.parametrize("policy", [policies.h2o(8, window=2), policies.keydiff(8)], ids=str)
def test_an_evicting_policy_answers_what_decode_answers(policy):
    prompts = [words(20, 400 + i) for i in range(3)]
    found = batch_llm.batch(PARAMS, prompts, policy, method="none", max_new_tokens=OUT, batch_tokens=64)
    for one, prompt in zip(found, prompts, strict=True):
        assert_array_equal(one.tokens, alone(prompt, policy))
