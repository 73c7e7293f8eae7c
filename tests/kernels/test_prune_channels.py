import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import codecs
from pallas_kernels.prune_channels import gpu, prune_channels, reference, tpu


def loop(k, q, keep, there=None, asked=None):
    """Channels by a sort of (score, channel) in float64, one head and channel at a time."""
    batch, heads, slots, width = k.shape
    there = np.ones((batch, heads, slots), bool) if there is None else there
    asked = np.ones((batch, q.shape[3]), bool) if asked is None else asked
    index = np.zeros((batch, heads, keep), np.int32)
    for b, h in np.ndindex(batch, heads):
        order = []
        for j in range(width):
            of_q = sum(float(x) ** 2 for x in q[b, h][:, asked[b], j].ravel())
            of_k = sum(float(x) ** 2 for x in k[b, h, there[b, h], j])
            score = np.float64(of_q) * np.float64(of_k)
            order.append((np.inf if np.isnan(score) else -score, j))
        index[b, h] = sorted(j for _, j in sorted(order)[:keep])
    return index


def make(slots, width, dtype=jnp.float32, group=2, queries=5, seed=0, lead=(2, 1), fill="normal"):
    """Keys and queries; channels differ in size, so that their scores are apart. "ties" has small whole numbers."""
    rng = np.random.default_rng(seed)
    k, q = rng.normal(size=(*lead, slots, width)), rng.normal(size=(*lead, group, queries, width))
    k *= np.exp(rng.normal(size=width))
    if fill == "ties":
        k, q = rng.integers(-1, 2, k.shape), rng.integers(-1, 2, q.shape)
    return jnp.asarray(k, dtype), jnp.asarray(q, dtype)


def bits(x):
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def check(run, k, q, keep, **masks):
    """Holds the choice to the loop, and keys to bits, of a nan too."""
    keys, index = run(k, q, keep, **masks)
    want = loop(np.asarray(k.astype(jnp.float32)), np.asarray(q.astype(jnp.float32)), keep, **masks)
    np.testing.assert_array_equal(index, want)
    assert (keys.dtype, index.dtype) == (k.dtype, jnp.int32)
    keys, want = bits(keys), np.take_along_axis(bits(k), want[:, :, None], axis=-1)
    if run is run_tpu and k.dtype == jnp.bfloat16:
        # XLA for a CPU moves bf16 as f32, before the kernel sees them: that makes all nans of blocks the quiet one, and
        # with the flags of these tests numbers below the smallest normal one 0.
        keys, want = (np.where((x & 0x7FFF) > 0x7F80, x & 0xFFC0, x) for x in (keys, want))
        keys, want = (np.where((x & 0x7F80) == 0, x & 0x8000, x) for x in (keys, want))
    np.testing.assert_array_equal(keys, want)


def run_tpu(*args, **settings):
    return tpu.prune_channels(*args, **settings, interpret=True)


RUNS = {"reference": reference.prune_channels, "tpu": run_tpu, "gpu": gpu.prune_channels}
every_implementation = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@every_implementation
def test_the_worked_example_keeps_channels_0_and_2(run):
    k = jnp.array([[1, 0.5, 0, 2], [0, 1, 1, 2], [1, 0, 2, 0], [2, 1, 1, 1]])[None, None]
    q = jnp.array([[[1.0, 0, 2, 1], [1, 1, 0, 0]], [[0, 1, 2, 0], [2, 0, 1, 1]]])[None, None]
    # Sums of squares of k: 6, 2.25, 6, 9; of q: 6, 2, 9, 2; products 36, 4.5, 54, 18.
    keys, index = run(k, q, 2)
    assert index.tolist() == [[[0, 2]]]
    assert keys[0, 0].tolist() == [[1, 0], [0, 1], [1, 2], [2, 1]]


