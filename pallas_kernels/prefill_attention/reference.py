"""What the kernels compute, with the whole [T, N] matrix of every head in memory."""

import jax
import jax.numpy as jnp

from pallas_kernels.prefill_attention import PrefillAttention


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    weights: jax.Array | None = None,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    sliding_window: int | None = None,
) -> PrefillAttention:
    """Softmax attention over visible slots; see the package."""

    def product(spec, x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision="highest")

    at, slot_at = q_pos[:, :, None, :, None], k_pos[:, :, None, None, :]
    logits = scale * product("bhgtd,bhnd->bhgtn", q, k)
    if bias is not None:
        logits = logits + jnp.where(at == slot_at, 0.0, bias[:, :, None, None, :])
    visible = (slot_at >= 0) & (slot_at <= at)
    if sliding_window is not None:
        visible &= at - slot_at < sliding_window
    logits = jnp.where(visible, logits, -jnp.inf)

    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])  # all 0 where nothing is visible
    out = product("bhgtn,bhnd->bhgtd", p.astype(v.dtype), v).astype(q.dtype)
    mass = None if weights is None else product("mbt,bhgtn->mbhn", weights, p)
    return PrefillAttention(out, lse, mass)
