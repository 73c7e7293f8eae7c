"""Passages cached in one context and used in another: which tokens are computed again, and what comes out."""

import dataclasses
import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from kvjax.serve import chunk_cache, fit
from kvjax.serve.chunk_cache import ChunkCache, by_context, by_deviation, nothing
from tests.oracles import cache_craft as oracle
from tests.tiny import CONFIG, random_params

PARAMS = random_params(dataclasses.replace(CONFIG, layers=4))


def words(count, seed):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, count)


SYSTEM, A, B, C, QUESTION = words(5, 1), words(12, 2), words(9, 3), words(17, 4), words(6, 5)


def whole(*parts, room=0):
    logits, cache = kvjax.prefill(PARAMS, policies.full(), np.concatenate(parts)[None], room=room)
    return np.asarray(logits), cache


def in_order(cache, layer):
    """Keys and values of a layer by position, [H, T, D]."""
    held = cache.layers[layer]
    order = np.argsort(np.where(held.pos[0, 0] < 0, 10**6, held.pos[0, 0]))[: int(cache.length[0])]
    return np.asarray(held.k)[0, :, order].swapaxes(0, 1), np.asarray(held.v)[0, :, order].swapaxes(0, 1)


def numbers(params):
    """The model as the oracle takes it."""
    names = ("wq", "wk", "wv", "wo", "attention_norm", "mlp_norm", "w_gate", "w_up", "w_down")
    layers = [{name: np.asarray(getattr(block, name)) for name in names} for block in params.blocks]
    weights = {"embedding": np.asarray(params.embed), "norm": np.asarray(params.norm), "layers": layers}
    config = params.config
    return oracle.Model(
        weights, config.q_heads, config.kv_heads, config.head_dim, config.norm_epsilon, config.rope.base
    )


MODEL = numbers(PARAMS)


def part(tokens, *stored):
    return oracle.Part(tuple(tokens.tolist()), *stored)


@pytest.fixture(scope="module")
def first():
    """The oracle's reading of the first prompt, and its spans: system, A, B, C, question."""
    parts = [part(x) for x in (SYSTEM, A, B, C, QUESTION)]
    return oracle.prefill(MODEL, parts), oracle.spans(parts)


def learned(**settings):
    """A cache that has read the first prompt."""
    rag = ChunkCache(**settings)
    rag.prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    return rag


def stored_of(rag):
    """What is stored of each chunk, by its number of tokens."""
    store = rag._store_of(PARAMS)
    return {len(store.about(name)["tokens"]): store.about(name) for name in store.keys("chunk/")}


def reordered(first, again):
    """The oracle's parts of system, C, A, B and the question, and the rows it computes; `again` by chunk."""
    result, spans = first
    held = [oracle.cut(result, tokens.tolist(), spans[i]) for i, tokens in ((0, SYSTEM), (3, C), (1, A), (2, B))]
    parts = [*held, part(QUESTION)]
    return parts, oracle.active_rows(parts, {i: places for i, places in enumerate(again, start=1)})


def test_a_prompt_that_is_new_is_computed_like_any_other():
    out = ChunkCache().prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    want, full = whole(SYSTEM, A, B, C, QUESTION)
    assert_allclose(out.logits, want, atol=1e-4)
    for layer in range(4):
        for got, wanted in zip(in_order(out.cache, layer), in_order(full, layer), strict=True):
            assert_allclose(got, wanted, atol=1e-5)
    assert [one.how for one in out.parts] == ["computed"] * 4


def test_a_prompt_that_is_known_is_exact_and_only_its_question_is_computed():
    out = learned().prefill(PARAMS, SYSTEM, [A, B, C], QUESTION[::-1])
    assert_allclose(out.logits, whole(SYSTEM, A, B, C, QUESTION[::-1])[0], atol=1e-4)
    assert [(one.how, one.computed) for one in out.parts] == [("exact", 0)] * 4


def test_decoding_goes_on_from_it():
    out = learned().prefill(PARAMS, SYSTEM, [A, B, C], QUESTION, room=6)
    _, full = whole(SYSTEM, A, B, C, QUESTION, room=6)
    token = np.argmax(out.logits, axis=-1)
    for _ in range(5):
        want, full = kvjax.step(PARAMS, full.policy, token, full)
        got, cache = kvjax.step(PARAMS, out.cache.policy, token, out.cache)
        out = out._replace(cache=cache)
        assert_allclose(got, want, atol=1e-4)
        token = np.argmax(want, axis=-1)