@every_implementation
@pytest.mark.parametrize(
    ("slots", "width", "keep", "dtype", "group", "queries"),
    [
        (1, 64, 1, jnp.float32, 1, 1),
        (37, 64, 63, jnp.bfloat16, 3, 4),
        (130, 80, 33, jnp.bfloat16, 8, 1),
        (64, 96, 57, jnp.float32, 4, 3),
        (200, 128, 77, jnp.bfloat16, 4, 8),
        (96, 256, 153, jnp.float32, 1, 2),
        (129, 256, 128, jnp.bfloat16, 2, 2),
        (16, 5, 2, jnp.float32, 2, 2),
    ],
)
def test_it_keeps_what_a_loop_keeps(run, slots, width, keep, dtype, group, queries):
    check(run, *make(slots, width, dtype, group, queries), keep)


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_go_to_the_lower_channel(run, dtype):
    check(run, *make(6, 64, dtype, fill="ties"), 21)
    equal = jnp.ones((1, 1, 4, 64), dtype)
    assert run(equal, jnp.ones((1, 1, 1, 1, 64), dtype), 3).index.tolist() == [[[0, 1, 2]]]


@every_implementation
@pytest.mark.parametrize("rubbish", [100.0, np.inf, np.nan])
def test_padding_queries_and_slots_that_are_not_there_change_nothing_in_the_choice(run, rubbish):
    k, q = make(40, 64, jnp.bfloat16)
    rng = np.random.default_rng(1)
    there, asked = rng.random(k.shape[:3]) < 0.6, np.array([[True, True, False, True, False], [False] * 4 + [True]])
    want = run(k, q, 20, there=there, asked=asked).index
    k = jnp.where(there[..., None], k, rubbish * jnp.arange(64)).astype(k.dtype)
    q = jnp.where(asked[:, None, None, :, None], q, rubbish).astype(q.dtype)
    np.testing.assert_array_equal(run(k, q, 20, there=there, asked=asked).index, want)
    check(run, k, q, 20, there=there, asked=asked)


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_nan_or_inf_stays_in_its_channel_and_keys_are_copied_bit_for_bit(run, dtype):
    k, q = make(20, 64, dtype, lead=(1, 1))
    wide = {2: np.uint16, 4: np.uint32}[k.dtype.itemsize]
    raw = bits(k).copy()
    one = raw.dtype.type(1)
    raw[0, 0, 3, 10] = bits(jnp.array([jnp.nan], dtype))[0] | one  # a nan with a payload
    raw[0, 0, 4, 20] = bits(jnp.array([jnp.inf], dtype))[0]
    raw[0, 0, 5, 30] = bits(jnp.array([-jnp.inf], dtype))[0]
    raw[0, 0, 6, :] = one  # the least subnormal
    raw[0, 0, 7, :] = bits(jnp.array([-0.0], dtype))[0]
    raw[0, 0, 8, ::2] = np.iinfo(wide).max  # nan, where it does not count
    k = jnp.asarray(raw.view(k.dtype))
    there = np.arange(20)[None, None] != 8
    index = run(k, q, 60, there=there).index.ravel().tolist()
    assert {20, 30} <= set(index)
    assert 10 not in index
    check(run, k, q, 60, there=there)


@every_implementation
def test_nothing_there_keeps_the_first_channels(run):
    k, q = make(20, 64)
    check(run, k, q, 9, there=np.zeros((2, 1, 20), bool))


@every_implementation
def test_it_chooses_what_the_codec_of_kvjax_fits(run):
    k, q = make(33, 64, jnp.bfloat16, lead=(2, 2))
    there, asked = np.arange(33) % 3 > 0, np.ones((2, 5), bool)
    there = np.broadcast_to(there, (2, 2, 33))
    codec = codecs.prune_channels(24)
    keys, index = run(k, q, 24, there=there, asked=asked)
    want = codec.fit(k, jnp.asarray(there), q, jnp.asarray(asked))
    np.testing.assert_array_equal(index, want)
    np.testing.assert_array_equal(bits(keys), bits(codec.project(k, want)))


