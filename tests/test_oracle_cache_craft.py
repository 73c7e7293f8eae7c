"""The oracle of Cache-Craft and CacheBlend against the worked examples and the promises of its specification."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.oracles import cache_craft, common
from tests.oracles.cache_craft import Part, Variant

SIX = 5e-7  # half a unit of the sixth decimal, the last that the worked examples print

# ---- statistics and fit ----

# rows are three tokens of T; columns A0 A1 B0 B1 C0 C1 T0 T1 T2
T1 = np.array(
    [
        [
            [0.10, 0.10, 0.20, 0.10, 0.05, 0.05, 0.40, 0.00, 0.00],
            [0.05, 0.05, 0.10, 0.10, 0.05, 0.05, 0.20, 0.40, 0.00],
            [0.02, 0.03, 0.05, 0.05, 0.02, 0.03, 0.20, 0.20, 0.40],
        ],
        [
            [0.20, 0.10, 0.10, 0.10, 0.05, 0.05, 0.40, 0.00, 0.00],
            [0.05, 0.05, 0.20, 0.10, 0.05, 0.05, 0.10, 0.40, 0.00],
            [0.05, 0.05, 0.10, 0.05, 0.05, 0.10, 0.10, 0.10, 0.40],
        ],
    ]
)
ATTENTION = [dict(zip(range(6, 9), layer, strict=True)) for layer in T1]
CHUNK, EARLIER = range(6, 9), [range(0, 2), range(2, 4), range(4, 6)]


def make_variant(context=("A", "B", "C"), inter=(0.425, 0.625, 0.3), **more):
    return Variant(tuple(context), tuple(inter), 0.7733409, (0.6, 0.45, 0.3), **more)


def test_example_statistics_of_a_chunk():
    one = [cache_craft.statistics([layer], CHUNK, EARLIER) for layer in ATTENTION]
    assert_allclose(one[0].inter, [0.35, 0.60, 0.25], atol=1e-12)
    assert_allclose(one[1].inter, [0.50, 0.65, 0.35], atol=1e-12)
    assert_allclose([one[0].intra, one[1].intra], [1.8, 1.5], atol=1e-12)
    # (.35 + .60 + .25) / 6 = .2, (.50 + .65 + .35) / 6 = .25; 1.8 / 9 = .2, 1.5 / 9 = .1666667
    assert_allclose([one[0].a, one[1].a, one[0].b, one[1].b], [0.2, 0.25, 0.2, 1.5 / 9], atol=1e-12)

    both = cache_craft.statistics(ATTENTION, CHUNK, EARLIER)
    assert_allclose([both.a, both.b], [0.225, 0.1833333], atol=5e-8)
    assert_allclose(both.cci, 0.7733409, atol=5e-8)  # 1 / (1 + exp(-.225 / .1833333))
    assert_allclose(both.inter, [0.425, 0.625, 0.3], atol=1e-12)
    assert_allclose(both.ext, [0.6, 0.45, 0.3], atol=1e-12)


def test_example_a_system_prompt_is_outside_the_statistics():
    without_a = cache_craft.statistics(ATTENTION, CHUNK, EARLIER[1:])
    assert_allclose(without_a.inter, [0.625, 0.3], atol=1e-12)
    # (.4 + .3) / 2, (.3 + .4) / 2, (.15 + .3) / 2
    assert_allclose(without_a.ext, [0.35, 0.35, 0.225], atol=1e-12)


@pytest.mark.parametrize(
    "new, beta, gamma, adjusted, one, one_tokens, more, more_tokens",
    [
        ("ABC", 1, 0, 1, 0, [], 0, []),
        ("BAC", 1, 0.333333, 0.666667, 0.257780, [0], 0.386670, [0, 1]),
        ("CBA", 1, 1, 0, 0.773341, [0, 1, 2], 1, [0, 1, 2]),
        ("AD", 0.314815, 0, 0.314815, 0.529882, [0, 1], 0.794823, [0, 1, 2]),
        ("BC", 0.685185, 0, 0.685185, 0.243459, [0], 0.365189, [0, 1]),
        ("DE", 0, 0, 0, 0.773341, [0, 1, 2], 1, [0, 1, 2]),
        ("", 0, 0, 0, 0.773341, [0, 1, 2], 1, [0, 1, 2]),
        ("DABC", 1, 0, 1, 0, [], 0, []),
    ],
)
def test_example_fit_of_a_variant(new, beta, gamma, adjusted, one, one_tokens, more, more_tokens):
    variant = make_variant()
    first = cache_craft.fit(variant, tuple(new))
    second = cache_craft.fit(variant, tuple(new), alpha=1.5)
    assert_allclose([first.beta, first.gamma, first.adjusted], [beta, gamma, adjusted], atol=SIX)
    assert_allclose([first.cfo, second.cfo], [one, more], atol=SIX)
    assert (first.tokens, second.tokens) == (one_tokens, more_tokens)
    assert (first.count, second.count) == (len(one_tokens), len(more_tokens))


def test_exact_asks_for_the_same_context_place_model_and_source():
    variant = make_variant(start=6, digest="model")
    same = dict(new=tuple("ABC"), start=6, digest="model")
    assert cache_craft.fit(variant, **same).exact
    for other in ({"new": tuple("DABC")}, {"new": tuple("BAC")}, {"start": 7}, {"digest": "other"}):
        assert not cache_craft.fit(variant, **{**same, **other}).exact
    assert cache_craft.fit(variant, **{**same, "new": tuple("DABC")}).cfo == 0
    assert not cache_craft.fit(dataclasses.replace(variant, exact_source=False), **same).exact


def test_a_variant_without_context_fits_an_empty_one_only():
    alone = Variant((), (), 0.5, (0.0, 0.0, 0.0))
    assert (cache_craft.fit(alone, ()).cfo, cache_craft.fit(alone, ("A",)).cfo) == (0, 0.5)
    assert cache_craft.fit(alone, ("A",)).tokens == [0, 1]  # ceil(1.5) tokens, the earlier of equals


def test_the_count_does_not_follow_rounding():
    assert len(cache_craft.recompute([0.0] * 10, 0.1 + 0.2)) == 3  # .30000000000000004 x 10


def test_choice_is_by_cfo_then_exact_score_newest_and_name():
    near, far = make_variant("AB", (1, 1), name=3), make_variant("XY", (1, 1), name=1)
    chosen, found = cache_craft.choose([far, near], tuple("AB"))
    assert chosen is near and found.cfo == 0

    tied = [
        make_variant("A", (1,), name=0, score=9.0, created=9),
        make_variant("AB", (1, 0), name=2, exact_source=False, score=5.0, created=1),
        make_variant("AB", (1, 0), name=3, exact_source=False, score=5.0, created=2),
        make_variant("AB", (1, 0), name=1, exact_source=False, score=5.0, created=2),
        make_variant("AB", (1, 0), name=4),
    ]
    order = []
    while tied:
        variant, _ = cache_craft.choose(tied, tuple("AB"))
        order.append(variant.name)
        tied.remove(variant)
    assert order == [4, 0, 1, 3, 2]


def test_a_variant_to_be_computed_in_full_is_a_miss():
    assert cache_craft.choose([make_variant()], tuple("CBA")) is not None
    assert cache_craft.choose([make_variant()], tuple("CBA"), alpha=1.5) is None
    assert cache_craft.choose([], tuple("ABC")) is None


# ---- store ----


def test_example_eviction():
    shelf = cache_craft.Shelf(capacity=3)
    uses = [("x", 1, 0.25), ("y", 1, 0.5), ("x", 2, 0.8), ("x", 1, 0.2), ("y", 2, 0.4), ("y", 1, 1.0), ("z", 1, 0.5)]
    told = []
    for chunk, variant, cfo in uses:
        gone = shelf.use((chunk, variant), cfo)
        told.append((shelf.scores[chunk, variant], gone))
    # 1/.25 = 4; 1/.5 = 2; 1/.8 = 1.25; 4 + 5 = 9; 1/.4 = 2.5; 2 + 1 = 3; 1/.5 = 2
    out = [None, None, None, None, ("x", 2), None, ("y", 2)]
    assert told == list(zip([4, 2, 1.25, 9, 2.5, 3, 2], out, strict=True))
    assert shelf.scores == {("x", 1): 9, ("y", 1): 3, ("z", 1): 2}


def test_a_chunk_with_all_its_variants_evicts_its_own():
    shelf = cache_craft.Shelf(capacity=9, per_chunk=2)
    shelf.use(("y", 1), 1.0)
    for variant, cfo in ((1, 0.25), (2, 0.5)):
        shelf.use(("x", variant), cfo)
    assert shelf.use(("x", 3)) == ("x", 2)
    assert shelf.scores == {("y", 1): 1, ("x", 1): 4, ("x", 3): 1}


def test_of_equal_scores_the_least_recently_used_goes():
    shelf = cache_craft.Shelf(capacity=2)
    for key, cfo in ((("x", 1), 1.0), (("y", 1), 0.5), (("x", 1), 1.0)):
        shelf.use(key, cfo)
    assert shelf.use(("z", 1)) == ("y", 1)


def test_scores_are_bounded_below_in_cfo_and_decay():
    shelf = cache_craft.Shelf(capacity=2, every=3)
    for _ in range(3):
        shelf.use(("x", 1), 0.0)
    assert shelf.scores == {("x", 1): 150}  # 3 x 1/.01, halved after the third use


# ---- rotation ----


@pytest.mark.parametrize(
    "layout, at_five, at_twelve",
    [
        ("half", [3.160435, 1.797584, -0.107938, 4.094959], [2.453573, 1.506768, 1.994989, 4.210659]),
        ("interleaved", [2.201511, -0.391600, 2.796334, 4.144939], [1.917000, 1.151135, 2.499577, 4.330371]),
    ],
)
def test_example_rotation(layout, at_five, at_twelve):
    key = np.array([1.0, 2.0, 3.0, 4.0])
    five = cache_craft.rotate(key, 5, layout=layout)
    assert_allclose(five, at_five, atol=SIX)
    assert_allclose(cache_craft.rotate(key, 12, layout=layout), at_twelve, atol=SIX)
    assert_allclose(cache_craft.rotate(five, 7, layout=layout), at_twelve, atol=SIX)
    assert_allclose(np.linalg.norm(five), np.linalg.norm(key), atol=1e-12)


# ---- the tiny model ----

SPANS = {"a": range(0, 4), "b": range(4, 8), "c": range(8, 12)}
TOKENS = {"a": (1, 5, 9, 2), "b": (7, 3, 3, 11), "c": (4, 12, 6, 8)}
QUESTION = Part((13, 0))
ASKING = [12, 13]


def wave(m, n, c):
    i, j = np.arange(m)[:, None], np.arange(n)[None]
    return np.sin(1.3 * i + 0.7 * j**2 + c) * 1.2 / np.sqrt(m)


def make_tiny():
    """Three layers of width 8, two heads, relu MLP, norms without gain and none at the end."""
    layers = []
    for number in range(3):
        q, k, v, o, u, w = (wave(8, 8, 10 * number + i).T for i in range(1, 7))
        gain = np.ones(8)
        layers.append(dict(wq=q, wk=k, wv=v, wo=o, w_up=u, w_down=w, attention_norm=gain, mlp_norm=gain))
    return cache_craft.Model({"embedding": 2 * wave(16, 8, 0.1), "layers": layers}, 2, 2, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    model: cache_craft.Model
    cached: cache_craft.Prefill  # of the request A B C
    stored: list  # C A B and the question, with what A B C left
    full: cache_craft.Prefill  # of C A B and the question

    def run(self, active=None, *, stored=None, **settings):
        return cache_craft.prefill(self.model, stored or self.stored, active, **settings)

    def error(self, *args, **settings):
        state = self.run(*args, **settings).state
        return np.abs(state - self.full.state).max() / np.abs(self.full.state).max()

    def old(self, layer):
        """Stored keys and values of the twelve rows in the new order."""
        return [np.concatenate([getattr(p, name)[layer] for p in self.stored[:3]]) for name in ("keys", "values")]


@pytest.fixture(scope="module")
def tiny():
    model = make_tiny()
    cached = cache_craft.prefill(model, [Part(TOKENS[name]) for name in "abc"])
    stored = [cache_craft.cut(cached, TOKENS[name], SPANS[name]) for name in "cab"] + [QUESTION]
    full = cache_craft.prefill(model, [Part(part.tokens) for part in stored])
    return Case(model, cached, stored, full)


def variants_of(tiny):
    attention = cache_craft.over_heads(tiny.cached)
    for name in "abc":
        before = "abc"[: "abc".index(name)]
        found = cache_craft.statistics(attention, SPANS[name], [SPANS[other] for other in before])
        yield name, found, Variant(tuple(before), tuple(found.inter), found.cci, tuple(found.ext))


def deviations(tiny):
    """Of the values in layer 1, between a full prefill and what is stored."""
    new, old = tiny.full.values[1], tiny.old(1)[1]
    return cache_craft.deviation({r: (0, new[r]) for r in range(12)}, {r: (0, old[r]) for r in range(12)})


def test_example_last_state_of_a_full_prefill(tiny):
    state = [2.044114, 3.166607, -1.092367, 2.085667, -2.02179, -1.979356, 2.206744, -1.342913]
    assert_allclose(tiny.full.state, state, atol=SIX)


def test_example_stored_keys_differ_from_layer_one_on(tiny):
    assert_array_equal(tiny.full.keys[0, :12], tiny.old(0)[0])
    assert_array_equal(tiny.full.values[0, :12], tiny.old(0)[1])
    assert_allclose(np.abs(tiny.full.keys[1, :12] - tiny.old(1)[0]).max(), 1.366174, atol=SIX)


def test_example_reuse_with_and_without_rotation_to_the_new_place(tiny):
    def left_where_it_was(part, moved):
        turned = [[[cache_craft.rotate(key, -moved) for key in row] for row in layer] for layer in part.keys]
        return dataclasses.replace(part, keys=np.array(turned))

    unturned = [left_where_it_was(p, moved) for p, moved in zip(tiny.stored, (-8, 4, 4), strict=False)] + [QUESTION]
    assert_allclose(tiny.error(ASKING, stored=unturned), 0.167047, atol=SIX)
    assert_allclose(tiny.error(ASKING), 0.116161, atol=SIX)


@pytest.mark.parametrize(
    "count, rows, error",
    [
        (2, [1, 5], 0.097001),
        (3, [1, 5, 7], 0.097240),
        (4, [1, 5, 7, 9], 0.081381),
        (6, [1, 2, 3, 5, 7, 9], 0.071765),
        (9, [1, 2, 3, 4, 5, 6, 7, 8, 9], 0.050615),
        (12, list(range(12)), 0),
    ],
)
def test_example_cacheblend(tiny, count, rows, error):
    chosen = cache_craft.blend_rows(deviations(tiny), count / 12, 14, 2)
    assert chosen == rows + ASKING
    assert_allclose(tiny.error(chosen), error, atol=SIX)


def test_example_cache_craft(tiny):
    found = {name: (statistics, variant) for name, statistics, variant in variants_of(tiny)}
    assert_allclose([found[name][0].cci for name in "abc"], [0.5, 0.634015, 0.892027], atol=SIX)
    assert_allclose(found["b"][0].inter, [1.418488], atol=SIX)
    assert_allclose(found["c"][0].inter, [1.303545, 1.41095], atol=SIX)

    fits = [cache_craft.fit(found[name][1], tuple("cab"[:i])) for i, name in enumerate("cab")]
    assert_allclose([f.cfo for f in fits], [0.892027, 0.5, 0], atol=SIX)
    assert [f.tokens for f in fits] == [[0, 1, 2, 3], [0, 1], []]

    rows = cache_craft.active_rows(tiny.stored, {i: f.tokens for i, f in enumerate(fits)})
    assert rows == [0, 1, 2, 3, 4, 5, *ASKING]
    assert_allclose(tiny.error(rows), 0.030450, atol=SIX)


def test_example_cfo_zero_is_not_exact(tiny):
    result = tiny.run([0, 1, 2, 3, 4, 5, 6, 7, *ASKING])  # all but B, which was stored after A and now follows C, A
    assert np.abs(result.state - tiny.full.state).max() > 1e-3


def test_example_mask_from_the_bottom_right_sees_the_future(tiny):
    def bottom_right(row, rows):
        return rows.index(row) + 14 - len(rows)

    rows = [0, 4, 8, *ASKING]
    assert bottom_right(0, rows) == 9
    assert_allclose(tiny.error(rows), 0.059678, atol=SIX)
    assert_allclose(tiny.error(rows, last_seen=bottom_right), 0.100629, atol=SIX)


# ---- a model with groups, SwiGLU and gains ----

PARTS = [Part((3, 1, 4)), Part((1, 5, 9, 2)), Part((6, 5, 3)), Part((8, 7))]


def make_grouped(layers=3, width=6, hidden=5, vocab=10, q_heads=4, kv_heads=2, head_dim=4, seed=0):
    rng = np.random.default_rng(seed)

    def weight(out, into):
        return rng.normal(size=(out, into)) / np.sqrt(into)

    stack = [
        dict(
            wq=weight(q_heads * head_dim, width),
            wk=weight(kv_heads * head_dim, width),
            wv=weight(kv_heads * head_dim, width),
            wo=weight(width, q_heads * head_dim),
            w_gate=weight(hidden, width),
            w_up=weight(hidden, width),
            w_down=weight(width, hidden),
            attention_norm=rng.uniform(0.5, 1.5, width),
            mlp_norm=rng.uniform(0.5, 1.5, width),
        )
        for _ in range(layers)
    ]
    weights = {"embedding": rng.normal(size=(vocab, width)), "norm": rng.uniform(0.5, 1.5, width), "layers": stack}
    return cache_craft.Model(weights, q_heads, kv_heads, head_dim, epsilon=1e-5, base=500.0)


@pytest.fixture(scope="module")
def grouped():
    """The chunks of PARTS stored from the order 0 1 2, asked for in the order 0 2 1."""
    model = make_grouped()
    cached = cache_craft.prefill(model, PARTS[:3])
    places = cache_craft.spans(PARTS)
    stored = [cache_craft.cut(cached, PARTS[i].tokens, places[i]) for i in (0, 2, 1)] + [PARTS[3]]
    full = cache_craft.prefill(model, [Part(part.tokens) for part in stored])
    return Case(model, cached, stored, full)


def by_matrices(model, tokens):
    """The model over a whole prompt in complex rotations and matrix products: last state, logits, attention."""
    n, group = len(tokens), model.q_heads // model.kv_heads
    turns = np.exp(1j * np.outer(np.arange(n), model.base ** (-np.arange(0, model.head_dim, 2) / model.head_dim)))

    def norm(x, gain):
        return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + model.epsilon)

    def turn(x):
        a, b = np.split(x, 2, axis=-1)
        z = (a + 1j * b) * turns[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    def heads(x):
        return x.reshape(n, -1, model.head_dim)

    h, seen = model.weights["embedding"][list(tokens)], []
    for w in model.weights["layers"]:
        x = norm(h, w["attention_norm"])
        q, k, v = (heads(x @ w[name].T) for name in ("wq", "wk", "wv"))
        q, k, v = turn(q), np.repeat(turn(k), group, axis=1), np.repeat(v, group, axis=1)
        logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(model.head_dim)
        logits = np.where(np.tril(np.ones((n, n), bool)), logits, -np.inf)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        seen.append(probs)
        h = h + np.einsum("hts,shd->thd", probs, v).reshape(n, -1) @ w["wo"].T
        x = norm(h, w["mlp_norm"])
        gate, up = x @ w["w_gate"].T, x @ w["w_up"].T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ w["w_down"].T
    return h[-1], norm(h[-1], model.weights["norm"]) @ model.weights["embedding"].T, seen


def test_full_prefill_is_the_model_in_whole_matrices(grouped):
    tokens = [token for part in grouped.stored for token in part.tokens]
    state, logits, probs = by_matrices(grouped.model, tokens)
    assert_allclose(grouped.full.state, state, atol=1e-12)
    assert_allclose(grouped.full.logits, logits, atol=1e-12)
    for layer, want in zip(grouped.full.probs, probs, strict=True):
        assert_allclose(np.stack([layer[row] for row in range(12)], axis=1), want, atol=1e-12)


def test_what_is_computed_again_is_never_read(grouped):
    spoilt = [
        dataclasses.replace(p, keys=p.keys * np.nan, values=p.values * np.nan) if p.keys is not None else p
        for p in grouped.stored
    ]
    result = grouped.run(range(12), stored=spoilt)
    assert_array_equal(result.state, grouped.full.state)
    assert_array_equal(result.keys, grouped.full.keys)


def test_a_prefix_in_its_old_place_is_exact_and_a_moved_chunk_is_in_layer_zero(grouped):
    # Chunk 0 leads both orders. Chunk 2 moved by four rows: only its first layer does not depend on what came before.
    result = grouped.run([10, 11])
    assert_allclose(result.keys[:, :3], grouped.full.keys[:, :3], atol=1e-12)
    assert_allclose(result.values[:, :3], grouped.full.values[:, :3], atol=1e-12)
    assert_array_equal(result.keys[0], grouped.full.keys[0])
    assert np.abs(result.keys[1, 3:10] - grouped.full.keys[1, 3:10]).max() > 1e-2


def test_the_same_context_and_place_is_exact_without_computing_again(grouped):
    tokens = [part.tokens for part in PARTS]
    stored = [cache_craft.cut(grouped.cached, t, s) for t, s in zip(tokens[:3], cache_craft.spans(PARTS), strict=False)]
    result = grouped.run([10, 11], stored=[*stored, PARTS[3]])
    assert_allclose(result.logits, cache_craft.prefill(grouped.model, PARTS).logits, atol=1e-12)


def test_a_later_token_never_changes_an_earlier_active_row(grouped):
    rows = [1, 4, 7, 10, 11]
    later = [*grouped.stored[:3], Part((8, 0))]
    one, other = grouped.run(rows), grouped.run(rows, stored=later)
    assert_array_equal(one.values[:, :11], other.values[:, :11])
    assert np.abs(one.values[1, 11] - other.values[1, 11]).max() > 1e-3
    for a, b in zip(one.probs, other.probs, strict=True):
        assert all(a[row].sum(axis=1) == pytest.approx(1) for row in rows)
        assert_array_equal(a[10], b[10])
        assert not a[4][:, 5:].any()


def test_a_row_neither_active_nor_stored_is_refused(grouped):
    with pytest.raises(ValueError, match=r"rows \[10\] are neither active nor stored"):
        grouped.run([11])
    with pytest.raises(ValueError, match="include the last"):
        grouped.run([10])


# ---- focus ----


def test_focused_is_what_stands_before_the_widest_gap():
    assert cache_craft.focused([0.25, 1.0, 0.875, 0.125]) == {1, 2}  # 1, .875, .25, .125: gaps .125, .625, .125
    assert cache_craft.focused([0.0, 0.5, 1.0]) == {2}  # gaps .5 and .5: the first
    assert cache_craft.focused([0.5, 0.5, 0.5]) == {0}
    assert cache_craft.focused([0.1]) == {0}


@pytest.mark.parametrize(
    "changes, layer",
    [
        ([], 12),  # the same set all along: checks 10, 11, 12
        ([5], 12),
        ([11], 13),  # another set from layer 11 on: 11, 12, 13
        ([11, 13], 15),
        ([11, 13, 15], None),
    ],
)
def test_the_choice_stands_after_three_equal_checks_none_below_layer_ten(changes, layer):
    sets = [{sum(at <= number for at in changes)} for number in range(16)]
    assert cache_craft.stop_layer(sets) == layer


def test_question_mass_is_per_token_of_the_chunk():
    # rows T1 and T2 as the question, to A, B and C of two tokens: (.10 + .05) / 2, (.20 + .10) / 2, (.10 + .05) / 2
    mass = cache_craft.question_mass(ATTENTION[0], range(7, 9), EARLIER)
    assert_allclose(mass, [0.075, 0.15, 0.075], atol=1e-12)


def test_stored_chunks_out_of_focus_are_left_after_the_stop_and_missed_ones_stay(grouped):
    tokens, parts = [part.tokens for part in grouped.stored], list(grouped.stored)
    parts[1] = Part(tokens[1])  # the second chunk is missed
    rows = cache_craft.active_rows(parts, {0: [0, 1, 2], 2: [1, 2]})
    assert rows == [0, 1, 2, 3, 4, 5, 7, 8, 10, 11]
    whole = grouped.run(rows, stored=parts)
    places = cache_craft.spans(parts)
    sums = np.zeros(3)
    for weights in cache_craft.over_heads(whole)[:2]:
        sums += [np.mean([weights[t][s] for s in place for t in (10, 11)]) * 2 for place in places[:3]]
    chosen = cache_craft.focused(list(sums))
    assert 0 < len(chosen - {1}) < 2  # one of the two stored chunks, or the test shows nothing

    thin = cache_craft.focus_stop(parts, [0, 1, 2], 3, first=1, repeats=1)
    result = grouped.run(rows, stored=parts, thin=thin)
    left = sorted({0, 1, 2, 7, 8} - {row for i in chosen for row in places[i]})
    assert [sorted(layer) for layer in result.probs] == [rows, rows, [row for row in rows if row not in left]]
    old = np.concatenate([parts[0].keys, np.zeros((3, 3, 2, 4)), parts[2].keys], axis=1)
    assert_array_equal(result.keys[2, left], old[2, left])
    assert_array_equal(result.keys[:2], whole.keys[:2])


# ---- CacheBlend ----


def test_deviation_is_of_values_unless_keys_are_asked_for_and_of_stored_rows_only():
    new = {0: (np.array([[1.0], [2.0]]), np.array([[3.0], [0.0]])), 1: (np.ones((2, 1)), np.ones((2, 1)))}
    stored = {0: (np.zeros((2, 1)), np.array([[1.0], [0.0]]))}
    assert cache_craft.deviation(new, stored) == {0: 4}  # (3 - 1)^2
    assert cache_craft.deviation(new, stored, keys=True) == {0: 9}  # 1 + 4 of the keys besides
    assert cache_craft.deviation(new, stored, keys=True, values=False) == {0: 5}


def test_the_count_is_rounded_down_and_the_suffix_is_always_in():
    rows = cache_craft.blend_rows({0: 1.0, 1: 3.0, 2: 2.0, 3: 3.0, 4: 0.0, 5: 9.0}, 0.5, 7, 2)
    assert rows == [1, 3, 5, 6]  # floor(.5 x 5) = 2 of rows 0..4, the last two besides


def test_the_codes_way_keeps_all_new_values_up_to_its_check_layer(tiny):
    result = tiny.run(thin=cache_craft.blend_once(14, 2, 1 / 3))
    assert [sorted(layer) for layer in result.probs] == [list(range(14))] * 2 + [[1, 5, 7, 9, 12, 13]]
    assert_array_equal(result.values[:2], tiny.full.values[:2])
    assert_array_equal(result.values[2, [0, 2, 3, 4]], tiny.old(2)[1][[0, 2, 3, 4]])
    assert_allclose(result.values[2, [1, 5, 7, 9, 12]], tiny.full.values[2, [1, 5, 7, 9, 12]], atol=1e-12)


def test_gradual_filtering_chooses_among_what_is_left(tiny):
    result = tiny.run(thin=cache_craft.blend_gradually(14, 2, [None, 11 / 12, 0.5]))
    kept = [sorted(set(layer) - {12, 13}) for layer in result.probs]
    assert [len(rows) for rows in kept] == [12, 12, 11]
    moved = {
        row: sum(
            ((new[1, row] - old[row]) ** 2).sum()
            for new, old in zip((tiny.full.keys, tiny.full.values), tiny.old(1), strict=True)
        )
        for row in range(12)
    }
    assert kept[2] == sorted(common.best(moved, 11))  # without row 11; by values alone, without row 10
    assert_allclose(tiny.error(thin=cache_craft.blend_gradually(14, 2, [None, None, None])), 0, atol=1e-12)


# ---- loading by layers ----


@pytest.mark.parametrize(
    "layers, compute, load, first, overlapped, after, at_once",
    [(32, 3, 16, 27, 528, 608, 515), (32, 3, 4, 9, 132, 224, 131), (80, 7, 4, 1, 564, 880, 564)],
)
def test_example_layers_to_load_first(layers, compute, load, first, overlapped, after, at_once):
    assert cache_craft.layers_first(layers, compute, load) == first
    assert cache_craft.load_and_compute(layers, compute, load, first) == (overlapped, 0)
    assert cache_craft.load_and_compute(layers, compute, load, layers) == (after, 0)
    assert cache_craft.load_and_compute(layers, compute, load, 1)[0] == at_once


def test_no_layer_waits_and_with_one_loaded_less_one_does():
    for layers in (1, 2, 5, 7):
        for compute in range(1, 7):
            for load in range(1, 7):
                first = cache_craft.layers_first(layers, compute, load)
                waits = [cache_craft.load_and_compute(layers, compute, load, f)[1] for f in range(1, layers + 1)]
                assert [wait == 0 for wait in waits] == [f >= first for f in range(1, layers + 1)]
                best = max(load + layers * compute, layers * load + compute)
                assert cache_craft.load_and_compute(layers, compute, load, 1)[0] == best


# ---- attention in two parts ----


def test_example_join_of_prefix_and_suffix():
    query = np.array([1.0, 2.0])
    prefix = np.array([[1, 0], [0, 1], [1, 1]]), np.array([[1, 0], [0, 1], [2, 2]])
    suffix = np.array([[2, 0], [-1, 1]]), np.array([[3, -1], [0, 4]])
    out_p, lse_p = cache_craft.attend_part(query, *prefix)
    out_s, lse_s = cache_craft.attend_part(query, *suffix)
    assert_allclose([*out_p, lse_p], [1.29197994, 1.4359461, 2.67301077], atol=5e-9)
    assert_allclose(lse_p / np.log(2), 3.85633937, atol=5e-9)
    assert_allclose([*out_s, lse_s], [2.00928465, 0.65119225, 1.81504709], atol=5e-9)

    out, lse = cache_craft.join([(out_p, lse_p), (out_s, lse_s)])
    assert_allclose([*out, lse], [1.50556815, 1.2022739, 3.02649790], atol=5e-9)
    whole = cache_craft.attend_part(query, *(np.concatenate(pair) for pair in zip(prefix, suffix, strict=True)))
    assert_allclose([*whole[0], whole[1]], [*out, lse], atol=1e-12)


def test_an_empty_part_changes_nothing_and_two_give_zeros():
    query, keys = np.array([1.0, 2.0]), np.array([[1.0, 0.0], [0.0, 1.0]])
    part, empty = cache_craft.attend_part(query, keys, keys), cache_craft.attend_part(query, keys[:0], keys[:0])
    assert_array_equal(cache_craft.join([empty, part])[0], part[0])
    out, lse = cache_craft.join([empty, empty])
    assert_array_equal(out, [0, 0])
    assert lse == -np.inf


def test_decoding_over_a_shared_prefix_is_prefill_of_the_whole(grouped):
    """Two requests share the rows of one prefix; each token is computed over them and over the request's own rows."""
    prefix = (3, 1, 4, 1)
    shared = cache_craft.cut(cache_craft.prefill(grouped.model, [Part(prefix)]), prefix, range(4))
    for suffix in ((5, 9, 2), (6, 5, 3, 5)):
        parts = [shared]
        for token in suffix:
            result = cache_craft.prefill(grouped.model, [*parts, Part((token,))])
            row = sum(len(part.tokens) for part in parts)
            parts.append(cache_craft.cut(result, (token,), range(row, row + 1)))
        whole = cache_craft.prefill(grouped.model, [Part(prefix + suffix)])
        assert_allclose(result.logits, whole.logits, atol=1e-12)
