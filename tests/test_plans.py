"""Budgets by layer: real capacities, the numbers of D2O's paper, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import plans, policies
from kvjax.models import llama
from tests.methods import kept_positions
from tests.oracles import d2o
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS, TOKENS, LENGTHS = random_params(), random_tokens(3, 24), (24, 13, 3)
H2O, TOVA = policies.h2o(10, window=4), policies.tova(6)


def test_layers_hold_what_their_own_policy_holds():
    plan = plans.by_layer([H2O, TOVA])
    assert plan is plans.by_layer([H2O, TOVA])
    out = kvjax.decode(PARAMS, plan, TOKENS, lengths=LENGTHS, max_new_tokens=5)
    assert [layer.slots for layer in out.cache.layers] == [11, 7]
    _, alike = kvjax.prefill(PARAMS, H2O, TOKENS, lengths=LENGTHS)
    _, cache = kvjax.prefill(PARAMS, plan, TOKENS, lengths=LENGTHS)
    for b in range(3):
        assert kept_positions(cache.layers[0], b) == kept_positions(alike.layers[0], b)
    slot = 2 * CONFIG.head_dim * 4 + 4
    assert kvjax.nbytes(cache) == 3 * CONFIG.kv_heads * (11 * (slot + 4) + 7 * slot) + 4 * 3
    assert "by_layer(1 h2o(budget=10, window=4) + 1 tova(budget=6))" in str(kvjax.report(cache))


def test_a_plan_of_one_policy_is_that_policy():
    want = kvjax.decode(PARAMS, H2O, TOKENS, lengths=LENGTHS, max_new_tokens=6)
    plan = plans.by_layer([H2O] * CONFIG.layers)
    got = kvjax.decode(PARAMS, plan, TOKENS, lengths=LENGTHS, max_new_tokens=6)
    assert_array_equal(got.tokens, want.tokens)
    assert_allclose(got.logits, want.logits, atol=1e-5)


def test_full_layers_grow_beside_bounded_ones_and_turns_and_chunks_go_on():
    plan = plans.by_layer([policies.full(), H2O])
    _, cache = kvjax.prefill(PARAMS, plan, TOKENS, chunk=8)
    out = kvjax.decode(PARAMS, plan, TOKENS[:, :5], cache=cache, max_new_tokens=4)
    assert [layer.slots for layer in out.cache.layers] == [33, 11]
    with pytest.raises(ValueError, match="full.. frees none"):
        kvjax.step(PARAMS, plan, TOKENS[:, 0], out.cache)


def probabilities(q, k, length):
    """Causal attention f64[Hq, n, n] of un-rotated q [n, Hq, D] and k [n, H, D] of the tiny model."""
    cos, sin = (np.asarray(part)[:, None] for part in CONFIG.rope.angles(jnp.arange(length), CONFIG.head_dim))

    def turn(x):
        one, two = np.split(np.asarray(x[:length], np.float64), 2, axis=-1)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    q, k = turn(q), np.repeat(turn(k), CONFIG.q_heads // CONFIG.kv_heads, axis=1)
    logits = np.einsum("ihd,jhd->hij", q, k) / CONFIG.head_dim**0.5
    p = np.where(np.tri(length, dtype=bool), np.exp(logits), 0.0)
    return p / p.sum(axis=-1, keepdims=True)


def test_density_is_the_oracles():
    got = plans.density(PARAMS, TOKENS, lengths=LENGTHS)
    assert got.shape == (CONFIG.layers,) and ((got >= 0) & (got <= 1)).all()
    _, q, k, *_ = llama.project(PARAMS.blocks[0], llama.embed(PARAMS, TOKENS), CONFIG, None)
    wanted = [d2o.density(probabilities(q[b], k[b], length)) for b, length in enumerate(LENGTHS)]
    assert_allclose(got[0], np.mean(wanted), rtol=1e-3)  # scaling to 0..1 enlarges what f32 rounds


@pytest.mark.parametrize("share, sizes", [(0.1, [13, 11, 9, 6]), (0.3, [41, 33, 27, 18])])
def test_d2o_gives_the_budgets_of_the_worked_example(share, sizes):
    density = [0.1, 0.3, 0.5, 0.9]
    plan = plans.d2o(density, 101, heavy=share, window=share, exempt=())
    assert [part.name for part in plan.layers] == [f"d2o(budget={2 * size}, window={size})" for size in sizes]
    assert d2o.allocate(density, share, share, 101, exempt=()) == [(size, size) for size in sizes]


def test_d2o_leaves_out_the_exempt_layers_and_rounds_up():
    plan = plans.d2o([0.5] * 6, 1000, multiple=64)
    assert [part.budget for part in plan.layers] == [None, None, 256, 256, 256, None]


def test_pyramidkv_keeps_the_total():
    budgets = [part.budget for part in plans.pyramidkv(30, 256).layers]
    assert sum(budgets) == 30 * 256 and budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == 64 + 10
    assert {part.budget for part in plans.pyramidkv(4, 100, window=10, steepness=1).layers} == {100}
    for layers, budget, window in ((30, 66, 64), (30, 70, 64), (8, 40, 30), (1, 9, 8)):  # hardly a slot for each
        budgets = [part.budget for part in plans.pyramidkv(layers, budget, window=window).layers]
        assert sum(budgets) == layers * budget and min(budgets) > window


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: plans.by_layer([]), "there is no policy"),
        (lambda: plans.by_layer([H2O, "tova"]), "is no policy"),
        (lambda: plans.by_layer([plans.by_layer([H2O])]), "itself made of 1 policies"),
        (lambda: kvjax.prefill(PARAMS, plans.by_layer([H2O] * 3), TOKENS), "for 3 layers, and this model has 2"),
        (lambda: kvjax.empty_cache(PARAMS, plans.by_layer([H2O]), 1), "for 1 layers, and this model has 2"),
        (lambda: plans.d2o([np.nan, 1], 100), "a number for each layer"),
        (lambda: plans.d2o([0.5] * 4, 100, heavy=0.9, window=0.2), "together at most 1"),
        (lambda: plans.d2o([0.5] * 4, 100, heavy=np.nan), "heavy=nan must be a finite number above 0 and below 1"),
        (lambda: plans.d2o([0.5] * 4, 100, window="x"), "window='x' must be a finite number"),
        (lambda: plans.d2o([0.5] * 4, 100, sinks=2.5), "sinks=2.5 must be a whole number"),
        (lambda: plans.d2o([0.5] * 4, 100, exempt=(0.5,)), "exempt=0.5 must be a whole number. It lists layers"),
        (lambda: plans.d2o([0.5] * 4, 100, exempt=(4,)), r"exempt=\(4,\) must be layers of 4"),
        (lambda: plans.pyramidkv(4, 64), r"window=64 is outside 1\.\.63"),
        (lambda: plans.pyramidkv(4, 100, steepness=0.5), "steepness=0.5 must be a finite number at least 1"),
        (lambda: plans.pyramidkv(4, 100, steepness=None), "steepness=None must be a finite number"),
        (lambda: plans.pyramidkv(4, 100, window=np.nan), "window=nan must be a whole number"),
    ],
)
def test_plans_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_attend_wants_the_policy_of_its_layer():
    x = jnp.ones((1, 2, 2, 8))
    with pytest.raises(ValueError, match=r"policy\.layers"):
        kvjax.attend(x, x, x, None, plans.by_layer([H2O]), positions=jnp.array([[0, 1]]))


def test_a_plan_is_traced_once():
    plan = plans.by_layer([H2O, TOVA])
    _, cache = kvjax.prefill(PARAMS, plan, TOKENS)
    step = jax.jit(lambda *args: kvjax.step(*args), donate_argnums=3)  # jit of the function itself shares its programs
    for token in random_tokens(3, 4).T:
        logits, cache = step(PARAMS, plan, token, cache)
    assert step._cache_size() == 1 and np.isfinite(logits).all()
