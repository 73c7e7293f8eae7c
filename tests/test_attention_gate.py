"""Attention-Gate: the worked examples of its specification, what its flags hide, and that answers lose nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from kvjax.cache import LayerShape
from kvjax.heads import AttentionGate
from kvjax.models.llama import Projected
from tests.methods import kept_positions
from tests.oracles import attention_gate
from tests.test_policies import BASE, KV_HEADS, streams
from tests.tiny import CONFIG, random_params, random_tokens

ATTEND = jax.jit(kvjax.attend, static_argnames=("rope", "capacity"))
DIGITS = {"rtol": 0, "atol": 2e-6}  # the examples are printed with six digits, and kvjax computes in f32


def gated(policy, q, k, v, p, calls, *, rope=None, prompt=None):
    """`kvjax.attend` call by call: (out [B, T, Hq, D], layer). q, k, v are [B, n, heads, D], p [B, n, H].

    The first `prompt` tokens, None the first call, may come in several calls; single tokens after it are steps.
    """
    batch, count, kv_heads, dim = k.shape
    prompt, start = calls[0] if prompt is None else prompt, 0
    cache = policy.empty(LayerShape(batch, kv_heads, count + 1, dim, jnp.dtype("float32"), 0))
    for size in calls:
        now, column = slice(start, start + size), np.broadcast_to(np.arange(start, start + size), (batch, size))
        turn = kvjax.Turn(jnp.zeros(batch, jnp.int32), jnp.full(batch, prompt)) if start < prompt else None
        piece = [jnp.asarray(x[:, now], jnp.float32) for x in (q, k, v)]
        out, cache = ATTEND(
            *piece, cache, policy, positions=jnp.asarray(column, jnp.int32), rope=rope, capacity=count + 1,
            given={"attention_gate": jnp.asarray(p[:, now].swapaxes(1, 2), jnp.float32)}, turn=turn,
        )  # fmt: skip
        start += size
        yield np.asarray(out), cache


# ---- worked examples ----

X = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]]
WQ, WK, WV = ([[2, -2], [-2, 2], [2, 2]], [[2, 0], [0, 2], [1, -1]], [[2, 0], [0, -2], [-2, 1]])
P = np.array([[0.664732, 0.163564, 0.536653, 0.377541, 0.320337], [0.666462, 0.385570, 0.108291, 0.524979, 0.197933]])
CAUSAL = [[0.908877, 0.156293, 0.567411, 0.512497, 0.320337], [0.182426, 0.376723, 0.292105, 0.407333, 0.197933]]
OF_THREE = [[0.689041, 0.156744, 0.567411], [0.678704, 0.379581, 0.292105]]

FLAGS = [1.0, 0, 1, 0, 0, 0]  # of the first head, and of the token that is decoded, whose flag does not count
Q = [[1, 0], [0, 1], [1, 1], [1, -1], [0, 2], [1, 1]]
K = [[1, 1], [2, 0], [0, 1], [1, 0], [-1, 1], [0, 0]]
V = [[1, 0], [0, 1], [2, 2], [-1, 1], [0, 3], [1, 1]]
OUT = [[1, 0], [0.669762, 0.330238], [1.330238, 0.660477], [-0.011921, 0.856034], [1, 1.666667]]
ALL_KEPT = [[1, 0], [0.669762, 0.330238], [0.796664, 0.796664], [-0.005498, 0.933599], [0.790791, 1.573685]]


def example_gate(reach="prompt"):
    config = dataclasses.replace(CONFIG, width=3)
    gate = AttentionGate(config, heads=1, head_dim=2, reach=reach, rotated=False, rngs=nnx.Rngs(0))
    for name, weights in (("wq", WQ), ("wk", WK), ("wv", WV)):
        setattr(gate, name, nnx.Param(jnp.asarray(weights, jnp.float32)[:, None]))
    gate.wo, gate.bias = nnx.Param(jnp.array([[[1, -1], [1, 0.5]]])), nnx.Param(jnp.array([0.3, 0.5]))
    return gate


@pytest.mark.parametrize("reach, count, p", [("prompt", 5, P), ("causal", 5, CAUSAL), ("prompt", 3, OF_THREE)])
def test_the_gate_of_the_example_has_its_probabilities(reach, count, p):
    positions = jnp.arange(count)[None]
    made = Projected(jnp.asarray([X[:count]], jnp.float32), None, None, None, positions)
    assert_allclose(example_gate(reach)(made)[0], p, **DIGITS)


def example(policy, flags, calls):
    q, k, v = (np.asarray(x, float)[None, :, None] for x in (Q, K, V))
    return list(gated(policy, q, k, v, np.asarray(flags)[None, :, None], calls))


@pytest.mark.parametrize("flags, want", [(FLAGS, OUT), ([1.0] * 6, ALL_KEPT)])
def test_a_token_that_is_dropped_is_seen_by_itself_alone(flags, want):
    # row 1 is equal: token 1 sees itself; from row 2 on it is gone
    (out, _), _ = example(policies.attention_gate(last=0), flags, [5, 1])
    assert_allclose(out[0, :, 0], want, **DIGITS)


def test_a_decoded_token_attends_to_what_was_kept_and_stays():
    (_, prompt), (out, step) = example(policies.attention_gate(last=0), FLAGS, [5, 1])
    assert_allclose(out[0, 0, 0], [1.283995, 0.708020], **DIGITS)
    assert (kept_positions(prompt, 0), kept_positions(step, 0)) == ([[0, 2]], [[0, 2, 5]])


@pytest.mark.parametrize("budget, last, kept", [(1, 0, [0]), (1, 1, [4]), (2, 1, [0, 4]), (4, 1, [0, 2, 4])])
def test_a_budget_keeps_the_last_and_then_the_most_probable_of_those_that_pass(budget, last, kept):
    # by probability 0 2 3 4 1, of which 0 and 2 pass; of a budget of four a slot stays empty
    ((_, cache),) = example(policies.attention_gate(budget, last=last), [*P[0], 0], [5])
    assert kept_positions(cache, 0) == [kept]


# ---- what flags do ----

N, PROMPT = 16, 10


def shown(policy, p):
    """bool[B, Hq, n, n], which tokens each query sees: values are 1 for one token each."""
    q, k, _ = streams(1, N, seed=2)
    markers = np.broadcast_to(np.eye(N)[None, :, None], (1, N, KV_HEADS, N))
    pad = [(0, 0)] * 3 + [(0, N - q.shape[-1])]
    out = [o for o, _ in gated(policy, np.pad(q, pad), np.pad(k, pad), markers, p, [PROMPT] + [1] * (N - PROMPT))]
    return np.concatenate(out, axis=1).swapaxes(1, 2) > 0


def expected(stays):
    """bool[n, n] of what a query may see, where `stays` bool[n] says which tokens others see."""
    before = np.tri(N, dtype=bool)
    return before & (np.eye(N, dtype=bool) | stays)


@pytest.mark.parametrize("threshold, always", [(0.5, [False, False]), (0.0, [True, True]), (1.0, [False, False])])
def test_all_query_heads_of_a_group_see_what_their_kv_head_keeps_and_no_query_is_left_without(threshold, always):
    p = np.random.default_rng(3).uniform(0.2, 0.8, (1, N, KV_HEADS))
    p[0, :PROMPT, 1] = 0.1  # the second head drops all that it may
    got = shown(policies.attention_gate(threshold=threshold, sinks=1, last=2), p)
    group = got.shape[1] // KV_HEADS
    protected = (np.arange(N) < 1) | (np.arange(N) >= PROMPT - 2)
    for head in range(got.shape[1]):
        flags = p[0, :, head // group] > threshold
        want = expected(protected | flags)
        assert_array_equal(got[0, head], want)
        assert want.all(where=np.tri(N, dtype=bool)) == always[head // group]


def test_tokens_that_nobody_else_sees_see_themselves():
    got = shown(policies.attention_gate(last=0), np.zeros((1, N, KV_HEADS)))
    assert_array_equal(got[0, 0], expected(np.arange(N) >= PROMPT))


def test_flags_hide_in_a_prompt_what_the_smaller_cache_no_longer_holds():
    q, k, v = streams(2, N, seed=4)
    p = np.random.default_rng(5).random((2, N, KV_HEADS))
    p[:, PROMPT:] = 1.0  # read whole, what follows the prompt passes by its probability
    rope, policy = kvjax.Rope(BASE), policies.attention_gate(last=0)
    ((whole, _),) = gated(policy, q, k, v, p, [N], rope=rope)
    steps = np.concatenate([out for out, _ in gated(policy, q, k, v, p, [PROMPT] + [1] * (N - PROMPT), rope=rope)], 1)
    assert_allclose(steps, whole, atol=2e-5)


@pytest.mark.parametrize("budget", [None, 4])
def test_a_prompt_in_chunks_is_that_of_the_oracle_that_learns_each_chunk_by_itself(budget):
    q, k, v = streams(2, N, seed=6)
    p, calls = np.random.default_rng(7).random((2, N, KV_HEADS)), [4, 4, 4, 1, 1, 2]
    policy = policies.attention_gate(budget, threshold=0.4, sinks=1)
    got = list(gated(policy, q, k, v, p, calls[:5], rope=kvjax.Rope(BASE), prompt=12))
    for b in range(2):
        want = attention_gate.run(
            q[b], k[b], v[b], calls, p=p[b], base=BASE, prompt=12, threshold=0.4, cap=budget, protect_first=1,
            decide="call",
        )  # fmt: skip
        for (out, cache), call in zip(got, want[:5], strict=True):
            assert_allclose(out[b], call.out, atol=2e-5)
            assert kept_positions(cache, b) == call.kept


# ---- through a model ----

PARAMS = random_params()
TOKENS, LENGTHS = random_tokens(3, 24), (24, 13, 3)


def kept(cache):
    return [[kept_positions(layer, b) for b in range(len(cache.length))] for layer in cache.layers]


def longer(before, length, more):
    """What is kept if all heads keep `more` tokens besides, from position `length` [B] on."""
    return [[[[*head, *range(n, n + more)] for head in row] for row, n in zip(layer, length, strict=True)]
            for layer in before]  # fmt: skip


def test_an_answer_loses_nothing_and_takes_a_slot_a_token():
    policy = policies.attention_gate(6)
    logits, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, room=3)
    before = kept(cache)
    for i in range(3):
        logits, cache = kvjax.step(PARAMS, policy, logits.argmax(axis=-1), cache)
        assert kept(cache) == longer(before, LENGTHS, i + 1)


@pytest.mark.parametrize("budget", [None, 6])
def test_a_later_turn_loses_nothing(budget):
    policy = policies.attention_gate(budget)
    _, cache = kvjax.prefill(PARAMS, policy, TOKENS, lengths=LENGTHS, room=1)
    after = kvjax.decode(PARAMS, policy, TOKENS[:, :4], cache=cache, max_new_tokens=2).cache
    assert kept(after) == longer(kept(cache), LENGTHS, 6)


def test_prompts_leave_no_more_than_the_budget_in_slots_for_it_and_the_tokens_to_come():
    _, cache = kvjax.prefill(PARAMS, policies.attention_gate(6), TOKENS, lengths=LENGTHS, room=3)
    assert {layer.slots for layer in cache.layers} == {6 + 3}
    sizes = {len(head) for layer in kept(cache) for row in layer for head in row}
    assert max(sizes) <= 6 and len(sizes) > 1  # heads differ


def test_a_causal_gate_decides_about_a_token_before_it_has_seen_the_later_ones():
    gates = jax.tree.map(lambda leaf: leaf, PARAMS.heads["attention_gate"])
    for gate in gates:
        gate.reach = "causal"
    policy, changed = policies.attention_gate(last=0), TOKENS.at[:, 9:].set((TOKENS[:, 9:] + 7) % CONFIG.vocab)

    def flags(heads, tokens):
        _, cache = kvjax.prefill(kvjax.with_heads(PARAMS, {"attention_gate": heads}), policy, tokens)
        return [[[[p for p in head if p < 9] for head in row] for row in layer] for layer in kept(cache)]

    assert flags(gates, TOKENS) == flags(gates, changed)
    assert flags(PARAMS.heads["attention_gate"], TOKENS) != flags(PARAMS.heads["attention_gate"], changed)


def test_a_gate_that_drops_everything_changes_the_logits_of_its_own_layer_alone():
    gates = jax.tree.map(lambda leaf: leaf, PARAMS.heads["attention_gate"])
    for gate, bias in zip(gates, (30.0, -30.0), strict=True):
        gate.wo, gate.bias = nnx.Param(jnp.zeros_like(gate.wo)), nnx.Param(jnp.full(CONFIG.kv_heads, bias))
    params = kvjax.with_heads(PARAMS, {"attention_gate": gates})
    _, cache = kvjax.prefill(params, policies.attention_gate(), TOKENS)
    _, whole = kvjax.prefill(PARAMS, policies.full(), TOKENS)
    first, second = cache.layers
    assert kept(cache)[0][0] == [[*range(24)]] * 2 and kept(cache)[1][0] == [[23]] * 2
    assert_allclose(first.k, whole.layers[0].k, atol=1e-5)
    last = np.asarray(second.k)[second.pos == 23]  # of the second layer's own input, which the first has not changed
    assert_allclose(last, np.asarray(whole.layers[1].k)[whole.layers[1].pos == 23], atol=1e-5)


@pytest.mark.parametrize("call", [kvjax.prefill, kvjax.decode])
def test_a_model_without_gates_is_refused_by_name(call):
    settings = {"max_new_tokens": 1} if call is kvjax.decode else {}
    with pytest.raises(ValueError, match=r"attention_gate\(\) must be given \['attention_gate'\].*kvjax\.with_heads"):
        call(kvjax.with_heads(PARAMS, {}), policies.attention_gate(), TOKENS, **settings)
