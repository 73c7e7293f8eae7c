"""Causal attention over slots with column masses: the reference, and the kernels against it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels.prefill_attention import gpu, prefill_attention, reference, tpu
from pallas_kernels.prefill_attention.spans import meetings, spans

KERNELS = ("tpu", "gpu")
SEVERAL_BLOCKS = {"tpu": dict(group=4, count=150, slots=600), "gpu": dict(group=3, count=40, slots=200)}


def run(kernel, arrays, **settings):
    """A kernel in interpretation; calls of the same shapes and settings are traced once."""
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return traced(kernel, **settings)(arrays)


@functools.cache
def traced(kernel, **settings):
    if kernel == "tpu":
        settings["interpret"] = True
    function = {"tpu": tpu, "gpu": gpu, "reference": reference}[kernel].prefill_attention
    return jax.jit(lambda arrays: function(**arrays, **settings))


def make(batch=2, heads=2, group=3, count=40, slots=200, dim=16, wide=32, dtype=jnp.float32, statistics=2, seed=0):
    """A chunk of `count` tokens behind slots in the order of their positions; numpy arrays."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return draw.normal(size=shape).astype(dtype)

    pos = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, heads, slots))
    return dict(
        q=normal(batch, heads, group, count, dim),
        k=normal(batch, heads, slots, dim),
        v=normal(batch, heads, slots, wide),
        q_pos=pos[..., slots - count :].copy(),
        k_pos=pos.copy(),
        weights=draw.random((statistics, batch, count), np.float32) if statistics else None,
    )


def shuffled(arrays, seed=1):
    """The slots before the chunk in any order, a third of them free."""
    draw = np.random.default_rng(seed)
    count = arrays["k_pos"].shape[2] - arrays["q_pos"].shape[2]
    for row in arrays["k_pos"].reshape(-1, arrays["k_pos"].shape[2]):
        row[:count] = draw.permutation(count)
        row[: count - 1][draw.random(count - 1) < 1 / 3] = -1
    return arrays


def uneven(arrays):
    """Rows of the batch end early, the last one at once; their slots are free there."""
    count = arrays["q_pos"].shape[2]
    for b, ends in enumerate(np.linspace(count - 3, 0, len(arrays["q_pos"])).astype(int)):
        arrays["q_pos"][b, :, ends:] = -1
        arrays["k_pos"][b, :, arrays["k_pos"].shape[2] - count + ends :] = -1
    return arrays


def all_free(arrays):
    arrays["k_pos"][:] = -1
    return arrays


def counting_the_last(arrays):
    arrays["weights"][:] = np.arange(arrays["q_pos"].shape[2]) >= arrays["q_pos"].shape[2] - 9
    return arrays


def biased(arrays):
    arrays["bias"] = np.random.default_rng(2).normal(size=arrays["k_pos"].shape).astype(np.float32)
    return arrays


def loop(q, k, v, q_pos, k_pos, weights=None, bias=None, scale=1.0, sliding_window=None):
    """The operation one query at a time, in float64."""
    batch, heads, group, count, _ = q.shape
    out = np.zeros((*q.shape[:4], v.shape[3]))
    lse = np.full(q.shape[:4], -np.inf)
    mass = np.zeros((0 if weights is None else len(weights), batch, heads, k.shape[2]))
    for b, h, g, t in np.ndindex(batch, heads, group, count):
        at = q_pos[b, h % q_pos.shape[1], t]
        visible = [
            n for n, pos in enumerate(k_pos[b, h])
            if pos != -1 and pos <= at and (sliding_window is None or at - pos < sliding_window)
        ]  # fmt: skip
        if not visible:
            continue
        logits = k[b, h, visible].astype(np.float64) @ q[b, h, g, t].astype(np.float64) * scale
        if bias is not None:
            logits += np.where(k_pos[b, h, visible] == at, 0, bias[b, h, visible])
        lse[b, h, g, t] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        p = np.exp(logits - lse[b, h, g, t])
        out[b, h, g, t] = p @ v[b, h, visible].astype(np.float64)
        for m in range(len(mass)):
            mass[m, b, h, visible] += weights[m, b, t] * p
    return out, lse, mass if weights is not None else None


