"""The definition of `prune_channels`, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.prune_channels import Pruned


def asked_squares(q: jax.Array, asked: jax.Array | None) -> jax.Array:
    """Sums of squares of the queries that count, f32[B, H, D]."""
    q = q.astype(jnp.float32)
    if asked is not None:
        q = jnp.where(asked[:, None, None, :, None], q, 0.0)
    return (q * q).sum(axis=(2, 3))


def prune_channels(
    k: jax.Array, q: jax.Array, keep: int, *, there: jax.Array | None = None, asked: jax.Array | None = None
) -> Pruned:
    """As `pallas_kernels.prune_channels.prune_channels`."""
    counted = k.astype(jnp.float32)
    if there is not None:
        counted = jnp.where(there[..., None], counted, 0.0)
    score = asked_squares(q, asked) * (counted * counted).sum(axis=2)  # [B, H, D]
    best = jnp.argsort(-score, axis=-1)[..., :keep]  # stable; nan comes last
    index = jnp.sort(best, axis=-1).astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(k, f"uint{8 * k.dtype.itemsize}")  # a CPU may change a nan of bf16 in a copy
    keys = jnp.take_along_axis(bits, index[:, :, None], axis=-1)
    return Pruned(jax.lax.bitcast_convert_type(keys, k.dtype), index)
