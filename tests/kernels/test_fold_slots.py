import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels.fold_slots import fold_slots, gpu, reference, tpu

KERNELS = {
    "reference": reference.fold_slots,
    "tpu": lambda *args, **kwargs: tpu.fold_slots(*args, **kwargs, interpret=True),
    "gpu": gpu.fold_slots,
}
F32, BF16 = jnp.float32, jnp.bfloat16

# batch, heads, N, (Dk, Dv), C, dtype, how targets are drawn
CASES = {
    "one_slot": (1, 1, 1, (64, 64), 1, F32, "arbitrary"),
    "odd_count": (1, 3, 37, (64, 64), 5, F32, "banded"),
    "pruned_keys": (2, 2, 130, (64, 128), 20, BF16, "arbitrary"),
    "as_many_as_before": (1, 2, 60, (80, 80), 60, F32, "arbitrary"),
    "groups_of_128": (1, 1, 600, (96, 96), 131, BF16, "banded"),
    "two_blocks_arbitrary": (1, 1, 520, (128, 128), 132, F32, "arbitrary"),
    "wide": (1, 1, 300, (256, 256), 7, F32, "banded"),
    "wide_bf16": (1, 2, 40, (256, 80), 6, BF16, "kept"),
    "into_one": (1, 2, 300, (128, 128), 1, BF16, "arbitrary"),
    "all_join_the_last": (1, 1, 140, (64, 64), 130, F32, "last"),
    "nothing_kept": (1, 2, 140, (64, 64), 9, F32, "nothing"),
    "more_than_before": (1, 1, 5, (64, 64), 12, F32, "arbitrary"),
    "kept_and_losers": (1, 1, 260, (128, 128), 33, BF16, "kept"),
}


def draw_targets(rng, shape, slots, how):
    if how == "banded":  # runs of neighbours
        return np.sort(rng.integers(0, slots, shape), axis=-1)
    if how == "nothing":
        return rng.choice([-1, slots, 2**31 - 1, -(2**31)], shape)
    if how == "last":
        return np.full(shape, slots - 1)
    target = rng.integers(-2, slots + 2, shape)  # some dropped
    if how == "kept":  # `slots` kept ones keep their order, each loser joins any
        for row in target.reshape(-1, shape[-1]):
            row[np.sort(rng.choice(shape[-1], slots, replace=False))] = np.arange(slots)
    return target


def make(name, seed=0):
    batch, heads, count, dims, slots, dtype, how = CASES[name]
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(rng.normal(size=(batch, heads, count, d)), dtype) for d in dims)
    target = jnp.asarray(draw_targets(rng, (batch, heads, count), slots, how), jnp.int32)
    weight, value_weight = (jnp.asarray(rng.uniform(-0.5, 2, (batch, heads, count)), F32) for _ in range(2))
    return (k, v, target, weight, slots), {"value_weight": value_weight}


