"""`slot_attention`: its reference against loops over visible slots, and its TPU kernel against the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from kvjax.attention import attend_slots
from kvjax.cache import FREE
from kvjax.codecs import integer
from kvjax.policy import Mass
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.slot_attention import Packed, reference, slot_attention, tpu
from pallas_kernels.slot_attention.cases import CASES

F32, BF16 = jnp.float32, jnp.bfloat16


@functools.partial(jax.jit, static_argnums=(1, 2))
def packed(x, bits, group):
    return integer(bits, group=group).store(x)


def run(function, *args, **settings):
    """Compiled as a whole, which takes a third of the time that its operations take one by one."""
    return jax.jit(functools.partial(function, **settings))(*args)


def interpreted(*args, **settings):
    return tpu.slot_attention(*args, interpret=True, **settings)


def make(lead, slots, widths, dtype=F32, *, bits=(None, None), group=32, bias=False, seed=0):
    """q, k, v, q_pos, k_pos and bias; some slots are free, some queries are padding, and positions are shuffled."""
    (rows, heads, shared, queries), (narrow, wide), rng = lead, widths, np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = (
        normal(rows, heads, shared, queries, narrow),
        normal(rows, heads, slots, narrow),
        normal(rows, heads, slots, wide),
    )
    k, v = (x if each is None else packed(x, each, group) for x, each in zip((k, v), bits, strict=True))
    k_pos = np.stack([rng.permutation(slots) for _ in range(rows * heads)]).reshape(rows, heads, slots)
    k_pos = np.where(rng.random(k_pos.shape) < 0.2, FREE, k_pos)
    q_pos = rng.integers(FREE, slots, (rows, heads if seed % 2 else 1, queries))
    b = jnp.asarray(rng.normal(size=k_pos.shape), F32) if bias else None
    return q, k, v, jnp.asarray(q_pos, jnp.int32), jnp.asarray(k_pos, jnp.int32), b


def by_hand(q, k, v, q_pos, k_pos, bias, *, scale, sliding_window=None):
    """(out, lse, mass, logits) in float64, one query at a time, with a dict of the slots that it sees."""
    q, k, v, q_pos, k_pos = (np.asarray(x, np.float64) for x in (q, k, v, q_pos, k_pos))
    out, lse = np.zeros((*q.shape[:4], v.shape[3])), np.full(q.shape[:4], -np.inf)
    mass, logits = np.zeros(k_pos.shape), np.full((*q.shape[:4], k.shape[2]), -np.inf)
    for b, h, g, t in itertools.product(*map(range, q.shape[:4])):
        now, seen = q_pos[b, min(h, q_pos.shape[1] - 1), t], {}
        for slot, pos in enumerate(k_pos[b, h]):
            if pos == FREE or pos > now or (sliding_window is not None and pos <= now - sliding_window):
                continue
            seen[slot] = scale * sum(q[b, h, g, t] * k[b, h, slot])
            if bias is not None and pos != now:
                seen[slot] += float(bias[b, h, slot])
        if not seen:
            continue
        lse[b, h, g, t] = np.log(sum(np.exp(logit) for logit in seen.values()))
        for slot, logit in seen.items():
            p = np.exp(logit - lse[b, h, g, t])
            out[b, h, g, t] += p * v[b, h, slot]
            mass[b, h, slot] += p
            logits[b, h, g, t, slot] = logit
    return out, lse, mass, logits


def decoded(x):
    """What `Packed` stores in float64, one code at a time."""
    words, step, low = np.asarray(x.codes), np.asarray(x.step, np.float64), np.asarray(x.low, np.float64)

    def code(d, bits, first=0):
        each = 32 // bits
        return words[..., first + d // each] >> np.uint32(d % each * bits) & np.uint32(2**bits - 1)

    out = np.empty((*words.shape[:3], x.channels))
    for d in range(x.channels):
        two_planes = x.bits == 3  # of two bits, 16 to a word, and then of one
        whole = code(d, 2) + 4 * code(d, 1, -(-x.channels // 16)) if two_planes else code(d, x.bits)
        out[..., d] = step[..., d // x.group] * whole + low[..., d // x.group]
    return out


def assert_same(given, want, tolerance):
    assert_allclose(np.asarray(given.out, np.float32), np.asarray(want.out, np.float32), rtol=tolerance, atol=tolerance)
    assert_allclose(given.lse, want.lse, rtol=tolerance, atol=tolerance)
    assert given.out.dtype == want.out.dtype and given.lse.dtype == F32
    if want.stat is not None:
        assert given.stat.dtype == F32
        assert_allclose(given.stat, want.stat, rtol=tolerance, atol=tolerance)


def test_a_case_worked_by_hand():
    # Logits 2 x 0 and 2 x ln(3) / 2: probabilities 1/4 and 3/4. Slot 2 is free, slot 3 lies in the future.
    q, k = jnp.ones((1, 1, 1, 1, 1)), jnp.array([0.0, np.log(3.0) / 2, 9.0, 9.0]).reshape(1, 1, 4, 1)
    v = jnp.array([[4.0, 0.0], [8.0, 4.0], [9.0, 9.0], [9.0, 9.0]])[None, None]
    at, pos = jnp.full((1, 1, 1), 7, jnp.int32), jnp.array([[[7, 2, FREE, 8]]], jnp.int32)
    out, lse, mass = slot_attention(q, k, v, at, pos, scale=2.0, stat="mass")
    assert_allclose(out.ravel(), [4 / 4 + 3 * 8 / 4, 3 * 4 / 4], rtol=1e-6)
    assert_allclose(lse.ravel(), [np.log(4.0)], rtol=1e-6)
    assert_allclose(mass.ravel(), [1 / 4, 3 / 4, 0, 0], rtol=1e-6)


def test_a_query_takes_no_bias_for_its_own_token():
    # The other slot's logit grows by ln(3), the own slot, at position 7, keeps its 0 whatever its bias.
    q, k, v = jnp.ones((1, 1, 1, 1, 1)), jnp.zeros((1, 1, 2, 1)), jnp.ones((1, 1, 2, 1))
    at, pos = jnp.full((1, 1, 1), 7, jnp.int32), jnp.array([[[7, 2]]], jnp.int32)
    mass = slot_attention(q, k, v, at, pos, jnp.array([[[5.0, np.log(3.0)]]], F32), stat="mass").stat
    assert_allclose(mass.ravel(), [1 / 4, 3 / 4], rtol=1e-6)


@pytest.mark.parametrize("bits, channels, group", [(8, 64, 32), (4, 80, 16), (3, 96, 32), (2, 64, 32)])
def test_packed_vectors_are_what_the_codec_of_kvjax_stored(bits, channels, group):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5, channels)), F32)
    stored = packed(x, bits, group)
    assert stored.channels == channels
    assert_allclose(stored.load(), decoded(stored), rtol=1e-6, atol=1e-6)
    step = np.repeat(np.asarray(stored.step, np.float64), group, axis=-1)
    assert (
        abs(np.asarray(stored.load()) - x) < 0.51 * step + 4e-3
    ).all()  # half a step, and what f16 rounds of two ends


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 4}], ids=["all", "window"])
@pytest.mark.parametrize("bits, group", [((None, None), 32), ((4, 8), 32), ((2, 4), 16)])
def test_the_reference_is_a_loop_over_visible_slots(bits, group, settings):
    args = make((2, 2, 3, 2), 11, (32, 64), bits=bits, group=group, bias=True, seed=sum(bits) if bits[0] else 1)
    q, k, v, *rest = args
    loaded = (q, *(decoded(x) if isinstance(x, Packed) else x for x in (k, v)), *rest)
    out, lse, mass, logits = by_hand(*loaded, scale=0.3, **settings)
    for stat, want in (("mass", mass), ("logits", logits), (None, None)):
        given = run(slot_attention, *args, scale=0.3, stat=stat, **settings)
        assert_allclose(given.out, out, rtol=1e-5, atol=1e-5)
        assert_allclose(given.lse, lse, rtol=1e-5, atol=1e-5)
        if want is None:
            assert given.stat is None
        else:
            assert_allclose(given.stat, want, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_attention_of_kvjax():
    q, k, v, q_pos, k_pos, bias = make((2, 2, 3, 1), 33, (16, 16), bias=True)
    want = attend_slots(q, k, v, q_pos, k_pos, needs=frozenset({Mass()}), bias=bias, sliding_window=20)
    given = slot_attention(q, k, v, q_pos, k_pos, bias, sliding_window=20, stat="mass")
    assert_allclose(given.out, want.out, rtol=1e-5, atol=1e-5)
    assert_allclose(given.lse, want.lse, rtol=1e-5, atol=1e-5)
    assert_allclose(given.stat / 3, want.mass[Mass()], rtol=1e-5, atol=1e-6)  # kvjax takes the group's mean


# lead (rows, kv_heads, group, queries), slots, (Dk, Dv), dtype; the rest for `make`; settings
AWKWARD = {
    "one block": ((2, 2, 3, 1), 17, (64, 64), F32, {}, {"stat": "mass"}),
    "pruned keys, three blocks": (
        (1, 2, 4, 3),
        300,
        (77, 128),
        F32,
        {"bias": True, "seed": 1},
        {"stat": "logits", "sliding_window": 90},
    ),
    "one slot": ((1, 1, 1, 1), 1, (80, 80), BF16, {"seed": 3}, {"stat": "mass"}),
    "whole blocks": ((1, 2, 8, 1), 256, (128, 128), BF16, {"bias": True}, {"stat": None}),
    "sixteen queries": ((1, 1, 4, 16), 140, (256, 256), F32, {"bias": True}, {"stat": "mass"}),
    "int4, pruned": ((1, 2, 4, 1), 300, (64, 128), F32, {"bits": (4, 4), "bias": True}, {"stat": "mass"}),
    "int8 and int2": ((2, 1, 1, 2), 130, (96, 96), BF16, {"bits": (8, 2), "seed": 1}, {"stat": "logits"}),
    "int2 and int8": ((1, 1, 3, 1), 40, (96, 64), F32, {"bits": (2, 8)}, {"stat": "mass", "sliding_window": 9}),
    "packed keys alone": ((1, 1, 3, 1), 150, (128, 64), BF16, {"bits": (2, None)}, {"stat": None}),
    "packed values alone": ((1, 1, 8, 2), 40, (80, 80), F32, {"bits": (None, 4), "group": 16}, {"stat": "mass"}),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_the_tpu_kernel_gives_what_the_reference_gives(case, monkeypatch):
    monkeypatch.setattr(tpu, "MOST_SLOTS", 128)
    lead, slots, widths, dtype, how, settings = AWKWARD[case]
    args = make(lead, slots, widths, dtype, **how)
    settings = {"scale": widths[1] ** -0.5, **settings}
    given, want = (
        run(interpreted, *args, **settings),
        run(reference.slot_attention, *args, **settings),
    )
    # bf16 has 8 bits, for probabilities times steps as for the output; f32 sums in another order
    assert_same(given, want, 2e-2 if dtype == BF16 else 2e-5)


def test_the_tpu_kernel_gives_the_same_mass_where_logits_do_not_fit_into_vmem(monkeypatch):
    args = make((1, 2, 3, 2), 150, (64, 64))
    monkeypatch.setattr(tpu, "MOST_SLOTS", 128)
    monkeypatch.setattr(tpu, "MOST_LOGITS", 0)
    given = run(interpreted, *args, stat="mass")
    assert_same(given, reference.slot_attention(*args, stat="mass"), 2e-5)


def test_the_tpu_kernel_reads_every_finite_half():
    bits = np.arange(2**16, dtype=np.uint16)
    halves = bits.view(np.float16)
    finite = np.isfinite(halves)
    given = tpu._from_half(jnp.asarray(bits.view(np.int16)[finite]))
    assert_array_equal(given, halves[finite].astype(np.float32))


def test_blocks_of_the_tpu_kernel_are_whole_tiles():
    for slots, bits in itertools.product((1, 127, 5000, 32768, 90000), (None, 4)):
        form = tpu.Form(128, bits, 4 if bits else 0, bool(bits), BF16)
        size = tpu.block_slots(slots, 8, 4, (form, form), 2)
        assert size == slots <= tpu.MOST_SLOTS or (size % tpu.LANES == 0 and size <= min(slots, tpu.MOST_SLOTS))


ATTENTIONS = {"reference": functools.partial(run, slot_attention), "tpu": functools.partial(run, interpreted)}


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_slot_order_carries_no_meaning(attention):
    q, k, v, q_pos, k_pos, bias = make((1, 2, 2, 2), 40, (32, 64), bits=(4, 8), bias=True)
    order = np.random.default_rng(1).permutation(40)
    k2, v2, pos2, bias2 = jax.tree.map(lambda x: x[:, :, order], (k, v, k_pos, bias))
    one, other = (
        attention(q, k, v, q_pos, k_pos, bias, stat="mass"),
        attention(q, k2, v2, q_pos, pos2, bias2, stat="mass"),
    )
    assert_same(other, one._replace(stat=one.stat[:, :, order]), 1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("free", [False, True], ids=["both halves", "a half all free"])
def test_two_halves_joined_by_their_lse_are_the_whole(attention, free):
    q, k, v, q_pos, k_pos, bias = make((1, 2, 2, 2), 40, (32, 32), bias=True)
    k_pos = k_pos.at[:, :, 20:].set(FREE) if free else k_pos
    whole, *halves = (
        attention(q, k[:, :, part], v[:, :, part], q_pos, k_pos[:, :, part], bias[:, :, part], stat="logits")
        for part in (slice(None), slice(20), slice(20, None))
    )
    lse = jnp.logaddexp(halves[0].lse, halves[1].lse)
    out = sum(half.out * jnp.exp(half.lse - jnp.where(lse > -jnp.inf, lse, 0.0))[..., None] for half in halves)
    assert_allclose(lse, whole.lse, rtol=1e-5, atol=1e-5)
    assert_allclose(out, whole.out, rtol=1e-5, atol=1e-5)
    assert_allclose(jnp.concatenate([half.stat for half in halves], axis=-1), whole.stat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_a_query_without_a_visible_slot_gives_zero(attention):
    q, k, v, _, k_pos, _ = make((1, 1, 2, 3), 12, (32, 32), bits=(4, 4))
    q_pos = jnp.array([[[FREE, 11, 3]]], jnp.int32)
    k_pos = jnp.where(k_pos <= 3, FREE, k_pos)  # the third query comes before all that is there
    given = attention(q, k, v, q_pos, k_pos, stat="mass")
    assert (given.out[..., ::2, :] == 0).all() and (given.lse[..., ::2] == -jnp.inf).all()
    assert jnp.isfinite(given.lse[..., 1]).all() and jnp.isfinite(given.out).all()
    assert_allclose(given.stat.sum(), 2.0, rtol=1e-5)  # of the one query's two heads


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_masses_sum_to_the_queries_that_see_anything(attention):
    args = make((2, 2, 3, 2), 30, (32, 32), seed=5)
    given = attention(*args, stat="mass")
    assert_allclose(given.stat.sum(axis=-1), (given.lse > -jnp.inf).sum(axis=(2, 3)), rtol=1e-5)


def args_of(**changes):
    names = ("q", "k", "v", "q_pos", "k_pos", "bias")
    return {**dict(zip(names, make((2, 2, 2, 1), 8, (32, 32), bias=True), strict=True)), **changes}


GOOD = args_of()
FOUR = packed(GOOD["k"], 4, 32)
WRONG = {
    r"must be \[B, H, G, T, Dk\]": {"q": GOOD["q"][0]},
    "q is int32": {"q": GOOD["q"].astype(jnp.int32)},
    "has no query": {"q": GOOD["q"][:, :, :, :0], "q_pos": GOOD["q_pos"][..., :0]},
    "with at least one slot": {"k_pos": GOOD["k_pos"][..., :0]},
    r"k \(2, 2, 7, 32\) must be": {"k": GOOD["k"][:, :, :7]},
    r"v \(2, 1, 8, 32\) must be": {"v": GOOD["v"][:, :1]},
    "give a floating dtype, or `Packed`": {"v": GOOD["v"].astype(jnp.int8)},
    "k has 16 channels and q": {"k": GOOD["k"][..., :16]},
    "q_pos .* must be": {"q_pos": GOOD["q_pos"][0]},
    "k_pos is float32": {"k_pos": GOOD["k_pos"].astype(F32)},
    "bias float16": {"bias": GOOD["bias"].astype(jnp.float16)},
    "sliding_window=0": {"sliding_window": 0},
    "scale=": {"scale": GOOD["bias"]},
    "stat='masses'": {"stat": "masses"},
    "bits=5": {"k": Packed(FOUR.codes, FOUR.step, FOUR.low, 5, 32)},
    r"k.codes is uint32\[2, 2, 8, 4\], and must be uint32\[2, 2, 8, 8\]": {
        "k": Packed(FOUR.codes, FOUR.step, FOUR.low, 8, 32)
    },
    "v.step is float32": {"v": Packed(FOUR.codes, FOUR.step.astype(F32), FOUR.low, 4, 32)},
    "implementation='cuda' must be one of": {"implementation": "cuda"},
    "implementation='tpu' cannot run here": {"implementation": "tpu"},
    "implementation='gpu' cannot run here": {"implementation": "gpu"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_call_says_what_came_and_what_was_wanted(message):
    with pytest.raises(ValueError, match=message):
        slot_attention(**args_of(**WRONG[message]))


UNFIT = {
    "kernels are for float32 and bfloat16": ((1, 1, 1, 1), (32, 32), jnp.float16, {}),
    "17 queries, and kernels take 16": ((1, 1, 1, 17), (32, 32), F32, {}),
    "v has 288 channels": ((1, 1, 1, 1), (32, 288), F32, {}),
    "codes of 3 bits": ((1, 1, 1, 1), (32, 32), F32, {"bits": (3, 3)}),
    "groups of 4 channels, and kernels want whole words of 8": (
        (1, 1, 1, 1),
        (32, 32),
        F32,
        {"bits": (4, 4), "group": 4},
    ),
    "groups of 8 channels, and the kernel wants 16": ((1, 1, 1, 1), (32, 32), F32, {"bits": (8, 8), "group": 8}),
    "144 queries for each kv_head": ((1, 1, 9, 16), (32, 32), F32, {}),
}


@pytest.mark.parametrize("why", UNFIT)
def test_a_call_without_a_kernel_goes_to_the_reference(why):
    lead, widths, dtype, how = UNFIT[why]
    args = make(lead, 8, widths, dtype, **how)
    with compiling_for("tpu"):
        with pytest.raises(ValueError, match=why):
            slot_attention(*args, implementation="tpu")
        given = slot_attention(*args)
    assert_array_equal(given.out, reference.slot_attention(*args).out)


def test_kernels_take_keys_of_the_dtype_of_queries():
    q, k, *rest = make((1, 1, 1, 1), 8, (32, 32), BF16)
    with compiling_for("gpu"), pytest.raises(ValueError, match="k is float32 and q is bfloat16"):
        slot_attention(q, k.astype(F32), *rest, implementation="gpu")


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_call_that_the_tpu_kernel_takes(case):
    shapes, settings = CASES[case]
    with compiling_for("tpu"):
        given = jax.eval_shape(functools.partial(slot_attention, implementation="tpu", **settings), *shapes)
    want = jax.eval_shape(functools.partial(slot_attention, implementation="reference", **settings), *shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
