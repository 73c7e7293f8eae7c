"""The Attention-Gate oracle against its worked examples, dense formulations and the properties of its specification."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.oracles import attention_gate as ag
from tests.oracles import common, full
from tests.test_oracles import GROUP, KV_HEADS, make_stream, rotate

N, PROMPT = 16, 10
CALLS = [PROMPT] + [1] * (N - PROMPT)
CHUNKED = [4, 3, 3] + [1] * (N - PROMPT)


# ---- worked examples ----

X = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], float)
EXAMPLE = ag.Gate(
    wq=np.array([[2, -2], [-2, 2], [2, 2]], float),
    wk=np.array([[2, 0], [0, 2], [1, -1]], float),
    wv=np.array([[2, 0], [0, -2], [-2, 1]], float),
    wo=np.array([[1, -1], [1, 0.5]]),
    bo=np.array([0.3, 0.5]),
)
NO_TURN = dict(heads=1, base=None)

P = np.array([[0.664732, 0.163564, 0.536653, 0.377541, 0.320337], [0.666462, 0.385570, 0.108291, 0.524979, 0.197933]]).T
F = np.array([1.0, 0, 1, 0, 0])  # head 0
Q = np.array([[1, 0], [0, 1], [1, 1], [1, -1], [0, 2]], float)
K = np.array([[1, 1], [2, 0], [0, 1], [1, 0], [-1, 1]], float)
V = np.array([[1, 0], [0, 1], [2, 2], [-1, 1], [0, 3]], float)
C = np.array([[1, 2], [0, 1], [-1, 1], [2, 0], [1, 1]], float)
GATED = [[1, 0], [0.669762, 0.330238], [1.330238, 0.660477], [-0.011921, 0.856034], [1, 1.666667]]
ALL_KEPT = [[1, 0], [0.669762, 0.330238], [0.796664, 0.796664], [-0.005498, 0.933599], [0.790791, 1.573685]]


def to6(got, want):
    assert_allclose(got, want, rtol=0, atol=6e-7)


def test_example_gate():
    # token 0: q' = (2, -2); its products with k' = (2,0), (0,2), (1,-1), (2,2), (1,1) are 4, -4, 4, 0, 0, over sqrt 2.
    # Tokens 0 and 2 tie, with v' = (2, 0) and (-2, 1), and 3 and 4 tie with e^-2.828 = .0591 each, v' = (2, -2) and
    # (-2, -1), token 1 gets e^-5.657 = .0035: O' = (0, (1 - 3*.0591 - 2*.0035)/2.1217) = (0, .3845)
    # z = .3 + 0 + .3845 = .6845, sigmoid .6647
    o = ag.mixed(X, EXAMPLE, mask="bidirectional", **NO_TURN)
    to6(o, [[0, 0.384453], [0, -1.931947], [1.687834, -1.840959], [0, -0.8], [0.915434, -1.967659]])
    p = ag.keep_probability(X, EXAMPLE, mask="bidirectional", **NO_TURN)
    to6(p, P)
    assert_array_equal(ag.raw_flags(p).T, [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]])
    assert_array_equal(p, ag.keep_probability(X, EXAMPLE, **NO_TURN))  # the prompt is the whole


def test_example_gate_causal():
    # token 0 reads itself: O' = v' = (2, 0), z = .3 + 2, sigmoid(2.3) = .9089
    p = ag.keep_probability(X, EXAMPLE, mask="causal", **NO_TURN)
    to6(p[:, 0], [0.908877, 0.156293, 0.567411, 0.512497, 0.320337])
    to6(p[:, 1], [0.182426, 0.376723, 0.292105, 0.407333, 0.197933])
    assert_array_equal(ag.raw_flags(p).T, [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])


def test_example_gate_of_a_prefix():
    p = ag.keep_probability(X, EXAMPLE, prompt=3, **NO_TURN)
    to6(p[:3].T, [[0.689041, 0.156744, 0.567411], [0.678704, 0.379581, 0.292105]])
    assert np.isnan(p[3:]).all()
    assert_array_equal(ag.raw_flags(p, prompt=3).T, [[1, 0, 1, 1, 1], [1, 0, 0, 1, 1]])


def test_example_loss():
    # 4 flags of 10: |.4 - .5| = .1; probabilities: mean .39460613
    counted = np.ones((1, 5), bool)
    p = ag.keep_probability(X, EXAMPLE, **NO_TURN)[None, None]
    flags = ag.raw_flags(p[0, 0])[None, None].astype(float)
    assert ag.keep_fractions(flags, counted) == [0.4]
    loss, grad = ag.eviction_loss(flags, counted, target=0.5)
    assert_allclose(loss, 0.1)
    assert_allclose(grad, -0.1)  # towards more flags, one part in ten each
    assert_allclose(ag.keep_fractions(p, counted), 0.39460613, atol=1e-8)
    assert_allclose(ag.eviction_loss(p, counted, target=0.5)[0], 0.10539387, atol=1e-8)
    # -.1 * .664732 * .335268 = -.022286
    to6(ag.straight_through(p, grad)[0, 0, :, 0], [-0.022286, -0.013681, -0.024866, -0.023500, -0.021772])


def test_example_attention():
    # row 1: logits 1/sqrt 2 and 0 over itself, which is evicted and yet seen: e^.7071/(1 + e^.7071) = .669762
    # row 2: token 1 is gone; logits 2/sqrt 2 and 1/sqrt 2 give .669762, .330238 of (1,0), (2,2): (1.330238, .660477)
    to6(ag.gated_attention(Q[:, None], K, V, F)[:, 0], GATED)
    to6(ag.gated_attention(Q[:, None], K, V, np.ones(5))[:, 0], ALL_KEPT)


def test_example_stream():
    # prompt of five, then one token at position 5 with q = (1,1), k = 0, v = (1,1): weights e^1.4142 = 4.1133 and
    # e^.7071 = 2.0281 for tokens 0 and 2, 1 for itself, 7.1414 in all: ((4.1133 + 4.0562 + 1), (4.0562 + 1)) / 7.1414
    q, k, v = np.vstack([Q, [[1, 1]]]), np.vstack([K, [[0, 0]]]), np.vstack([V, [[1, 1]]])
    q, k = rotate(q, -np.arange(6)), rotate(k, -np.arange(6))  # so that the run's rotation gives the example's vectors
    stream = [x[:, None] for x in (q, k, v)]
    first, then = ag.run(*stream, [5, 1], p=P[:, :1], protect_last=0)
    to6(first.out[:, 0], GATED)
    assert (first.kept, then.kept) == ([[0, 2]], [[0, 2, 5]])
    to6(then.out[0, 0], [1.283995, 0.708020])
    to6([first.scores[0][j] for j in range(5)], P[:, 0])
    assert then.scores == [{0: P[0, 0], 2: P[2, 0], 5: np.inf}]


def test_example_gate_gradient():
    # key 3 is evicted and has one later query, row 4: q = (0,2), logits 2/sqrt 2 for keys 0, 2, 4 and 0 for key 3, so
    # its ratio is e^-1.4142/3 = .081039; G = (1,1), G.v = 0, delta = 1 + 1.666667: -.081039 * 2.666667 = -.216104
    p = ag.keep_probability(X, EXAMPLE, **NO_TURN)[:, 0]
    got = ag.gate_gradient(Q[:, None], K, V, F, C[:, None])
    to6(got, [-0.423155, 1.011129, 1.007900, -0.216104, 0])
    to6(ag.straight_through(p, got), [-0.094306, 0.138333, 0.250621, -0.050785, 0])


def test_example_capacity():
    head = dict(enumerate(P[:, 0]))
    assert common.best(head, 5) == [0, 2, 3, 4, 1]
    assert ag.survivors(head, (), 0.5, 1) == [0]
    assert ag.survivors(head, ag.protected_positions(5), 0.5, 1) == [4]
    assert_array_equal(ag.flags(P[:, :1], cap=1)[:, 0], [0, 0, 0, 0, 1])
    assert_array_equal(ag.flags(P[:, :1], cap=1, protect_last=0)[:, 0], [1, 0, 0, 0, 0])
    assert_array_equal(ag.flags(P[:, :1], cap=4)[:, 0], [1, 0, 1, 0, 1])  # places stay empty


def test_example_parameters():
    assert 32 * ag.parameters(4096, 4, 128, 32) == 201_851_904
    assert 32 * ag.parameters(4096, 4, 64, 32) == 100_926_464
    assert 32 * ag.parameters(4096, 2, 64, 32) == 50_463_744
    assert 32 * ag.parameters(4096, 4, 128, 8) == 201_457_920


# ---- the gate ----

WIDTH, HEADS, HEAD_WIDTH = 6, 2, 4
MASKS = {
    "prefix": dict(prompt=7),
    "causal": dict(mask="causal"),
    "bidirectional": dict(mask="bidirectional"),
    "chunks": dict(mask="chunk_bidirectional", chunks=[4, 3, 5]),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def make_gate(seed=0, n=12):
    rng = np.random.default_rng(seed)
    wq, wk, wv = rng.normal(size=(3, WIDTH, HEADS * HEAD_WIDTH))
    wo = rng.normal(size=(HEADS * HEAD_WIDTH, KV_HEADS))
    return rng.normal(size=(n, WIDTH)), ag.Gate(wq, wk, wv, wo, rng.normal(size=KV_HEADS))


def keep(x, gate, **settings):
    return ag.keep_probability(x, gate, heads=HEADS, **settings)


@each_mask
def test_gate_is_masked_multi_head_attention(mask):
    x, gate = make_gate()
    n = len(x)
    i, j = np.indices((n, n))
    sees = {
        "prefix_bidirectional": j < 7,
        "causal": j <= i,
        "bidirectional": j < n,
        "chunk_bidirectional": j < np.where(i < 4, 4, np.where(i < 7, 7, n)),
    }[mask.get("mask", "prefix_bidirectional")]
    z = gate.bo
    for a in range(HEADS):
        mine = slice(a * HEAD_WIDTH, (a + 1) * HEAD_WIDTH)
        logits = rotate(x @ gate.wq[:, mine], range(n)) @ rotate(x @ gate.wk[:, mine], range(n)).T / np.sqrt(HEAD_WIDTH)
        weights = np.where(sees, np.exp(logits), 0.0)
        z = z + weights / weights.sum(axis=1, keepdims=True) @ x @ gate.wv[:, mine] @ gate.wo[mine]
    want = 1 / (1 + np.exp(-z))
    if "prompt" in mask:
        want[7:] = np.nan
    assert_allclose(keep(x, gate, **mask), want, atol=1e-12)


def test_causal_flags_do_not_depend_on_later_tokens():
    x, gate = make_gate()
    before = keep(x, gate, mask="causal")
    x[7] += 1.0
    after = keep(x, gate, mask="causal")
    assert_array_equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).all()


def test_prefix_flags_do_not_depend_on_tokens_outside_the_prompt():
    x, gate = make_gate()
    before = keep(x, gate, prompt=7)
    x[7:] += 1.0
    assert_array_equal(keep(x, gate, prompt=7), before)
    assert_array_equal(keep(x[:7], gate), before[:7])


def test_chunks_of_one_are_causal_and_one_chunk_is_the_whole():
    x, gate = make_gate()
    n = len(x)
    assert_array_equal(keep(x, gate, mask="chunk_bidirectional", chunks=[1] * n), keep(x, gate, mask="causal"))
    assert_array_equal(keep(x, gate, mask="chunk_bidirectional", chunks=[n]), keep(x, gate))


def test_only_a_turned_gate_sees_order():
    x, gate = make_gate()
    order = np.random.default_rng(1).permutation(len(x))
    assert_allclose(keep(x[order], gate, base=None), keep(x, gate, base=None)[order], atol=1e-12)
    assert abs(keep(x[order], gate) - keep(x, gate)[order]).max() > 1e-2


@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (2, 1)])
@pytest.mark.parametrize("mask", ["prefix_bidirectional", "causal"])
def test_padding_changes_nothing(mask, left, right):
    x, gate = make_gate()
    n = len(x)
    padded = np.vstack([np.full((left, WIDTH), 3.0), x, np.full((right, WIDTH), -5.0)])
    valid = [False] * left + [True] * n + [False] * right
    p = keep(padded, gate, mask=mask, valid=valid)
    want = keep(x, gate, mask=mask)
    assert_allclose(p[left : left + n], want, atol=1e-12)
    for given in (ag.raw_flags(p, valid=valid), ag.flags(p, valid=valid, protect_first=1, cap=5)):
        assert not given[~np.array(valid)].any()
    assert_array_equal(
        ag.flags(p, valid=valid, protect_first=1, cap=5)[left : left + n], ag.flags(want, protect_first=1, cap=5)
    )
    values = np.where(np.isnan(p), 0.9, p)[None, None]
    assert_allclose(ag.keep_fractions(values, np.array([valid])), want.mean())


def test_linear_control_by_hand():
    # z = 2 - 1 + .5, and 0 exactly: .8176 and .5, which does not pass a threshold of .5
    p = ag.linear_keep_probability(np.array([[2.0, 1.0], [0.5, 1.0]]), np.array([[1.0], [-1.0]]), np.array([0.5]))
    to6(p, [[0.817574], [0.5]])
    assert_array_equal(ag.raw_flags(p), [[True], [False]])


def test_sigmoid_far_out():
    assert (ag.sigmoid(800.0), ag.sigmoid(0.0), ag.sigmoid(-700.0) > 0) == (1.0, 0.5, True)


# ---- initial values ----


def test_initial_gate_keeps_all():
    x = make_gate()[0]
    gate = ag.initial_gate(np.random.default_rng(0), WIDTH, HEADS, HEAD_WIDTH, KV_HEADS)
    p = keep(x, gate)
    assert_allclose(p, 0.88079708, atol=1e-8)
    stream = make_stream(len(x))
    assert_allclose(ag.run(*stream, [len(x)], p=p)[0].out, full.run(*stream, [len(x)])[0].out, atol=1e-14)


def test_initial_gate_learns_at_its_output_first():
    x, _ = make_gate()
    gate = ag.initial_gate(np.random.default_rng(0), WIDTH, HEADS, HEAD_WIDTH, KV_HEADS)

    def change(name, index):
        moved = getattr(gate, name).copy()
        moved[index] += 1e-6
        return abs(keep(x, replace(gate, **{name: moved})) - keep(x, gate)).max() / 1e-6

    assert change("wo", (0, 0)) > 1e-4
    assert [change(name, (0, 0)) for name in ("wq", "wk", "wv")] == [0, 0, 0]


# ---- flags ----


def test_thresholds_at_the_ends():
    p = keep(*make_gate())
    assert ag.raw_flags(p, threshold=0.0).all()
    assert not ag.raw_flags(np.ones_like(p), threshold=1.0).any()
    assert_array_equal(ag.flags(p, threshold=1.0, protect_first=2)[:, 0].nonzero()[0], [0, 1, len(p) - 1])


def test_protected_positions():
    assert ag.protected_positions(6) == {5}
    assert ag.protected_positions(6, 0, 0) == set()
    assert ag.protected_positions(6, 2, 3) == {0, 1, 3, 4, 5}
    assert ag.protected_positions(3, 2, 8) == {0, 1, 2}
    assert ag.protected_positions(5, 1, 1, [False, True, True, True, False]) == {1, 3}


def test_equality_evicts():
    assert ag.survivors({0: 0.5, 1: 0.51}, (), 0.5, None) == [1]
    assert_array_equal(ag.raw_flags(np.array([[0.5], [0.51]]))[:, 0], [0, 1])


def test_padding_is_never_kept_whatever_its_probability():
    p, valid = np.array([[0.99], [0.7], [0.8], [0.6], [0.99]]), [False, True, True, True, False]
    assert_array_equal(ag.raw_flags(p, valid=valid)[:, 0], [0, 1, 1, 1, 0])
    assert_array_equal(ag.flags(p, valid=valid, cap=2)[:, 0], [0, 0, 1, 1, 0])  # 3 is the last token of the prompt


def test_cap_takes_the_protected_then_the_likely_then_the_lower():
    p = {0: 0.9, 1: 0.6, 2: 0.7, 3: 0.7, 4: 0.8, 5: 0.1}
    assert ag.survivors(p, {5}, 0.5, None) == [0, 1, 2, 3, 4, 5]
    assert ag.survivors(p, {5}, 0.5, 4) == [0, 2, 4, 5]
    assert ag.survivors(p, {5}, 0.75, 4) == [0, 4, 5]
    assert ag.survivors(p, {1, 4, 5}, 0.5, 2) == [1, 4]


# ---- attention in training ----

T = 9


def make_head(seed=0, n=T):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(n, GROUP, 4))
    k, v = rng.normal(size=(2, n, 4))
    return q, k, v, rng.integers(0, 2, n).astype(float), rng.normal(size=(n, GROUP, 4))


def dense(q, k, v, f, fixed=()):
    """The gate inside the softmax as one matrix per head; takes complex arguments."""
    n = len(k)
    weights = np.tile(np.where(np.isin(np.arange(n), list(fixed)), 1.0, f), (n, 1))
    weights[np.arange(n), np.arange(n)] = 1.0
    a = np.tril(weights) * np.exp(np.einsum("iad,jd->aij", q, k) / np.sqrt(k.shape[1]))
    return np.einsum("aij,jd->iad", a / a.sum(axis=2, keepdims=True), v)


def slope(function, x):
    """Derivative of a real function of x by a complex step, which does not round."""
    grad = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1e-30j
        grad[index] = function(moved).imag / 1e-30
    return grad


@pytest.mark.parametrize("fixed", [(), (0, T - 1), (2, 3, 4)])
def test_gated_attention_is_a_weighted_softmax(fixed):
    q, k, v, f, _ = make_head()
    assert_allclose(ag.gated_attention(q, k, v, f, fixed), dense(q, k, v, f, fixed), atol=1e-12)
    p = np.random.default_rng(1).uniform(size=T)
    assert_allclose(ag.gated_attention(q, k, v, p, fixed), dense(q, k, v, p, fixed), atol=1e-12)


@pytest.mark.parametrize("fixed", [(), (0, T - 1), (2, 3, 4)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_the_weighted_softmax(seed, soft, fixed):
    q, k, v, f, g = make_head(seed)
    if soft:
        f = 0.1 + 0.8 * np.random.default_rng(seed).uniform(size=T)
    got = ag.gate_gradient(q, k, v, f, g, fixed, clamp=None)
    assert_allclose(got, slope(lambda x: (dense(q, k, v, x, fixed) * g).sum(), f), atol=1e-12)
    assert not got[[*fixed, T - 1]].any()  # weights that are 1, and the last, which no later query sees
    dq, dk, dv = ag.input_gradients(q, k, v, f, g, fixed)
    assert_allclose(dq, slope(lambda x: (dense(x, k, v, f, fixed) * g).sum(), q), atol=1e-12)
    assert_allclose(dk, slope(lambda x: (dense(q, x, v, f, fixed) * g).sum(), k), atol=1e-12)
    assert_allclose(dv, slope(lambda x: (dense(q, k, x, f, fixed) * g).sum(), v), atol=1e-12)


def test_gate_gradient_agrees_with_finite_differences():
    q, k, v, f, g = make_head()
    want = np.zeros(T)
    for j in range(T):
        step = 1e-6 * np.eye(T)[j]
        ahead, behind = (ag.gated_attention(q, k, v, f + s, ()) for s in (step, -step))
        want[j] = ((ahead - behind) * g).sum() / 2e-6
    assert_allclose(ag.gate_gradient(q, k, v, f, g, clamp=None), want, atol=1e-7)  # steps of 1e-6 round at 1e-9


def test_soft_mask_through_the_sigmoid():
    q, k, v, _, g = make_head()
    z = np.random.default_rng(2).normal(size=T)
    p = 1 / (1 + np.exp(-z))
    got = ag.straight_through(p, ag.gate_gradient(q, k, v, p, g))
    assert_allclose(got, slope(lambda x: (dense(q, k, v, 1 / (1 + np.exp(-x))) * g).sum(), z), atol=1e-12)


def test_clamp_by_hand():
    # two tokens, D = 1: query 1 has logits 5 for the evicted key 0 and 0 for itself, lse 0; v = 3 and 1, G = 1,
    # delta = 1: e^5 (3 - 1) without the clamp, 10 (3 - 1) with it; a kept key's ratio is at most 1
    q, k, v = np.array([[[0.0]], [[1.0]]]), np.array([[5.0], [0.0]]), np.array([[3.0], [1.0]])
    g = np.ones((2, 1, 1))
    assert_allclose(ag.gate_gradient(q, k, v, np.zeros(2), g, clamp=None), [2 * np.exp(5), 0])
    assert_allclose(ag.gate_gradient(q, k, v, np.zeros(2), g), [20, 0])
    # kept: lse = ln(1 + e^5), out = (3 e^5 + 1)/(1 + e^5), and v - out = 2/(1 + e^5), times e^5/(1 + e^5)
    assert_allclose(ag.gate_gradient(q, k, v, np.ones(2), g, clamp=1e-3), [2 * np.exp(5) / (1 + np.exp(5)) ** 2, 0])
    assert_allclose(ag.gate_gradient(q, 1e4 * k, v, np.zeros(2), g), [20, 0])


def test_evicted_keys_give_and_get_nothing_but_from_themselves():
    q, k, v, _, g = make_head()
    dq, dk, dv = ag.input_gradients(q, k, v, np.zeros(T), g)
    assert_allclose([dq.max(), dk.max(), dq.min(), dk.min()], 0, atol=1e-15)  # a row of one key
    assert_allclose(dv, g.sum(axis=1))


def test_key_heads_gradient_is_the_sum_over_its_group():
    q, k, v, f, g = make_head()
    parts = [ag.gate_gradient(q[:, a : a + 1], k, v, f, g[:, a : a + 1]) for a in range(GROUP)]
    assert_allclose(ag.gate_gradient(q, k, v, f, g), sum(parts), atol=1e-12)


# ---- losses ----


def flags_of(kept, total):
    return (np.arange(total) < kept).astype(float)[None, None, :, None]


@pytest.mark.parametrize("bracket", ["abs", "square", "hinge"])
def test_loss_by_hand(bracket):
    # 10 flags, target .5; 3 kept miss by -.2, 7 kept by +.2
    every = np.ones((1, 10), bool)
    losses = [
        ag.eviction_loss(flags_of(kept, 10), every, target=0.5, strength=2.0, bracket=bracket) for kept in (3, 5, 7)
    ]
    assert_allclose(
        [loss for loss, _ in losses], {"abs": [0.4, 0, 0.4], "square": [0.08, 0, 0.08], "hinge": [0, 0, 0.4]}[bracket]
    )
    slopes = {"abs": [-0.2, 0, 0.2], "square": [-0.08, 0, 0.08], "hinge": [0, 0, 0.2]}[bracket]
    for (_, grad), want in zip(losses, slopes, strict=True):
        assert_allclose(grad, want, atol=1e-15)


def test_scopes_by_hand():
    # layers that keep .2 and .8 miss a target of .5 by .3 each, and not at all together
    values = np.concatenate([flags_of(2, 10), flags_of(8, 10)])
    every = np.ones((1, 10), bool)
    loss, grad = ag.eviction_loss(values, every, target=0.5)
    assert_allclose(loss, 0.3)
    assert_allclose(grad[:, 0, 0, 0], [-0.05, 0.05])
    loss, grad = ag.eviction_loss(values, every, target=0.4, scope="global")
    assert_allclose(loss, 0.1)
    assert_allclose(grad, 0.05)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("bracket", ["abs", "square", "hinge"])
def test_loss_gradient_is_its_derivative(bracket, scope):
    rng = np.random.default_rng(3)
    values, counted = rng.uniform(size=(2, 2, 3, 2)), np.array([[True, True, False], [True, False, False]])

    def loss(x):
        return ag.eviction_loss(x, counted, target=0.4, strength=3.0, bracket=bracket, scope=scope)[0]

    want = np.zeros(values.shape)
    for index in np.ndindex(values.shape):
        step = np.zeros(values.shape)
        step[index] = 1e-6
        want[index] = (loss(values + step) - loss(values - step)) / 2e-6
    got = ag.eviction_loss(values, counted, target=0.4, strength=3.0, bracket=bracket, scope=scope)[1]
    assert_allclose(got, want, atol=1e-8)  # differences of 1e-6 round at 1e-10
    assert not got[:, ~counted].any()


def test_rows_are_pooled_and_shards_summed_before_the_bracket():
    # one row of 1 counted token, kept, and one of 9, of which 3 are: 4 of 10, not the mean of 1 and 1/3
    values = np.zeros((1, 2, 9, 1))
    values[0, 0, :1] = values[0, 1, :3] = 1
    counted = np.arange(9) < np.array([[1], [9]])
    assert_allclose(ag.keep_fractions(values, counted), [0.4])
    assert_allclose(ag.eviction_loss(values, counted, target=0.5)[0], 0.1)
    apart = [ag.eviction_loss(values[:, b : b + 1], counted[b : b + 1], target=0.5)[0] for b in range(2)]
    assert_allclose(apart, [0.5, 1 / 6])  # their mean is not .1


def test_capped_and_protected_keys_do_not_change_the_loss():
    p = np.array([[0.9], [0.8], [0.7], [0.1]])
    assert_array_equal(ag.raw_flags(p)[:, 0], [1, 1, 1, 0])
    assert_array_equal(ag.flags(p, cap=2)[:, 0], [1, 0, 0, 1])


def test_continuation_loss_by_hand():
    # tokens 1, 0, 1, 1 split at 2: row 1 gives token 2 (= 1) 3/4, row 2 gives token 3 (= 1) 1/2; the rest is not read
    logits = np.log(np.array([[0.5, 0.5], [1, 3], [2, 2], [0.1, 0.9]]))
    assert_allclose(ag.continuation_loss(logits, [1, 0, 1, 1], 2), (np.log(4 / 3) + np.log(2)) / 2)
    assert_allclose(ag.continuation_loss(logits + 7.0, [0, 1, 1, 1], 2), (np.log(4 / 3) + np.log(2)) / 2)


def test_ramp():
    assert [ag.ramped(2.0, step, 100) for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]


# ---- streams ----


def make_p(seed=0, n=N, kv_heads=KV_HEADS):
    return np.random.default_rng(seed).uniform(size=(n, kv_heads))


def outputs(calls):
    return np.concatenate([call.out for call in calls])


SETTINGS = {
    "plain": {},
    "no protection": dict(protect_last=0),
    "sinks": dict(protect_first=2, protect_last=2),
    "capped": dict(cap=3),
    "nothing passes": dict(threshold=1.0, protect_last=0),
}
each_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@each_settings
@pytest.mark.parametrize("calls", [CALLS, CHUNKED, [PROMPT, 4, 2]], ids=["plain", "chunked", "later turn"])
def test_stream_is_attention_under_the_mask_of_the_flags(calls, settings):
    q, k, v = make_stream(N)
    p = make_p()
    got = ag.run(q, k, v, calls, p=p, prompt=PROMPT, **settings)
    stay = ag.flags(p, prompt=PROMPT, **settings).astype(float)
    for h in range(KV_HEADS):
        mine = slice(h * GROUP, (h + 1) * GROUP)
        turned = np.stack([rotate(q[:, a], np.arange(N)) for a in range(h * GROUP, (h + 1) * GROUP)], axis=1)
        want = dense(turned, rotate(k[:, h], np.arange(N)), v[:, h], stay[:, h])
        assert_allclose(outputs(got)[:, mine], want, atol=1e-12)
    stop = 0
    for count, call in zip(calls, got, strict=True):
        stop += count
        assert call.kept == [[j for j in range(stop) if stay[j, h]] for h in range(KV_HEADS)]


@pytest.mark.parametrize("decide", ["prompt", "call"])
@pytest.mark.parametrize("calls", [CALLS, CHUNKED])
def test_threshold_zero_is_the_full_cache(calls, decide):
    stream = make_stream(N)
    got = ag.run(*stream, calls, p=make_p(), prompt=PROMPT, threshold=0.0, decide=decide)
    assert_allclose(outputs(got), outputs(full.run(*stream, calls)), atol=1e-12)
    assert got[-1].kept == [list(range(N))] * KV_HEADS


def test_threshold_one_leaves_the_protected_and_self():
    q, k, v = make_stream(N)
    first, *_, last = ag.run(q, k, v, CALLS, p=make_p(), threshold=1.0)
    assert first.kept == [[PROMPT - 1]] * KV_HEADS
    assert last.kept == [list(range(PROMPT - 1, N))] * KV_HEADS
    assert_allclose(first.out, np.repeat(v[:PROMPT], GROUP, axis=1), atol=1e-15)  # each sees itself alone


def test_decode_never_evicts():
    p = make_p()
    p[PROMPT:] = 0.0
    calls = ag.run(*make_stream(N), CALLS, p=p, cap=4)
    counts = ag.prompt_counts(calls[0].kept, PROMPT)
    assert max(counts) == 4
    for grown, call in enumerate(calls):
        assert ag.prompt_counts(call.kept, PROMPT) == counts
        assert [len(kept) for kept in call.kept] == [count + grown for count in counts]


def test_values_past_the_prompt_are_not_read():
    stream, p = make_stream(N), make_p()
    a, b = (ag.run(*stream, CALLS, p=x)[-1] for x in (p, p[:PROMPT]))
    assert_array_equal(a.out, b.out)
    assert a.scores == b.scores


def test_a_flag_concerns_its_head_alone():
    stream, p = make_stream(N), make_p()
    p[3] = 0.9
    before = ag.run(*stream, CALLS, p=p)
    p[3, 1] = 0.1
    after = ag.run(*stream, CALLS, p=p)
    assert_array_equal(outputs(before)[:, :GROUP], outputs(after)[:, :GROUP])
    assert_array_equal(outputs(before)[:4], outputs(after)[:4])  # token 3 still sees itself
    assert (abs(outputs(before) - outputs(after))[4:, GROUP:] > 1e-9).any(axis=2).all()
    for x, y in zip(before, after, strict=True):
        assert x.kept[0] == y.kept[0]
        assert sorted({*x.kept[1]} - {*y.kept[1]}) == [3]


def test_heads_of_a_group_see_the_same_keys():
    q, k, v = make_stream(N)
    q[:] = q[:, :1]
    out = outputs(ag.run(q, k, v, CALLS, p=make_p()))
    for a in range(KV_HEADS * GROUP):
        assert_array_equal(out[:, a], out[:, a // GROUP * GROUP])


@pytest.mark.parametrize("settings", [{}, dict(protect_first=2), dict(threshold=1.0)])
def test_without_a_cap_it_does_not_matter_when_flags_are_known(settings):
    stream, p = make_stream(N), make_p()
    whole = ag.run(*stream, CALLS, p=p, **settings)
    calls = ag.run(*stream, CHUNKED, p=p, prompt=PROMPT, decide="call", **settings)
    assert_allclose(outputs(calls), outputs(whole), atol=1e-14)
    assert calls[-1].kept == whole[-1].kept


def test_a_cap_call_by_call_ends_at_the_same_tokens_but_earlier_calls_saw_others():
    stream, p = make_stream(N), make_p()
    whole = ag.run(*stream, CALLS, p=p, cap=3)
    calls = ag.run(*stream, CHUNKED, p=p, prompt=PROMPT, cap=3, decide="call")
    assert [call.kept for call in calls[2:]] == [call.kept for call in whole]
    assert_allclose(outputs(calls)[7:], outputs(whole)[7:], atol=1e-14)
    assert abs(outputs(calls) - outputs(whole))[:7].max() > 1e-3


def test_cap_call_by_call_by_hand():
    # cap 2, calls of 2 and 2, the last token protected: [0, 1] pass; then 0, 1, 2 pass and 3 is protected, 1 is best
    stream = make_stream(4, kv_heads=1, group=1)
    p = np.array([[0.7], [0.8], [0.6], [0.1]])
    calls = ag.run(*stream, [2, 2], p=p, prompt=4, cap=2, decide="call")
    assert [call.kept for call in calls] == [[[0, 1]], [[1, 3]]]
    assert [call.scores for call in calls] == [[{0: 0.7, 1: 0.8}], [{0: 0.7, 1: 0.8, 2: 0.6, 3: np.inf}]]
    # token 2 sees 1 and itself: 0 went before the call attended
    q, k, v = (x[:, 0] for x in stream)
    logits = rotate(k[1:3], [1, 2]) @ rotate(q[2:3], [2])[0] / np.sqrt(q.shape[1])
    weights = np.exp(logits) / np.exp(logits).sum()
    assert_allclose(calls[1].out[0, 0], weights @ v[1:3])
    known = ag.run(*stream, [2, 2], p=p, prompt=4, cap=2)
    assert [call.kept for call in known] == [[[1]], [[1, 3]]]


def test_given_positions_stand_for_the_protected_ends():
    stream, p = make_stream(N), np.zeros((N, KV_HEADS))
    got = ag.run(*stream, CHUNKED, p=p, prompt=PROMPT, protected={3, 6}, decide="call")
    assert [call.kept[0] for call in got[:3]] == [[3], [3, 6], [3, 6]]


def test_flags_may_stand_for_probabilities():
    stream, p = make_stream(N), make_p()
    a = ag.run(*stream, CALLS, p=p)
    b = ag.run(*stream, CALLS, p=(p > 0.5).astype(float))
    assert_array_equal(outputs(a), outputs(b))


@pytest.mark.parametrize("wrong", [dict(prompt=5), dict(cap=0), dict(decide="late"), dict(p=np.zeros((PROMPT - 1, 2)))])
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError):
        ag.run(*make_stream(N), CALLS, **{"p": make_p(), **wrong})