def test_tpu_cuts_a_block_of_bf16_bit_for_bit():
    x = np.arange(2**16, dtype=np.uint16).reshape(256, 256)  # all that bf16 has
    chosen = np.zeros((256, 16), np.float32)
    chosen[[3, 250, 7], [0, 1, 8]] = 1  # rows 0 and 1 of the even half, and 0 of the odd
    want = np.zeros((16, 256), np.uint16)
    want[[0, 2, 1]] = x.T[[3, 250, 7]]
    np.testing.assert_array_equal(jax.jit(tpu.narrow)(jnp.asarray(x), jnp.asarray(chosen, jnp.bfloat16)), want)


@pytest.mark.parametrize(("slots", "dtype"), [(700, jnp.bfloat16), (640, jnp.float32)])
def test_tpu_reads_twice_what_does_not_fit_and_chooses_the_same(monkeypatch, slots, dtype):
    monkeypatch.setattr(tpu, "MOST_BYTES", 256 * 128 * jnp.dtype(dtype).itemsize)
    step, block = tpu.config(slots, 64, jnp.dtype(dtype).itemsize)
    assert (step, block) == ((256, 256) if dtype == jnp.bfloat16 else (128, 256))
    there = np.random.default_rng(2).random((2, 1, slots)) < 0.5
    check(run_tpu, *make(slots, 64, dtype), 39, there=there)


def test_tpu_holds_a_head_of_llama_at_once():
    assert tpu.config(8192, 128, 2) == (512, 8192)
    assert tpu.config(16384, 128, 2) == (512, 16384)
    assert tpu.config(32768, 128, 2) == (512, 16384)


def test_gpu_sums_several_blocks_in_several_splits(monkeypatch):
    monkeypatch.setattr(gpu, "config", lambda rows, slots, channels: gpu.Config(16, 3, 4))
    there = np.random.default_rng(2).random((2, 1, 170)) < 0.5
    check(gpu.prune_channels, *make(170, 80), 47, there=there)


def test_gpu_splits_few_heads_finely_and_many_coarsely():
    assert gpu.config(8, 8192, 128) == (64, 1, 128)
    assert gpu.config(256, 8192, 128) == (64, 8, 16)


def test_it_runs_under_jit_and_takes_the_reference_here():
    k, q = make(20, 64)
    got = jax.jit(prune_channels, static_argnums=2)(k, q, 11)
    np.testing.assert_array_equal(got.index, reference.prune_channels(k, q, 11).index)


def test_wrong_calls_are_told_what_is_wrong():
    k, q = jnp.zeros((1, 2, 8, 16)), jnp.zeros((1, 2, 3, 4, 16))
    for args, settings, message in [
        ((k[0], q, 2), {}, r"k \(2, 8, 16\) must be \[B, H, N, D\]"),
        ((k, q[:, :1], 2), {}, r"q \(1, 1, 3, 4, 16\) must be .* of k \(1, 2, 8, 16\)"),
        ((k, q[..., :8], 2), {}, r"q \(1, 2, 3, 4, 8\) must be"),
        ((k.astype(jnp.int32), q, 2), {}, "k is int32; give a floating dtype"),
        ((k, q, 0), {}, r"keep=0 must be an int in 1\.\.15"),
        ((k, q, 16), {}, r"keep=16 must be an int in 1\.\.15, below the 16 of k"),
        ((k, q, 2), {"there": jnp.zeros((1, 2, 7), bool)}, r"there bool\[1, 2, 7\] must be bool\[1, 2, 8\]"),
        ((k, q, 2), {"asked": jnp.zeros((1, 4))}, r"asked float32\[1, 4\] must be bool\[1, 4\]"),
        ((k, q, 2), {"implementation": "cuda"}, "'cuda' must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune_channels(*args, **settings)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_kernel_that_cannot_run_here_is_refused(name):
    k, q = make(20, 64)
    with pytest.raises(ValueError, match="cannot run here"):
        prune_channels(k, q, 2, implementation=name)
    with pytest.raises(ValueError, match="k is float16, and kernels are for float32 and bfloat16"):
        prune_channels(k.astype(jnp.float16), q, 2, implementation=name)
    k, q = make(2, 257)
    with pytest.raises(ValueError, match="257 channels, and kernels take 256 at most"):
        prune_channels(k, q, 2, implementation=name)
