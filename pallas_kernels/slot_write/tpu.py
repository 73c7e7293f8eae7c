"""`slot_write` for TPU: of each buffer only the tile that holds the slot is read and written back.

A step of the grid is one row and head; the prefetched slot chooses the tile. What XLA lays out side by side in memory
depends on the shape, and a kernel that wants another order costs a copy of the buffer before and after it. So each
buffer is seen in the order that XLA gives it as an argument (read off programs compiled for v5e, v5p and v6e):

    flat    [B, H, N]                       block [1, 8, 128]: 8 heads by 128 slots
    rows    [B, H, N, D], 128 divides D     block [1, 1, 8, D]: 8 slots of a head (16 where a number has 2 bytes)
    heads   [B, N, H, D], nor 8 divides N   block [1, 1, H, D]: a slot of all heads
    lanes   [B, H, D, N], any other D       block [1, 1, D, 128]: 128 slots of a head

The guess is wrong, and buffers are copied, where neither 8 divides N nor heads fill a tile (H is not 2, 4 or a multiple
of 8) though 128 divides D: give such a cache a multiple of 8 slots. It is wrong for [B, H, N], too, where 8 does not
divide H; those are small.

Steps of neighbouring heads may share a tile (flat, heads). The next block is fetched while the last one is on its way
back, so a step may read a shared tile as it was before its neighbours wrote it. So each step writes what all heads
have to write in its tile: whichever comes last, and whatever it has read, the tile ends up the same.

Blocks that no step visits keep what they hold, because each output is its input. A slot out of range goes to the
first tile, which is written back as it was. Only bits are moved, as integers: no nan is changed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ORDER = {"flat": (0, 1, 2), "rows": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "lanes": (0, 1, 3, 2)}  # each its own inverse


def slot_write(
    buffers: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], slot: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.slot_write`; rows already have the dtypes of their buffers."""
    slot = jnp.where((slot >= 0) & (slot < buffers[0].shape[2]), slot, -1)
    fit = [i for i, buffer in enumerate(buffers) if buffer.dtype != jnp.float16]
    written = _call([buffers[i] for i in fit], [rows[i] for i in fit], slot, interpret) if fit else []
    out = dict(zip(fit, written, strict=True))
    return tuple(out[i] if i in out else _masked(buffers[i], rows[i], slot) for i in range(len(buffers)))


def _masked(buffer, row, slot):
    """What f16 gets, which kernels for TPU do not take: XLA reads and writes the whole buffer."""
    here = jnp.arange(buffer.shape[2]) == slot[..., None]
    return jnp.where(here.reshape(here.shape + (1,) * (buffer.ndim - 3)), row[:, :, None], buffer)


def _call(buffers, rows, slot, interpret):
    views = [_view(x.shape) for x in buffers]
    buffers = [x.transpose(ORDER[view]) for view, x in zip(views, buffers, strict=True)]
    # A block's last two axes must be whole, or whole tiles.
    rows = [_bits(x) if view == "heads" else _bits(x)[:, :, None] for view, x in zip(views, rows, strict=True)]
    column = jnp.pad(slot, ((0, 0), (0, -slot.shape[1] % 32)), constant_values=-1)[..., None]
    row_specs, buffer_specs = zip(*map(functools.partial(_specs, slot.shape[1]), views, buffers), strict=True)
    grid = slot.shape
    in_specs = [pl.BlockSpec((1, *column.shape[1:]), lambda b, h, slots: (b, 0, 0)), *row_specs, *buffer_specs]
    out = pl.pallas_call(
        functools.partial(_kernel, views),
        name="slot_write",
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in buffers],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=list(buffer_specs)
        ),
        input_output_aliases={2 + len(rows) + i: i for i in range(len(buffers))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(slot.ravel(), column, *rows, *buffers)
    return [x.transpose(ORDER[view]) for view, x in zip(views, out, strict=True)]


def _bits(x):
    return jax.lax.bitcast_convert_type(x, _bits_of(x.dtype)).astype(jnp.int32)


def _bits_of(dtype):
    return jnp.int16 if dtype.itemsize == 2 else jnp.int32


def _view(shape):
    if len(shape) == 3:
        return "flat"
    if shape[3] % LANES:
        return "lanes"
    return "heads" if shape[2] % 8 else "rows"


def _specs(heads, view, buffer):
    """The blocks of a row and of the buffer that it goes to, whose axes are in the order of its view."""
    shape, sublanes = buffer.shape, 32 // buffer.dtype.itemsize

    def at(b, h, slots, tile=1):
        return jax.lax.div(jnp.maximum(slots[b * heads + h], 0), tile)

    if view == "flat":
        together, tile = min(sublanes, heads), min(LANES, shape[2])
        row = pl.BlockSpec((1, together, 1), lambda b, h, slots: (b, jax.lax.div(h, together), 0))
        return row, pl.BlockSpec(
            (1, together, tile), lambda b, h, slots: (b, jax.lax.div(h, together), at(b, h, slots, tile))
        )
    if view == "heads":
        row = pl.BlockSpec((1, heads, shape[3]), lambda b, h, slots: (b, 0, 0))
        return row, pl.BlockSpec((1, 1, heads, shape[3]), lambda b, h, slots: (b, at(b, h, slots), 0, 0))
    if view == "rows":
        tile = min(sublanes, shape[2])
        row = pl.BlockSpec((1, 1, 1, shape[3]), lambda b, h, slots: (b, h, 0, 0))
        return row, pl.BlockSpec((1, 1, tile, shape[3]), lambda b, h, slots: (b, h, at(b, h, slots, tile), 0))
    tile = min(LANES, shape[3])
    row = pl.BlockSpec((1, 1, 1, shape[2]), lambda b, h, slots: (b, h, 0, 0))
    return row, pl.BlockSpec((1, 1, shape[2], tile), lambda b, h, slots: (b, h, 0, at(b, h, slots, tile)))


def _kernel(views, slots_ref, column_ref, *refs):
    b, h = pl.program_id(0), pl.program_id(1)
    slot = slots_ref[b * pl.num_programs(1) + h]
    count = len(views)
    for view, row, old, new in zip(views, refs, refs[count:], refs[2 * count :], strict=False):
        lead = (0,) * (len(old.shape) - 2)
        row, here = _ROW_AND_PLACE[view](row, old.shape, slot, h, column_ref)
        bits = jax.lax.bitcast_convert_type(old[lead], _bits_of(old.dtype))
        new[lead] = jax.lax.bitcast_convert_type(jnp.where(here, row.astype(bits.dtype), bits), new.dtype)


# Of each view: what to write, and where in the tile; both broadcast to the tile.


def _flat(row, tile, slot, h, column):
    _, together, width = tile
    start = pl.multiple_of(jax.lax.div(h, together) * together, together)
    slots = column[0, pl.ds(start, together), :]  # [together, 1]
    return row[0], _places(slot, width, tile[1:], 1) == slots


def _rows(row, tile, slot, h, column):
    return row[0, 0], _places(slot, tile[2], tile[2:], 0) == slot


def _heads(row, tile, slot, h, column):
    slots = jnp.broadcast_to(column[0, : tile[2], :], tile[2:])
    return row[0], slots == jnp.maximum(slot, 0)


def _lanes(row, tile, slot, h, column):
    return row[0, 0].T, _places(slot, tile[3], tile[2:], 1) == slot


_ROW_AND_PLACE = {"flat": _flat, "rows": _rows, "heads": _heads, "lanes": _lanes}


def _places(slot, width, shape, axis):
    """The slots of the tile that holds this one, along an axis of it."""
    return jax.lax.div(jnp.maximum(slot, 0), width) * width + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
