"""The definition of `slot_write`."""

import jax
import jax.numpy as jnp


def slot_write(buffers: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], slot: jax.Array) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.slot_write`; rows already have the dtypes of their buffers."""
    count = buffers[0].shape[2]
    slot = jnp.where((slot >= 0) & (slot < count), slot, count)  # out of range is dropped; a negative one would wrap
    b, h = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])[None, :]
    return tuple(
        buffer.at[b, h, slot].set(row, mode="drop", unique_indices=True)
        for buffer, row in zip(buffers, rows, strict=True)
    )
