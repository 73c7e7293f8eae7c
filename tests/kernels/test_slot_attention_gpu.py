"""The Triton kernels of `slot_attention`, in Triton's interpreter, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call
from pallas_kernels.slot_attention import gpu, reference
from pallas_kernels.slot_attention.packed import Packed, words

BF16 = jnp.bfloat16
# bf16 has 8 bits: weights are rounded to it, and so is the output of about 2
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # the lse of nothing is -inf
MASS_TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-4}  # weights in f16 are off by 1 in 2048


def packed(rng, lead, channels, bits, group):
    """Any codes, with bits set beyond the last channel too, which must not matter."""
    codes = rng.integers(0, 2**32, (*lead, words(channels, bits)), dtype=np.uint32)
    step = rng.uniform(0.5, 1.5, (*lead, channels // group)) * 3 / 2**bits
    low = -rng.uniform(0.5, 2.0, step.shape)
    return Packed(jnp.asarray(codes), jnp.asarray(step, jnp.float16), jnp.asarray(low, jnp.float16), bits, group)


def make(
    *, rows=1, heads=2, group=2, queries=1, slots=40, k_dim=16, v_dim=16, dtype=jnp.float32, k_bits=None, v_bits=None,
    channels=16, one_head=True, bias=False, free=0.3, seed=0,
):  # fmt: skip
    """Arguments of a call: positions in any order, a third of the slots free, some queries' own tokens among them."""
    rng = np.random.default_rng(seed)
    lead = (rows, heads, slots)

    def stored(dim, bits):
        if bits is not None:
            return packed(rng, lead, dim, bits, channels)
        return jnp.asarray(rng.normal(size=(*lead, dim)), dtype)

    pos = np.argsort(rng.random(lead), axis=-1)
    q_pos = slots - 1 - rng.integers(0, 1 + slots // 2, (rows, 1 if one_head else heads, queries))
    q = jnp.asarray(rng.normal(size=(rows, heads, group, queries, k_dim)), dtype)
    args = (
        q,
        stored(k_dim, k_bits),
        stored(v_dim, v_bits),
        jnp.asarray(q_pos, jnp.int32),
        jnp.asarray(np.where(rng.random(lead) < free, -1, pos), jnp.int32),
    )
    return (*args, jnp.asarray(rng.normal(size=lead), jnp.float32)) if bias else args


def cut(monkeypatch, **changes):
    """Cuts the call otherwise than `config` would; a split is of whole blocks."""
    config = gpu.config
    if "split" in changes:
        changes["block"] = 16
    monkeypatch.setattr(gpu, "config", lambda *args: config(*args)._replace(**changes))


def check(args, **settings):
    """Compares all that is returned, and returns it."""
    got = gpu.slot_attention(*args, **settings)
    want = jax.jit(functools.partial(reference.slot_attention, **settings))(*args)
    name = args[0].dtype.name
    assert got.out.dtype == args[0].dtype and got.lse.dtype == jnp.float32
    close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE[name], atol=TOLERANCE[name])
    close(np.asarray(got.out, np.float32), np.asarray(want.out, np.float32))
    # sums in another order, of products as exact as the reference's
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5, atol=1e-5)
    if settings.get("stat") == "mass":
        tolerance = MASS_TOLERANCE[name]
        np.testing.assert_allclose(got.stat, want.stat, rtol=tolerance, atol=1e-6)
    elif settings.get("stat") == "logits":
        np.testing.assert_allclose(got.stat, want.stat, rtol=1e-5, atol=2e-5)
    else:
        assert got.stat is None
    return got


