"""Which blocks of slots a block of queries has to visit, in plain jnp; both kernels follow it."""

import jax
import jax.numpy as jnp

NEVER = 2**31 - 1  # a position that no query reaches


def meetings(
    q_pos: jax.Array, k_pos: jax.Array, rows: int, slots: int, sliding_window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Whether any query of a block sees any slot of a block, and whether every query sees every slot.

    Args:
      q_pos: i32[B, H, a multiple of rows], -1 for padding.
      k_pos: i32[B, H, a multiple of slots], -1 for free slots.
      rows: Queries of a block.
      slots: Slots of a block.
      sliding_window: As in the public function.

    Returns:
      some, every: bool[B, H, blocks of queries, blocks of slots]. `some` may be true where no query sees a slot; where
      `every` is true, no slot has a query's own position.
    """
    q_pos = q_pos.reshape(*q_pos.shape[:2], -1, rows)
    k_pos = k_pos.reshape(*k_pos.shape[:2], -1, slots)
    q_least, q_most = q_pos.min(axis=3)[..., :, None], q_pos.max(axis=3)[..., :, None]
    k_least, k_most = k_pos.min(axis=3)[..., None, :], k_pos.max(axis=3)[..., None, :]
    q_first = jnp.where(q_pos < 0, NEVER, q_pos).min(axis=3)[..., :, None]
    k_first = jnp.where(k_pos < 0, NEVER, k_pos).min(axis=3)[..., None, :]
    some = k_first <= q_most
    every = (k_least >= 0) & (k_most < q_least)
    if sliding_window is not None:
        some &= q_first - k_most < sliding_window
        every &= q_most - k_least < sliding_window
    return some, every


def spans(some: jax.Array, every: jax.Array) -> jax.Array:
    """Blocks to visit along the last axis, i32[..., 4]: first, open, shut, stop.

    All that `some` marks lies in first..stop - 1, and open..shut - 1 is a run inside it that needs no mask:

        some   0 1 1 1 0 1 1 0
        every  0 0 1 1 0 0 0 0     first 1, open 2, shut 4, stop 7
    """
    count = some.shape[-1]
    at = jnp.arange(count)
    stop = jnp.where(some, at + 1, 0).max(axis=-1)
    first = jnp.minimum(jnp.where(some, at, count).min(axis=-1), stop)
    every = every & (at >= first[..., None])
    open_ = jnp.minimum(jnp.where(every, at, count).min(axis=-1), stop)
    shut = jnp.where(~every & (at >= open_[..., None]), at, count).min(axis=-1)
    return jnp.stack([first, open_, jnp.minimum(shut, stop), stop], axis=-1).astype(jnp.int32)


def padded(x: jax.Array, axis: int, multiple: int, fill: float = 0) -> jax.Array:
    """`x` with `fill` behind its last along an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=fill)