def test_statistics_are_those_of_the_attention_that_the_chunk_gave(first):
    result, spans = first
    attention = oracle.over_heads(result)
    held = stored_of(learned())
    for i, tokens in enumerate((A, B, C), start=1):
        want = oracle.statistics(attention, spans[i], spans[1:i])
        about = held[len(tokens)]
        assert_allclose(about["inter"], want.inter, rtol=1e-5)
        assert_allclose(about["ext"], want.ext, rtol=1e-4, atol=1e-7)
        assert about["cci"] == pytest.approx(want.cci, rel=1e-5)


def test_in_another_order_the_rows_that_looked_outside_are_computed_again(first):
    result, spans = first
    attention, out = (
        oracle.over_heads(result),
        learned(choice=by_context(0.6)).prefill(PARAMS, SYSTEM, [C, A, B], QUESTION),
    )
    again = []
    for i, new in ((3, ()), (1, (3,)), (2, (3, 1))):
        made = oracle.statistics(attention, spans[i], spans[1:i])
        variant = oracle.Variant(tuple(range(1, i)), tuple(made.inter), made.cci, tuple(made.ext))
        again.append(oracle.fit(variant, new, start=1, alpha=0.6))
    assert [one.cfo for one in out.parts[1:]] == pytest.approx([one.cfo for one in again], rel=1e-5)
    parts, rows = reordered(first, [one.tokens for one in again])
    assert [one.computed for one in out.parts[1:]] == [one.count for one in again]
    assert 0 < sum(one.count for one in again) < len(C) + len(A)
    want = oracle.prefill(MODEL, parts, rows)
    assert_allclose(out.logits[0], want.logits, atol=1e-4)
    for layer in range(4):
        assert_allclose(in_order(out.cache, layer)[1].swapaxes(0, 1), want.values[layer], atol=1e-5)
    assert np.abs(want.logits - whole(SYSTEM, C, A, B, QUESTION)[0][0]).max() > 0.1  # it is not the full reading


def test_cacheblend_goes_on_with_the_values_that_differ_most(first):
    out = learned(choice=by_deviation(0.3)).prefill(PARAMS, SYSTEM, [C, A, B], QUESTION)
    parts, rows = reordered(first, [range(len(C)), range(len(A)), range(len(B))])
    chunks = range(len(SYSTEM), rows[-1] + 1 - len(QUESTION))
    total = rows[-1] + 1

    def thin(layer):
        if layer.number != 1:
            return sorted(layer.new)
        moved = {row: d for row, d in oracle.deviation(layer.new, layer.stored).items() if row in chunks}
        best = sorted(moved, key=lambda row: (-moved[row], row))[: int(0.3 * len(chunks))]
        return sorted([*best, *range(total - len(QUESTION), total)])

    assert_allclose(out.logits[0], oracle.prefill(MODEL, parts, rows, thin=thin).logits, atol=1e-4)


