"""Pieces join: any scorer, selection, fate, codec and lower tier, with buffers to match."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import codecs, folds, policies, scorers, selects, store
from kvjax.policy import evict
from kvjax.tiers import demote
from tests.methods import kept_positions

HEADS, DIM, BUDGET = 2, 8, 6
ROPE = kvjax.Rope(100.0)
SCORERS = {
    "mass": scorers.attention_mass(),
    "recency, sinks": scorers.protect(scorers.recency(), sinks=2),
    "newest query": policies.tova(BUDGET).scorer,
    "keys": policies.keydiff(BUDGET).scorer,
    "expected": policies.expected_attention(BUDGET, window=2, sinks=1).scorer,
}
SELECTS = {"top_k": selects.top_k, "above": selects.above(0.3)}
FATES = {"drop": None, "into nearest": folds.into_nearest(0.2)}
CODECS = {
    "as they are": None,
    "pruned int4": dict(
        keys=codecs.pipe(codecs.prune_channels(4), codecs.integer(4, group=4)), values=codecs.integer(8, group=8)
    ),
}
LOWS = {
    "tova": policies.tova(4),
    "h2o": policies.h2o(4, window=1),
    "expected, pruned int4": store(policies.expected_attention(4, window=1, sinks=1), **CODECS["pruned int4"]),
    "all, int4": store(policies.full(), keys=codecs.integer(4, group=8), values=codecs.integer(4, group=8)),
}


def run(policy, calls=((9, 7), (1, 1), (3, 2), (1, 0))):
    """Two rows of different length through a prompt, steps and a turn; the caches."""
    rng = np.random.default_rng(0)
    start, cache = np.zeros(2, int), None
    attend = jax.jit(kvjax.attend, static_argnames=("rope", "capacity"))
    for counts in calls:
        width = max(counts)
        q, k, v = (rng.standard_normal((2, width, heads, DIM), dtype=np.float32) for heads in (4, HEADS, HEADS))
        positions = np.where(np.arange(width) < np.array(counts)[:, None], start[:, None] + np.arange(width), -1)
        unbounded = policy.budget is None and cache is None
        out, cache = attend(
            q, k, v, cache, policy, positions=jnp.asarray(positions, jnp.int32), rope=ROPE,
            capacity=24 if unbounded else None,
        )  # fmt: skip
        start = start + counts
        assert np.isfinite(out).all()
        yield cache


COMBINATIONS = list(itertools.product(SCORERS, SELECTS, FATES, CODECS))[::3]  # every pair of pieces is among them
TIERS = list(itertools.product(SCORERS, LOWS))[::3]


@pytest.mark.parametrize("scorer, select, fate, codec", COMBINATIONS, ids=map(" x ".join, COMBINATIONS))
def test_any_scorer_selection_fate_and_codec_join(scorer, select, fate, codec):
    policy = evict(SCORERS[scorer], budget=BUDGET, select=SELECTS[select], fate=FATES[fate])
    policy = policy if CODECS[codec] is None else store(policy, **CODECS[codec])
    for cache in run(policy):
        assert all(len(head) <= BUDGET for b in (0, 1) for head in kept_positions(cache, b))
        assert cache.slots == BUDGET + 1
        if CODECS[codec] is not None:  # 4 channels of 4 bits, and 8 of 8: in words, with a step and a minimum
            assert cache.k.codes.shape[-1] == 1 and cache.v.codes.shape[-1] == 2
    if select == "top_k":
        assert {len(head) for head in kept_positions(cache, 0)} == {BUDGET}


@pytest.mark.parametrize("scorer, low", TIERS, ids=map(" x ".join, TIERS))
def test_any_scorer_demotes_to_any_lower_policy(scorer, low):
    policy = demote(SCORERS[scorer], LOWS[low], budget=3)
    for cache in run(policy):
        above, below = (kept_positions(tier, 0) for tier in cache.tiers)
        assert all(not set(a) & set(b) for a, b in zip(above, below, strict=True))
        assert all(len(head) <= 3 for head in above)
        if LOWS[low].budget is not None:
            assert all(len(head) <= LOWS[low].budget for head in below)
    if low == "all, int4":
        assert all(sorted(a + b) == list(range(14)) for a, b in zip(above, below, strict=True))


def test_a_lower_tier_chooses_by_the_attention_that_its_own_slots_receive():
    """Key and query are one-hot: what the newest query looks at stays in the tier that tova rules."""
    policy = demote(scorers.recency(), policies.tova(2), budget=1)
    eye = 9.0 * np.eye(8, dtype=np.float32)[None, :, None]
    looks = (0, 0, 0, 1, 1)  # what each token's query looks at
    cache = None
    for p, at in enumerate(looks):
        _, cache = kvjax.attend(
            eye[:, at : at + 1], eye[:, p : p + 1], eye[:, p : p + 1], cache, policy,
            positions=jnp.full((1, 1), p, jnp.int32),
        )  # fmt: skip
    # Token 3 looked at 1 when 2 came down beside 0 and 1, so 0 or 2 had to go: both had nothing, and 2 is the higher.
    assert kept_positions(cache, 0) == [[4]] and kept_positions(cache.low, 0)[0][1:] != [0]
    assert 1 in kept_positions(cache.low, 0)[0]


def test_above_keeps_what_passes_and_no_more_than_the_budget():
    score = jnp.asarray([[[0.9, 0.1, 0.5, 0.7, jnp.inf]]])
    pos = jnp.asarray([[[0, 1, 2, 3, 4]]])
    assert selects.above(0.4)(score, pos, 5).tolist() == [[[True, False, True, True, True]]]
    assert selects.above(0.4)(score, pos, 2).tolist() == [[[True, False, False, False, True]]]


def test_what_cannot_be_joined_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="compactor.*keeps a state of its layer.*such as h2o or tova"):
        demote(scorers.recency(), policies.compactor(20), budget=4)
    with pytest.raises(ValueError, match="policy='full' is no policy"):
        demote(scorers.recency(), "full", budget=4)
    with pytest.raises(ValueError, match="keys='int4' is no codec.*such as integer"):
        store(policies.tova(4), keys="int4")
    with pytest.raises(ValueError, match="evict: budget=0 must be at least 1"):
        evict(scorers.recency(), budget=0)
    with pytest.raises(ValueError, match="evict: budget=2.5 must be a whole number"):
        evict(scorers.recency(), budget=2.5)
    with pytest.raises(ValueError, match="scorer='mass' is no Scorer"):
        evict("mass", budget=2)


def test_a_threshold_that_drops_many_at_once_loses_none_that_are_to_be_demoted():
    low = store(policies.full(), keys=codecs.integer(8, group=8))
    *_, cache = run(demote(policies.tova(6).scorer, low, budget=6, select=selects.above(0.15)))
    for row, count in ((0, 14), (1, 10)):
        upper, lower = (set(np.asarray(tier.pos)[row, 0].tolist()) - {-1} for tier in cache.tiers)
        assert upper | lower == set(range(count))
        assert not upper & lower


def test_a_threshold_does_not_ask_how_wide_a_call_is():
    policy = evict(policies.tova(6).scorer, budget=6, select=selects.above(0.3))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, heads, DIM), dtype=np.float32) for heads in (4, HEADS, HEADS))
    at = np.where(np.arange(9) < 4, np.arange(9), -1)[None]
    caches = [
        kvjax.attend(q[:, :n], k[:, :n], v[:, :n], None, policy, positions=jnp.asarray(at[:, :n]), rope=ROPE)[1]
        for n in (4, 9)
    ]
    kept = [kept_positions(cache, 0) for cache in caches]
    assert kept[0] == kept[1]
    assert any(len(own) < 4 for own in kept[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: demote(policies.tova(6).scorer, policies.full()),
        lambda: evict(policies.tova(6).scorer, budget=None, select=selects.above(0.5)),
        lambda: evict(policies.tova(6).scorer, budget=4, select="top_k"),
        lambda: evict(policies.tova(6).scorer, budget=4, fate="drop"),
        lambda: selects.above(float("nan")),
        lambda: store(policies.think(4, recent=4), values=codecs.integer(4, group=8)),
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(make):
    with pytest.raises(ValueError):
        make()
