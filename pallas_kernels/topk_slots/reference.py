"""The definition of `topk_slots`, in plain jnp, by a sort."""

import jax
import jax.numpy as jnp

from pallas_kernels.topk_slots import FREE, TopK


def worth(score: jax.Array, pos: jax.Array, protected: jax.Array | None) -> jax.Array:
    """Scores that can be ordered, f32[B, H, N]: -inf where free, and only there."""
    limits = jnp.finfo(jnp.float32)
    score = jnp.where(score > limits.min, score, limits.min)  # also of nan
    score = jnp.where(jnp.abs(score) < limits.tiny, 0.0, score)  # no -0, which a sort puts below 0
    if protected is not None:
        score = jnp.where(protected, jnp.inf, score)
    return jnp.where(pos == FREE, -jnp.inf, score)


def topk_slots(score: jax.Array, pos: jax.Array, k: int, *, protected: jax.Array | None = None) -> TopK:
    """As `pallas_kernels.topk_slots.topk_slots`."""
    slots = score.shape[2]
    slot = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2)
    lost = -worth(score, pos, protected)
    lost = jnp.where(lost == 0, 0.0, lost)
    lost, _, best = jax.lax.sort((lost, pos, slot), dimension=-1, num_keys=2)
    index = jnp.sort(jnp.where(lost[..., :k] == jnp.inf, slots, best[..., :k]), axis=-1)  # inf was a free slot
    row, head = jnp.arange(pos.shape[0])[:, None, None], jnp.arange(pos.shape[1])[None, :, None]
    kept = jnp.zeros(pos.shape, bool).at[row, head, index].set(True, mode="drop")
    return TopK(kept, index)
