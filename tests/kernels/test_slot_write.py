import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pallas_kernels.slot_write import gpu, reference, slot_write, tpu

KERNELS = {
    "reference": reference.slot_write,
    "tpu": lambda *args: tpu.slot_write(*args, interpret=True),
    "gpu": gpu.slot_write,
}

# batch, heads, slots, (dtype, width) of each buffer. Of the views of the TPU kernel, each meets tails: slots that are
# no multiple of 8, 16 or 128, heads that are no multiple of 8, fewer slots than a tile.
SHAPES = {
    "llama": (2, 8, 17, [("bfloat16", 128), ("bfloat16", 128), ("int32", None), ("float32", None)]),
    "llama_whole_tiles": (1, 2, 48, [("bfloat16", 128), ("float32", 128)]),
    "half_a_tile_left": (2, 2, 24, [("bfloat16", 128)]),
    "smollm2": (2, 3, 130, [("float32", 64), ("float32", 64), ("int32", None)]),
    "codes": (1, 2, 257, [("uint32", 16), ("float16", 4), ("float16", None), ("uint32", None), ("int32", 2)]),
    "many_heads": (2, 20, 150, [("float32", None), ("bfloat16", None)]),
    "odd_widths": (1, 3, 140, [("bfloat16", 80), ("bfloat16", 96), ("float32", 1)]),
    "wide": (1, 4, 9, [("bfloat16", 256), ("float32", 256)]),
    "one_slot": (2, 1, 1, [("bfloat16", 128), ("float32", 3), ("int32", None)]),
    "two_slots": (1, 2, 2, [("bfloat16", 64), ("float32", None)]),
}


def random_bits(rng, shape, dtype):
    """Any bits, inf, -0 and subnormals among them, but one kind of nan: XLA on a CPU makes those of 2 bytes alike."""
    dtype = jnp.dtype(dtype)
    x = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    with np.errstate(invalid="ignore"):  # signalling nans signal
        return jnp.asarray(np.where(np.isnan(x), dtype.type(np.nan), x) if jnp.issubdtype(dtype, jnp.floating) else x)


def bits(x):
    x = np.asarray(x)
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def make(name, slot=None, seed=0):
    batch, heads, slots, kinds = SHAPES[name]
    rng = np.random.default_rng(seed)
    trailing = [() if width is None else (width,) for _, width in kinds]
    buffers = [random_bits(rng, (batch, heads, slots, *t), d) for (d, _), t in zip(kinds, trailing, strict=True)]
    rows = [random_bits(rng, (batch, heads, *t), d) for (d, _), t in zip(kinds, trailing, strict=True)]
    slot = rng.integers(0, slots, (batch, heads)) if slot is None else np.full((batch, heads), slot)
    return tuple(buffers), tuple(rows), jnp.asarray(slot, jnp.int32)


def loop(buffers, rows, slot):
    """One row and head at a time, in bits."""
    out = [bits(x).copy() for x in buffers]
    for buffer, row in zip(out, map(bits, rows), strict=True):
        for b, h in np.ndindex(*slot.shape):
            if 0 <= slot[b, h] < buffer.shape[2]:
                buffer[b, h, slot[b, h]] = row[b, h]
    return out


def assert_writes_as_the_loop(kernel, args):
    for got, want, buffer in zip(KERNELS[kernel](*args), loop(*args), args[0], strict=True):
        assert got.dtype == buffer.dtype
        assert_array_equal(bits(got), want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_worked_case(kernel):
    # Row 0 puts 9 into slot 2, row 1 has nowhere to put its 8.
    buffer = jnp.asarray([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    (out,) = KERNELS[kernel]((buffer,), (jnp.asarray([[9.0], [8.0]]),), jnp.asarray([[2], [3]], jnp.int32))
    assert_array_equal(out, [[[1, 2, 9]], [[4, 5, 6]]])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SHAPES)
def test_only_the_named_slots_change_bit_for_bit(kernel, name):
    assert_writes_as_the_loop(kernel, make(name))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "llama_whole_tiles", "smollm2", "many_heads", "wide"])
def test_the_first_and_the_last_slot_can_be_written(kernel, name):
    for slot in (0, SHAPES[name][2] - 1):
        assert_writes_as_the_loop(kernel, make(name, slot))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "half_a_tile_left", "codes", "many_heads"])
