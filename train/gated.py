"""Attention with a gate inside its softmax, and the gradient of the gate, a block of queries at a time."""

import functools

import jax
import jax.numpy as jnp

BLOCK_LOGITS = 2**18  # queries times keys, for each query head


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def gated_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, flags: jax.Array, free: jax.Array, clamp: float | None
) -> jax.Array:
    """Causal attention in which key j weighs flags_j for all later queries, and 1 for its own.

        out_i = sum_j w_ij exp(q_i k_j) v_j / sum_j w_ij exp(q_i k_j),  w_ij = 1 if i = j or j is not free, else flags_j

    The gradient of a flag is what the key is worth, also where the flag is 0 and it took no part:
    sum_i exp(q_i k_j - lse_i) g_i (v_j - out_i) over later queries i, with g the gradient of the output. Those of q, k
    and v flow through visible keys alone.

    Args:
      q: [B, H, G, T, D], rotated and scaled.
      k: [B, H, T, D], rotated.
      v: [B, H, T, D].
      flags: f32[B, H, T], 0 or 1.
      free: bool[B, T], keys whose flag counts; the others are seen by all.
      clamp: Largest weight exp(q_i k_j - lse_i) of a key that takes no part; without a bound (None) the gradient is
        exact, and may overflow.

    Returns:
      [B, H, G, T, D].
    """
    return _forward(q, k, v, flags, free, clamp)[0]


def _size(count):
    return max(1, min(count, BLOCK_LOGITS // count))


def _blocks(x, axis, size):
    """x cut along `axis` into blocks, which come first; padded with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _whole(blocks, axis, count):
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, count, axis=axis)


def _seen(shown, first, size):
    """Which keys each query of a block sees, bool[B, H, 1, t, N], and which are not later than it, bool[t, N]."""
    key, query = jnp.arange(shown.shape[-1]), first + jnp.arange(size)[:, None]
    return ((key < query) & shown[:, :, None, None]) | (key == query), key <= query


def _logits(q, k):
    return jnp.einsum("bhgtd,bhnd->bhgtn", q, k, preferred_element_type=jnp.float32)


def _forward(q, k, v, flags, free, clamp):
    count, size = q.shape[3], _size(q.shape[3])
    shown = (flags > 0) | ~free[:, None]

    def block(args):
        first, q = args
        visible, _ = _seen(shown, first, size)
        logits = jnp.where(visible, _logits(q, k), -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)  # nan for no query: each sees itself, but for padding behind the last
        p = jnp.where(visible, jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
        return jnp.einsum("bhgtn,bhnd->bhgtd", p.astype(v.dtype), v), lse

    firsts = jnp.arange(0, count, size)
    out, lse = jax.lax.map(block, (firsts, _blocks(q, 3, size)))
    out, lse = _whole(out, 3, count), _whole(lse, 3, count)
    return out, (q, k, v, shown, free, out, lse)


def _backward(clamp, saved, gradient):
    q, k, v, shown, free, out, lse = saved
    count, size = q.shape[3], _size(q.shape[3])
    top = jnp.inf if clamp is None else jnp.log(clamp)

    def block(sums, args):
        first, q, g, out, lse = args
        visible, causal = _seen(shown, first, size)
        over = _logits(q, k) - lse[..., None]
        weight = jnp.where(causal, jnp.exp(jnp.where(visible, over, jnp.minimum(over, top))), 0.0)
        p = jnp.where(visible, weight, 0.0)
        g = g.astype(jnp.float32)
        gain = jnp.einsum("bhgtd,bhnd->bhgtn", g, v.astype(jnp.float32))
        gain -= jnp.sum(g * out.astype(jnp.float32), axis=-1, keepdims=True)
        of_logits = p * gain
        dk, dv, dflags = sums
        dk += jnp.einsum("bhgtn,bhgtd->bhnd", of_logits, q.astype(jnp.float32))
        dv += jnp.einsum("bhgtn,bhgtd->bhnd", p, g)
        later = jnp.arange(count) < first + jnp.arange(size)[:, None]
        dflags += jnp.where(later, weight * gain, 0.0).sum(axis=(2, 3))
        return (dk, dv, dflags), jnp.einsum("bhgtn,bhnd->bhgtd", of_logits, k.astype(jnp.float32))

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32), jnp.zeros(shown.shape, jnp.float32)
    firsts = jnp.arange(0, count, size)
    (dk, dv, dflags), dq = jax.lax.scan(block, zeros, (firsts, *(_blocks(x, 3, size) for x in (q, gradient, out, lse))))
    dflags = jnp.where(free[:, None], dflags, 0.0)
    return _whole(dq, 3, count).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dflags, None


gated_attention.defvjp(_forward, _backward)
