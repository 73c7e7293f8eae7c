"""The table of all methods. A new one joins with a row, and every promise is then tested on it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax import policies
from kvjax.policies.compactor import projection
from tests.oracles import (
    attention_gate,
    cam,
    compactor,
    d2o,
    elastic_cache,
    ems,
    expected_attention,
    full,
    h2o,
    keydiff,
    kivi,
    kvmerger,
    locret,
    mikv,
    random_eviction,
    snapkv,
    streaming_llm,
    think,
    tova,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method, with settings that suit a budget of 10.

    Attributes:
      make: The policy with a budget.
      oracle: `run` of its float64 oracle, with the same settings.
      sinks: First tokens that it always keeps.
      window: Newest tokens that it always keeps; None stands for all that the sinks leave of the budget.
      heads_alike: Whether all heads of a layer keep the same tokens, in slots of the same order.
      slack: Tokens below the budget that may be in use, in methods that compress now and then.
      folds: Whether losers are folded into kept tokens, whose values then are no longer their own.
      rtol: How near outputs are to the oracle's, as a share of the largest output of the call.
      given: What the oracle calls a statistic that each token brings along: f64[n, H] in 0..1.
      by_turn: Whether what it keeps depends on where a turn ends.
      whole: Whether it must see a prompt whole, or its heads must.
      spare: Slots below the budget that a long prompt leaves free; None stands for the slack.
    """

    make: Callable[[int], kvjax.Policy]
    oracle: Callable[..., Any]
    sinks: int = 0
    window: int | None = 0
    heads_alike: bool = False
    slack: int = 0
    folds: bool = False
    rtol: float = 4e-6  # f32 has 24 bits, 6e-8, and logits are sums that exp enlarges; the worst method has 1.9e-6
    given: str | None = None
    by_turn: bool = False
    whole: bool = False
    spare: int | None = None


