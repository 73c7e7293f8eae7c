"""The KVMerger oracle against the worked examples of its specification, examples by hand, and its properties."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import full, kvmerger
from tests.oracles.kvmerger import Slot
from tests.test_oracles import GROUP, KV_HEADS, close, heads_together, make_stream, planted, rotate

KEYS = np.array([(1, 0), (0.9, 0.1), (0.8, 0.3), (0, 1), (0.1, 0.9), (-1, 0.2), (0.5, 0.5), (0.4, 0.6)])
VALUES = np.array([(1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (5, 5), (7, 0), (0, 7)], float)
MASSES = [1.5, 0.9, 1.1, 0.4, 0.7, 3.0, 0.6, 0.2]
PARTS = dict(window=2, heavy=1)


def slots_of(keys, values, masses, counts=None):
    counts = counts or [1] * len(keys)
    rows = zip(np.asarray(keys, float), np.asarray(values, float), masses, counts, strict=True)
    return [Slot(p, key, value, count, mass) for p, (key, value, mass, count) in enumerate(rows)]


EXAMPLE = slots_of(KEYS, VALUES, MASSES)


def columns(slots):
    """positions, counts, keys, values"""
    return (
        [slot.position for slot in slots],
        [slot.count for slot in slots],
        np.stack([slot.key for slot in slots]),
        np.stack([slot.value for slot in slots]),
    )


def intervals(sets):
    return [(members[0], members[-1]) for members in sets]


# ---- worked examples ----


def test_example_links():
    assert kvmerger.protected(EXAMPLE, **PARTS) == {5, 6, 7}
    assert_allclose(
        [kvmerger.cosine(a, b) for a, b in zip(KEYS, KEYS[1:], strict=False)],
        [0.993884, 0.969377, 0.351123, 0.993884, 0.086630, -0.554700, 0.980581],
        atol=1e-6,
    )


def test_example_threshold():
    sets = kvmerger.merging_sets(EXAMPLE, {5, 6, 7}, rule="threshold", eps=0.75)
    assert sets == [[0, 1, 2], [3, 4], [5], [6], [7]]
    runs = [[EXAMPLE[i] for i in members] for members in sets]
    assert_allclose([kvmerger.bandwidth(run, "mean_dist") for run in runs], [0.118317, 0.05, 0, 0, 0], atol=1e-6)
    w = [x for run in runs for x in kvmerger.kernel_weights(run, "mean_dist")]
    assert_allclose(w, [0.667049, 0.326530, 0.006421, 0.017986, 0.982014, 1, 1, 1], atol=1e-6)

    after = kvmerger.compress(EXAMPLE, budget=8, rule="threshold", **PARTS)
    positions, counts, keys, values = columns(after)
    assert positions == [0, 4, 5, 6, 7] and counts == [3, 2, 1, 1, 1]
    assert_allclose(keys[:2], [(0.966063, 0.034579), (0.098201, 0.901799)], atol=1e-6)
    assert_allclose(values[:2], [(1.339373, 0), (0, 1.982014)], atol=1e-6)
    assert after[2:] == EXAMPLE[5:]
    scaled = kvmerger.compress(EXAMPLE, budget=8, rule="threshold", value_scale="set_size", **PARTS)
    assert_allclose(columns(scaled)[3][:2], [(4.018119, 0), (0, 3.964028)], atol=1e-6)


def test_example_fixed_sigma():
    w = [x for run in (EXAMPLE[:3], EXAMPLE[3:5]) for x in kvmerger.kernel_weights(run, 5.0)]
    assert_allclose(w, [0.333667, 0.333533, 0.332800, 0.499900, 0.500100], atol=1e-6)
    _, _, keys, _ = columns(kvmerger.compress(EXAMPLE, budget=8, rule="threshold", sigma=5.0, **PARTS))
    assert_allclose(keys[:2], [(0.900087, 0.133193), (0.050010, 0.949990)], atol=1e-6)


def test_example_budget():
    sets = kvmerger.merging_sets(EXAMPLE, {5, 6, 7}, merges=2)
    assert sets == [[0, 1], [2], [3, 4], [5], [6], [7]]
    w = [x for members in sets for x in kvmerger.kernel_weights([EXAMPLE[i] for i in members], "mean_dist")]
    assert_allclose(w, [0.982014, 0.017986, 1, 0.017986, 0.982014, 1, 1, 1], atol=1e-6)
    after = kvmerger.compress(EXAMPLE, budget=6, **PARTS)
    positions, counts, keys, values = columns(after)
    assert positions == [0, 2, 4, 5, 6, 7] and counts == [2, 1, 2, 1, 1, 1]
    assert_allclose(keys[[0, 2]], [(0.998201, 0.001799), (0.098201, 0.901799)], atol=1e-6)
    assert_allclose(values[[0, 2]], [(1.017986, 0), (0, 1.982014)], atol=1e-6)
    assert [after[i] for i in (1, 3, 4, 5)] == [EXAMPLE[i] for i in (2, 5, 6, 7)]


@pytest.mark.parametrize(
    "value_scale, count_bias, wanted",
    [
        ("mean", False, (2.344467, 2.320580)),
        ("mean", True, (1.761048, 1.556670)),
        ("set_size", False, (3.075177, 2.718288)),
    ],
)
def test_example_query(value_scale, count_bias, wanted):
    query = np.array([1, 0.5])
    assert_allclose(kvmerger.attend(query, EXAMPLE)[0], (2.073529, 1.455627), atol=1e-6)
    after = kvmerger.compress(EXAMPLE, budget=8, rule="threshold", value_scale=value_scale, **PARTS)
    assert_allclose(kvmerger.attend(query, after, count_bias=count_bias)[0], wanted, atol=1e-6)


def controlled_errors(seed):
    """Relative errors of the 32 queries after the prompt, by what was done to it."""
    n, later, dim = 512, 32, 64
    rng = np.random.default_rng(seed)
    k, q, v = rng.normal(size=(n, dim)), rng.normal(size=(n + later, dim)), rng.normal(size=(n, dim))
    for i in range(1, n):
        k[i] = 0.95 * k[i - 1] + np.sqrt(1 - 0.95**2) * k[i]
    q, k = rotate(2 * q, np.arange(n + later)), rotate(k, np.arange(n))

    def outputs(keys, values, bias=0.0):
        logits = q[n:] @ keys.T / np.sqrt(dim) + bias
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True) @ values

    p = np.exp(np.where(np.tri(n), q[:n] @ k.T / np.sqrt(dim), -np.inf))
    mass = (p / p.sum(axis=1, keepdims=True)).sum(axis=0)
    exact = outputs(k, v)
    slots = slots_of(k, v, mass)

    def error(out):
        return np.linalg.norm(out - exact) / np.linalg.norm(exact)

    newest = np.arange(n - 128, n)
    kept = np.concatenate([np.argsort(-mass[: n - 128], kind="stable")[:128], newest])
    errors = {"evict": error(outputs(k[kept], v[kept]))}
    for sigma in ("mean_dist", 5.0):
        for scale, bias in (("set_size", False), ("mean", False), ("mean", True)):
            after = kvmerger.compress(slots, budget=256, window=87, heavy=61, sigma=sigma, value_scale=scale)
            assert len(after) == 256
            _, counts, keys, values = columns(after)
            errors[sigma, scale, bias] = error(outputs(keys, values, np.log(counts) if bias else 0.0))
    return errors


def test_control():
    seeds = [controlled_errors(seed) for seed in range(20)]
    wanted = {
        "evict": 0.932,
        ("mean_dist", "set_size", False): 1.659,
        ("mean_dist", "mean", False): 0.902,
        ("mean_dist", "mean", True): 0.708,
        (5.0, "set_size", False): 1.300,
        (5.0, "mean", False): 0.873,
        (5.0, "mean", True): 0.596,
    }
    for name, value in wanted.items():
        assert_allclose(np.mean([e[name] for e in seeds]), value, atol=5e-4, err_msg=str(name))
    for e in seeds:
        set_size, mean, biased = (e["mean_dist", *x] for x in (("set_size", False), ("mean", False), ("mean", True)))
        assert biased < e["evict"] and biased < mean < set_size


# ---- by hand ----


@pytest.mark.parametrize("x", [0.01, 1.0, 30.0])
def test_weights_of_a_pair_do_not_depend_on_its_distance(x):
    pair = slots_of([(0, 0), (0, x)], VALUES[:2], [2.0, 1.0])
    assert_allclose(kvmerger.kernel_weights(pair, "mean_dist"), (0.982014, 0.017986), atol=1e-6)
    assert_allclose(kvmerger.kernel_weights(pair, "mean_dist_excl"), (0.731059, 0.268941), atol=1e-6)


@pytest.mark.parametrize("members, wanted", [(2, 0.018), (3, 0.105), (4, 0.169)])
def test_weights_of_a_set_at_equal_distances(members, wanted):
    run = slots_of([np.zeros(4), *np.eye(4)[: members - 1]], np.zeros((members, 4)), [1.0] + [0.0] * (members - 1))
    for sigma, g in (("mean_dist", wanted), ("mean_dist_excl", np.exp(-1))):
        w = kvmerger.kernel_weights(run, sigma)
        assert_allclose(np.array(w[1:]) / w[0], g, atol=5e-4)


def test_equal_masses_take_the_first_as_pivot_and_equal_keys_weigh_the_same():
    run = slots_of([(1, 2)] * 3, [(3, 0), (0, 3), (0, 0)], [1.0, 1.0, 0.5])
    merged = kvmerger.merge(run)
    assert merged.position == 0 and merged.count == 3 and merged.mass == 2.5
    assert_allclose([merged.key, merged.value], [(1, 2), (1, 1)])


def test_a_merged_slot_weighs_as_its_tokens():
    # pivot of count 3 at distance 0, one token at distance 2: sigma = 2 / (4 sqrt 2), g = exp(-16)
    run = slots_of([(0, 0), (0, 2)], [(6, 0), (0, 1)], [5.0, 1.0], counts=[3, 1])
    assert_allclose(kvmerger.bandwidth(run, "mean_dist"), 2 / 4 / np.sqrt(2))
    assert_allclose(kvmerger.bandwidth(run, "mean_dist_excl"), 2 / 3 / np.sqrt(2))
    assert_allclose(kvmerger.kernel_weights(run, "mean_dist"), np.array([3, np.exp(-16)]) / (3 + np.exp(-16)))
    # set_size: the stored values are sums; their means are (2, 0) and (0, 1)
    merged = kvmerger.merge(run, sigma=1e9, value_scale="set_size")
    assert merged.count == 4
    assert_allclose(merged.value, (6, 1))
    assert_allclose(kvmerger.merge(run, sigma=1e9).value, (4.5, 0.25))


def test_shortfall_drops_the_least_attended_sets():
    # links 0 and 1 end at the protected token 1, link 3 at the window
    slots = slots_of([(1, 0)] * 5, VALUES[:5], [0.5, 3.0, 0.4, 0.6, 0.1])
    after = kvmerger.compress(slots, budget=2, window=1, heavy=1)
    assert columns(after)[:2] == ([1, 4], [1, 1])
    after = kvmerger.compress(slots, budget=3, window=1, heavy=1)
    assert columns(after)[:2] == ([1, 3, 4], [1, 2, 1])
    tied = slots_of([(1, 0)] * 4, VALUES[:4], [0.5, 3.0, 0.5, 0.1])
    assert columns(kvmerger.compress(tied, budget=3, window=1, heavy=1))[0] == [0, 1, 3]


def test_threshold_is_strict():
    slots = slots_of([(1, 0), (1, 0)], VALUES[:2], [1, 1])
    assert kvmerger.merging_sets(slots, set(), rule="threshold", eps=1.0) == [[0], [1]]
    assert kvmerger.merging_sets(slots, set(), rule="threshold", eps=0.999) == [[0, 1]]


def test_run_sums_the_group():
    one = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.6, 1: 0.2, 2: 0.2}], dim=4)
    two = planted([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 0.1, 1: 0.6, 2: 0.3}], dim=4)
    q, _, _ = heads_together(one, two)
    (call,) = kvmerger.run(q, one[1], one[2], [3], budget=2, window=1, heavy=0)
    close(call.scores[0], {0: 3.7, 1: 1.8, 2: 0.5})
    assert call.counts == [{0: 2, 2: 1}]


# ---- properties ----

N = 26
SETTINGS = dict(budget=9, window=3, heavy=2)
CALLS = {"prompt then tokens": [16] + [1] * 10, "chunks": [7, 7, 4, 8], "tokens": [1] * N, "one": [N]}
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
each_remerge = pytest.mark.parametrize("remerge_every", [None, 1, 4])
each_rule = pytest.mark.parametrize("rule", ["budget", "threshold"])
each_scale = pytest.mark.parametrize("value_scale, count_bias", [("mean", True), ("mean", False), ("set_size", False)])


@each_calls
@each_remerge
@pytest.mark.parametrize("options", [{"rule": "budget"}, {"rule": "threshold", "eps": 1.0}])
def test_budget_as_long_as_the_stream_is_full_attention(calls, remerge_every, options):
    stream = make_stream(N)
    got = kvmerger.run(*stream, calls, budget=N, window=3, heavy=2, remerge_every=remerge_every, **options)
    for a, b in zip(got, full.run(*stream, calls), strict=True):
        assert_allclose(a.out, b.out, atol=1e-12)
        assert a.kept == b.kept


@each_calls
@each_remerge
def test_occupancy(calls, remerge_every):
    results = kvmerger.run(*make_stream(N), calls, remerge_every=remerge_every, **SETTINGS)
    size = 0
    for i, (call, c) in enumerate(zip(results, calls, strict=True)):
        size += c
        if i == 0 or (remerge_every and (c > 1 or size >= 9 + remerge_every)):
            size = min(size, 9)
        now = sum(calls[: i + 1])
        for kept, held, counts in zip(call.kept, call.held, call.counts, strict=True):
            assert len(kept) == size and kept == sorted(held) == sorted(counts)
            assert {*range(max(now - 3, 0), now)} <= set(kept)


@each_rule
def test_prompt_loses_nothing(rule):
    q, k, v = make_stream(N)
    (call,) = kvmerger.run(q, k, v, [N], rule=rule, eps=0.3, **(SETTINGS | {"budget": 9 if rule == "budget" else N}))
    for h in range(KV_HEADS):
        assert sum(call.counts[h].values()) == N
        assert_allclose(sum(call.scores[h].values()), GROUP * N)
        safe = [*range(N - 3, N), *sorted(range(N - 3), key=lambda p: -call.scores[h][p])[:2]]
        for p in safe:
            assert call.counts[h][p] == 1
            assert_allclose(call.held[h][p].key, rotate(k[p : p + 1, h], [p])[0], atol=1e-12)
            assert (call.held[h][p].value == v[p, h]).all()


def random_slots(seed, n=24):
    rng = np.random.default_rng(seed)
    return slots_of(rng.normal(size=(n, 3)), rng.normal(size=(n, 3)), rng.random(n))


@pytest.mark.parametrize("seed", range(5))
def test_budget_is_threshold_at_another_eps_and_sets_are_nested(seed):
    slots = random_slots(seed)
    safe = kvmerger.protected(slots, window=4, heavy=2)
    by_eps = kvmerger.merging_sets(slots, safe, rule="threshold", eps=0.2)
    assert kvmerger.merging_sets(slots, safe, merges=len(slots) - len(by_eps)) == by_eps
    before = intervals([[i] for i in range(len(slots))])
    for merges in range(1, 10):
        sets = kvmerger.merging_sets(slots, safe, merges=merges)
        assert [i for members in sets for i in members] == list(range(len(slots)))
        for first, last in before:
            assert any(a <= first and last <= b for a, b in intervals(sets))
        before = intervals(sets)


@pytest.mark.parametrize("sigma", ["mean_dist", "mean_dist_excl", 0.7])
def test_merged_keys_stay_near_the_pivot_and_scaling_keys_matters_to_a_fixed_sigma(sigma):
    run = random_slots(0, 5)
    pivot = kvmerger.pivot_of(run)
    far = max(np.linalg.norm(slot.key - pivot.key) for slot in run)
    assert np.linalg.norm(kvmerger.merge(run, sigma=sigma).key - pivot.key) <= far
    w = kvmerger.kernel_weights(run, sigma)
    assert_allclose(sum(w), 1)
    larger = [Slot(s.position, 3 * s.key, s.value, s.count, s.mass) for s in run]
    assert np.allclose(w, kvmerger.kernel_weights(larger, sigma)) == isinstance(sigma, str)


def test_identical_tokens_merge_without_loss_if_counted():
    slots = random_slots(1, 8)
    slots[1:4] = [Slot(p, slots[1].key, slots[1].value, 1, 0.1) for p in (1, 2, 3)]
    after = kvmerger.compress(slots, budget=6, window=2, heavy=0)
    assert [slot.count for slot in after] == [1, 3, 1, 1, 1, 1]
    query = np.array([1.0, -2.0, 0.5])
    want = kvmerger.attend(query, slots)[0]
    assert_allclose(kvmerger.attend(query, after)[0], want, atol=1e-12)
    assert np.abs(kvmerger.attend(query, after, count_bias=False)[0] - want).max() > 1e-3


@each_calls
@each_remerge
@each_rule
@each_scale
def test_outputs_attend_to_what_the_call_before_left(calls, remerge_every, rule, value_scale, count_bias):
    q, k, v = make_stream(N)
    options = dict(remerge_every=remerge_every, rule=rule, value_scale=value_scale, count_bias=count_bias)
    results = kvmerger.run(q, k, v, calls, eps=0.3, **SETTINGS, **options)
    held, counts = [{}] * KV_HEADS, [{}] * KV_HEADS
    for call, now, c in zip(results, np.cumsum(calls), calls, strict=True):
        for x in range(q.shape[1]):
            h = x // GROUP
            new = np.arange(now - c, now)
            keys = np.stack([t.key for t in held[h].values()] + list(rotate(k[new, h], new)))
            values = np.stack([t.value for t in held[h].values()] + list(v[new, h]))
            sizes = np.array([*counts[h].values(), *[1] * c]) if count_bias else 1
            weights = sizes * np.exp(keys @ rotate(q[now - 1 : now, x], [now - 1])[0] / np.sqrt(q.shape[2]))
            assert_allclose(call.out[-1, x], weights @ values / weights.sum(), atol=1e-12)
        held, counts = call.held, call.counts


def test_tokens_after_the_prompt_do_not_merge_by_default():
    stream = make_stream(N)
    prompt, *steps = kvmerger.run(*stream, [16] + [1] * 10, **SETTINGS)
    for t, step in enumerate(steps):
        assert step.kept == [kept + list(range(16, 17 + t)) for kept in prompt.kept]
        assert step.scores == [{}] * KV_HEADS


@each_calls
def test_scores_after_remerging_are_masses_of_what_is_left(calls):
    results = kvmerger.run(*make_stream(N), calls, remerge_every=2, **SETTINGS)
    for before, after in zip(results, results[1:], strict=False):
        for h in range(KV_HEADS):
            assert set(before.kept[h]) <= set(after.scores[h])
            assert all(after.scores[h][p] > before.scores[h][p] - 1e-12 for p in before.kept[h])


@pytest.mark.parametrize(
    "settings",
    [{"window": 0}, {"heavy": 7}, {"rule": "pairs"}, {"sigma": "mean"}, {"sigma": 0.0}, {"value_scale": "sum"}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError):
        kvmerger.run(*make_stream(5), [5], **(SETTINGS | settings))