def loop(x, target, weight, slots):
    """One slot at a time in float64, and the sum of the sizes of what was added."""
    x, target, weight = np.asarray(x, np.float64), np.asarray(target), np.asarray(weight, np.float64)
    out = np.zeros((*target.shape[:2], slots, x.shape[-1]))
    size = np.zeros_like(out)
    for b, h, n in np.ndindex(*target.shape):
        if 0 <= target[b, h, n] < slots:
            out[b, h, target[b, h, n]] += weight[b, h, n] * x[b, h, n]
            size[b, h, target[b, h, n]] += abs(weight[b, h, n] * x[b, h, n])
    return out, size


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_each_output_slot_is_the_weighted_sum_of_those_that_join_it(kernel, name):
    (k, v, target, weight, slots), more = make(name)
    folded = KERNELS[kernel](k, v, target, weight, slots, **more)
    for x, w, got in ((k, weight, folded[0]), (v, more["value_weight"], folded[1])):
        want, size = loop(x, target, w, slots)
        assert got.dtype == x.dtype
        error = np.abs(np.asarray(got, np.float64) - want)
        # bf16 has 8 bits, and Triton's interpreter cuts them off where a GPU rounds.
        rounding = 0 if x.dtype == F32 else 2.0**-7 if kernel == "gpu" else 2.0**-8
        assert (error <= 1e-6 * size + rounding * np.abs(want)).all()  # the sum is in f32, whatever the dtype


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_worked_merge_of_kvmerger(kernel):
    # Run {0, 1, 2}: .667049 [1, 0] + .326530 [.9, .1] + .006421 [.8, .3]
    #   = [.667049 + .293877 + .005137, .032653 + .001926] = [.966063, .034579]
    # Run {3, 4}: .017986 [0, 1] + .982014 [.1, .9] = [.098201, .017986 + .883813] = [.098201, .901799]
    k = jnp.asarray([[1, 0], [0.9, 0.1], [0.8, 0.3], [0, 1], [0.1, 0.9]], F32)[None, None]
    target = jnp.asarray([0, 0, 0, 1, 1])[None, None]
    weight = jnp.asarray([0.667049, 0.326530, 0.006421, 0.017986, 0.982014], F32)[None, None]
    folded, _ = KERNELS[kernel](k, k, target, weight, 2, value_weight=weight)
    assert_allclose(folded[0, 0], [[0.966063, 0.034579], [0.098201, 0.901799]], atol=1e-6)  # six decimals are given


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_slot_alone_with_weight_one_comes_out_bit_for_bit(kernel, dtype):
    rng = np.random.default_rng(1)
    shape = (1, 1, 135, 64)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-28, 37, shape)  # all exponents but those next to subnormals
    x[0, 0, 3], x[0, 0, 4] = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).min)
    x = jnp.asarray(x, dtype)
    order = rng.permutation(135)[None, None]
    ones = jnp.ones(shape[:3], F32)
    k, v = KERNELS[kernel](x, -x, jnp.asarray(order, jnp.int32), ones, 135, value_weight=ones)
    assert_array_equal(jnp.take_along_axis(k, order[..., None], axis=2), x)
    assert_array_equal(jnp.take_along_axis(v, order[..., None], axis=2), -x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rubbish", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_a_dropped_slot_holds_does_not_matter(kernel, rubbish):
    (k, v, target, weight, slots), more = make("kept_and_losers")
    dropped = (target < 0) | (target >= slots)
    clean = KERNELS[kernel](k, v, target, weight, slots, **more)
    k, v = (jnp.where(dropped[..., None], rubbish, x).astype(x.dtype) for x in (k, v))
    weight, more = jnp.where(dropped, rubbish, weight), {"value_weight": jnp.where(dropped, rubbish, weight)}
    k_folded, v_folded = KERNELS[kernel](k, v, target, weight, slots, **more)
    assert dropped.any()
    assert_array_equal(k_folded, clean[0])
    assert jnp.isfinite(v_folded).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_nan_or_an_infinity_reaches_its_own_target_and_channel_only(kernel):
    (k, v, target, weight, slots), more = make("groups_of_128")
    weight = jnp.abs(weight) + 1
    target = target.at[0, 0, 300].set(5).at[0, 0, 590].set(5)
    clean, clean_v = KERNELS[kernel](k, v, target, weight, slots, **more)
    spoilt = k.at[0, 0, 10, 1].set(jnp.nan).at[0, 0, 20, 2].set(jnp.inf).at[0, 0, 599, 3].set(-jnp.inf)
    spoilt = spoilt.at[0, 0, 300, 4].set(jnp.inf).at[0, 0, 590, 4].set(-jnp.inf)  # of different blocks
    got, got_v = KERNELS[kernel](spoilt, v, target, weight, slots, **more)
    want = clean.at[0, 0, target[0, 0, 10], 1].set(jnp.nan).at[0, 0, target[0, 0, 20], 2].set(jnp.inf)
    want = want.at[0, 0, target[0, 0, 599], 3].set(-jnp.inf).at[0, 0, 5, 4].set(jnp.nan)
    assert_array_equal(got.astype(F32), want.astype(F32))  # numpy knows no nan in bf16
    assert_array_equal(got_v, clean_v)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_output_slot_that_nothing_joins_is_zero(kernel):
    x = jnp.ones((1, 1, 3, 64))
    ones = jnp.ones((1, 1, 3))
    k, v = KERNELS[kernel](x, x, jnp.asarray([[[0, 3, 0]]]), ones, 5, value_weight=ones)
    assert_array_equal(k[0, 0, :, 0], [2, 0, 0, 1, 0])
    assert_array_equal(k, v)


def test_more_output_slots_than_fit_into_vmem_are_done_in_chunks(monkeypatch):
    (k, v, target, weight, slots), more = make("groups_of_128")
    whole = tpu.fold_slots(k, v, target, weight, slots, **more, interpret=True)
    monkeypatch.setattr(tpu, "CHUNK_BYTES", 2**18)
    assert tpu.config(k, v, slots)[1] < slots
    chunked = tpu.fold_slots(k, v, target, weight, slots, **more, interpret=True)
    for got, want in zip(chunked, whole, strict=True):
        assert_array_equal(got, want)


def test_without_value_weight_values_are_weighted_as_keys():
    (k, v, target, weight, slots), _ = make("pruned_keys")
    got = fold_slots(k, v, target, weight, slots)
    want = fold_slots(k, v, target, weight, slots, value_weight=weight)
    assert_array_equal(got[1], want[1])


def test_a_head_dim_without_a_configuration_takes_the_reference():
    x, ones = jnp.ones((1, 1, 2, 300)), jnp.ones((1, 1, 2))
    target = jnp.zeros((1, 1, 2), jnp.int32)
    assert_array_equal(fold_slots(x, x, target, ones, 1)[0], 2 * x[:, :, :1])
    with pytest.raises(ValueError, match="head_dim 300"):
        fold_slots(x, x, target, ones, 1, implementation="gpu")


def test_a_dtype_without_a_kernel_takes_the_reference():
    x, ones = jnp.ones((1, 1, 2, 4), jnp.float16), jnp.ones((1, 1, 2))
    target = jnp.zeros((1, 1, 2), jnp.int32)
    assert fold_slots(x, x, target, ones, 1)[0].dtype == jnp.float16
    with pytest.raises(ValueError, match="no kernel for k in float16"):
        fold_slots(x, x, target, ones, 1, implementation="tpu")


X, W, T = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3), jnp.int32)


@pytest.mark.parametrize(
    "args, more, message",
    [
        ((X[0], X, T, W, 1), {}, "k is"),
        ((X, X[:, :, :2], T, W, 1), {}, "alike in B, H and N"),
        ((X, X, W, W, 1), {}, "target is float32"),
        ((X, X, T > 0, W, 1), {}, "its cumsum - 1 is"),
        ((X, X, T[0], W, 1), {}, r"target is \[2, 3\]"),
        ((X, X, T, W[..., :2], 1), {}, r"weight is \[1, 2, 2\]"),
        ((X, X, T, W, 1), {"value_weight": W[0]}, r"value_weight is \[2, 3\]"),
        ((X, X, T, W, 0), {}, "slots=0"),
        ((X, X, T, W, 2.0), {}, "positive int"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(args, more, message):
    with pytest.raises(ValueError, match=message):
        fold_slots(*args, **more)


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_kernel_asked_for_by_name_cannot_run_on_a_cpu(name):
    with pytest.raises(ValueError, match="cannot run here"):
        fold_slots(X, X, T, W, 1, implementation=name)
