"""The definition of `fold_slots`."""

import jax
import jax.numpy as jnp


def fold_slots(
    k: jax.Array, v: jax.Array, target: jax.Array, weight: jax.Array, slots: int, *, value_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.fold_slots`."""
    batch, heads, _ = target.shape
    joins = (target >= 0) & (target < slots)
    target = jnp.where(joins, target, slots)  # out of range is dropped; a negative one would wrap
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]

    def fold(x, w):
        rows = jnp.where(joins[..., None], x.astype(jnp.float32) * w[..., None], 0)
        out = jnp.zeros((batch, heads, slots, x.shape[-1]), jnp.float32)
        return out.at[b, h, target].add(rows, mode="drop").astype(x.dtype)

    return fold(k, weight), fold(v, value_weight)
