"""The oracle of Compactor against linear algebra, a masked formulation and small examples by hand."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import compactor, full
from tests.test_oracles import GROUP, KV_HEADS, make_stream

DIM, RANK = 8, 5
N = 30
SMALL = dict(first=3, last=2, chunk=8)


def sketch(seed=0, heads=KV_HEADS, dim=DIM, rank=RANK):
    return np.random.default_rng(seed).normal(size=(heads, dim, rank)) / np.sqrt(rank)


def keys(m, seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(size=(m, dim)) + 3.0


# ---- leverage ----


def test_leverage_by_hand():
    # keys -1, 0, 4 on a line: mean 1, centred -2, -1, 3, squares 4, 1, 9, and the Gram matrix is 14 + 2 = 16
    got = compactor.leverage(np.array([[-1.0], [0.0], [4.0]]), np.eye(1), ridge=2.0)
    assert_allclose(got, [4 / 16, 1 / 16, 9 / 16])


@pytest.mark.parametrize("m", [1, 3, 40])
def test_leverage_is_the_diagonal_of_the_ridge_projection(m):
    k, phi = keys(m), sketch()[0]
    x = (k - k.mean(axis=0)) @ phi
    want = np.diag(x @ np.linalg.inv(x.T @ x + 0.01 * np.eye(RANK)) @ x.T)
    assert_allclose(compactor.leverage(k, phi), want, atol=1e-10)


@pytest.mark.parametrize("rank", [DIM, DIM + 4])
def test_an_orthogonal_sketch_gives_the_exact_leverage(rank):
    k = keys(40)
    phi = np.linalg.qr(np.random.default_rng(1).normal(size=(rank, rank)))[0][:DIM]  # orthonormal rows
    u, s, _ = np.linalg.svd(k - k.mean(axis=0), full_matrices=False)
    assert_allclose(compactor.leverage(k, phi), (u**2) @ (s**2 / (s**2 + 0.01)), atol=1e-10)


def test_leverage_ignores_what_all_keys_share():
    assert_allclose(compactor.leverage(keys(40) + 100.0, sketch()[0]), compactor.leverage(keys(40), sketch()[0]))


def test_the_key_far_out_has_the_largest_leverage():
    rng = np.random.default_rng(2)
    k = np.outer(rng.normal(size=50), rng.normal(size=DIM)) + 0.01 * rng.normal(size=(50, DIM))
    k[17] += 5.0 * rng.normal(size=DIM)
    assert compactor.leverage(k, sketch()[0]).argmax() == 17


# ---- attention inside chunks ----


def test_mass_by_hand():
    # zero queries attend alike, so each token gets 1 in all; lengths of values 5, 0, 2, 1; pooled over three
    values = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    got = compactor.chunked_mass(np.zeros((4, 1, 2)), np.ones((4, 2)), values, chunk=3)
    assert_allclose(got, [5 / 3, 7 / 3, 1, 1])


def test_mass_of_two_tokens_by_hand():
    # the only keys are 0 and ln 3; queries 1 and -1 give the second .75 and .25; a query of 0 in both heads gives .5
    q = np.array([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    k = np.array([[0.0, 0.0], [np.log(3), 0.0]])
    got = compactor.chunked_mass(q, k, np.array([[1.0, 0.0], [0.0, 1.0]]), pool=1)
    assert_allclose(got, [(0.5 + 1.0) / 2, (1.5 + 1.0) / 2])


@pytest.mark.parametrize("scale", [1.0, None])
@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 64])
def test_mass_is_attention_under_a_mask_of_blocks(chunk, scale):
    m, group = 20, 3
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(m, group, DIM)), rng.normal(size=(m, DIM)), rng.normal(size=(m, DIM))
    logits = np.einsum("igd,jd->gij", q, k) * (DIM**-0.5 if scale is None else scale)
    block = np.arange(m) // chunk
    weights = np.where(block[:, None] == block[None, :], np.exp(logits), 0.0)
    mass = (weights / weights.sum(axis=2, keepdims=True)).sum(axis=1).mean(axis=0)
    assert_allclose(compactor.chunked_mass(q, k, np.eye(m), chunk, scale, pool=1), mass, atol=1e-12)
    assert_allclose(mass.sum(), m)

    weighted = np.pad(mass * np.linalg.norm(v, axis=1), 1)
    want = (weighted[:-2] + weighted[1:-1] + weighted[2:]) / 3
    assert_allclose(compactor.chunked_mass(q, k, v, chunk, scale), want, atol=1e-12)


def test_mass_sees_later_tokens():
    q, k, v = np.ones((5, 1, 2)), np.zeros((5, 2)), np.ones((5, 2))
    k[4] = 10.0
    assert compactor.chunked_mass(q, k, v, pool=1)[4] > 4.9 * np.sqrt(2)


# ---- scores ----


def parts(n, **settings):
    q, k, v = make_stream(n)
    return compactor.score(q, k + 1.0, k, v, sketch(), **{**SMALL, "blending": 0.75, **settings})


def test_score_is_the_blend_over_heads_and_the_middle():
    q, k, v = make_stream(N)
    got = compactor.score(q, k + 1.0, k, v, sketch(), blending=0.75, **SMALL)
    assert np.isposinf(got[:, :3]).all() and np.isposinf(got[:, -2:]).all()
    lev = np.stack([compactor.leverage(k[3:-2, h], sketch()[h]) for h in range(KV_HEADS)])
    mass = np.stack(
        [
            compactor.chunked_mass(q[3:-2, h * GROUP : (h + 1) * GROUP], k[3:-2, h] + 1.0, v[3:-2, h], chunk=8)
            for h in range(KV_HEADS)
        ]
    )
    want = 0.75 * (lev - np.mean(lev)) / np.std(lev) + (mass - np.mean(mass)) / np.std(mass)
    assert_allclose(got[:, 3:-2], want, atol=1e-12)
    assert_allclose(got[:, 3:-2].mean(), 0, atol=1e-12)


def test_no_blending_leaves_attention_alone():
    middle = parts(N, blending=0.0)[:, 3:-2]
    assert_allclose([middle.mean(), middle.std()], [0, 1], atol=1e-12)


def test_the_protected_do_not_count():
    q, k, v = make_stream(N)
    want = compactor.score(q, k, k, v, sketch(), blending=0.5, **SMALL)
    for x in (q, k, v):
        x[:3] = x[-2:] = 50.0
    assert_allclose(compactor.score(q, k, k, v, sketch(), blending=0.5, **SMALL), want)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_a_short_row_is_protected_whole(n):
    assert np.isposinf(parts(n)).all()


def test_a_single_token_in_the_middle_scores_zero():
    q, k, v = make_stream(6, kv_heads=1)
    got = compactor.score(q, k, k, v, sketch(heads=1), blending=0.5, **SMALL)
    assert got[0, 3] == 0.0


def test_equal_scores_keep_the_lower_position():
    assert compactor.choose(np.array([[np.inf, 1.0, 2.0, 1.0, np.inf], [0.0] * 5]), 3) == [[0, 2, 4], [0, 1, 2]]


# ---- streams ----


@pytest.mark.parametrize("budget", [8, 12, N, N + 5])
def test_budget_is_filled_with_the_ends_and_the_best(budget):
    stream = make_stream(N)
    (call,) = compactor.run(*stream, [N], budget=budget, phi=sketch(), **SMALL)
    assert_allclose(call.out, full.run(*stream, [N])[0].out, atol=1e-12)
    for kept, scores in zip(call.kept, call.scores, strict=True):
        assert len(kept) == min(budget, N)
        assert {0, 1, 2, N - 2, N - 1} <= set(kept)
        assert sorted(scores) == list(range(N))
        losers = [scores[p] for p in scores if p not in kept]
        assert min(scores[p] for p in kept) >= max(losers, default=-np.inf)


def test_blending_is_the_removed_share():
    stream = make_stream(N)
    (a,) = compactor.run(*stream, [N], budget=12, phi=sketch(), **SMALL)
    (b,) = compactor.run(*stream, [N], budget=12, phi=sketch(), blending=0.6, **SMALL)
    assert compactor.removed_share(N, 12) == pytest.approx(0.6)
    for x, y in zip(a.scores, b.scores, strict=True):
        assert_allclose([x[p] for p in range(N)], [y[p] for p in range(N)])


def test_decoded_tokens_push_out_the_least_of_the_prompt_then_the_oldest():
    stream = make_stream(N)
    calls = compactor.run(*stream, [14, *[1] * 16], budget=10, phi=sketch(), **SMALL)
    for before, now in zip(calls, calls[1:], strict=False):
        for h, kept in enumerate(now.kept):
            (gone,) = {*before.kept[h], max(kept)} - {*kept}
            middle = {p: s for p, s in now.scores[h].items() if p in before.kept[h] and s < compactor.LATE}
            first = SMALL["first"]
            middle = {p: s for p, s in middle.items() if p >= first}
            assert gone == (min(middle, key=middle.get) if middle else min(p for p in before.kept[h] if p >= first))


def test_leverage_takes_keys_as_they_came_and_attention_takes_them_turned():
    # with all keys equal before rotation, leverage is nothing, and the score does not depend on the sketch
    q, k, v = make_stream(N)
    k[:] = 1.0
    (a,) = compactor.run(q, k, v, [N], budget=12, phi=sketch(0), blending=5.0, **SMALL)
    (b,) = compactor.run(q, k, v, [N], budget=12, phi=sketch(1), blending=5.0, **SMALL)
    for x, y in zip(a.scores, b.scores, strict=True):
        assert x == y
        assert len({s for s in x.values() if s < compactor.LATE}) == N - 5  # turned keys still differ
