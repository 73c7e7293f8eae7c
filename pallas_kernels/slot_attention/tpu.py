"""`slot_attention` on a TPU: one pass over blocks of slots, whose softmax is corrected as larger logits come.

The query heads of a group and their T queries are rows of one matrix, so that a block of keys and values is loaded once
for all of them.

Channels that do not fill the 128 lanes lie second in a TPU's memory, slots first: XLA stores an array [N, 64] so, and
words and steps too. Such arrays are handed over as [D, N], which moves nothing where D, or a vector's words, are a
multiple of 8; for others, such as 77 pruned channels, XLA may put heads second, and then it copies them first.

Codes become bf16 (f32 where q is) in VMEM, without their steps: with x = step code + low in each of S groups,

  q . x = sum over groups of step (q_s . code_s) + low sum(q_s)

and so S copies of q, each zero but for a group, are multiplied by the codes, and steps by the products. A word's codes
come out in planes, the first of all words, then the second of all words; q is brought into that order beforehand,
and the output out of it afterwards.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.slot_attention import FREE, SlotAttention
from pallas_kernels.slot_attention.packed import Packed

LANES, SUBLANES = 128, 8
MOST_SLOTS = 4096  # of a block
VMEM = 10 * 2**20  # bytes that blocks may take, by a count that is not exact; the compiler's limit is 16 MiB
MOST_LOGITS = 3 * 2**20  # bytes of logits that wait in VMEM for the sum of their row


class Form(NamedTuple):
    """How keys or values are stored, without the arrays."""

    channels: int
    bits: int | None  # None for an array
    groups: int  # that have a step
    columns: bool  # [D, N], or [N, D]
    dtype: jnp.dtype  # of what is multiplied


def slot_attention(
    q, k, v, q_pos, k_pos, bias=None, *, scale=1.0, sliding_window=None, stat=None, interpret=False
) -> SlotAttention:
    """See `pallas_kernels.slot_attention`.

    Beside keys and values a slot's position is copied and read, 12 bytes, and as many for a bias; steps and lows are
    copied as integers, for kernels know no f16, 8 bytes a group. For stat="mass" the logits of a row stay in VMEM until
    its sum is known, and their masses take 4 bytes to write and 8 to bring into shape. Where logits would take more
    than 3 MiB, they are written and read again instead: 8 G T + 4 bytes a slot; keys and values have 2 D itemsize.
    stat="logits" writes 4 G T bytes.
    """
    if (missing := SUBLANES - k_pos.shape[2]) > 0:  # products of one slot are not lowered
        settings = {"scale": scale, "sliding_window": sliding_window, "stat": stat, "interpret": interpret}
        k, v, bias = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))[: x.ndim]), (k, v, bias))
        more_pos = jnp.pad(k_pos, ((0, 0), (0, 0), (0, missing)), constant_values=FREE)
        out, lse, extra = slot_attention(q, k, v, q_pos, more_pos, bias, **settings)
        return SlotAttention(out, lse, None if extra is None else extra[..., :-missing])
    batch, heads, group, queries, _ = q.shape
    slots, rows, forms = k_pos.shape[2], group * queries, (_form(k, q.dtype), _form(v, q.dtype))
    padded = _up(rows, SUBLANES)
    waiting = stat == "mass" and 4 * padded * (slots + MOST_SLOTS) <= MOST_LOGITS
    writes = stat is not None and not waiting
    size = block_slots(slots, padded, rows if writes else 0, forms, q.dtype.itemsize)
    blocks = pl.cdiv(slots, size)

    def each_row(x):  # [B, H, ...] -> [B H, ...]
        return x.reshape(batch * heads, *x.shape[2:])

    def block(*lead, axis=None):  # all of a row of the grid, or the block of its slots along `axis`
        shape = tuple(size if i == axis else extent for i, extent in enumerate(lead))
        return pl.BlockSpec((1, *shape), lambda r, i: (r, *(i if a == axis else 0 for a in range(len(shape)))))

    def stored_block(x, form):
        return block(x.shape[1], size, axis=1) if form.columns else block(size, x.shape[2], axis=0)

    at = jnp.broadcast_to(q_pos[:, :, None], (batch, heads, group, queries)).reshape(batch * heads, rows, 1)
    at = jnp.pad(at, ((0, 0), (0, padded - rows), (0, 0)), constant_values=FREE)
    q = jnp.pad(q.reshape(batch * heads, rows, -1), ((0, 0), (0, padded - rows), (0, 0)))
    asked = _asked(q, forms[0])
    stores = tuple(tuple(each_row(part) for part in _parts(x)) for x in (k, v))
    by_slot = tuple(each_row(x)[:, None] for x in (k_pos, bias) if x is not None)  # [B H, 1, N]
    width = forms[1].channels

    grid = (batch * heads, blocks)
    in_specs = [
        tuple(block(*x.shape[1:]) for x in asked),
        block(padded, 1),
        tuple(block(1, size, axis=1) for _ in by_slot),
        *(tuple(stored_block(x, form) for x in store) for store, form in zip(stores, forms, strict=True)),
    ]
    out_specs = [block(padded, width), block(padded, 1)]
    out_shape = [(padded, width, q.dtype), (padded, 1, jnp.float32)]
    if writes:
        out_specs.append(block(rows, size, axis=1))
        out_shape.append((rows, slots, jnp.float32))
    elif waiting:
        out_specs.append(block(blocks, size))
        out_shape.append((blocks, size, jnp.float32))
    scratch = [(padded, 1), (padded, 1), (padded, width), *([(blocks, padded, size)] if waiting else [])]
    settings = {"forms": forms, "slots": slots, "scale": scale, "sliding_window": sliding_window, "waiting": waiting}
    out, lse, *extra = pl.pallas_call(
        functools.partial(_kernel, **settings),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct((grid[0], *shape), dtype) for *shape, dtype in out_shape],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="slot_attention",
    )(asked, at, by_slot, *stores)

    def unpadded(x):
        return x[:, :rows].reshape(batch, heads, group, queries, -1)

    out, lse = unpadded(_in_order(out, forms[1])), unpadded(lse)[..., 0]
    if stat is None:
        return SlotAttention(out, lse, None)
    if waiting:
        return SlotAttention(out, lse, extra[0].reshape(batch, heads, -1)[:, :, :slots])
    logits = extra[0].reshape(batch, heads, group, queries, slots)
    if stat == "logits":
        return SlotAttention(out, lse, logits)
    return SlotAttention(out, lse, jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None]).sum(axis=(2, 3)))


def block_slots(slots: int, rows: int, written: int, forms: tuple[Form, Form], itemsize: int) -> int:
    """Slots of a block: all, or else a multiple of 128 that fits into VMEM, and divides all if one near the most does.

    Args:
      slots: N.
      rows: Queries of all heads of a group, padded.
      written: Rows of logits that are written.
      forms: Of keys and of values.
      itemsize: Bytes of a number of q.
    """
    moved = 2 * 4 * SUBLANES  # a position and a bias
    held, tall = 0, rows
    for form in forms:
        if form.bits is None:
            moved += _up(form.channels, SUBLANES) * itemsize
            continue
        moved += form.channels * form.bits // 8 + 2 * 2 * _up(form.groups, SUBLANES)
        held = max(held, _up(form.channels, SUBLANES) * (4 + itemsize))  # unpacked
        tall = max(tall, rows * form.groups)
    a_slot = 2 * (moved + 4 * _up(written, SUBLANES)) + held + tall * (4 + itemsize) + 3 * 4 * rows
    most = max(LANES, min(MOST_SLOTS, VMEM // a_slot // LANES * LANES))
    if slots <= most:
        return slots
    even = _up(pl.cdiv(slots, pl.cdiv(slots, most)), LANES)
    return next((size for size in range(most, most // 2, -LANES) if slots % size == 0), even)


def _form(x, dtype) -> Form:
    if isinstance(x, Packed):
        return Form(x.channels, x.bits, x.step.shape[-1], True, dtype)
    return Form(x.shape[-1], None, 0, x.shape[-1] % LANES != 0, dtype)


def _parts(x):
    """The arrays of a store, [B, H, D, N] or [B, H, N, D]."""
    if not isinstance(x, Packed):
        return (x.swapaxes(2, 3) if x.shape[-1] % LANES else x,)
    halves = (jax.lax.bitcast_convert_type(part, jnp.int16) for part in (x.step, x.low))  # kernels know no f16
    return tuple(part.swapaxes(2, 3) for part in (x.codes, *halves))


def _asked(q, form):
    """q [B H, rows, D] as keys of that form want it: for codes S copies, each of one group, and the groups' sums."""
    if form.bits is None:
        return (q,)
    wide = q.reshape(*q.shape[:2], form.groups, -1, 32 // form.bits)  # groups, words, codes of a word
    sums = wide.astype(jnp.float32).sum(axis=(3, 4))  # [B H, rows, S]
    apart = jnp.einsum("brgwj,sg->bsrjgw", wide, jnp.eye(form.groups, dtype=q.dtype))
    return apart.reshape(q.shape[0], -1, form.channels), sums


def _in_order(out, form):
    """Channels in their order, out of planes."""
    if form.bits is None:
        return out
    return out.reshape(*out.shape[:2], 32 // form.bits, -1).swapaxes(2, 3).reshape(out.shape)


def _kernel(q, at, by_slot, k, v, out, lse, *rest, forms, slots, scale, sliding_window, waiting):
    """A block of slots. `rest`: the statistic, if any; largest logit so far, sum, output; waiting logits."""
    *stat, top, total, so_far = rest[:-1] if waiting else rest
    i, size = pl.program_id(1), by_slot[0].shape[2]

    @pl.when(i == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        so_far[...] = jnp.zeros_like(so_far)

    def within(shape, axis):  # the last block may reach beyond the slots, and reads anything there
        return i * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < slots

    logits = scale * _products(q, k, forms[0])  # f32[rows, n]
    pos, asks = by_slot[0][0], at[0]  # [1, n], [rows, 1]
    if len(by_slot) == 2:
        logits = logits + jnp.where(pos == asks, 0.0, by_slot[1][0])
    visible = (pos != FREE) & (pos <= asks)
    if sliding_window is not None:
        visible &= asks - pos < sliding_window
    if slots % size:
        visible &= within((1, size), 1)
    logits = jnp.where(visible, logits, -jnp.inf)

    before = top[...]
    now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
    base = jnp.where(now > -jnp.inf, now, 0.0)
    p = jnp.exp(logits - base)
    fade = jnp.exp(before - base)
    top[...] = now
    total[...] = fade * total[...] + p.sum(axis=1, keepdims=True)
    so_far[...] = fade * so_far[...] + _weighted(p, v, forms[1], within if slots % size else None)
    if waiting:
        rest[-1][i] = logits
    elif stat:
        stat[0][0] = logits[: stat[0].shape[1]]

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        some = top[...] > -jnp.inf
        out[0] = (so_far[...] / jnp.where(some, total[...], 1.0)).astype(out.dtype)
        sums = jnp.where(some, top[...] + jnp.log(jnp.where(some, total[...], 1.0)), -jnp.inf)
        lse[0] = sums
        if waiting:

            @pl.loop(0, stat[0].shape[1])
            def _(j):
                mass = jnp.exp(rest[-1][j] - jnp.where(some, sums, 0.0)).sum(axis=0, keepdims=True)
                stat[0][0, pl.ds(j, 1)] = mass


def _products(q, k, form):
    """q . k, f32[rows, n]."""
    if form.bits is None:
        return _dot(q[0][0], k[0][0], 0 if form.columns else 1)
    products = _dot(q[0][0], _codes(k[0][0], form), 0)  # [S rows, n]
    step, low, sums = _from_half(k[1][0]), _from_half(k[2][0]), q[1][0]
    rows = sums.shape[0]
    return sum(
        step[s : s + 1] * products[s * rows : (s + 1) * rows] + low[s : s + 1] * sums[:, s : s + 1]
        for s in range(form.groups)
    )


def _weighted(p, v, form, within):
    """Sum over slots of p v, f32[rows, D]; `within` tells slots from what lies beyond them, None where nothing does."""
    if form.bits is None:
        x = v[0][0]
        if within is not None:  # what lies beyond may be nan, codes and steps cannot
            x = jnp.where(within(x.shape, 1 if form.columns else 0), x, jnp.zeros_like(x))
        return _dot(p.astype(x.dtype), x, 1 if form.columns else 0)
    step, low = _from_half(v[1][0]), _from_half(v[2][0])
    groups = [slice(s, s + 1) for s in range(form.groups)]
    stepped = jnp.concatenate([p * step[s] for s in groups], axis=0).astype(form.dtype)  # [S rows, n]
    sums = _dot(stepped, _codes(v[0][0], form), 1)  # [S rows, D], of which S-th parts are wanted
    rows, words = p.shape[0], form.channels * form.bits // 32
    word = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (1, form.channels), 1), jnp.int32(words))
    group = jax.lax.div(word, jnp.int32(words // form.groups))
    return sum(
        jnp.where(group == s, sums[s * rows : (s + 1) * rows] + (p * low[groups[s]]).sum(axis=1, keepdims=True), 0.0)
        for s in range(form.groups)
    )


def _codes(words, form):
    """Codes [D, n] in planes, of words u32[W, n]."""
    words = pltpu.bitcast(words, jnp.int32)  # u32 does not become f32
    planes = [words >> place & (1 << form.bits) - 1 for place in range(0, 32, form.bits)]
    return jnp.concatenate(planes, axis=0).astype(jnp.float32).astype(form.dtype)


def _from_half(bits):
    """f32 of the bits of finite f16, i16."""
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    normal = jax.lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    x = jnp.where(magnitude < 0x400, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -x, x)


def _dot(x, y, axis):
    """x [m, c] times y over its `axis`, f32[m, n]."""
    exactly = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=exactly, preferred_element_type=jnp.float32)


def _up(count, to):
    return math.ceil(count / to) * to
