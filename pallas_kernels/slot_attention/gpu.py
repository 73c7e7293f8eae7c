"""`slot_attention` in Triton: flash-decoding, for one to sixteen queries a row.

A program walks its split of a head's slots once, for all queries of the group, with a running softmax; a second kernel
joins splits. The mass of a slot needs the softmax's total, which is known at the end only: weights are kept, relative
to the largest logit so far, and a last small kernel turns them into masses. They cost two bytes a query and slot,
written and, mostly from L2, read again.

Codes never become keys or values. A row of q is laid out once for each group of channels, with zeros elsewhere, so that
products with the codes, which are exact in bf16, come out by group; then they meet the group's step and low. Such rows
fill up the 16 of a matrix product, of which a few queries use a quarter. Values go the other way: weights times steps,
a row for each group, meet the codes. The codes at one place of their words make one matrix (a plane), so that words are
taken apart in registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.slot_attention import SlotAttention
from pallas_kernels.slot_attention.packed import Packed

PROCESSORS = 132  # of an H100 or H200
MOST_SPLITS = 128
LEAST_SPLIT = 256  # slots
CHUNK = 512  # slots of a program of `_mass`


class Config(NamedTuple):
    """How a call is cut up: `rows` queries times group of a program, `block` slots of a step, slots of a `split`."""

    rows: int
    block: int
    split: int
    num_warps: int
    num_stages: int


class _Stored(NamedTuple):
    """Keys or values: the arrays that a kernel reads, and what it must know of them. bits = 0 for an array."""

    x: jax.Array
    step: jax.Array
    low: jax.Array
    channels: int
    bits: int
    group: int

    @property
    def groups(self) -> int:
        return self.channels // self.group

    @property
    def tile_bytes(self) -> int:
        """Of one slot in shared memory."""
        if not self.bits:
            return _power(self.channels) * self.x.dtype.itemsize
        return 4 * _power(self.x.shape[-1], 8) + 4 * _power(self.groups)


def slot_attention(q, k, v, q_pos, k_pos, bias=None, *, scale=1.0, sliding_window=None, stat=None) -> SlotAttention:
    """See `pallas_kernels.slot_attention`.

    Masses come from weights that are kept in f16 where q is bf16: a query's part of a mass is off by one in 2048 at
    most, or by 3e-8, whichever is more. Where q is f32 the weights are f32. In both a mass is also off by what f32
    rounds of the lse, 6e-8 |lse| of it.
    """
    batch, heads, group, queries, _ = q.shape
    rows, slots = group * queries, k_pos.shape[2]
    k, v = _stored(k), _stored(v)
    cut = config(batch * heads, rows, slots, q.dtype, k, v)
    splits = triton.cdiv(slots, cut.split)
    lead = (batch * heads, splits, rows)
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    weight = jnp.float16 if q.dtype == jnp.bfloat16 else jnp.float32
    kept, tops = nothing, nothing
    if stat == "mass":
        kept = jax.ShapeDtypeStruct((batch * heads, rows, slots), weight)
        tops = jax.ShapeDtypeStruct((batch * heads, rows, triton.cdiv(slots, cut.block)), jnp.float32)
    elif stat == "logits":
        kept = jax.ShapeDtypeStruct((batch * heads, rows, slots), jnp.float32)

    out, lse, kept, tops = triton_call.call(
        _attend,
        *(q, k.x, k.step, k.low, v.x, v.step, v.low, q_pos, k_pos, k_pos if bias is None else bias),
        out_shapes=[
            jax.ShapeDtypeStruct((*lead, v.channels), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
            kept,
            tops,
        ],
        grid=(triton.cdiv(rows, cut.rows) * splits, batch * heads),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        HEADS=heads,
        Q_HEADS=q_pos.shape[1],
        QUERIES=queries,
        ROWS=rows,
        SLOTS=slots,
        SPLIT=cut.split,
        SPLITS=splits,
        SCALE=float(scale),
        WINDOW=sliding_window or 0,
        BIAS=bias is not None,
        STAT=stat or "",
        ROW_BLOCK=cut.rows,
        BLOCK=cut.block,
        **_constants("K", k, q.dtype),
        **_constants("V", v, q.dtype),
    )
    if stat == "mass":
        kept = _masses(kept, tops, lse, cut.block)
    if splits > 1:
        out, lse = _joined(out, lse, q.dtype)
    shape = q.shape[:4]
    if stat is not None:
        kept = kept.reshape(k_pos.shape if stat == "mass" else (*shape, slots))
    return SlotAttention(out.reshape(*shape, v.channels), lse.reshape(shape), None if stat is None else kept)


def config(batch_heads: int, rows: int, slots: int, dtype: jnp.dtype, k: _Stored, v: _Stored) -> Config:
    """Splits that fill the device evenly, and blocks whose loads keep the memory busy.

    An H200 wants about 40 KiB on their way to each processor; here it is 64 KiB or more. Shared memory stays within the
    99 KiB of the smallest devices, but for products of 64 rows on an H100, which take more and have more.
    """
    bytes_of_slot, packed = k.tile_bytes + v.tile_bytes, bool(k.bits or v.bits)
    groups = max(_power(x.groups) for x in (k, v))
    row_block = min(_power(rows), max(1, (64 if bytes_of_slot <= 512 else 32) // groups))
    # One warp where words fill no more than one tile of a matrix product: more of them would do the same work.
    alone = dtype == jnp.bfloat16 and groups * row_block <= 16
    alone &= all(x.bits and x.x.shape[-1] <= 16 for x in (k, v))
    block = (32 if alone or dtype == jnp.float32 else 64) if packed else 128
    while block > 16 and (block * bytes_of_slot > 32 * 1024 or block >= 2 * slots):
        block //= 2
    tiles, blocks, places = triton.cdiv(rows, row_block), triton.cdiv(slots, block), PROCESSORS * (8 if alone else 2)

    def time(splits):  # in blocks; a second kernel takes that of two or so
        return triton.cdiv(batch_heads * tiles * splits, places) * triton.cdiv(blocks, splits) + 2 * (splits > 1)

    splits = min(range(1, max(1, min(MOST_SPLITS, slots // LEAST_SPLIT)) + 1), key=time)
    return Config(row_block, block, block * triton.cdiv(blocks, splits), 1 if alone else 4, 4 if row_block <= 4 else 3)


def _constants(name, stored, dtype):
    width, low_bits = stored.x.shape[-1], stored.bits in (2, 4)
    constants = {"CHANNELS": stored.channels, "WIDTH": width, "BITS": stored.bits, "GROUPS": stored.groups}
    constants["OFFSET"] = 128 if low_bits and dtype == jnp.bfloat16 else 0
    return {f"{name}_{key}": value for key, value in constants.items()}


def _power(n, least=1):
    return max(least, triton.next_power_of_2(n))


def _stored(x):
    if isinstance(x, Packed):
        return _Stored(x.codes, x.step, x.low, x.channels, x.bits, x.group)
    return _Stored(x, x, x, x.shape[-1], 0, x.shape[-1])  # of an array, step and low are not read


def _joined(parts, lses, dtype):
    """Splits under one softmax: out [B * H, rows, Dv], lse f32[B * H, rows]."""
    batch_heads, splits, rows, channels = parts.shape
    return triton_call.call(
        _join,
        parts,
        lses,
        out_shapes=[
            jax.ShapeDtypeStruct((batch_heads, rows, channels), dtype),
            jax.ShapeDtypeStruct((batch_heads, rows), jnp.float32),
        ],
        grid=(rows, batch_heads),
        ROWS=rows,
        SPLITS=splits,
        CHANNELS=channels,
        SPLIT_BLOCK=_power(splits),
        CHANNEL_BLOCK=min(64, _power(channels)),
    )


def _masses(weights, tops, lses, block):
    """f32[B * H, N] out of weights [B * H, rows, N] relative to the tops f32[B * H, rows, N / block]."""
    batch_heads, rows, slots = weights.shape
    (mass,) = triton_call.call(
        _mass,
        weights,
        tops,
        lses,
        out_shapes=[jax.ShapeDtypeStruct((batch_heads, slots), jnp.float32)],
        grid=(triton.cdiv(slots, CHUNK), batch_heads),
        ROWS=rows,
        SLOTS=slots,
        SPLITS=lses.shape[1],
        BLOCK=block,
        ROW_BLOCK=min(8, _power(rows)),
        SPLIT_BLOCK=_power(lses.shape[1]),
        CHUNK=CHUNK,
    )
    return mass


@triton.jit
def _attend(
    q, k, k_step, k_low, v, v_step, v_low, q_pos, k_pos, bias, out, lse, stat, tops,
    HEADS: tl.constexpr, Q_HEADS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
    STAT: tl.constexpr, ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    K_CHANNELS: tl.constexpr, K_WIDTH: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_CHANNELS: tl.constexpr, V_WIDTH: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    V_OFFSET: tl.constexpr,
):  # fmt: skip
    """Rows are the group's queries: q [B * H, ROWS, K_CHANNELS], out [B * H, SPLITS, ROWS, V_CHANNELS]."""
    TILES: tl.constexpr = (ROWS + ROW_BLOCK - 1) // ROW_BLOCK
    tile, split = tl.program_id(0) % TILES, tl.program_id(0) // TILES  # tiles of the same slots run together
    head = tl.program_id(1).to(tl.int64)
    row = tile * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    at = (head // HEADS * Q_HEADS + head % HEADS % Q_HEADS) * QUERIES + row % QUERIES
    now = tl.load(q_pos + at, mask=row < ROWS, other=-1)
    asked = _queries(q + head * ROWS * K_CHANNELS, tile, ROWS, ROW_BLOCK, K_CHANNELS, K_BITS, K_GROUPS)
    sums = _sums(asked, ROW_BLOCK, K_GROUPS)

    k, k_step, k_low = _of_head(k, k_step, k_low, head * SLOTS, K_WIDTH, K_GROUPS)
    v, v_step, v_low = _of_head(v, v_step, v_low, head * SLOTS, V_WIDTH, V_GROUPS)
    k_pos, bias = k_pos + head * SLOTS, bias + head * SLOTS
    stat, tops = stat + (head * ROWS + row)[:, None] * SLOTS, tops + (head * ROWS + row) * tl.cdiv(SLOTS, BLOCK)

    top = tl.full([ROW_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROW_BLOCK], tl.float32)
    sums_v = _nothing_yet(ROW_BLOCK, V_WIDTH, V_BITS, V_GROUPS)
    for start in range(split * SPLIT, min(split * SPLIT + SPLIT, SLOTS), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        logits = SCALE * _products(asked, sums, k, k_step, k_low, slot, SLOTS, K_WIDTH, K_BITS, K_GROUPS, K_OFFSET)
        pos = tl.load(k_pos + slot, mask=slot < SLOTS, other=-1)[None, :]
        if BIAS:
            more = tl.load(bias + slot, mask=slot < SLOTS, other=0.0)[None, :]
            logits += tl.where(pos == now[:, None], 0.0, more)
        visible = (pos != -1) & (pos <= now[:, None])
        if WINDOW > 0:
            visible &= now[:, None] - pos < WINDOW
        logits = tl.where(visible, logits, float("-inf"))

        last, top = top, tl.maximum(top, tl.max(logits, axis=1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # nothing visible so far: exp(-inf - 0) is 0
        fade = tl.exp(last - safe)
        p = tl.exp(logits - safe[:, None])
        total = total * fade + tl.sum(p, axis=1)
        sums_v = _add_values(
            sums_v, fade, p, v, v_step, v_low, slot, SLOTS, V_WIDTH, V_BITS, V_GROUPS, V_OFFSET, q.dtype.element_ty
        )
        if STAT != "":
            inside = (row < ROWS)[:, None] & (slot < SLOTS)[None, :]
            seen = logits if STAT == "logits" else p
            tl.store(stat + slot[None, :], seen.to(stat.dtype.element_ty), mask=inside)
        if STAT == "mass":
            tl.store(tops + start // BLOCK, top, mask=row < ROWS)

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    at = (head * SPLITS + split) * ROWS + row
    tl.store(lse + at, tl.where(some, top + tl.log(total), float("-inf")), mask=row < ROWS)
    _write(out + at[:, None] * V_CHANNELS, row < ROWS, sums_v, total, V_CHANNELS, V_WIDTH, V_BITS, V_GROUPS, V_OFFSET)


@triton.jit
def _of_head(x, step, low, slots, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Pointers to what lies `slots` slots further."""
    return x + slots * WIDTH, step + slots * GROUPS, low + slots * GROUPS


@triton.jit
def _queries(
    q, tile, ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """A matrix for each place of a word: [groups * ROW_BLOCK, words], zero outside the row's group of channels."""
    PLACES: tl.constexpr = 32 // BITS if BITS else 1
    stacked = tl.arange(0, triton.next_power_of_2(GROUPS) * ROW_BLOCK)
    row, group = tile * ROW_BLOCK + stacked % ROW_BLOCK, stacked // ROW_BLOCK
    planes = ()
    for j in tl.static_range(PLACES):
        channel = tl.arange(0, max(16, triton.next_power_of_2(tl.cdiv(CHANNELS, PLACES)))) * PLACES + j
        own = channel[None, :] // (CHANNELS // GROUPS) == group[:, None]
        inside = (row < ROWS)[:, None] & (channel < CHANNELS)[None, :] & own
        planes = planes + (tl.load(q + row[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0),)
    return planes


@triton.jit
def _sums(planes, ROW_BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Sums of q over each group of channels: f32[groups, ROW_BLOCK]."""
    total = tl.sum(planes[0].to(tl.float32), axis=1)
    for j in tl.static_range(1, len(planes)):
        total += tl.sum(planes[j].to(tl.float32), axis=1)
    return tl.reshape(total, [triton.next_power_of_2(GROUPS), ROW_BLOCK])


@triton.jit
def _products(
    queries, sums, k, step, low, slot, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """q . k: f32[ROW_BLOCK, BLOCK]."""
    dtype: tl.constexpr = queries[0].dtype
    at = tl.arange(0, queries[0].shape[1])
    inside = (at < WIDTH)[:, None] & (slot < SLOTS)[None, :]
    keys = tl.load(k + slot[None, :] * WIDTH + at[:, None], mask=inside, other=0)
    x = tl.dot(queries[0], _operand(keys, 0, BITS, OFFSET, dtype), input_precision="ieee")
    for j in tl.static_range(1, len(queries)):
        x = tl.dot(queries[j], _operand(keys, j, BITS, OFFSET, dtype), x, input_precision="ieee")
    if BITS:
        step, low = _by_group(step, slot, SLOTS, GROUPS), _by_group(low, slot, SLOTS, GROUPS)
        x = tl.reshape(x, [sums.shape[0], sums.shape[1], slot.shape[0]]) - OFFSET * sums[:, :, None]
        x = tl.sum(x * step[:, None, :] + sums[:, :, None] * low[:, None, :], axis=0)
    return x


@triton.jit
def _operand(x, PLACE: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """x, or the codes at one place of its words, and OFFSET: as floats, which hold them exactly."""
    if OFFSET:
        half: tl.constexpr = 16 // BITS  # both halves of a word at once: each becomes 128 and, in its last bits, a code
        x = (x >> (BITS * (PLACE % half))) & ((2**BITS - 1) * 0x10001) | 0x43004300
        x = (x >> (16 * (PLACE // half))).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif BITS:
        x = ((x >> (BITS * PLACE)) & (2**BITS - 1)).to(tl.float32).to(dtype)
    return x


@triton.jit
def _by_group(x, slot, SLOTS: tl.constexpr, GROUPS: tl.constexpr):
    """f32[groups, BLOCK] of x f16[SLOTS, groups]."""
    group = tl.arange(0, triton.next_power_of_2(GROUPS))
    inside = (group < GROUPS)[:, None] & (slot < SLOTS)[None, :]
    return tl.load(x + slot[None, :] * GROUPS + group[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _nothing_yet(ROW_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Zeros for `_add_values`: a matrix for each place of a word, sums of weights, sums of lows."""
    groups: tl.constexpr = triton.next_power_of_2(GROUPS)
    planes = ()
    for _ in tl.static_range(32 // BITS if BITS else 1):
        planes = planes + (tl.zeros([groups * ROW_BLOCK, max(8, triton.next_power_of_2(WIDTH))], tl.float32),)
    return planes, tl.zeros([groups * ROW_BLOCK], tl.float32), tl.zeros([ROW_BLOCK, groups], tl.float32)


@triton.jit
def _add_values(
    sums, fade, p, v, step, low, slot, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Fades the sums and adds p . v, by place of a word and by group of channels."""
    planes, weight, lows = sums
    at = tl.arange(0, planes[0].shape[1])
    inside = (slot < SLOTS)[:, None] & (at < WIDTH)[None, :]
    values = tl.load(v + slot[:, None] * WIDTH + at[None, :], mask=inside, other=0)
    if BITS:
        group = tl.arange(0, lows.shape[1])
        inside = (slot < SLOTS)[:, None] & (group < GROUPS)[None, :]
        low = tl.load(low + slot[:, None] * GROUPS + group[None, :], mask=inside, other=0.0)
        exact: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16  # a low is f16
        lows = tl.dot(p.to(exact), low.to(exact), lows * fade[:, None], input_precision="ieee")
        p = p[None, :, :] * _by_group(step, slot, SLOTS, GROUPS)[:, None, :]
        p = tl.reshape(p, [weight.shape[0], slot.shape[0]])
        fade = tl.reshape(fade[None, :] + tl.zeros([lows.shape[1], 1], tl.float32), [weight.shape[0]])
    p = p.to(dtype)
    if OFFSET:  # of what is multiplied, so that the offset of the codes goes away exactly
        weight = weight * fade + tl.sum(p.to(tl.float32), axis=1)
    new = ()
    for j in tl.static_range(len(planes)):
        faded = planes[j] * fade[:, None]
        new = new + (tl.dot(p, _operand(values, j, BITS, OFFSET, dtype), faded, input_precision="ieee"),)
    return new, weight, lows


@triton.jit
def _write(
    out, rows, sums, total, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Writes the sums of `_add_values` over the total. Of a group's sums, only its own channels mean anything."""
    planes, weight, lows = sums
    group = tl.arange(0, lows.shape[1])
    for j in tl.static_range(len(planes)):
        channel = tl.arange(0, planes[0].shape[1]) * len(planes) + j
        x = planes[j]
        if BITS:
            x = tl.reshape(x - OFFSET * weight[:, None], [lows.shape[1], lows.shape[0], x.shape[1]])
            own = channel[None, :] // (CHANNELS // GROUPS) == group[:, None]
            x = tl.sum(tl.where(own[:, None, :], x + tl.trans(lows)[:, :, None], 0.0), axis=0)
        inside = rows[:, None] & (channel < CHANNELS)[None, :]
        tl.store(out + channel[None, :], (x / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join(
    parts, lses, out, lse, ROWS: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: parts f32[B * H, SPLITS, ROWS, CHANNELS] and their lses."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLIT_BLOCK)
    at = (head * SPLITS + split) * ROWS + row
    theirs = tl.load(lses + at, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(theirs, axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(theirs - safe)
    total = tl.sum(weight, axis=0)
    tl.store(lse + head * ROWS + row, safe + tl.log(total))  # log(0) is -inf
    weight = weight / tl.where(total > 0.0, total, 1.0)
    for first in tl.static_range(0, CHANNELS, CHANNEL_BLOCK):
        channel = first + tl.arange(0, CHANNEL_BLOCK)
        inside = (split < SPLITS)[:, None] & (channel < CHANNELS)[None, :]
        x = tl.load(parts + at[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
        x = tl.sum(x * weight[:, None], axis=0)
        tl.store(out + (head * ROWS + row) * CHANNELS + channel, x.to(out.dtype.element_ty), mask=channel < CHANNELS)


@triton.jit
def _mass(
    weights, tops, lses, mass, ROWS: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums over rows what `_attend` kept, under the softmax of all splits."""
    head = tl.program_id(1).to(tl.int64)
    slot, split = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, SPLIT_BLOCK)
    blocks: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    x = tl.zeros([CHUNK], tl.float32)
    for first in range(0, ROWS, ROW_BLOCK):
        row = first + tl.arange(0, ROW_BLOCK)
        inside = (row < ROWS)[:, None] & (split < SPLITS)[None, :]
        at = (head * SPLITS + split)[None, :] * ROWS + row[:, None]
        theirs = tl.load(lses + at, mask=inside, other=float("-inf"))
        top = tl.max(theirs, axis=1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        lse = safe + tl.log(tl.sum(tl.exp(theirs - safe[:, None]), axis=1))
        inside = (row < ROWS)[:, None] & (slot < SLOTS)[None, :]
        at = (head * ROWS + row)[:, None]
        weight = tl.load(weights + at * SLOTS + slot[None, :], mask=inside, other=0.0).to(tl.float32)
        since = tl.load(tops + at * blocks + slot[None, :] // BLOCK, mask=inside, other=float("-inf"))
        share = tl.exp(since - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
        x += tl.sum(weight * share, axis=0)
    tl.store(mass + head * SLOTS + slot, x, mask=slot < SLOTS)