def assert_same(got, want, dtype=jnp.float32):
    # f32 sums of hundreds of slots in another order; bf16 has 8 bits, and a mass sums rounded numbers
    near, mass_near = (1e-5, 1e-4) if dtype == jnp.float32 else (2e-2, 3e-2)
    assert_allclose(np.asarray(got[0], np.float32), np.asarray(want[0], np.float32), rtol=near, atol=near)
    assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert (got[2] is None) == (want[2] is None)
    if want[2] is not None:
        assert_allclose(got[2], want[2], rtol=mass_near, atol=mass_near / 10)


def test_reference_weighs_one_to_three_in_a_worked_case():
    # logits 0 and ln 3: p = 1/4, 3/4; out = 4/4 + 3 * 8/4 = 7; lse = ln 4; mass = 2 p
    got = reference.prefill_attention(
        jnp.ones((1, 1, 1, 1, 1)),
        jnp.array([0, math.log(3)]).reshape(1, 1, 2, 1),
        jnp.array([4.0, 8.0]).reshape(1, 1, 2, 1),
        jnp.array([[[1]]]),
        jnp.array([[[1, 0]]]),
        weights=jnp.full((1, 1, 1), 2.0),
    )
    assert_allclose(got.out.ravel(), [7], rtol=1e-6)
    assert_allclose(got.lse.ravel(), [math.log(4)], rtol=1e-6)
    assert_allclose(got.mass.ravel(), [0.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize("change", [shuffled, uneven, all_free, counting_the_last, biased])
@pytest.mark.parametrize("window", [None, 5])
def test_reference_is_the_loop_over_queries(change, window):
    arrays = change(make(heads=1, group=3, count=9, slots=24, dim=4, wide=6))
    settings = dict(scale=0.5, sliding_window=window)
    assert_same(run("reference", arrays, **settings), loop(**arrays, **settings))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", [lambda x: x, shuffled, uneven, all_free, counting_the_last])
def test_kernel_gives_what_the_reference_gives(kernel, change):
    arrays = change(make(**SEVERAL_BLOCKS[kernel]))
    assert_same(run(kernel, arrays, scale=0.25), run("reference", arrays, scale=0.25))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", [lambda x: x, shuffled])
def test_kernel_takes_a_bias_and_a_window(kernel, change):
    arrays = biased(change(make(heads=1, statistics=1, **SEVERAL_BLOCKS[kernel])))
    settings = dict(scale=0.25, sliding_window=arrays["k_pos"].shape[2] // 2)
    assert_same(run(kernel, arrays, **settings), run("reference", arrays, **settings))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_plain_prompt_needs_no_statistics(kernel):
    arrays = make(heads=1, group=4, count=280, slots=280, statistics=0)
    arrays["q_pos"] = arrays["q_pos"][:, :1]
    got = run(kernel, arrays)
    assert got.mass is None
    assert_same(got, run("reference", arrays))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "group, count, slots, dim, wide, statistics, dtype",
    [
        (1, 17, 300, 80, 80, 4, jnp.bfloat16),
        (3, 33, 140, 64, 128, 1, jnp.bfloat16),  # pruned keys
        (8, 20, 20, 256, 256, 3, jnp.bfloat16),
        (3, 17, 18, 77, 96, 1, jnp.float32),
    ],
)
def test_kernel_takes_awkward_sizes(kernel, group, count, slots, dim, wide, statistics, dtype):
    arrays = make(2, 1, group, count, slots, dim, wide, dtype, statistics)
    arrays["q_pos"] = arrays["q_pos"][:, :1]
    arrays = uneven(arrays)
    got, want = (run(name, arrays, scale=dim**-0.5) for name in (kernel, "reference"))
    assert got.out.dtype == dtype
    assert_same(got, want, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_masses_of_a_query_sum_to_its_weight_for_each_query_head(kernel):
    arrays = shuffled(make(**SEVERAL_BLOCKS[kernel]))
    mass = run(kernel, arrays, scale=0.25).mass
    want = arrays["q"].shape[2] * arrays["weights"].sum(axis=2)[:, :, None]
    assert_allclose(mass.sum(axis=3), np.broadcast_to(want, mass.shape[:3]), rtol=1e-4)  # f32 sums of hundreds of slots


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_do_not_affect_each_other(kernel):
    arrays = shuffled(make(**SEVERAL_BLOCKS[kernel]))
    before = run(kernel, arrays, scale=0.25)
    for name in ("q", "k", "v"):
        arrays[name][1, 1] = np.nan
    after = run(kernel, arrays, scale=0.25)
    there = np.array([[True, True], [True, False]])
    for x, y in zip((before.out, before.lse, before.mass[0]), (after.out, after.lse, after.mass[0]), strict=True):
        assert_array_equal(np.asarray(x)[there], np.asarray(y)[there])


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_that_no_query_sees_are_not_visited(kernel):
    arrays, start = make(**SEVERAL_BLOCKS[kernel]), {"tpu": 512, "gpu": 192}[kernel]  # of the last block of slots
    arrays["k_pos"][..., start:] = -1
    for name in ("k", "v"):
        arrays[name][:, :, start:] = np.nan
    got = run(kernel, arrays, scale=0.25)
    assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_queries_that_do_not_count_are_not_visited_for_the_masses(kernel):
    arrays = counting_the_last(make(**SEVERAL_BLOCKS[kernel]))
    want = run(kernel, arrays, scale=0.25).mass
    ahead = {"tpu": 128, "gpu": 20}[kernel]  # tokens of the blocks in front of those that count
    arrays["q"][:, :, :, :ahead] = np.nan
    assert_array_equal(run(kernel, arrays, scale=0.25).mass, want)


def test_spans_hold_a_run_that_needs_no_mask():
    some = jnp.array([[0, 1, 1, 1, 0, 1, 1, 0], [0] * 8, [1] * 8], bool)
    every = jnp.array([[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8, [0] * 8], bool)
    assert spans(some, every).tolist() == [[1, 2, 4, 7], [0, 0, 0, 0], [0, 8, 8, 8]]


@pytest.mark.parametrize("window", [None, 7])
def test_what_meets_is_what_is_visible(window):
    draw = np.random.default_rng(0)
    q_pos, k_pos = draw.integers(-1, 40, (2, 3, 24)), draw.integers(-1, 40, (2, 3, 16))
    q_pos.sort(axis=2), k_pos.sort(axis=2)
    q, k = q_pos[..., None], k_pos[:, :, None]
    visible = (k >= 0) & (k <= q) & (q - k < (window or 99))
    blocks = visible.reshape(2, 3, 6, 4, 4, 4)
    some, every = meetings(jnp.asarray(q_pos), jnp.asarray(k_pos), 4, 4, window)
    assert (np.asarray(some) >= blocks.any(axis=(3, 5))).all()
    assert (np.asarray(every) <= blocks.all(axis=(3, 5))).all()
    assert not np.asarray(some).all() and np.asarray(every).any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=np.zeros((2, 2, 9, 4), np.float32)), r"must be \[B, H, G, T, Dk\]"),
        (dict(k=np.zeros((2, 2, 24, 5), np.float32)), "do not fit q"),
        (dict(k=np.zeros((2, 2, 24, 4), jnp.bfloat16)), "one floating dtype"),
        (dict(k=np.zeros((2, 2, 0, 4), np.float32), v=np.zeros((2, 2, 0, 4), np.float32)), "is empty"),
        (dict(q_pos=np.zeros((2, 9), np.int32)), r"wants int32\[2, 1 or 2, 9\]"),
        (dict(k_pos=np.zeros((2, 1, 24), np.int32)), r"wants int32\[2, 2, 24\]"),
        (dict(weights=np.zeros((5, 2, 9), np.float32)), "None sums no columns"),
        (dict(weights=np.zeros((1, 2, 8), np.float32)), "None sums no columns"),
        (dict(bias=np.zeros((2, 24), np.float32)), r"wants float32\[2, 2, 24\]"),
        (dict(sliding_window=0), "at least 1"),
        (dict(implementation="cuda"), "must be one of"),
        (dict(implementation="tpu"), "cannot run here"),
        (dict(implementation="gpu"), "cannot run here"),
        (dict(implementation="gpu", v=np.zeros((2, 2, 24, 320), np.float32)), "head_dim up to 256"),
    ],
)
def test_a_wrong_call_says_what_is_wanted(change, message):
    call = make(group=3, count=9, slots=24, dim=4) | change
    with pytest.raises(ValueError, match=message):
        prefill_attention(**call)


def test_a_large_group_is_too_much_for_the_tpu_kernel():
    call = make(group=17, count=9, slots=24, dim=4)
    with pytest.raises(ValueError, match="groups of up to 16"):
        prefill_attention(**call, implementation="tpu")


def test_here_the_reference_is_chosen():
    arrays = make(group=3, count=9, slots=24, dim=4)
    got = prefill_attention(**arrays, scale=0.5)
    assert_same(got, run("reference", arrays, scale=0.5))