def test_chunks_that_the_question_does_not_look_at_are_left_alone_after_some_layers(first):
    out = learned(choice=by_context(share=0.5), focus=fit.Focus(0, 2)).prefill(PARAMS, SYSTEM, [C, A, B], QUESTION)
    again = []
    result, spans = first
    for i in (3, 1, 2):
        made = oracle.statistics(oracle.over_heads(result), spans[i], spans[1:i])
        again.append(sorted(np.argsort(-np.array(made.ext), kind="stable")[: -(-len(spans[i]) // 2)]))
    parts, rows = reordered(first, again)
    thin = oracle.focus_stop(parts, [1, 2, 3], 4, first=0, repeats=2)
    assert out.dropped is not None
    assert_allclose(out.logits[0], oracle.prefill(MODEL, parts, rows, thin=thin).logits, atol=1e-4)


@pytest.mark.parametrize("choice", [by_context(share=1.0), by_deviation(1.0)], ids=lambda choice: choice.name)
def test_computing_all_again_is_the_full_reading(choice):
    out = learned(choice=choice).prefill(PARAMS, SYSTEM, [C, A, B], QUESTION)
    assert_allclose(out.logits, whole(SYSTEM, C, A, B, QUESTION)[0], atol=1e-4)


def test_nothing_that_is_cached_of_a_computed_token_is_read():
    rag = learned(choice=by_deviation(1.0))
    store = rag._store_of(PARAMS)
    for name in store.keys("chunk/"):
        nans = [tuple(np.full_like(x, np.nan) for x in store.get(name).layer(i)) for i in range(4)]
        store.put(name, nans, {**store.about(name), "before": "elsewhere"})
    out = rag.prefill(PARAMS, SYSTEM, [C, A, B], QUESTION)
    assert_allclose(out.logits, whole(SYSTEM, C, A, B, QUESTION)[0], atol=1e-4)


def test_the_first_layers_keys_and_values_are_exact_wherever_a_chunk_comes():
    out = learned(choice=nothing()).prefill(PARAMS, SYSTEM, [C, A, B], QUESTION)
    _, full = whole(SYSTEM, C, A, B, QUESTION)
    for got, want in zip(in_order(out.cache, 0), in_order(full, 0), strict=True):
        assert_allclose(got, want, atol=1e-5)


def test_a_chunk_is_not_exact_behind_other_tokens_however_its_neighbours_are_called():
    """A B A C and A B B C: the same chunks, each once, stand before C, and it begins at the same place."""
    rag, twin = ChunkCache(), words(12, 9)
    rag.prefill(PARAMS, [], [A, twin, A, C], QUESTION)
    out = rag.prefill(PARAMS, [], [A, twin, twin, C], QUESTION)
    assert [one.how for one in out.parts] == ["computed", "exact", "exact", "repeated", "fixed"]


def test_no_more_variants_of_a_chunk_stay_than_may_and_those_of_least_use_leave():
    rag = ChunkCache(variants=2, choice=by_context(10.0))  # so dear that a new context is a miss
    for before in ([A], [B], [A, B]):
        rag.prefill(PARAMS, SYSTEM, [*before, C], QUESTION)
    store = rag._store_of(PARAMS)
    assert [len(store.about(name)["ext"]) for name in store.keys("chunk/")].count(len(C)) == 2
    few = ChunkCache(capacity=2)
    few.prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    assert len(few._store_of(PARAMS).keys("chunk/")) == 2


def test_scores_of_uses_are_those_of_the_specification():
    """Three places; the worked example of the reconstruction."""
    scores, held = fit.Scores(), []
    for name, cfo in (
        ("x/1", 0.25), ("y/1", 0.5), ("x/2", 0.8), ("x/1", 0.2), ("y/2", 0.4), ("y/1", 1.0), ("z/1", 0.5)
    ):  # fmt: skip
        if name not in held and len(held) == 3:
            gone = scores.worst(held)
            held.remove(gone)
            scores.forget(gone)
        held = [*(other for other in held if other != name), name]
        scores.use(name, cfo)
    assert {name: round(scores[name], 9) for name in held} == {"x/1": 9.0, "y/1": 3.0, "z/1": 2.0}


def test_fits_are_those_of_the_oracle_in_every_order_of_up_to_four_chunks():
    inter, ext = np.array([0.425, 0.625, 0.3]), np.array([0.6, 0.45, 0.3])
    mine = fit.Variant("v", ("a", "b", "c"), "", fit.Statistics(inter, 0.7733409, ext), True)
    theirs = oracle.Variant(("a", "b", "c"), tuple(inter), 0.7733409, tuple(ext))
    for count in range(5):
        for new in itertools.permutations("abcd", count):
            for alpha in (1.0, 1.5):
                got, want = fit.fit(mine, new, "x", alpha=alpha), oracle.fit(theirs, new, start=9, alpha=alpha)
                assert got.cfo == pytest.approx(want.cfo, abs=1e-12)
                assert got.tokens.tolist() == want.tokens


def test_another_model_or_tenant_never_hits(tmp_path):
    with_others = {"folder": tmp_path, "host_bytes": 0}
    learned(**with_others)
    other = random_params(PARAMS.config, seed=3)
    for rag, params in ((ChunkCache(**with_others), other), (ChunkCache(domain="b", **with_others), PARAMS)):
        out = rag.prefill(params, SYSTEM, [A, B, C], QUESTION)
        assert [one.how for one in out.parts] == ["computed"] * 4
    again = ChunkCache(**with_others).prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    assert [one.how for one in again.parts] == ["exact"] * 4


def test_a_damaged_entry_is_a_miss_in_the_middle_of_a_prefill(tmp_path):
    learned(folder=tmp_path, host_bytes=0).close()
    rag = ChunkCache(tmp_path, host_bytes=0)
    for path in sorted(tmp_path.rglob("*.safetensors"))[:2]:
        held = bytearray(path.read_bytes())
        held[-1] ^= 1  # in the last layer
        path.write_bytes(held)
    with pytest.warns(RuntimeWarning):
        out = rag.prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    assert_allclose(out.logits, whole(SYSTEM, A, B, C, QUESTION)[0], atol=1e-4)
    assert sorted(one.how for one in out.parts) == ["computed", "computed", "exact", "exact"]


def test_entries_in_eight_bits_are_nearly_as_good():
    out = learned(int8=True).prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    want = whole(SYSTEM, A, B, C, QUESTION)[0]
    assert 0 < np.abs(out.logits - want).max() < 0.05 * np.abs(want).max()  # 8 bits, in every layer


def test_what_is_stored_in_eight_bits_is_never_called_exact():
    out = learned(int8=True).prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    assert {one.how for one in out.parts} == {"fixed"}


def test_a_disk_full_of_damaged_variants_that_cannot_be_removed_is_read_around(tmp_path, monkeypatch):
    rag = ChunkCache(tmp_path, host_bytes=0, choice=by_context(10.0))
    for before in ([], [A], [B]):
        rag.prefill(PARAMS, SYSTEM, [*before, C], QUESTION)
    rag.close()
    for path in tmp_path.rglob("*.safetensors"):
        held = bytearray(path.read_bytes())
        held[-1] ^= 1
        path.write_bytes(held)
    rag = ChunkCache(tmp_path, host_bytes=0)
    monkeypatch.setattr(type(rag._store_of(PARAMS)._disk), "remove", lambda *_: False)
    with pytest.warns(RuntimeWarning):
        out = rag.prefill(PARAMS, SYSTEM, [B, C], QUESTION)
    assert_allclose(out.logits, whole(SYSTEM, B, C, QUESTION)[0], atol=1e-4)


def test_a_variant_that_has_just_been_stored_is_not_the_one_to_leave():
    rag = ChunkCache(variants=1, choice=by_context(10.0))
    for _ in range(5):
        rag.prefill(PARAMS, SYSTEM, [A, C], QUESTION)  # C behind A is used again and again
    for _ in range(2):
        out = rag.prefill(PARAMS, SYSTEM, [B, C], QUESTION)
    assert [one.how for one in out.parts] == ["exact", "exact", "exact"]


def test_chunks_may_be_held_on_the_device_alone():
    rag = learned(device_bytes=2**24, host_bytes=0)
    out = rag.prefill(PARAMS, SYSTEM, [A, B, C], QUESTION)
    assert [one.how for one in out.parts] == ["exact"] * 4
    assert rag.stats()["hits"]["device"] == 4


def test_a_policy_stores_the_part_of_a_chunk_that_it_keeps_of_the_chunk_alone():
    policy = policies.h2o(6, window=2)
    small = learned(policy=policy, choice=nothing())
    out = small.prefill(PARAMS, SYSTEM, [C, A, B], QUESTION)
    assert [one.how for one in out.parts] == ["exact", "fixed", "fixed", "fixed"]
    store = small._store_of(PARAMS)
    for name in store.keys("chunk/"):
        assert store.get(name).layer(0)[0].shape == (CONFIG.kv_heads, 6, CONFIG.head_dim)
    _, alone = kvjax.prefill(PARAMS, policy, A[None])
    held = next(store.about(name)["pos"] for name in store.keys("chunk/") if len(store.about(name)["ext"]) == len(A))
    # in the first layer a chunk's queries and keys are the same in any context
    assert_array_equal(np.sort(held[0]), np.sort(np.asarray(alone.layers[0].pos[0, :, :-1])))
    assert np.isfinite(out.logits).all()


@pytest.mark.parametrize(
    "given, why",
    [
        ({"question": []}, "question is empty"),
        ({"chunks": [[1], []]}, r"chunks\[1\] is empty"),
        ({"chunks": [[99]]}, "ids from 99 to 99"),
        ({"system": [0.5]}, "list of token ids"),
        ({"chunks": [[1] * 300]}, "context of 256"),
        ({"room": -1}, "room=-1"),
    ],
)
def test_what_cannot_be_read_is_refused(given, why):
    given = {"system": [1], "chunks": [[2]], "question": [3], **given}
    with pytest.raises(ValueError, match=why):
        ChunkCache().prefill(PARAMS, **given)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"choice": 0.3}, "by_context"),
        ({"variants": 0}, "variants=0"),
        ({"policy": policies.kivi()}, "kivi.*plain slots"),
        ({"policy": policies.locret(8, tail=1)}, "locret.*trained heads"),
        ({"policy": policies.tova(8), "choice": by_deviation()}, "compares all values"),
        ({"host_bytes": 0}, "no tier"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        ChunkCache(**settings).prefill(PARAMS, [], [[1, 2]], [3])


@pytest.mark.parametrize("make, why", [(lambda: by_context(-1.0), "alpha"), (lambda: by_deviation(2.0), "share")])
def test_choices_out_of_range_are_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_prompts_of_the_same_size_compile_nothing_new():
    rag = learned()

    def read(seed):
        rag.prefill(PARAMS, SYSTEM, [words(12, seed), words(9, seed + 1), words(17, seed + 2)], QUESTION)

    read(20)  # unlike the first prompt, behind a system text that is cached
    before = chunk_cache._layer._cache_size()
    read(30)
    assert chunk_cache._layer._cache_size() == before
