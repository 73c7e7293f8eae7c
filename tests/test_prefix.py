"""A prefix that rows share: attention over it and a row's own slots is one softmax, for outputs and for statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import codecs, policies
from kvjax.models.rope import Rope
from kvjax.policy import store

PARTS, EACH, LONG, OWN, HEADS, GROUP, DIM = 2, 3, 20, 9, 2, 2, 8
ROPE = Rope()


def made(count, seed, rows=PARTS * EACH, heads=HEADS * GROUP):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, count, heads, DIM), dtype=np.float32))


def prompt(count, seed, rows=PARTS * EACH):
    return made(count, seed, rows), made(count, seed + 1, rows, HEADS), made(count, seed + 2, rows, HEADS)


def read(vectors, cache, policy, positions, **more):
    return kvjax.attend(*vectors, cache, policy, positions=positions, rope=ROPE, **more)


def places(lengths, start=0, count=None):
    at = jnp.arange(count or max(lengths))
    return jnp.where(at < jnp.array(lengths)[:, None], jnp.asarray(start).reshape(-1, 1) + at, -1)


LENGTHS = np.array([LONG, 13])
PREFIX = prompt(LONG, 0, PARTS)
SUFFIX = prompt(OWN, 3)
OWN_LENGTHS = [9, 1, 4, 7, 9, 2]
NEXT = prompt(1, 6)


def shared(policy, prefix_policy=None, chunks=(OWN,)):
    """Outputs of suffixes and of one step more, and the layer's cache, where the prefix is read once for its rows."""
    _, prefix = read(PREFIX, None, prefix_policy or policies.full(), places(LENGTHS))
    start = np.repeat(LENGTHS, EACH)
    cache, outs = (
        policy.empty(kvjax.cache.LayerShape(PARTS * EACH, HEADS, policy.capacity(OWN, 1), DIM, jnp.float32, 0)),
        [],
    )
    at = places(OWN_LENGTHS, start)
    for begin, size in zip(np.cumsum([0, *chunks[:-1]]), chunks, strict=True):
        piece = slice(begin, begin + size)
        out, cache = read(
            [x[:, piece] for x in SUFFIX], cache, policy, at[:, piece], prefix=prefix, capacity=cache.slots
        )
        outs.append(out)
    after, cache = read(NEXT, cache, policy, places([1] * 6, start + OWN_LENGTHS), prefix=prefix)
    return jnp.concatenate(outs, axis=1), after, cache


def apart(policy):
    """The same where every row holds the prefix itself."""
    rows = [np.repeat(x, EACH, axis=0) for x in PREFIX]
    start = np.repeat(LENGTHS, EACH)
    _, cache = read(rows, None, policy, places(start, count=LONG), capacity=LONG + OWN + 2)
    out, cache = read(SUFFIX, cache, policy, places(OWN_LENGTHS, start), capacity=LONG + OWN + 2)
    after, cache = read(NEXT, cache, policy, places([1] * 6, start + OWN_LENGTHS))
    return out, after, cache


@pytest.mark.parametrize("chunks", [(OWN,), (4, 5)])
def test_what_rows_share_is_read_as_if_each_had_it(chunks):
    want, want_after, _ = apart(policies.full())
    out, after, _ = shared(policies.full(), chunks=chunks)
    assert_allclose(out, want, atol=1e-6)
    assert_allclose(after, want_after, atol=1e-6)


def test_statistics_are_those_of_the_joint_softmax():
    policy = policies.h2o(LONG + OWN + 1, window=2)
    _, _, whole = apart(policy)
    _, _, own = shared(policy)
    start = np.repeat(LENGTHS, EACH)
    for row in range(PARTS * EACH):
        for head in range(HEADS):
            held = {int(p): m for p, m in zip(own.pos[row, head], own.stats["mass"][row, head], strict=True) if p >= 0}
            want = {int(p): m for p, m in zip(whole.pos[row, head], whole.stats["mass"][row, head], strict=True)}
            assert sorted(held) == list(range(start[row], start[row] + OWN_LENGTHS[row] + 1))
            assert_allclose(list(held.values()), [want[p] for p in held], rtol=1e-5)


