"""Every method against its float64 oracle: outputs and kept positions, call by call, in a batch of uneven rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import kvjax
from kvjax import policies
from kvjax.policies.random import _mix
from tests.oracles import full, h2o, keydiff, random_eviction, snapkv, streaming_llm, tova

Q_HEADS, KV_HEADS, HEAD_DIM, BASE = 6, 2, 8, 100.0  # a small base: rotations matter within a few tokens


def draws(seed: int, count: int, layer: int = 0) -> np.ndarray:
    """The documented draw of `random`, in plain integers: [H, count]."""

    def mix(x):
        x = (x + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    def draw(head, pos):
        return mix(mix(pos) ^ mix(mix(seed ^ mix(layer)) ^ head)) >> 8

    return np.array([[draw(head, pos) for pos in range(count)] for head in range(KV_HEADS)], dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Row:
    """A method in the shared table: how to make it with a budget, and the oracle's `run` with the same settings."""

    make: Callable[[int], kvjax.Policy]
    oracle: Callable[..., Any]


POLICIES = {
    "full": Row(lambda budget: policies.full(), lambda budget, **kw: full.run(**kw)),
    "streaming_llm": Row(
        lambda budget: policies.streaming_llm(budget, sinks=2),
        lambda budget, **kw: streaming_llm.run(budget=budget, sinks=2, **kw),
    ),
    "h2o": Row(
        lambda budget: policies.h2o(budget, window=4), lambda budget, **kw: h2o.run(budget=budget, window=4, **kw)
    ),
    "snapkv": Row(
        lambda budget: policies.snapkv(budget, window=4, pool=3),
        lambda budget, **kw: snapkv.run(budget=budget, window=4, pool=3, **kw),
    ),
    "tova": Row(policies.tova, lambda budget, **kw: tova.run(budget=budget, **kw)),
    "keydiff": Row(policies.keydiff, lambda budget, **kw: keydiff.run(budget=budget, **kw)),
    "random": Row(
        lambda budget: policies.random(budget, seed=7),
        lambda budget, **kw: random_eviction.run(budget=budget, scores=draws(7, len(kw["q"])), **kw),
    ),
}


def streams(rows: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Un-rotated q [B, n, Hq, D], k and v [B, n, H, D], float64."""
    rng = np.random.default_rng(seed)
    return (
        2 * rng.standard_normal((rows, count, Q_HEADS, HEAD_DIM)),
        rng.standard_normal((rows, count, KV_HEADS, HEAD_DIM)),
        rng.standard_normal((rows, count, KV_HEADS, HEAD_DIM)),
    )


def run_kvjax(policy, q, k, v, prompts, calls):
    """Feeds rows with prompts of different lengths; then `calls` tokens for each row. Yields (out, cache, first)."""
    attend = jax.jit(kvjax.attend, static_argnames=("rope", "capacity"))
    rope, cache = kvjax.Rope(BASE), None
    start = np.zeros(len(prompts), int)
    for count in (prompts, *calls):
        width = int(np.max(count))
        counts = np.broadcast_to(count, len(prompts))
        at = start[:, None] + np.arange(width)
        positions = np.where(np.arange(width) < counts[:, None], at, -1)
        pick = np.minimum(at, q.shape[1] - 1)
        piece = [jnp.asarray(np.take_along_axis(x, pick[:, :, None, None], axis=1), jnp.float32) for x in (q, k, v)]
        capacity = q.shape[1] + 1 if policy.budget is None else None
        out, cache = attend(
            *piece, cache, policy, positions=jnp.asarray(positions, jnp.int32), rope=rope, capacity=capacity
        )
        start = start + counts
        yield np.asarray(out), cache


def kept_positions(cache, row):
    return [sorted(int(p) for p in head if p >= 0) for head in np.asarray(cache.pos)[row]]


CALLS = {
    "decode": ((20, 13, 3), (1,) * 30),
    "chunks": ((8, 5, 8), (8, 8, 5) + (1,) * 10),
    "short prompt": ((1, 2, 3), (1,) * 20),
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("row", POLICIES.values(), ids=POLICIES)
def test_outputs_and_kept_positions_are_those_of_the_oracle(row, calls):
    budget, (prompts, rest) = 10, calls
    q, k, v = streams(len(prompts), max(prompts) + sum(rest), seed=3)
    got = list(run_kvjax(row.make(budget), q, k, v, prompts, rest))
    for b, prompt in enumerate(prompts):
        sizes = [prompt, *rest]
        total = sum(sizes)
        want = row.oracle(budget, q=q[b, :total], k=k[b, :total], v=v[b, :total], calls=sizes, base=BASE)
        for i, ((out, cache), expected) in enumerate(zip(got, want, strict=True)):
            assert_allclose(out[b, : sizes[i]], expected.out, atol=2e-5, err_msg=f"row {b}, call {i}")  # f32
            assert kept_positions(cache, b) == [list(head) for head in expected.kept], f"row {b}, call {i}"


def test_the_draw_is_the_one_documented():
    assert int(_mix(jnp.uint32(5))) == int(_mix(jnp.asarray(5, jnp.uint32)))
    policy = policies.random(1000, seed=7)
    assert policy is policies.random(budget=1000, seed=7)
