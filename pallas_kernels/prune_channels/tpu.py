"""Pallas for TPU: a head's keys are squared and summed, ranked, and cut, in VMEM if they fit, else in two readings."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.prune_channels import Pruned
from pallas_kernels.prune_channels.reference import asked_squares

LANES = 128
SUBLANES = 16  # of a tile of bf16
MOST_AT_ONCE = 512  # slots the squares or the copy take at a time
MOST_BYTES = 4 * 2**20  # of a block of keys


def prune_channels(
    k: jax.Array,
    q: jax.Array,
    keep: int,
    *,
    there: jax.Array | None = None,
    asked: jax.Array | None = None,
    interpret: bool = False,
) -> Pruned:
    """As `pallas_kernels.prune_channels.prune_channels`."""
    batch, heads, slots, channels = k.shape
    rows = batch * heads
    step, block = config(slots, channels, k.dtype.itemsize)
    padded = pl.cdiv(slots, block) * block
    there = jnp.ones((batch, heads, slots), bool) if there is None else there
    there = jnp.pad(there.reshape(rows, slots), ((0, 0), (0, padded - slots)))
    there = there.reshape(rows, padded // step, 1, step).astype(jnp.float32)
    k = jnp.pad(k.reshape(rows, slots, channels), ((0, 0), (0, padded - slots), (0, 0)))
    asked = asked_squares(q, asked).reshape(rows, 1, channels)

    grid = (rows, 2, padded // block)  # first the sums, then the copy
    in_specs = [
        pl.BlockSpec((1, block, channels), lambda row, phase, i: (row, i, 0)),
        pl.BlockSpec((1, block // step, 1, step), lambda row, phase, i: (row, i, 0, 0)),
        pl.BlockSpec((1, 1, channels), lambda row, phase, i: (row, 0, 0)),
    ]
    out_specs = (
        pl.BlockSpec((1, keep, block), lambda row, phase, i: (row, 0, phase * i)),  # stays at 0 until the copy
        pl.BlockSpec((1, 1, keep), lambda row, phase, i: (row, 0, 0)),
    )
    keys, index = pl.pallas_call(
        functools.partial(_kernel, step=step),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=(
            jax.ShapeDtypeStruct((rows, keep, padded), k.dtype),
            jax.ShapeDtypeStruct((rows, 1, keep), jnp.int32),
        ),
        scratch_shapes=[
            pltpu.VMEM((1, channels), jnp.float32),
            pltpu.VMEM((channels, _columns(keep, k.dtype.itemsize)), jnp.bfloat16),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=40 * 2**20
        ),
        interpret=interpret,
        name="prune_channels",
    )(k, there, asked)
    # Slots on lanes: with fewer than 128 channels there, rows would be filled up to 128 in HBM, and nothing be saved.
    keys = keys[:, :, :slots].reshape(batch, heads, keep, slots).swapaxes(2, 3)
    return Pruned(keys, index.reshape(batch, heads, keep))


def config(slots: int, channels: int, itemsize: int) -> tuple[int, int]:
    """(slots at a time, slots of a block): all slots are one block if their keys fit."""
    if slots <= LANES:
        step = pl.cdiv(slots, SUBLANES) * SUBLANES
    else:
        filled = pl.cdiv(slots, LANES) * LANES
        step = next(n for n in (MOST_AT_ONCE, 256, LANES) if filled % n == 0)
    steps = MOST_BYTES // (pl.cdiv(channels, LANES) * LANES * itemsize * step)
    return step, min(pl.cdiv(slots, step), steps) * step


def _columns(keep, itemsize):
    """Columns of `chosen`: a place each, or for bf16 the even places, filled up to whole tiles, and the odd ones."""
    return keep if itemsize == 4 else 2 * pl.cdiv(keep, 2 * 8) * 8


def _kernel(k, there, asked, keys, index, sums, chosen, *, step):
    """One block of a head, in one of the two phases."""
    phase, i = pl.program_id(1), pl.program_id(2)
    steps, keep = k.shape[1] // step, keys.shape[1]

    @pl.when((phase == 0) & (i == 0))
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(phase == 0)
    def _():
        def add(j, total):
            x = k[0, pl.ds(pl.multiple_of(j * step, step), step)].astype(jnp.float32)
            counts = jnp.broadcast_to(there[0, j], (8, step)).T[:, :1]  # [step, 1]
            x = jnp.where(counts > 0, x, 0.0)
            return total + jnp.sum(x * x, axis=0, keepdims=True)

        sums[...] += jax.lax.fori_loop(0, steps, add, jnp.zeros_like(sums))

    @pl.when((phase == 1) & (i == 0))
    def _():
        stays, before = _ranked(sums[...] * asked[0], keep)
        row, place = (jax.lax.broadcasted_iota(jnp.int32, (k.shape[2], keep), axis) for axis in (0, 1))
        index[0] = jnp.sum(jnp.where(stays & (before == place), row, 0), axis=0, keepdims=True)
        place = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 1)
        if k.dtype.itemsize == 2:
            half = chosen.shape[1] // 2
            place = jnp.where(place < half, 2 * place, 2 * (place - half) + 1)
        chosen[...] = (stays & (before == place)).astype(jnp.float32).astype(jnp.bfloat16)

    @pl.when(phase == 1)
    def _():
        def copy(j, _):
            at = pl.ds(pl.multiple_of(j * step, step), step)
            bits = jax.lax.bitcast_convert_type(k[0, at], {2: jnp.uint16, 4: jnp.int32}[k.dtype.itemsize])
            keys[0, :, at] = jax.lax.bitcast_convert_type(narrow(bits, chosen[...])[:keep], k.dtype)
            return _

        jax.lax.fori_loop(0, steps, copy, None)


def _ranked(score, keep):
    """(which channels stay, how many stay before each), [D, 1]; `score` is f32[1, D]. Each is compared with all."""
    channels = score.shape[1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (channels, channels), axis) for axis in (0, 1))
    across = jnp.where(score >= 0, score, -1.0)  # nan, below all others
    down = jnp.sum(jnp.where(row == column, across, 0.0), axis=1, keepdims=True)  # the same, f32[D, 1]
    beaten = (across > down) | ((across == down) & (column < row))  # the channel of the row, by that of the column
    beats = (down > across) | ((down == across) & (row < column))
    stays_down = jnp.sum(beaten.astype(jnp.int32), axis=1, keepdims=True) < keep
    stays_across = jnp.sum(beats.astype(jnp.int32), axis=0, keepdims=True) < keep
    return stays_down, jnp.sum((stays_across & (column < row)).astype(jnp.int32), axis=1, keepdims=True)


def narrow(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """The chosen channels of x, bit for bit: by bytes, so that no nan or inf meets a 0.

    A byte is a whole number that bf16 holds, and each is multiplied by one 1, and by 0 else: the products are exact.

    Args:
      x: u16 or i32[n, D], the bits of keys.
      chosen: bf16[D, places], 1 where a channel comes to a place; places in the order of `_columns`.

    Returns:
      [places, n] in x's dtype, in the order of the channels.
    """
    bits, size = x.astype(jnp.int32), x.dtype.itemsize
    words = 0
    for byte in range(size):
        part = ((bits >> (8 * byte)) & 0xFF).astype(jnp.float32).astype(jnp.bfloat16)
        part = jax.lax.dot_general(chosen, part, (((0,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        words = words | (part.astype(jnp.int32) << (8 * byte))
    if size == 2:
        half = words.shape[0] // 2
        words = words[:half] | (words[half:] << 16)
    return pltpu.bitcast(words, x.dtype)  # a word of two bf16 becomes two rows