def test_an_evicting_policy_keeps_within_its_budget_and_the_prefix_stays():
    out, after, cache = shared(policies.tova(4))
    assert cache.slots == 5
    assert int((cache.pos >= 0).sum(axis=-1).max()) <= 4
    assert np.isfinite(out).all() and np.isfinite(after).all()


def test_a_prefix_may_be_evicted_and_stored_in_codes():
    policy = store(policies.keydiff(12), keys=codecs.integer(8, group=8), values=codecs.integer(8, group=8))
    out, _, _ = shared(policies.full(), policy)
    plain, _, _ = shared(policies.full(), policies.keydiff(12))
    assert_allclose(out, plain, atol=0.05)  # of eight bits
    assert float(jnp.abs(out - shared(policies.full())[0]).max()) > 0.05  # 12 of 20 tokens are not all


def test_an_empty_prefix_changes_nothing():
    _, prefix = read(PREFIX, None, policies.full(), jnp.full((PARTS, LONG), -1))
    want, _ = read(SUFFIX, None, policies.full(), places(OWN_LENGTHS))
    out, _ = read(SUFFIX, None, policies.full(), places(OWN_LENGTHS), prefix=prefix)
    assert_array_equal(out, want)


def test_long_calls_in_blocks_and_spans_read_it_too():
    rows = prompt(1100, 9, rows=1)
    first = [x[:, :60] for x in rows]
    _, prefix = read(first, None, policies.full(), places([60]))
    out, _ = read([x[:, 60:] for x in rows], None, policies.full(), places([1040], 60), prefix=prefix)
    want, _ = read(rows, None, policies.full(), places([1100]))
    assert_allclose(out, want[:, 60:], atol=1e-5)


def test_an_attended_prefix_costs_the_same_whatever_follows_it():
    """Seen in the compiled program: what it loads of a prefix does not grow with the rows that share it."""

    def loaded(rows):
        shape = kvjax.cache.LayerShape(1, HEADS, 4096, DIM, jnp.float32, 0)
        prefix = jax.eval_shape(lambda: policies.full().empty(shape))
        own = jax.eval_shape(lambda: policies.full().empty(kvjax.cache.LayerShape(rows, HEADS, 4, DIM, jnp.float32, 0)))
        vectors = [jax.ShapeDtypeStruct((rows, 1, h, DIM), jnp.float32) for h in (HEADS * GROUP, HEADS, HEADS)]
        at = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

        def call(q, k, v, cache, prefix, at):
            return kvjax.attend(q, k, v, cache, policies.full(), positions=at, rope=ROPE, prefix=prefix)

        text = jax.jit(call).lower(*vectors, own, prefix, at).compile().as_text()
        return text.count(f"f32[{rows},{HEADS},4096,{DIM}]")

    assert loaded(8) == 0


@pytest.mark.parametrize(
    "policy, prefix, reason",
    [
        (policies.streaming_llm(8), policies.full(), "streaming_llm.*place in the cache"),
        (policies.full(), policies.streaming_llm(8), "streaming_llm.*place in the cache"),
        (policies.full(), policies.kivi(bits=4, group=8, residual=32), "kivi.*whole layers or two tiers"),
    ],
)
def test_what_cannot_share_a_prefix_is_refused_with_the_reason(policy, prefix, reason):
    _, layer = read(PREFIX, None, prefix, places(LENGTHS))
    with pytest.raises(ValueError, match=reason):
        read(SUFFIX, None, policy, places(OWN_LENGTHS, np.repeat(LENGTHS, EACH)), prefix=layer)


def test_rows_that_do_not_divide_are_refused():
    _, prefix = read(PREFIX, None, policies.full(), places(LENGTHS))
    with pytest.raises(ValueError, match="divides its 5 rows"):
        read([x[:5] for x in SUFFIX], None, policies.full(), places(OWN_LENGTHS[:5]), prefix=prefix)
