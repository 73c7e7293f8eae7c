"""kvjax itself on the worked examples of the methods' specifications, number by number.

Some examples give queries, or probabilities that unit keys can be asked for: those go through `kvjax.attend`. Others
give keys, values and the attention that tokens received: those are handed to the policy as attention would hand them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import kvjax
from kvjax import codecs, folds, plans, policies
from kvjax.attention import attend_slots
from kvjax.cache import LayerShape, extend, resize
from kvjax.models.rope import rotate
from kvjax.policy import Mass, Masses, Seen, evict
from kvjax.scorers import attention_mass, protect, recency
from pallas_kernels.slot_attention.packed import unpack

ATTEND = jax.jit(kvjax.attend, static_argnames=("rope", "capacity"))
DIGITS = {"rtol": 0, "atol": 2e-6}  # the examples are printed with six digits, and kvjax computes in f32

# The attention of six queries, and of the steps after them over what is left, which several examples share.
MATRIX = [
    [1],
    [0.6, 0.4],
    [0.5, 0.2, 0.3],
    [0.4, 0.1, 0.3, 0.2],
    [0.3, 0.1, 0.4, 0.1, 0.1],
    [0.3, 0.1, 0.2, 0.1, 0.1, 0.2],
]
COLUMN_SUMS = [3.1, 0.9, 1.2, 0.4, 0.2, 0.2]
SIX = {0: 0.25, 2: 0.05, 4: 0.40, 5: 0.20, 6: 0.10}
SEVEN = {0: 0.05, 2: 0.00, 5: 0.90, 6: 0.03, 7: 0.02}
EIGHT = {0: 0.10, 5: 0.30, 6: 0.30, 7: 0.20, 8: 0.10}


# ---- helpers: one row, one kv head ----


def f32(x):
    return jnp.asarray(np.asarray(x, np.float32))


def seen_of(positions, k, mass):
    """What attention would say of tokens at `positions` with keys [T, D]; `mass` maps needs to [.., N]."""
    zeros = jnp.zeros((1, 1, 1, *k.shape))
    masses = Masses({need: x[None, None] for need, x in mass.items()})
    return Seen(positions[None], zeros, k[None, None], zeros, zeros[..., 0], masses)


def after_prompt(policy, k, v, mass, room=0):
    """The layer after a prompt of keys [n, D] and values, whose tokens received `mass`: {Mass: f32[.., n]}."""
    k, v, count = f32(k), f32(v), len(k)
    cache = policy.empty(LayerShape(1, 1, 0, k.shape[1], k.dtype, 0))
    cache = extend(cache, k[None, None], v[None, None], jnp.arange(count)[None])
    seen = seen_of(jnp.arange(count), k, {need: f32(x) for need, x in mass.items()})
    return policy.first(cache, seen, policy.capacity(count + room))


def after_step(policy, cache, now, k, v, probabilities):
    """The layer after one token more, whose query attends as {position: probability} says."""
    table = np.zeros(128)  # by position; none reaches the last one, where free slots read
    table[list(probabilities)] = list(probabilities.values())
    return later_call(policy, cache, jnp.asarray([now]), f32(k)[None], f32(v)[None], f32(table))


@jax.jit
def later_call(policy, cache, now, k, v, table):
    stored = policy.written(cache, k[None, None], v[None, None], now)
    held = policy.loaded(stored)
    seen = seen_of(now, k, dict.fromkeys(policy.needs, table[held.pos[0, 0]]))
    return policy.settled(policy.update(held, seen, cache.capacity), held, stored)


def attended(policy, q, k, v, calls, rope=None):
    """`kvjax.attend` call by call: out [B, T, Hq, D] and the layer. q [n, Hq, D], k [n, D], v [n, D] or [B, n, D]."""
    v = f32(v).reshape(-1, len(k), 1, len(k[0]))
    q, k = (jnp.broadcast_to(x, (len(v), *x.shape)) for x in (f32(q), f32(k)[:, None]))
    cache, start = None, 0
    for count in calls:
        now = slice(start, start + count)
        positions = jnp.broadcast_to(jnp.arange(len(k[0]))[now], (len(v), count))
        out, cache = ATTEND(
            q[:, now], k[:, now], v[:, now], cache, policy, positions=positions, rope=rope,
            capacity=len(k[0]) + 1 if policy.budget is None else None,
        )  # fmt: skip
        start += count
        yield np.asarray(out), cache


def asked(rows, values=None):
    """q, k and v of a stream whose query i attends as rows[i] says: unit keys, queries of log-probabilities."""
    count = len(rows)
    q, v = np.zeros((count, 1, count)), np.zeros((count, count))
    for i, row in enumerate(rows):
        for j, p in row.items() if isinstance(row, dict) else enumerate(row):
            q[i, 0, j] = np.sqrt(count) * np.log(max(p, 1e-30))
    if values is not None:
        v[:, : np.shape(values)[1]] = values
    return q, np.eye(count), v


def markers(positions, k):
    """Values [B, n, D], in row b those that are 1 for the token positions[b] alone: outputs are its probability."""
    return np.broadcast_to(np.eye(len(k))[positions][..., None], (len(positions), *np.shape(k)))


def held(cache, leaf):
    """Rows of a leaf, in the order of their positions, without free slots."""
    pos = np.asarray(cache.pos)[0, 0]
    return np.asarray(leaf)[0, 0][[i for i in np.argsort(pos) if pos[i] >= 0]]


def kept(cache):
    return held(cache, cache.pos).tolist()


# ---- h2o ----

H2O = policies.h2o(4, window=2)


def test_h2o_keeps_heavy_and_new_tokens_of_a_prompt():
    ((_, cache),) = attended(H2O, *asked(MATRIX), [6])
    assert kept(cache) == [0, 2, 4, 5]
    assert_allclose(held(cache, cache.stats["mass"]), [3.1, 1.2, 0.2, 0.2], **DIGITS)


def test_h2o_evicts_the_lightest_token_outside_the_window_in_each_step():
    _, *steps = attended(H2O, *asked([*MATRIX, SIX, SEVEN, EIGHT]), [6, 1, 1, 1])
    # before: 3.35 1.25 .60 .40 .10, and 4 goes though 5 is lighter; then 2 (1.25) before 5 (1.30); then 6 (.43)
    assert [kept(cache) for _, cache in steps] == [[0, 2, 5, 6], [0, 5, 6, 7], [0, 5, 7, 8]]
    masses = [[3.35, 1.25, 0.40, 0.10], [3.40, 1.30, 0.13, 0.02], [3.50, 1.60, 0.22, 0.10]]
    assert_allclose([held(cache, cache.stats["mass"]) for _, cache in steps], masses, **DIGITS)


def test_h2o_token_by_token_counts_probabilities_over_what_is_left():
    ((_, cache),) = attended(policies.h2o(4, window=2, prompt="greedy"), *asked(MATRIX), [6])
    assert kept(cache) == [0, 2, 4, 5]
    assert_allclose(held(cache, cache.stats["mass"]), [3.133333, 1.222222, 0.211111, 0.222222], **DIGITS)


def test_mass_alone_without_a_window_freezes_on_the_first_tokens():
    policy = evict(attention_mass(), budget=3)
    *_, last = calls = [cache for _, cache in attended(policy, *asked(MATRIX), [1] * 6)]
    assert [kept(cache) for cache in calls[2:]] == [[0, 1, 2]] * 4  # each later token is its own victim
    assert_allclose(held(last, last.stats["mass"]), [3.208333, 0.936111, 1.294444], **DIGITS)


def test_h2o_keeps_the_lower_position_of_equal_masses():
    cache = after_prompt(policies.h2o(3, window=1), np.zeros((4, 2)), np.zeros((4, 2)), {Mass(): np.ones(4)})
    assert kept(cache) == [0, 1, 3]


# ---- streaming_llm: one radian a position ----

STREAM_K = [(1, 0), (0, 1), (1, 1), (1, -1), (0.5, 0.5), (0, -1), (1, 0.5)]
STREAM_V = [(1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (3, 0), (0, 3)]
STREAM_Q = np.zeros((7, 1, 2))
STREAM_Q[6] = 1, 0.5
IN_HAND = [0, 1, 4, 5, 6]
STREAMING = policies.streaming_llm(4, sinks=2)
TRUE_PLACES = evict(protect(recency(), sinks=2), budget=4)  # the same tokens, not numbered anew


def test_streaming_llm_keeps_the_first_and_the_newest_tokens():
    prompt, step = (cache for _, cache in attended(STREAMING, STREAM_Q, STREAM_K, STREAM_V, [6, 1], kvjax.Rope()))
    assert kept(prompt) == [0, 1, 4, 5] and kept(step) == [0, 1, 5, 6]


@pytest.mark.parametrize("policy, out", [(STREAMING, (0.577893, 1.657214)), (TRUE_PLACES, (0.684210, 1.336880))])
def test_streaming_llm_attends_at_places_in_the_cache_and_not_at_true_positions(policy, out):
    _, (got, _) = attended(policy, STREAM_Q, STREAM_K, STREAM_V, [6, 1], kvjax.Rope())
    assert_allclose(got[0, 0, 0], out, **DIGITS)


@pytest.mark.parametrize(
    "policy, logits",
    [
        (STREAMING, [-0.194626, -0.250228, -0.059953, -0.786036, 0.883883]),
        (TRUE_PLACES, [0.777731, -0.577772, -0.059953, -0.786036, 0.883883]),  # only the sinks differ
    ],
)
def test_streaming_llm_has_the_logits_of_its_places(policy, logits):
    _, (got, _) = attended(policy, STREAM_Q, STREAM_K, markers(IN_HAND, STREAM_K), [6, 1], kvjax.Rope())
    p = got[:, 0, 0, 0]
    assert_allclose(np.log(p / p[4]), np.subtract(logits, logits[4]), **DIGITS)
    if policy is STREAMING:
        assert_allclose(p, [0.151885, 0.143671, 0.173781, 0.084076, 0.446587], **DIGITS)


def test_streaming_llm_numbers_the_tokens_in_hand_without_a_gap():
    pos = jnp.asarray([0, 1, 2, 3, 6, 7, 8, 9])[None, None]
    cache = dataclasses.replace(policies.full().empty(LayerShape(1, 1, 8, 2, jnp.float32, 0)), pos=pos)
    assert policies.streaming_llm(7, sinks=4).ranks(cache).tolist() == [[list(range(8))]]


# ---- d2o ----

D2O_K = [(1, 0), (0.8, 0.6), (0, 1), (-0.28, 0.96), (-1, 0), (0, -1)]
D2O_V = [(1, 0), (2, 2), (0, 2), (4, 0), (1, 1), (0, 1)]


def d2o_example(steps=0, **settings):
    policy = policies.d2o(4, window=2, sinks=1, **settings)
    cache = after_prompt(policy, D2O_K, D2O_V, {Mass(): COLUMN_SUMS})
    later = [(6, (0.6, -0.8), (5, 5), SIX), (7, (-0.6, 0.8), (1, -1), SEVEN)]
    for step in later[:steps]:
        cache = after_step(policy, cache, *step)
    return cache


def test_d2o_folds_what_reaches_the_mean_cosine_and_drops_the_rest():
    cache = d2o_example()
    assert kept(cache) == [0, 2, 4, 5]
    assert_allclose(cache.carry, 0.88, **DIGITS)  # (.80 + .96) / 2: token 1 is below it, token 3 above, and joins 2
    assert_allclose(held(cache, cache.k), [(1, 0), (-0.137200, 0.980400), (-1, 0), (0, -1)], **DIGITS)
    assert_allclose(held(cache, cache.v), [(1, 0), (1.960005, 1.019997), (1, 1), (0, 1)], **DIGITS)


def test_d2o_weighs_by_the_cosine_itself_as_the_published_code():
    cache = d2o_example(weights="code_mean")
    assert_allclose(held(cache, cache.k)[1], (-0.1344, 0.9608), **DIGITS)  # ((0, 1) + .96 k_3) / 2
    assert_allclose(held(cache, cache.v)[1], (1.92, 1.00), **DIGITS)


def test_d2o_drops_the_victim_of_a_step_that_is_below_the_moving_threshold():
    cache = d2o_example(1)
    assert kept(cache) == [0, 2, 5, 6]
    assert_allclose(cache.carry, 0.361015, **DIGITS)  # .3 x .88 + .7 x .138593, the cosine of 4 and the folded 2
    assert_allclose(held(cache, cache.stats["mass"]), [3.35, 1.25, 0.4, 0.1], **DIGITS)
    assert_allclose(held(cache, cache.k), [(1, 0), (-0.137200, 0.980400), (0, -1), (0.6, -0.8)], **DIGITS)


def test_d2o_moves_its_threshold_by_the_smoothing_it_is_given():
    assert_allclose(d2o_example(1, smoothing=0.5).carry, 0.509296, **DIGITS)


def test_d2o_folds_the_victim_of_a_step_into_a_new_token_that_is_like_it():
    cache = d2o_example(2)
    assert kept(cache) == [0, 5, 6, 7]
    assert_allclose(cache.carry, 0.721109, **DIGITS)  # below .875435, the cosine of 2 and 7
    assert_allclose(held(cache, cache.stats["mass"]), [3.40, 1.30, 0.13, 0.02], **DIGITS)
    assert_allclose(held(cache, cache.k)[3], (-0.382994, 0.884589), **DIGITS)
    assert_allclose(held(cache, cache.v)[3], (1.450146, -0.052825), **DIGITS)


def test_d2o_measures_the_density_of_a_layer_between_its_heads():
    columns = [COLUMN_SUMS, np.ones(6), [2, 1, 1, 1, 0.5, 0.5]]  # variances 1.22, 0, .3, scaled to .999999, 0, .245901
    cache = after_prompt(plans._measure(), np.zeros((6, 2)), np.zeros((6, 2)), {Mass(by_query_head=True): columns})
    assert_allclose(cache.carry, 0.415300, **DIGITS)


# ---- cam ----

CAM_V = [(1, 0), (2, 2), (0, 2), (4, 0), (1, 1), (0, 1)]
CAM = policies.cam(4, sinks=1, targets=2)  # all chances of the example are 1, whatever is drawn


def test_cam_gives_the_value_of_each_loser_to_the_two_tokens_after_it():
    *_, third, fourth, fifth = (cache for _, cache in attended(CAM, *asked(MATRIX, CAM_V), [1] * 6))
    assert [kept(cache) for cache in (third, fourth, fifth)] == [[0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]]
    assert_allclose(held(third, third.v)[:, :2], CAM_V[:4], **DIGITS)
    assert_allclose(held(fourth, fourth.v)[:, :2], [(1, 0), (1, 3), (5, 1), (1, 1)], **DIGITS)
    assert_allclose(held(fifth, fifth.v)[:, :2], [(1, 0), (5.5, 2.5), (1.5, 2.5), (0, 1)], **DIGITS)


def test_cam_attends_before_it_gives():
    *_, third, fourth, fifth = (out[0, 0, 0, :2] for out, _ in attended(CAM, *asked(MATRIX, CAM_V), [1] * 6))
    assert_allclose([third, fourth, fifth], [(1.4, 0.8), (1.0, 1.1), (1.222222, 1.111111)], **DIGITS)


def test_cam_leaves_the_masses_of_the_receivers_alone():
    *_, third, fourth, fifth = (cache for _, cache in attended(CAM, *asked(MATRIX, CAM_V), [1] * 6))
    masses = [[2.5, 0.7, 0.6, 0.2], [2.8, 1.0, 0.3, 0.1], [3.133333, 0.411111, 0.211111, 0.222222]]
    assert_allclose([held(cache, cache.stats["mass"]) for cache in (third, fourth, fifth)], masses, **DIGITS)


@pytest.mark.parametrize("losers", [1, 2])  # a step, and a call in which several may leave
@pytest.mark.parametrize(
    "masses, draw, gives",
    [
        ((0.3, 0.4, 0.8), 0.49, True),  # .3 / .6 = .5
        ((0.3, 0.4, 0.8), 0.50, False),
        ((0.3, 0.0, 0.0), 0.99, True),  # x / 0 is 1
        ((0.0, 0.0, 0.0), 0.00, False),  # 0 / 0 is 0
    ],
)
def test_cam_gives_where_the_draw_is_below_the_ratio_of_the_masses(masses, draw, gives, losers):
    k, v, alone = np.zeros((3, 2)), [(2, 2), (0, 0), (0, 0)], jnp.asarray([False, True, True])[None, None]
    cache = after_prompt(policies.cam(3, sinks=1), k, v, {Mass(): np.zeros(3)})
    cache = resize(cache, 3)
    mass, draws = f32(masses)[None, None], jnp.full((1, 1, 3), draw)
    given = folds.spread(
        cache, folds.gather_losers(cache, alone, losers), alone, mass, draws, 2, seen_of(jnp.array([2]), f32(k[:1]), {})
    )
    assert_allclose(given.v[0, 0, 1:], [(1, 1) if gives else (0, 0)] * 2)


# ---- kvmerger ----

RUNS_K = [(1, 0), (0.9, 0.1), (0.8, 0.3), (0, 1), (0.1, 0.9), (-1, 0.2), (0.5, 0.5), (0.4, 0.6)]
RUNS_V = [(1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (5, 5), (7, 0), (0, 7)]
RUNS_MASS = [1.5, 0.9, 1.1, 0.4, 0.7, 3.0, 0.6, 0.2]


def runs(values=RUNS_V, **settings):
    """The policy, and the layer after the prompt of the example: 5 is heavy, 6 and 7 are new."""
    settings = {"budget": 8, "rule": "threshold"} | settings
    policy = policies.kvmerger(window=2, heavy=1, **settings)
    return policy, after_prompt(policy, RUNS_K, values, {Mass(): RUNS_MASS})


def test_kvmerger_joins_runs_above_the_threshold_at_their_pivots():
    _, cache = runs()
    assert kept(cache) == [0, 4, 5, 6, 7]
    assert (1 + held(cache, cache.stats["joined"])).tolist() == [3, 2, 1, 1, 1]
    merged = [(0.966063, 0.034579), (0.098201, 0.901799)]
    assert_allclose(held(cache, cache.k), [*merged, *RUNS_K[5:]], **DIGITS)
    assert_allclose(held(cache, cache.v), [(1.339373, 0), (0, 1.982014), *RUNS_V[5:]], **DIGITS)


@pytest.mark.parametrize(
    "threshold, joined",  # cosines of the neighbours that may be joined: .993884 .969377 .351123 .993884
    [(0.9939, [1] * 8), (0.9938, [2, 1, 2, 1, 1, 1]), (0.9694, [2, 1, 2, 1, 1, 1]), (0.9693, [3, 2, 1, 1, 1])]
    + [(0.3512, [3, 2, 1, 1, 1]), (0.3511, [5, 1, 1, 1]), (-1.0, [5, 1, 1, 1])],
)
def test_kvmerger_compares_the_cosines_of_neighbours(threshold, joined):
    _, cache = runs(threshold=threshold)
    assert (1 + held(cache, cache.stats["joined"])).tolist() == joined


def test_kvmerger_weighs_by_a_kernel_as_wide_as_the_mean_distance():
    _, cache = runs(np.eye(8))  # unit values: what is merged are the weights
    weights = [[0.667049, 0.326530, 0.006421, 0, 0], [0, 0, 0, 0.017986, 0.982014]]
    assert_allclose(held(cache, cache.v)[:2, :5], weights, **DIGITS)


def test_kvmerger_weighs_by_a_kernel_of_a_given_width():
    _, cache = runs(np.eye(8), sigma=5.0)
    weights = [[0.333667, 0.333533, 0.332800, 0, 0], [0, 0, 0, 0.499900, 0.500100]]
    assert_allclose(held(cache, cache.v)[:2, :5], weights, **DIGITS)
    assert_allclose(held(cache, cache.k)[:2], [(0.900087, 0.133193), (0.050010, 0.949990)], **DIGITS)


def test_kvmerger_multiplies_values_by_the_length_of_the_run():
    _, cache = runs(value_scale="set_size")
    assert_allclose(held(cache, cache.v), [(4.018119, 0), (0, 3.964028), *RUNS_V[5:]], **DIGITS)


def test_kvmerger_joins_the_most_similar_neighbours_until_the_budget_holds_all():
    _, cache = runs(budget=6, rule="budget")
    assert kept(cache) == [0, 2, 4, 5, 6, 7]
    assert (1 + held(cache, cache.stats["joined"])).tolist() == [2, 1, 2, 1, 1, 1]
    wanted_k, wanted_v = np.array(RUNS_K)[kept(cache)], np.array(RUNS_V, float)[kept(cache)]
    wanted_k[[0, 2]], wanted_v[[0, 2]] = [(0.998201, 0.001799), (0.098201, 0.901799)], [(1.017986, 0), (0, 1.982014)]
    assert_allclose(held(cache, cache.k), wanted_k, **DIGITS)
    assert_allclose(held(cache, cache.v), wanted_v, **DIGITS)


@pytest.mark.parametrize(
    "settings, out",
    [
        ({"threshold": 1.0}, (2.073529, 1.455627)),  # joins nothing
        ({"count_bias": False}, (2.344467, 2.320580)),
        ({}, (1.761048, 1.556670)),
        ({"value_scale": "set_size", "count_bias": False}, (3.075177, 2.718288)),
    ],
)
def test_kvmerger_answers_a_query(settings, out):
    policy, cache = runs(**settings)
    q = f32([1, 0.5]).reshape(1, 1, 1, 1, 2) / np.sqrt(2)
    bias = None if policy.bias is None else policy.bias(cache, None)
    got = attend_slots(q, cache.k, cache.v, jnp.full((1, 1, 1), 8), cache.pos, bias=bias)
    assert_allclose(got.out.ravel(), out, **DIGITS)


def drifting_stream():
    """Rotated q [20, 544, 64], k and v [20, 512, 64]: keys that change slowly, and 32 queries after them."""
    rows = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        k, q, v = (rng.standard_normal((n, 64)) for n in (512, 544, 512))
        for i in range(1, 512):
            k[i] = 0.95 * k[i - 1] + np.sqrt(1 - 0.95**2) * k[i]
        rows.append((2 * q, k, v))
    q, k, v = (f32(np.stack(part)) for part in zip(*rows, strict=True))
    cos, sin = kvjax.Rope().angles(jnp.arange(544), 64)
    return rotate(q, cos, sin), rotate(k, cos[:512], sin[:512]), v


def test_kvmerger_loses_less_than_eviction_where_keys_drift_if_runs_are_counted():
    q, k, v = drifting_stream()
    later = jnp.broadcast_to(512 + jnp.arange(32), (20, 1, 32))

    def answers(policy):
        _, cache = kvjax.attend(
            q[:, :512, None], k[:, :, None], v[:, :, None], None, policy, positions=jnp.tile(jnp.arange(512), (20, 1))
        )
        bias = None if policy.bias is None else policy.bias(cache, None)
        return np.asarray(attend_slots(q[:, None, None, 512:] / 8, cache.k, cache.v, later, cache.pos, bias=bias).out)

    exact = answers(policies.full())

    def errors(policy):
        difference = (answers(policy) - exact).reshape(20, -1)
        return np.linalg.norm(difference, axis=1) / np.linalg.norm(exact.reshape(20, -1), axis=1)

    def merged(sigma, value_scale, count_bias):
        return errors(
            policies.kvmerger(256, window=87, heavy=61, sigma=sigma, value_scale=value_scale, count_bias=count_bias)
        )

    kinds = [("set_size", False), ("mean", False), ("mean", True)]
    evicted = errors(policies.h2o(256, window=128))
    near = [merged("mean_dist", *kind) for kind in kinds]
    wide = [merged(5.0, *kind) for kind in kinds]
    means = [x.mean() for x in (evicted, *near, *wide)]
    assert_allclose(means, [0.932, 1.659, 0.902, 0.708, 1.300, 0.873, 0.596], atol=6e-4)  # printed with three digits
    set_size, mean, counted = near
    assert (counted < evicted).all() and (counted < mean).all() and (mean < set_size).all()


# ---- ems ----

EMS_K = [(2, 0), (1.6, 1.2), (0, 1), (-0.28, 0.96), (-1, 0), (0, -1)]
EMS_V = [(1, 0), (2, 1), (0, 2), (1, -1), (1, 1), (0, 1)]
EMS_MASS = {Mass(): COLUMN_SUMS, Mass(2): [0.6, 0.2, 0.6, 0.2, 0.2, 0.2]}
EMS_SEVEN = {0: 0.1, 2: 0.05, 4: 0.5, 5: 0.05, 6: 0.2, 7: 0.1}


def ems_example(steps=0, prompt=None, **settings):
    """After the prompt, or a block of steps after it; `settings` hold for the steps, and `prompt` for the prompt."""
    policy = policies.ems(4, window=2, merge=2, **settings)
    before = policies.ems(4, window=2, merge=2, **(settings if prompt is None else prompt))
    cache = after_prompt(before, EMS_K, EMS_V, EMS_MASS)
    for now, probabilities in [(6, SIX), (7, EMS_SEVEN)][:steps]:
        cache = after_step(policy, cache, now, (1, 1), (1, 1), probabilities)
    return cache


def test_ems_keeps_centres_and_window_and_merges_by_score():
    cache = ems_example()
    assert kept(cache) == [0, 2, 4, 5]
    # 1 joins 0 at scores .9 and 3.1; 3 is like no centre
    assert_allclose(held(cache, cache.k), [(1.980312, 0.279939), (0, 1), (-1, 0), (0, -1)], **DIGITS)
    assert_allclose(held(cache, cache.v), [(1.225, 0.225), (0, 2), (1, 1), (0, 1)], **DIGITS)
    assert_allclose(held(cache, cache.stats["global"]), [4.0, 1.2, 0.2, 0.2], **DIGITS)


def test_ems_keeps_the_length_of_a_merged_key():
    cache = ems_example()
    assert_allclose(np.linalg.norm(held(cache, cache.k)[0]), 2, **DIGITS)


@pytest.mark.parametrize("similar, mass", [(0.7155, 4.0), (0.7156, 3.1)])  # cosines .8 x .894427 = .715542
def test_ems_compares_the_product_of_the_cosines(similar, mass):
    cache = ems_example(similar=similar)
    assert_allclose(held(cache, cache.stats["global"])[0], mass, **DIGITS)


@pytest.mark.parametrize(
    "keep, mass",  # shares .484375 .765625 .906250 1: .9 needs three tokens, two of them centres
    [(0.95, 3.1 + 0.9 + 0.4), (0.9, 3.1 + 0.9)],
)
def test_ems_drops_what_the_share_of_importance_does_not_need(keep, mass):
    cache = ems_example(keep=keep, similar=0.0)  # anything joins, negative cosines as 0
    assert_allclose(held(cache, cache.stats["global"])[0], mass, **DIGITS)


def test_ems_compresses_again_when_the_block_is_full():
    before, after = ems_example(1), ems_example(2)
    assert kept(before) == [0, 2, 4, 5, 6] and kept(after) == [0, 4, 6, 7]
    assert_allclose(held(before, before.stats["local"]), list(SIX.values()), **DIGITS)
    assert_allclose(held(after, after.stats["global"]), [4.35, 1.10, 0.30, 0.10], **DIGITS)
    assert_allclose(after.stats["local"], 0)
    assert_allclose(held(after, after.k), [(1.980312, 0.279939), (-1, 0), (1, 1), (1, 1)], **DIGITS)
    assert_allclose(held(after, after.v), [(1.225, 0.225), (1, 1), (1, 1), (1, 1)], **DIGITS)


def test_ems_chooses_a_centre_for_its_local_score():
    # scores 4.35 1.30 3.42 .95: by the global one alone, 4.35 1.30 1.10 .45, token 2 would stay instead of 4
    assert kept(ems_example(2, combine="global")) == [0, 2, 6, 7]
    assert kept(ems_example(2)) == [0, 4, 6, 7]


@pytest.mark.parametrize("similar, mass", [(0.0252, 4.35 + 1.30), (0.0253, 4.35)])  # .025286, of 2 and the merged 0
def test_ems_compares_with_merged_centres(similar, mass):
    cache = ems_example(2, prompt={}, similar=similar)
    assert_allclose(held(cache, cache.stats["global"])[0], mass, **DIGITS)


# ---- elastic_cache ----

ANCHOR_MASS = [4, 1.2, 2.5, 0.6, 0.9, 1.8, 0.3, 0.8, 1.4, 0.5]


def line(count):
    """Keys [count, 1] of 10 j, and values of j."""
    return 10.0 * np.arange(count)[:, None], np.arange(float(count))[:, None]


def elastic_steps(policy, prompt, mass, steps):
    """The layers after the prompt and after each step."""
    cache = after_prompt(policy, *line(prompt), {Mass(): mass}, room=steps)
    yield cache
    for now in range(prompt, prompt + steps):
        cache = after_step(policy, cache, now, [10.0 * now], [float(now)], {})
        yield cache


def test_elastic_cache_averages_each_token_into_the_nearest_anchor():
    (cache,) = elastic_steps(policies.elastic_cache(0.5), 10, ANCHOR_MASS, 0)
    assert kept(cache) == [0, 2, 5, 8, 9]  # 1 and 3 join 2, 4 and 6 join 5, 7 joins 8
    assert_allclose(held(cache, cache.k)[:, 0], [0, 20, 50, 75, 90], **DIGITS)
    assert_allclose(held(cache, cache.v)[:, 0], [0, 2, 5, 7.5, 9], **DIGITS)


def test_elastic_cache_gives_the_token_in_the_middle_to_the_left_anchor():
    (cache,) = elastic_steps(policies.elastic_cache(0.5), 8, [1, 0, 5, 0, 0, 0, 5, 1], 0)
    assert kept(cache) == [0, 2, 6, 7]
    assert_allclose(held(cache, cache.k)[:, 0], [0, 25, 55, 70], **DIGITS)  # 10 20 30 40, and 50 60


def test_elastic_cache_repeats_the_slips_of_the_published_code():
    (cache,) = elastic_steps(policies.elastic_cache(0.5, selection="official"), 10, ANCHOR_MASS, 0)
    assert kept(cache) == [0, 3, 6, 9]  # 0, 1, 3 itself and 4 join 3; 6 itself and 7 join 6
    assert_allclose(held(cache, cache.k)[:, 0], [0, 22, 63.333333, 90], **DIGITS)


def test_elastic_cache_drops_the_oldest_token_behind_the_fixed_place():
    caches = list(elastic_steps(policies.elastic_cache(0.5, distance=2), 10, ANCHOR_MASS, 8))
    held_then = [set(kept(cache)) for cache in caches]
    assert [len(now) for now in held_then[1:]] == [6, 6, 7, 7, 8, 8, 9, 9]
    gone = {i: held_then[i - 1] - held_then[i] for i in range(1, 9) if held_then[i - 1] - held_then[i]}
    assert gone == {2: {8}, 4: {9}, 6: {10}, 8: {11}}
    assert kept(caches[-1]) == [0, 2, 5, 12, 13, 14, 15, 16, 17]


def test_elastic_cache_leaves_the_merged_prompt_alone_while_answering():
    *_, last = elastic_steps(policies.elastic_cache(0.5, distance=2), 10, ANCHOR_MASS, 8)
    assert_allclose(held(last, last.k)[:3, 0], [0, 20, 50], **DIGITS)


@pytest.mark.parametrize(
    "pruned, stay, drops, length",
    [
        (0.2, 80, [5, 10, 15, 20], 96),
        (0.5, 50, list(range(2, 21, 2)), 60),
        (0.8, 20, [2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19, 20], 24),
    ],
)
def test_elastic_cache_drops_on_schedule(pruned, stay, drops, length):
    sizes = [len(kept(cache)) for cache in elastic_steps(policies.elastic_cache(pruned), 100, np.ones(100), 20)]
    assert (sizes[0], sizes[-1]) == (stay, length)
    assert [i for i in range(1, 21) if sizes[i] == sizes[i - 1]] == drops


# ---- think ----

THINK = policies.think(2, recent=1, window=2)
THINK_K = [(1, 0.5, 0, 2), (0, 1, 1, 2), (1, 0, 2, 0), (2, 1, 1, 1), (0.5, 0.5, 0.5, 0.5)]
THINK_V = [(1, 0), (0, 1), (1, 1), (2, 0), (0, 3)]
THINK_Q = np.zeros((5, 2, 4))  # two query heads; the last two of the prompt choose
THINK_Q[2:] = [[(1, 0, 2, 1), (0, 1, 2, 0)], [(1, 1, 0, 0), (2, 0, 1, 1)], [(1, 0.5, -1, 2)] * 2]


def test_think_prunes_all_keys_of_the_prompt_but_the_newest():
    (_, cache), _ = attended(THINK, THINK_Q, THINK_K, np.pad(THINK_V, [(0, 0), (0, 2)]), [4, 1])
    assert cache.low.fitted[1].tolist() == [[[0, 2]]]
    assert kept(cache) == [3] and kept(cache.low) == [0, 1, 2]
    assert held(cache, cache.k).tolist() == [[2, 1, 1, 1]]
    assert held(cache.low, cache.low.k).tolist() == [[1, 0], [0, 1], [1, 2]]


@pytest.mark.parametrize("policy, out", [(THINK, (1.312822, 0.650266)), (policies.full(), (0.932769, 0.430604))])
def test_think_answers_with_thin_and_whole_keys_under_one_softmax(policy, out):
    _, (got, _) = attended(policy, THINK_Q, THINK_K, np.pad(THINK_V, [(0, 0), (0, 2)]), [4, 1])
    assert_allclose(got[0, 0, :, :2], [out] * 2, **DIGITS)


@pytest.mark.parametrize(
    "policy, logits", [(THINK, [0.5, -0.5, -0.5, 1.75, 0.625]), (policies.full(), [2.625, 1.75, -0.5, 1.75, 0.625])]
)
def test_think_scales_thin_logits_by_the_whole_width(policy, logits):
    _, (got, _) = attended(policy, THINK_Q, THINK_K, markers(range(5), THINK_K), [4, 1])
    p = got[:, 0, 0, 0]
    assert_allclose(np.log(p / p[4]), np.subtract(logits, logits[4]), **DIGITS)
    if policy is THINK:
        assert_allclose(p, [0.157251, 0.057849, 0.057849, 0.548861, 0.178189], **DIGITS)


# ---- mikv ----

MIKV_MASS = [5, 0.2, 1.1, 0.4, 2, 0.3, 0.9, 0.1, 0.2, 0.1]
MIKV_STEPS = [  # what the high tokens receive; then the high tier, and its masses
    ({0: 0.30, 4: 0.10, 8: 0.05, 9: 0.20, 10: 0.10}, {0: 5.30, 4: 2.10, 9: 0.30, 10: 0.10}),  # 8 (.25) goes
    ({0: 0.20, 4: 0.10, 9: 0.05, 10: 0.30, 11: 0.15}, {0: 5.50, 4: 2.20, 10: 0.40, 11: 0.15}),  # 9 (.35)
    ({0: 0.20, 4: 0.10, 10: 0.30, 11: 0.05, 12: 0.10}, {0: 5.70, 4: 2.30, 10: 0.70, 11: 0.20, 12: 0.10}),  # none
    (
        {0: 0.10, 4: 0.10, 10: 0.05, 11: 0.02, 12: 0.30, 13: 0.20},
        {0: 5.80, 4: 2.40, 10: 0.75, 12: 0.40, 13: 0.20},  # 11 (.22)
    ),
]


def mikv_layers(steps):
    """The layers after a prompt of 10 and after each step; keys and values do not matter."""
    policy, zeros = policies.mikv(0.4, group=4), np.zeros((10, 4))
    cache = after_prompt(policy, zeros, zeros, {Mass(): MIKV_MASS}, room=len(steps))
    yield cache
    for now, probabilities in enumerate(steps, 10):
        cache = after_step(policy, cache, now, zeros[0], zeros[0], probabilities)
        yield cache


def test_mikv_keeps_attended_and_new_tokens_of_the_prompt_high():
    (cache,) = mikv_layers([])
    assert kept(cache) == [0, 4, 8, 9] and kept(cache.low) == [1, 2, 3, 5, 6, 7]


def test_mikv_demotes_the_least_attended_token_that_is_not_new():
    _, *layers = mikv_layers([probabilities for probabilities, _ in MIKV_STEPS])
    for cache, (_, high) in zip(layers, MIKV_STEPS, strict=True):
        assert kept(cache) == list(high)
        assert_allclose(held(cache, cache.stats["mass"]), list(high.values()), **DIGITS)


def test_mikv_takes_up_in_the_low_tier_what_it_demotes():
    _, *layers = mikv_layers([probabilities for probabilities, _ in MIKV_STEPS])
    low = [1, 2, 3, 5, 6, 7]
    assert [kept(cache.low) for cache in layers] == [[*low, 8], [*low, 8, 9], [*low, 8, 9], [*low, 8, 9, 11]]


def test_mikv_holds_six_high_tokens_and_three_new_ones_of_fifteen_and_sixteen():
    *_, fifteen, sixteen = mikv_layers([probabilities for probabilities, _ in MIKV_STEPS] + [{}, {}])
    assert kept(fifteen) == [0, 4, 10, 12, 13, 14]
    assert kept(sixteen) == [0, 4, 10, 13, 14, 15]  # 12 (.40) goes: 13 (.20) is new


BALANCE_Q = f32([[4, 0.5, -2, 8], [0, 1, 0, 0]]).reshape(1, 1, 1, 2, 4)
BALANCE_K = f32([[1, -4, 0.5, 0.25], [0, 0, 2, 0.5]]).reshape(1, 1, 2, 4)


@pytest.mark.parametrize(
    "codec, codes, back, logit",  # unrounded, the logit is 3
    [
        (codecs.integer(2, group=4), [3, 0, 3, 3], [1.000977, -4, 1.000977, 1.000977], 8.009766),
        (
            codecs.pipe(codecs.balance(), codecs.integer(2, group=4)),
            [3, 0, 2, 2],
            [1.999023, -2, 0.666016, 0.666016],
            1.998047,
        ),
    ],
)
def test_mikv_rounds_better_what_is_balanced(codec, codes, back, logit):
    fitted = codec.fit(BALANCE_K, jnp.ones((1, 1, 2), bool), BALANCE_Q, jnp.ones((1, 2), bool))
    stored = codec.store(codec.project(BALANCE_K, fitted))
    q = BALANCE_Q if codec.query is None else codec.query(BALANCE_Q, fitted)
    loaded = codec.load(stored)[0, 0, 0]
    assert unpack(stored.codes[0, 0, 0], 2, 4).tolist() == codes
    assert_allclose(loaded, back, **DIGITS)
    assert_allclose(q[0, 0, 0, 0] @ loaded, logit, **DIGITS)


def test_mikv_balances_queries_and_keys_to_the_same_maxima():
    scale = codecs.balance().fit(BALANCE_K, jnp.ones((1, 1, 2), bool), BALANCE_Q, jnp.ones((1, 2), bool))
    assert_allclose(scale[0, 0], [2, 0.5, 1, 4], **DIGITS)  # roots of 4/1, 1/4, 2/2, 8/.5


# ---- kivi ----

BLOCK = np.array([(1, 10, 0.2, -0.3), (1.5, 12, 0.1, 0.4), (2.5, 10.5, -0.2, 0.3), (4, 13, 0.3, 0.1)])


def kivi_layer():
    """Keys and values of 20 tokens as held by kivi, 16 keys and 4 values of them rounded; zeros beside the example."""
    policy = policies.kivi(2, group=4, residual=16)
    x = np.zeros((20, 16))
    x[:4, :4] = BLOCK
    return policy.loaded(after_prompt(policy, x, x, {}))


def test_kivi_rounds_keys_by_channel():
    k = kivi_layer().k[0, 0, :4, :4]
    assert k[:, :2].tolist() == [[1, 10], [1, 12], [3, 10], [4, 13]]
    assert_allclose(np.abs(k - BLOCK).mean(), 0.110417, **DIGITS)


def test_kivi_rounds_values_by_token():
    assert_allclose(np.abs(kivi_layer().v[0, 0, :4, :4] - BLOCK).mean(), 0.341977, **DIGITS)


def test_kivi_packs_the_tokens_of_a_channel_into_a_word():
    stored = codecs.by_channel(codecs.integer(2, group=4), 4).store(f32(BLOCK)[None, None])
    words, steps, minima = (leaf.ravel()[:2].tolist() for leaf in (stored.codes, stored.step, stored.low))
    assert words == [0xE0, 0xC8]  # codes 0 0 2 3 and 0 2 0 3, the first in the lowest bits
    assert (steps, minima) == ([1, 1], [1, 10])
