"""The slots of a layer under any attention: what is protected stays, the budget holds, slot order means nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies, selects
from kvjax.cache import FREE, LayerShape, take
from tests.methods import every_bounded_method, every_growing_method, every_method, kept_positions

B, H, G, D, BUDGET, ROPE = 2, 2, 2, 8, 10, kvjax.Rope(100.0)
PROMPT, LENGTHS = 14, (14, 5)
CALLS = (1, 1, 4, 1, 4, 1, 1, 1)  # tokens of each later call
SEEDS = st.integers(0, 2**31)

attend = jax.jit(kvjax.attend, static_argnames=("rope", "capacity"))
take_slots = jax.jit(take)


def streams(rng, count, scale=1.0):
    """q, k, v of `count` tokens; each value carries the position of its token, put in by `run`."""
    q = scale * rng.standard_normal((B, count, H * G, D))
    k = scale * rng.standard_normal((B, count, H, D))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, rng.standard_normal((B, count, H, D)))]


def call(policy, cache, q, k, v, positions):
    v = v.at[..., 0].set(positions[..., None])
    room = PROMPT + sum(CALLS) + 1
    slots = room if policy.budget is None and q.shape[1] > 1 else None
    worth = {name: jax.nn.sigmoid(k[..., 0]).swapaxes(1, 2) for name in policy.given}
    return attend(q, k, v, cache, policy, positions=positions, rope=ROPE, capacity=slots, given=worth)


def run(policy, rng, scale=1.0):
    """A prompt with rows of different length, then `CALLS`. Yields (out, cache, positions seen so far by each row)."""
    start = np.zeros(B, np.int32)
    cache = None
    for count in (PROMPT, *CALLS):
        now = np.array(LENGTHS if count == PROMPT else (count, max(count - 1, 1)), np.int32)
        positions = np.where(np.arange(count) < now[:, None], start[:, None] + np.arange(count), FREE)
        out, cache = call(policy, cache, *streams(rng, count, scale), jnp.asarray(positions))
        start += now
        yield out, cache, start


# 1e12: logits of 1e24, so that one token takes all. 1e25: logits overflow, and probabilities are nan.
@every_bounded_method
@given(seed=SEEDS, scale=st.sampled_from([0.0, 1.0, 30.0, 1e12]))
def test_what_is_protected_survives_any_attention(row, seed, scale):
    check_slots(row, seed, scale)


@every_bounded_method
def test_what_is_protected_survives_attention_that_overflows(row):
    check_slots(row, 0, 1e25)


@pytest.mark.parametrize("scale", [1e12, 1e25])
@every_growing_method
def test_what_grows_keeps_its_count_and_its_newest_token_whoever_gets_all_attention(row, scale):
    policy = row.make(BUDGET)
    if policy.given:
        pytest.skip("attention does not lead its choice")
    for out, cache, seen in run(policy, np.random.default_rng(0), scale):
        for b, total in enumerate(seen):
            held = zip(*(kept_positions(tier, b) for tier in cache.tiers), strict=True)
            for positions in (sum(tiers, []) for tiers in held):
                assert len(set(positions)) == len(positions) and {0, total - 1} <= set(positions) <= set(range(total))
                share = total - total // 2 if policy.grow and policy.low is None else total  # half, if it lets any go
                assert len(positions) == share
        assert scale > 1e12 or np.isfinite(out).all()


def check_slots(row, seed, scale):
    """The invariants of a bounded cache: occupancy, true and distinct positions, values in place, protection."""
    window = BUDGET - row.sinks if row.window is None else row.window
    for _, cache, seen in run(row.make(BUDGET), np.random.default_rng(seed), scale):
        for b in range(B):
            protected = set(range(min(row.sinks, seen[b]))) | set(range(max(seen[b] - window, 0), seen[b]))
            for head, positions in enumerate(kept_positions(cache, b)):
                assert len(positions) <= min(BUDGET, seen[b])
                assert len(positions) >= min(BUDGET - row.slack, seen[b])  # not fewer than there are
                assert len(set(positions)) == len(positions)
                assert set(positions) <= set(range(seen[b]))
                assert protected <= set(positions)
                pos = np.asarray(cache.pos)[b, head]
                if not row.folds:
                    assert_array_equal(np.asarray(cache.v)[b, head, :, 0][pos >= 0], pos[pos >= 0])


@every_method
@given(seed=SEEDS)
def test_an_occupied_slot_holds_the_token_of_its_position(row, seed):
    for _, cache, seen in run(row.make(BUDGET), np.random.default_rng(seed)):
        pos = np.asarray(cache.pos)
        if not row.folds and cache.made_by.form is None:
            assert_array_equal(np.asarray(cache.v)[..., 0][pos >= 0], pos[pos >= 0])
        assert all(max(kept_positions(cache, b)[0]) < seen[b] for b in range(B))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@every_method
def test_what_is_no_number_in_one_row_stays_there(row, which, wrong):
    policy = row.make(BUDGET)

    def cache_after(spoiled):
        rng, cache, start = np.random.default_rng(1), None, np.zeros(B, np.int32)
        for count in (PROMPT, 1, 1):
            positions = jnp.asarray(start[:, None] + np.arange(count, dtype=np.int32))
            parts = dict(zip("qkv", streams(rng, count), strict=True))
            if spoiled and count == PROMPT:
                parts[which] = parts[which].at[1, 3].set(wrong)
            out, cache = call(policy, cache, *parts.values(), positions)
            start += count
        return out, cache

    (want, clean), (got, spoiled) = cache_after(False), cache_after(True)
    assert_array_equal(got[0], want[0])
    mine = [
        jax.tree.map(lambda leaf: leaf[0], tier.slot_aligned()) for cache in (spoiled, clean) for tier in cache.tiers
    ]
    jax.tree.map(assert_array_equal, mine[: len(mine) // 2], mine[len(mine) // 2 :])
    for positions in kept_positions(spoiled, 1):
        assert len(set(positions)) == len(positions) and set(positions) <= set(range(PROMPT + 2))
        assert policy.budget is None or len(positions) <= policy.budget


@functools.cache
def some_cache(policy):
    """A cache after a few calls, with a free slot in each row, and what each row has seen."""
    return list(run(policy, np.random.default_rng(0)))[3][1:]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("count", [1, 4])
@every_method
@given(seed=SEEDS)
def test_slot_order_carries_no_meaning(row, count, tied, seed):
    policy, rng = row.make(BUDGET), np.random.default_rng(seed)
    if tied and row.folds:
        pytest.skip("cosines of equal keys differ in their last bit, by their place")
    if policy.form is not None:
        pytest.skip("it stores several tokens as one, in slots that are their positions")
    cache, seen = some_cache(policy)
    q, k, v = streams(rng, count)
    if tied:  # all keys alike, queries that prefer none, and nothing told apart before
        q, k = 0 * q, 0 * k + 1
        alike = jnp.broadcast_to(cache.k[:, :, :1], cache.k.shape)
        cache = dataclasses.replace(cache, k=alike, stats=jax.tree.map(jnp.zeros_like, cache.stats))
    order = rng.permuted(np.tile(np.arange(cache.slots, dtype=np.int32), (B, H, 1)), axis=-1)
    if row.heads_alike:
        order[:] = order[:, :1]
    positions = jnp.asarray(seen[:, None] + np.arange(count, dtype=np.int32))

    want, plain = call(policy, cache, q, k, v, positions)
    got, mixed = call(policy, take_slots(cache, order), q, k, v, positions)
    assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert [kept_positions(mixed, b) for b in range(B)] == [kept_positions(plain, b) for b in range(B)]
    for new, old in zip(by_position(mixed), by_position(plain), strict=True):  # all of a token moved together
        assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def by_position(cache):
    """Keys, values, positions and statistics of the occupied slots, in the order of their positions."""
    pos = np.asarray(cache.pos)
    for leaf in jax.tree.leaves(cache.slot_aligned()):
        leaf = np.asarray(leaf)
        for index in np.ndindex(B, H):
            order = np.argsort(pos[index])
            yield leaf[index][order][pos[index][order] >= 0]


@pytest.mark.parametrize("count", [1, 4])
@every_method
def test_a_row_without_a_token_gives_0(row, count):
    policy, rng = row.make(BUDGET), np.random.default_rng(0)
    positions = jnp.asarray([np.arange(count), [FREE] * count], jnp.int32)
    for cache in (None, policy.empty(LayerShape(B, H, BUDGET + 1, D, jnp.float32, 0))):
        for _ in range(1 if policy.budget is None and count == 1 else 2):  # a second token would find no slot
            out, cache = call(policy, cache, *streams(rng, count), positions)
            assert np.isfinite(out).all() and not np.any(out[1])
            assert (np.asarray(cache.pos)[1] == FREE).all()
            assert all(np.isfinite(stat).all() for stat in cache.stats.values())
            positions = positions.at[0].add(count)


@pytest.mark.parametrize("budget", [1, 7, 11, 12])
@given(seed=SEEDS, values=st.sampled_from([1, 3, 100]), free=st.sampled_from([0.0, 0.0, 0.3, 1.0]))
def test_top_k_keeps_the_best_with_ties_to_the_lower_position(budget, seed, values, free):
    slots, rng = 12, np.random.default_rng(seed)
    score = rng.integers(0, values, (B, H, slots)).astype(np.float32)
    score[rng.random(score.shape) < 0.1] = np.inf
    pos = rng.permuted(np.tile(np.arange(100, 100 + slots), (B, H, 1)), axis=-1)
    pos[rng.random(pos.shape) < free] = FREE
    kept = np.asarray(selects.top_k(jnp.asarray(score), jnp.asarray(pos, jnp.int32), budget))
    for index in np.ndindex(B, H):
        best = sorted((-s, p) for s, p in zip(score[index], pos[index], strict=True) if p >= 0)[:budget]
        assert sorted(pos[index][kept[index]]) == sorted(p for _, p in best)


@pytest.mark.parametrize("excess", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_top_k_fills_the_budget_whatever_the_scores_are(excess, bad):
    score, pos = jnp.full((1, 1, 8), bad).at[..., 2].set(np.inf), jnp.arange(8)[None, None]
    kept = np.asarray(selects.top_k(score, pos, 8 - excess))[0, 0]
    assert kept.sum() == 8 - excess and kept[2]


def test_a_policy_is_the_same_object_for_the_same_arguments():
    assert policies.h2o(8, window=2) is policies.h2o(budget=8, window=2)
    assert policies.h2o(8, window=2) is not policies.h2o(8, window=3)
