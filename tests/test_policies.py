"""Every method against its float64 oracle: outputs and kept positions, call by call, in a batch of uneven rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import kvjax
from kvjax import policies
from kvjax.draws import mix
from kvjax.policies.compactor import projection
from tests.methods import POLICIES, VARIANTS, kept_positions
from tests.oracles import compactor
from tests.test_cost import documented_bytes
from tests.tiny import CONFIG, random_params, random_tokens

Q_HEADS, KV_HEADS, HEAD_DIM, BASE = 6, 2, 8, 100.0  # a small base: rotations matter within a few tokens


def streams(rows: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Un-rotated q [B, n, Hq, D], k and v [B, n, H, D], float64."""
    rng = np.random.default_rng(seed)
    return (
        2 * rng.standard_normal((rows, count, Q_HEADS, HEAD_DIM)),
        rng.standard_normal((rows, count, KV_HEADS, HEAD_DIM)),
        rng.standard_normal((rows, count, KV_HEADS, HEAD_DIM)),
    )


def run_kvjax(policy, q, k, v, prompts, calls, given=()):
    """Feeds rows with prompts of different lengths; then `calls` tokens for each row. Yields (out, cache).

    `given` has what tokens bring along, {name: [B, n, H]}.
    """
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
        theirs = {name: np.take_along_axis(given[name], pick[:, :, None], axis=1).swapaxes(1, 2) for name in given}
        out, cache = attend(
            *piece,
            cache,
            policy,
            positions=jnp.asarray(positions, jnp.int32),
            rope=rope,
            capacity=capacity,
            given=theirs,
        )
        start = start + counts
        yield np.asarray(out), cache


CALLS = {
    "decode": ((20, 13, 3), (1,) * 30),
    "chunks": ((8, 5, 8), (8, 8, 5) + (1,) * 10),
    "short prompt": ((1, 2, 3), (1,) * 20),
}


# A variant meets short prompts in chunks, too.
CASES = {f"{name}-{kind}": (row, CALLS[kind]) for name, row in (POLICIES | VARIANTS).items() for kind in CALLS
         if name in POLICIES or kind != "short prompt"}  # fmt: skip


@pytest.mark.parametrize("row, calls", CASES.values(), ids=CASES)
def test_outputs_and_kept_positions_are_those_of_the_oracle(row, calls):
    budget, (prompts, rest) = 10, calls
    q, k, v = streams(len(prompts), max(prompts) + sum(rest), seed=3)
    policy, worth = row.make(budget), np.random.default_rng(4).random((*k.shape[:2], KV_HEADS))
    got = list(run_kvjax(policy, q, k, v, prompts, rest, {name: worth for name in policy.given}))
    for b, prompt in enumerate(prompts):
        sizes = [prompt, *rest]
        total = sum(sizes)
        extra = {} if row.given is None else {row.given: worth[b, :total]}
        want = row.oracle(budget, q=q[b, :total], k=k[b, :total], v=v[b, :total], calls=sizes, base=BASE, **extra)
        for i, ((out, cache), expected) in enumerate(zip(got, want, strict=True)):
            near = row.rtol * np.abs(expected.out).max()
            assert_allclose(out[b, : sizes[i]], expected.out, rtol=0, atol=near, err_msg=f"row {b}, call {i}")
            assert kept_positions(cache, b) == [list(head) for head in expected.kept], f"row {b}, call {i}"


@pytest.mark.parametrize("dim", [8, 64])
def test_compactor_ranks_large_keys_that_span_fewer_channels_than_its_sketch(dim):
    # 8 channels, or 18 tokens between first and last, for 48 of the sketch: rounding outdoes the ridge of one head
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 1, 30, KV_HEADS, dim))
    k[:, :, 0] *= 300
    ((_, cache),) = run_kvjax(policies.compactor(20), q, k, v, (30,), ())
    assert np.isfinite(cache.stats["rank"]).all()
    if dim == 8:  # of 18 tokens in 64 channels every leverage is 17 / 18, and what is left of it is rounding
        phi = np.asarray(projection(0, 0, KV_HEADS, dim, 48))
        (want,) = compactor.run(q[0], k[0], v[0], [30], base=BASE, budget=20, phi=phi)
        assert kept_positions(cache, 0) == want.kept


def test_nbytes_of_kivi_with_fewer_channels_is_the_other_formula_in_its_docstring():
    policy = policies.kivi(8, group=4, residual=8, channels=4)
    _, cache = jax.eval_shape(lambda: kvjax.prefill(random_params(), policy, random_tokens(3, 24)))
    said = documented_bytes(policy, config=CONFIG, batch=3, tokens=24, number=4, under="Bytes of fewer channels")
    assert kvjax.nbytes(cache) == said


@pytest.mark.parametrize("channels, match", [(6, "multiple of group=4"), (0, "channels=0"), (8, "prunes nothing of 8")])
def test_kivi_refuses_channels_that_its_words_do_not_hold(channels, match):
    with pytest.raises(ValueError, match=match):
        kvjax.prefill(random_params(), policies.kivi(8, group=4, residual=8, channels=channels), random_tokens(1, 4))


def test_the_draw_is_the_one_documented():
    assert int(mix(jnp.uint32(5))) == int(mix(jnp.asarray(5, jnp.uint32)))
    policy = policies.random(1000, seed=7)
    assert policy is policies.random(budget=1000, seed=7)