def uniform(seed: int, layer: int, head: int, pos: int) -> float:
    """The documented draw of a token, in plain integers."""

    def mix(x):
        x = (x + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    return (mix(mix(pos) ^ mix(mix(seed ^ mix(layer)) ^ head)) >> 8) / 2**24


def draws(seed: int, kv_heads: int, count: int, layer: int = 0) -> np.ndarray:
    """The draws of `random`, [H, count]."""
    return np.array([[uniform(seed, layer, head, pos) for pos in range(count)] for head in range(kv_heads)])


def all_kept(calls):
    """The calls of an oracle that says which keys are whole, of a method that keeps every token."""
    return [dataclasses.replace(call, kept=[sorted(head) for head in call.held]) for call in calls]


POLICIES = {
    "full": Row(lambda budget: policies.full(), lambda budget, **kw: full.run(**kw)),
    "streaming_llm": Row(
        lambda budget: policies.streaming_llm(budget, sinks=2),
        lambda budget, **kw: streaming_llm.run(budget=budget, sinks=2, **kw),
        sinks=2,
        window=None,
        heads_alike=True,
    ),
    "h2o": Row(
        lambda budget: policies.h2o(budget, window=4),
        lambda budget, **kw: h2o.run(budget=budget, window=4, **kw),
        window=4,
    ),
    "snapkv": Row(
        lambda budget: policies.snapkv(budget, window=4, pool=3),
        lambda budget, **kw: snapkv.run(budget=budget, window=4, pool=3, **kw),
        window=4,
    ),
    "tova": Row(policies.tova, lambda budget, **kw: tova.run(budget=budget, **kw), heads_alike=True),
    "keydiff": Row(policies.keydiff, lambda budget, **kw: keydiff.run(budget=budget, **kw)),
    "random": Row(
        lambda budget: policies.random(budget, seed=7),
        lambda budget, **kw: random_eviction.run(budget=budget, scores=draws(7, kw["k"].shape[1], len(kw["q"])), **kw),
    ),
    "d2o": Row(
        lambda budget: policies.d2o(budget, window=4, sinks=2),
        lambda budget, **kw: d2o.run(heavy=budget - 4, window=4, sinks=2, **kw),
        sinks=2,
        window=4,
        folds=True,
    ),
    "cam": Row(
        lambda budget: policies.cam(budget, sinks=2, targets=3, seed=5),
        lambda budget, **kw: cam.run(
            select="recency", budget=budget, sinks=2, targets=3, draw=lambda head, pos: uniform(5, 0, head, pos), **kw
        ),
        sinks=2,
        window=None,
        folds=True,
    ),
    "compactor": Row(
        lambda budget: policies.compactor(budget, first=2, last=1, sketch=6, chunk=5, seed=3),
        lambda budget, **kw: compactor.run(
            budget=budget, first=2, last=1, chunk=5, phi=projection(3, 0, kw["k"].shape[1], kw["k"].shape[2], 6), **kw
        ),
        sinks=2,
        window=1,
    ),
    "ems": Row(
        lambda budget: policies.ems(budget - 2, window=3, similar=0.1),
        lambda budget, **kw: ems.run(budget=budget - 2, window=3, tau=0.1, **kw),
        window=3,
        slack=2,
        folds=True,
    ),
    "kvmerger": Row(
        lambda budget: policies.kvmerger(budget - 2, window=3, heavy=2, every=3),
        lambda budget, **kw: kvmerger.run(budget=budget - 2, window=3, heavy=2, remerge_every=3, **kw),
        window=3,
        slack=2,
        folds=True,
    ),
    "expected_attention": Row(
        lambda budget: policies.expected_attention(budget, window=3, sinks=2),
        lambda budget, **kw: expected_attention.run(budget=budget, window=3, sinks=2, **kw),
        sinks=2,
        window=3,
    ),
    "think": Row(
        lambda budget: policies.think(4, recent=budget, window=3),
        lambda budget, **kw: think.run(keep_count=4, recent=budget, window=3, demote_tail=1, **kw),
        whole=True,
    ),
    "mikv": Row(
        lambda budget: policies.mikv(0.5 if budget < 20 else 1.0, low_bits=4, group=4),
        lambda budget, **kw: mikv.run(ratio=0.5, low_bits=4, group=4, **kw),
    ),
    "elastic_cache": Row(
        lambda budget: policies.elastic_cache(0.5 if budget < 20 else 0.0, distance=3),
        lambda budget, **kw: elastic_cache.run(r=0.5, distance=3, **kw),
        folds=True,
        whole=True,
    ),
    "kivi": Row(
        lambda budget: policies.kivi(4, group=4, residual=8 if budget < 20 else -(-budget // 8) * 8),
        lambda budget, **kw: all_kept(kivi.run(bits=4, group=4, residual=8, **kw)),
    ),
    "locret": Row(
        lambda budget: policies.locret(budget - (4 if budget < 20 else 0), stabilizers=2, tail=2, every=3),
        lambda budget, **kw: locret.run(
            budget=budget - 4, stabilizers=2, tail=2, bounded_decode=3, capacity=budget + 1, max_new=3, chunk=99, **kw
        ),
        window=2,
        slack=4,
        spare=2,
        given="scores",
        by_turn=True,
    ),
    "attention_gate": Row(
        lambda budget: policies.attention_gate(budget, threshold=0.5 if budget < 20 else 0.0),
        lambda budget, **kw: attention_gate.run(cap=budget, threshold=0.5, **kw),
        given="p",
        by_turn=True,
        whole=True,
    ),
}

VARIANTS = {  # of the same methods: only held to their oracles
    "d2o(per_head, code_mean)": Row(
        lambda budget: policies.d2o(budget, window=4, sinks=1, weights="code_mean", gate="per_head", smoothing=0.5),
        lambda budget, **kw: d2o.run(
            heavy=budget - 4, window=4, sinks=1, weights="code_mean", gate="per_head", beta=0.5, **kw
        ),
        sinks=1,
        window=4,
        folds=True,
    ),
    "d2o(not into sinks)": Row(
        lambda budget: policies.d2o(budget, window=3, sinks=3, into_sinks=False),
        lambda budget, **kw: d2o.run(heavy=budget - 3, window=3, sinks=3, into_sinks=False, **kw),
    ),
    "compactor(blend, scale)": Row(  # without a pool: two tokens between first and last are alike under one of three
        lambda budget: policies.compactor(
            budget, first=2, last=1, sketch=6, chunk=5, pool=1, blend=0.7, scale=None, seed=3
        ),
        lambda budget, **kw: compactor.run(
            budget=budget,
            first=2,
            last=1,
            chunk=5,
            pool=1,
            phi=projection(3, 0, kw["k"].shape[1], kw["k"].shape[2], 6),
            blending=0.7,
            scale=None,
            **kw,
        ),
    ),
    "cam(heavy)": Row(
        lambda budget: policies.cam(budget, sinks=0, heavy=True, window=4, targets=5, seed=5),
        lambda budget, **kw: cam.run(
            select="h2o", budget=budget, window=4, targets=5, draw=lambda head, pos: uniform(5, 0, head, pos), **kw
        ),
        window=4,
        folds=True,
    ),
    "cam(greedy, rolling)": Row(
        lambda budget: policies.cam(budget, sinks=2, targets=3, seed=5, prompt="greedy", positions="rolling"),
        lambda budget, **kw: cam.run(
            select="recency",
            budget=budget,
            sinks=2,
            targets=3,
            draw=lambda head, pos: uniform(5, 0, head, pos),
            prefill_mode="token",
            positions="rolling",
            **kw,
        ),
    ),
    "cam(heavy, rolling)": Row(
        lambda budget: policies.cam(budget, sinks=0, heavy=True, window=4, targets=5, seed=5, positions="rolling"),
        lambda budget, **kw: cam.run(
            select="h2o",
            budget=budget,
            window=4,
            targets=5,
            draw=lambda head, pos: uniform(5, 0, head, pos),
            positions="rolling",
            **kw,
        ),
    ),
    "h2o(greedy)": Row(
        lambda budget: policies.h2o(budget, window=4, prompt="greedy"),
        lambda budget, **kw: h2o.run(budget=budget, window=4, prefill="greedy", **kw),
    ),
    "h2o(rolling)": Row(
        lambda budget: policies.h2o(budget, window=4, positions="rolling"),
        lambda budget, **kw: h2o.run(budget=budget, window=4, positions="rolling", **kw),
    ),
    "h2o(greedy, rolling)": Row(
        lambda budget: policies.h2o(budget, window=4, prompt="greedy", positions="rolling"),
        lambda budget, **kw: h2o.run(budget=budget, window=4, prefill="greedy", positions="rolling", **kw),
    ),
    "ems(mean, dense)": Row(
        lambda budget: policies.ems(budget, window=4, combine="mean", keep=1.0, merge=3, similar=0.0, transfer=False),
        lambda budget, **kw: ems.run(
            budget=budget, window=4, combine="mean", p_keep=1.0, max_merge=3, tau=0.0, transfer_score=False, **kw
        ),
    ),
    "ems(global)": Row(
        lambda budget: policies.ems(budget, window=3, combine="global", similar=0.1),
        lambda budget, **kw: ems.run(budget=budget, window=3, combine="glo", tau=0.1, **kw),
    ),
    "ems(local)": Row(
        lambda budget: policies.ems(budget, window=3, combine="local", similar=0.1),
        lambda budget, **kw: ems.run(budget=budget, window=3, combine="loc", tau=0.1, **kw),
    ),
    "ems(raw)": Row(
        lambda budget: policies.ems(budget, window=3, redundancy="raw", similar=0.1),
        lambda budget, **kw: ems.run(budget=budget, window=3, redundancy="raw", tau=0.1, **kw),
    ),
    "kvmerger(paper)": Row(
        lambda budget: policies.kvmerger(
            budget,
            window=2,
            heavy=1,
            rule="threshold",
            threshold=0.3,
            value_scale="set_size",
            count_bias=False,
            every=4,
        ),
        lambda budget, **kw: kvmerger.run(
            budget=budget,
            window=2,
            heavy=1,
            rule="threshold",
            eps=0.3,
            value_scale="set_size",
            count_bias=False,
            remerge_every=4,
            **kw,
        ),
    ),
    "kvmerger(mean without the pivot)": Row(
        lambda budget: policies.kvmerger(budget, window=2, heavy=1, sigma="mean_dist_excl", every=2),
        lambda budget, **kw: kvmerger.run(
            budget=budget, window=2, heavy=1, sigma="mean_dist_excl", remerge_every=2, **kw
        ),
    ),
    "kvmerger(fixed width)": Row(
        lambda budget: policies.kvmerger(budget, window=2, heavy=1, sigma=2.0, every=1),
        lambda budget, **kw: kvmerger.run(budget=budget, window=2, heavy=1, sigma=2.0, remerge_every=1, **kw),
    ),
    "kvmerger(no merging in the answer)": Row(  # which single tokens are; more at once merge again
        lambda budget: policies.kvmerger(budget, window=2, heavy=1, every=60),
        lambda budget, calls, **kw: kvmerger.run(
            budget=budget, window=2, heavy=1, remerge_every=None if max(calls[1:]) == 1 else 60, calls=calls, **kw
        ),
    ),
    "think(few)": Row(
        lambda budget: policies.think(6, recent=1, window=20),
        lambda budget, **kw: think.run(keep_count=6, recent=1, window=20, demote_tail=1, **kw),
    ),
    "think(part of an answer)": Row(  # the tail grows, as in the published code, and then no more
        lambda budget: policies.think(4, recent=3, window=3, answer=6),
        lambda budget, **kw: think.run(keep_count=4, recent=3, window=3, demote_tail=1, answer=6, **kw),
    ),
    "think(over h2o)": Row(  # whose window reaches below the newest
        lambda budget: policies.think(4, recent=3, window=3, tokens=policies.h2o(budget - 3, window=5)),
        lambda budget, **kw: think.run(keep_count=4, recent=3, window=3, demote_tail=1, older=(budget - 3, 5), **kw),
    ),
    "kivi(fewer channels)": Row(
        lambda budget: policies.kivi(8, group=4, residual=8, channels=4, window=3),
        lambda budget, **kw: all_kept(kivi.run(bits=8, group=4, residual=8, keep_count=4, window=3, **kw)),
    ),
    "mikv(int8, int3)": Row(
        lambda budget: policies.mikv(0.3, low_bits=3, high_bits=8, group=8, heavy=1.0),
        lambda budget, **kw: mikv.run(ratio=0.3, low_bits=3, high_bits=8, group=8, heavy_share=1.0, twice=True, **kw),
        rtol=1e-3,  # several tokens at once round again what is held, with steps that f32 may round to another f16
    ),
    "mikv(newest, plain)": Row(
        lambda budget: policies.mikv(0.2, low_bits=2, group=4, heavy=0.0, balanced=False),
        lambda budget, **kw: mikv.run(ratio=0.2, low_bits=2, group=4, heavy_share=0.0, balance=False, **kw),
    ),
    "mikv(mean)": Row(
        lambda budget: policies.mikv(0.4, low_bits=4, group=4, mass="mean"),
        lambda budget, **kw: mikv.run(ratio=0.4, low_bits=4, group=4, mean=True, **kw),
    ),
    "mikv(votes of a window)": Row(
        lambda budget: policies.mikv(0.5, low_bits=4, window=4),
        lambda budget, **kw: mikv.run(ratio=0.5, low_bits=4, window=4, **kw),
    ),
    "elastic_cache(evict)": Row(
        lambda budget: policies.elastic_cache(0.6, losers="evict", distance=2),
        lambda budget, **kw: elastic_cache.run(r=0.6, stage1="evict", distance=2, **kw),
    ),
    "locret(unbounded)": Row(
        lambda budget: policies.locret(budget, stabilizers=0, tail=4),
        lambda budget, **kw: locret.run(budget=budget, stabilizers=0, tail=4, chunk=99, **kw),
        given="scores",
    ),
    "locret(true positions, sinks)": Row(
        lambda budget: policies.locret(budget, stabilizers=3, tail=1, sinks=2, positions="true", every=4),
        lambda budget, **kw: locret.run(
            budget=budget,
            stabilizers=3,
            tail=1,
            protect=2,
            position_mode="original",
            bounded_decode=4,
            capacity=budget + 5,
            max_new=4,
            chunk=99,
            **kw,
        ),
        given="scores",
    ),
    "attention_gate(no cap, sinks)": Row(
        lambda budget: policies.attention_gate(threshold=0.7, sinks=2, last=0),
        lambda budget, **kw: attention_gate.run(threshold=0.7, protect_first=2, protect_last=0, **kw),
        given="p",
    ),
    "elastic_cache(official)": Row(
        lambda budget: policies.elastic_cache(0.4, sinks=2, distance=3, selection="official"),
        lambda budget, **kw: elastic_cache.run(r=0.4, start_size=2, distance=3, selection="official", **kw),
    ),
    "elastic_cache(most)": Row(
        lambda budget: policies.elastic_cache(0.7, sinks=2, last=2, distance=1),
        lambda budget, **kw: elastic_cache.run(r=0.7, start_size=2, protect_size=2, distance=1, **kw),
    ),
}

every_method = pytest.mark.parametrize("row", POLICIES.values(), ids=POLICIES)
bounded_methods = {name: row for name, row in POLICIES.items() if row.make(10).budget is not None}
growing_methods = {name: row for name, row in POLICIES.items() if name not in bounded_methods}
every_growing_method = pytest.mark.parametrize("row", growing_methods.values(), ids=growing_methods)
every_bounded_method = pytest.mark.parametrize("row", bounded_methods.values(), ids=bounded_methods)


def kept_positions(layer: kvjax.LayerCache, b: int) -> list[list[int]]:
    """Positions that each head of row b keeps in one layer, in order."""
    return [sorted(int(p) for p in head if p >= 0) for head in np.asarray(layer.pos)[b]]