ARRAYS = {
    "one query": ({}, {}, {}),
    "group 1, mass": ({"group": 1}, {"stat": "mass"}, {}),
    "group 3, window, splits": ({"group": 3, "slots": 100}, {"sliding_window": 20, "stat": "mass"}, {"split": 32}),
    "group 8, bias, logits": ({"group": 8, "bias": True}, {"stat": "logits"}, {}),
    "2 queries, own heads, mass, bias": (
        {"queries": 2, "one_head": False, "bias": True, "group": 4},
        {"stat": "mass"},
        {},
    ),
    "5 queries, splits, logits": ({"queries": 5, "slots": 70}, {"stat": "logits"}, {"split": 32}),
    "16 queries in tiles, mass": ({"queries": 16, "group": 4}, {"stat": "mass"}, {"rows": 16}),
    "bf16, splits, mass": ({"dtype": BF16, "group": 4, "slots": 130}, {"stat": "mass"}, {"split": 32}),
    "bf16, bias, window": ({"dtype": BF16, "bias": True, "queries": 5}, {"sliding_window": 3}, {}),
    "bf16, logits": ({"dtype": BF16, "group": 8}, {"stat": "logits"}, {}),
    "no free slots": ({"free": 0.0}, {"stat": "mass"}, {}),
    "one slot": ({"slots": 1, "free": 0.0}, {"stat": "mass"}, {}),
    "two rows, pruned 39 of 64": ({"rows": 2, "k_dim": 39, "v_dim": 64}, {}, {}),
    "pruned 77 of 128, bf16, mass": ({"k_dim": 77, "v_dim": 128, "dtype": BF16}, {"stat": "mass"}, {}),
    "pruned 48 of 80": ({"k_dim": 48, "v_dim": 80, "queries": 2}, {"stat": "mass"}, {"split": 16}),
    "head_dim 96, bf16": ({"k_dim": 96, "v_dim": 96, "dtype": BF16}, {"stat": "mass"}, {}),
    "head_dim 256, splits": ({"k_dim": 256, "v_dim": 256}, {}, {"split": 16}),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_attended_as_by_the_reference(name, monkeypatch):
    shapes, settings, changes = ARRAYS[name]
    cut(monkeypatch, **changes)
    check(make(**shapes), scale=0.3, **settings)


PACKED = {
    "int8, bf16, group 4": ({"k_bits": 8, "v_bits": 8, "dtype": BF16, "group": 4}, {}, {}),
    "int8, f32, mass, splits": ({"k_bits": 8, "v_bits": 8, "slots": 70}, {"stat": "mass"}, {"split": 32}),
    "int4, bf16, mass, splits": (
        {"k_bits": 4, "v_bits": 4, "dtype": BF16, "group": 3, "slots": 70},
        {"stat": "mass"},
        {"split": 32},
    ),
    "int4, f32, logits, bias": ({"k_bits": 4, "v_bits": 4, "bias": True}, {"stat": "logits"}, {}),
    "int2, bf16, window": ({"k_bits": 2, "v_bits": 2, "dtype": BF16}, {"sliding_window": 9, "stat": "mass"}, {}),
    "int2, f32": ({"k_bits": 2, "v_bits": 2, "queries": 2}, {"stat": "mass"}, {}),
    "int8 keys, int4 values": ({"k_bits": 8, "v_bits": 4, "dtype": BF16, "queries": 5}, {"stat": "logits"}, {}),
    "int4 keys, bf16 values": ({"k_bits": 4, "dtype": BF16, "group": 8}, {"stat": "mass"}, {}),
    "bf16 keys, int2 values, bias": ({"v_bits": 2, "dtype": BF16, "bias": True}, {"stat": "mass"}, {}),
    "16 queries in tiles": ({"k_bits": 4, "v_bits": 4, "dtype": BF16, "queries": 16}, {"stat": "mass"}, {"rows": 8}),
    "pruned 48 of 80, 3 and 5 groups": (
        {"k_bits": 4, "v_bits": 4, "dtype": BF16, "k_dim": 48, "v_dim": 80},
        {"stat": "mass"},
        {},
    ),
    "pruned 39 of 52, a word not full": (
        {"k_bits": 8, "v_bits": 8, "k_dim": 39, "v_dim": 52, "channels": 13},
        {"stat": "mass"},
        {},
    ),
    "one group, a word not full": ({"k_bits": 4, "v_bits": 4, "k_dim": 77, "v_dim": 77, "channels": 77}, {}, {}),
}


@pytest.mark.parametrize("name", PACKED)
def test_codes_are_attended_as_by_the_reference(name, monkeypatch):
    shapes, settings, changes = PACKED[name]
    cut(monkeypatch, **changes)
    check(make(**{"k_dim": 32, "v_dim": 32, **shapes}), scale=0.2, **settings)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("split", [32, 64])
def test_a_query_that_sees_nothing_gives_zero(bits, split, monkeypatch):
    cut(monkeypatch, split=split)
    q, k, v, q_pos, k_pos = make(rows=2, queries=3, slots=50, k_dim=16, v_dim=16, k_bits=bits, v_bits=bits)
    q_pos = q_pos.at[0, :, 1].set(-1)
    k_pos = k_pos.at[1].set(-1).at[0, 0, :40].set(-1)  # row 1 holds nothing; row 0 begins with a block of nothing
    got = check((q, k, v, q_pos, k_pos), stat="mass")
    np.testing.assert_array_equal(got.out[1], 0.0)
    np.testing.assert_array_equal(got.out[0, :, :, 1], 0.0)
    np.testing.assert_array_equal(got.lse[1], -jnp.inf)
    np.testing.assert_array_equal(got.stat[1], 0.0)


def test_large_negative_logits_before_any_visible_slot_leave_the_mass_finite(monkeypatch):
    cut(monkeypatch, split=32)
    q, k, v, q_pos, k_pos, bias = make(slots=50, bias=True)
    args = (q, k, v, q_pos, k_pos.at[:, :, :16].set(-1), bias - 1000.0)
    got, want = gpu.slot_attention(*args, stat="mass"), reference.slot_attention(*args, stat="mass")
    # an f32 near 1000, as the lse is, is off by up to 3e-5
    np.testing.assert_allclose(got.stat, want.stat, rtol=1e-4)
    np.testing.assert_allclose(got.out, want.out, rtol=1e-4, atol=1e-4)


def test_the_masses_of_a_head_sum_to_its_queries():
    args = make(group=4, queries=2, dtype=BF16, slots=64, free=0.0)
    mass = gpu.slot_attention(*args, stat="mass").stat
    # f16 weights: errors of 1 in 2048 with either sign
    np.testing.assert_allclose(mass.sum(axis=-1), 8.0, rtol=3e-4)


@pytest.mark.parametrize("batch_heads, slots", [(256, 4096), (8, 32768), (8, 300), (24, 2048), (1, 1), (64, 1000)])
def test_splits_cover_the_slots_and_none_is_empty(batch_heads, slots):
    like = gpu._stored(jax.ShapeDtypeStruct((1, 1, slots, 128), BF16))
    got = gpu.config(batch_heads, 4, slots, jnp.dtype(BF16), like, like)
    splits = -(-slots // got.split)
    assert got.split % got.block == 0
    assert (splits - 1) * got.split < slots <= splits * got.split
    assert splits == 1 or got.split >= gpu.LEAST_SPLIT


def test_a_long_row_fills_the_device():
    like = gpu._stored(jax.ShapeDtypeStruct((1, 8, 32768, 128), BF16))
    got = gpu.config(8, 4, 32768, jnp.dtype(BF16), like, like)
    assert 8 * -(-32768 // got.split) >= 0.9 * 2 * gpu.PROCESSORS


def test_one_kernel_does_a_call_that_needs_no_split_and_no_mass():
    like = functools.partial(jax.ShapeDtypeStruct, dtype=BF16)
    pos = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes = like((32, 8, 4, 1, 128)), like((32, 8, 4096, 128)), like((32, 8, 4096, 128)), pos((32, 1, 1))
    with triton_call.recording() as launches:
        jax.eval_shape(gpu.slot_attention, *shapes, pos((32, 8, 4096)))
    assert [launch.kernel.fn.__name__ for launch in launches] == ["_attend"]
