"""The definition of `slot_attention`, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.slot_attention import FREE, SlotAttention
from pallas_kernels.slot_attention.packed import Packed


def slot_attention(q, k, v, q_pos, k_pos, bias=None, *, scale=1.0, sliding_window=None, stat=None) -> SlotAttention:
    """See `pallas_kernels.slot_attention`."""
    exactly = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    k, v = (x.load() if isinstance(x, Packed) else x.astype(jnp.float32) for x in (k, v))
    at, pos = q_pos[:, :, None, :, None], k_pos[:, :, None, None, :]  # against [B, H, G, T, N]

    logits = scale * jnp.einsum("bhgtd,bhnd->bhgtn", q.astype(jnp.float32), k, **exactly)
    if bias is not None:
        logits = logits + jnp.where(at == pos, 0.0, bias[:, :, None, None, :])
    visible = (pos != FREE) & (pos <= at)
    if sliding_window is not None:
        visible &= at - pos < sliding_window
    logits = jnp.where(visible, logits, -jnp.inf)

    top = logits.max(axis=-1, keepdims=True)
    some = top > -jnp.inf  # a query that sees nothing must not become nan
    p = jnp.exp(logits - jnp.where(some, top, 0.0))
    total = jnp.where(some, p.sum(axis=-1, keepdims=True), 1.0)
    p = p / total
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum("bhgtn,bhnd->bhgtd", p, v, **exactly).astype(q.dtype)
    return SlotAttention(out, lse, {None: None, "mass": p.sum(axis=(2, 3)), "logits": logits}[stat])