def test_a_slot_out_of_range_changes_nothing(kernel, name):
    for outside in (-1, SHAPES[name][2], 2**31 - 1, -(2**31)):
        assert_writes_as_the_loop(kernel, make(name, outside))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "many_heads"])
def test_heads_without_a_slot_do_not_disturb_their_neighbours(kernel, name):
    buffers, rows, slot = make(name)
    dropped = jnp.arange(slot.size).reshape(slot.shape) % 3 == 1
    assert_writes_as_the_loop(kernel, (buffers, rows, jnp.where(dropped, -1, jnp.where(slot < 9, 0, slot))))


def test_steps_that_share_a_tile_agree_on_what_it_ends_as():
    # On a TPU the tile of a step may have been read before its neighbours wrote it. The last step alone, on buffers as
    # they were, has to leave the tiles that it visits as all steps together do.
    buffers, rows, slot = make("llama", 5)
    whole = tpu.slot_write(buffers, rows, slot, interpret=True)
    for view, refs in (("heads", 0), ("flat", 2)):
        got = one_step(view, buffers[refs], rows[refs], slot, head=7)
        assert_array_equal(bits(got), bits(whole[refs][0]).reshape(got.shape))


def one_step(view, buffer, row, slot, head):
    """What the step of one head leaves of batch row 0, all of whose heads have their slot in one tile."""
    column = slot[..., None]
    if view == "flat":
        tile = (1, *buffer.shape[1:])
        new, here = tpu._flat(row[:1, :, None], tile, slot[0, head], 0, column)
        return jnp.where(here, new, buffer[0])
    tile = (1, 1, buffer.shape[1], buffer.shape[3])
    new, here = tpu._heads(row[:1], tile, slot[0, head], head, column)
    at = int(slot[0, head])
    return buffer[0].at[:, at].set(jnp.where(here, new, buffer[0, :, at]))


def test_rows_are_cast_to_the_dtype_of_their_buffer():
    buffer = jnp.zeros((1, 1, 2, 2), jnp.bfloat16)
    (out,) = slot_write((buffer,), (jnp.asarray([[[1.00390625, 2.0]]], jnp.float32),), jnp.asarray([[1]]))
    assert out.dtype == jnp.bfloat16
    assert_array_equal(out[0, 0].astype(jnp.float32), [[0, 0], [1, 2]])  # bf16 has 8 bits: 1 + 1/256 is a tie to even


def test_a_donated_buffer_is_written_in_place():
    buffers, rows, slot = make("smollm2")
    write = jax.jit(slot_write, donate_argnums=0)
    memory = write.lower(buffers, rows, slot).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in buffers)


def test_a_dtype_without_a_kernel_takes_the_reference():
    buffer = jnp.zeros((1, 1, 3), jnp.int8)
    (out,) = slot_write((buffer,), (jnp.ones((1, 1), jnp.int8),), jnp.asarray([[1]]))
    assert_array_equal(out, [[[0, 1, 0]]])
    with pytest.raises(ValueError, match="no kernel for int8"):
        slot_write((buffer,), (jnp.ones((1, 1), jnp.int8),), jnp.asarray([[1]]), implementation="gpu")


X, R, S = jnp.zeros((2, 3, 5, 4)), jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    "buffers, rows, slot, message",
    [
        ((X,), (), S, "1 buffers and 0 rows"),
        ((), (), S, "at least one buffer"),
        ((X,), (R,), jnp.zeros((2, 3)), "slot is float32"),
        ((X,), (R,), jnp.zeros((2,), jnp.int32), r"i32\[B, H\]"),
        ((X,), (R,), jnp.zeros((3, 2), jnp.int32), "buffer 0 is"),
        ((X, X[:, :, :4]), (R, R), S, "N alike in all buffers"),
        ((X[..., None],), (R[..., None],), S, "Fold further axes"),
        ((X,), (R[..., :3],), S, r"rows 0 is \[2, 3, 3\]"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(buffers, rows, slot, message):
    with pytest.raises(ValueError, match=message):
        slot_write(buffers, rows, slot)


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_kernel_asked_for_by_name_cannot_run_on_a_cpu(name):
    with pytest.raises(ValueError, match="cannot run here"):
        slot_write((X,), (R,), S, implementation=name)
