"""From logits to the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.counts import whole


class Draw(NamedTuple):
    """How tokens are drawn, as arrays, so that other values compile nothing anew; None where nothing is restricted."""

    temperature: jax.Array
    top_k: jax.Array | None
    top_p: jax.Array | None


def make_draw(temperature: float, top_k: int | None, top_p: float | None) -> Draw | None:
    """Checks the settings; None stands for greedy.

    Args:
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_k: Only the `top_k` likeliest tokens can be drawn; None allows all.
      top_p: Only the likeliest tokens that together reach this probability can be drawn; None allows all.

    Raises:
      ValueError: If a setting is out of its range, or has no effect.
    """
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is not None and (isinstance(value, str) or np.ndim(value)):
            raise ValueError(f"sampling: {name}={value!r} must be a number.")
    if not temperature >= 0:
        raise ValueError(f"sampling: temperature={temperature} must be 0 (greedy) or above.")
    if top_k is not None:
        top_k = whole("sampling", "top_k", top_k, least=1, mend="None allows every token.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sampling: top_p={top_p} must be above 0 and at most 1; None allows every token.")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise ValueError(
                "sampling: top_k and top_p have no effect at temperature=0; set a temperature, such as 0.8."
            )
        return None
    return Draw(
        jnp.float32(temperature),
        None if top_k is None else jnp.int32(min(top_k, 2**31 - 1)),
        None if top_p is None else jnp.float32(top_p),
    )


def sample(logits: jax.Array, draw: Draw | None, keys: jax.Array, position: jax.Array) -> jax.Array:
    """Draws one token a row.

    Args:
      logits: f32[B, V].
      draw: None takes the likeliest, ties to the lowest id.
      keys: One key a row, [B].
      position: i32[B], position of the token to be drawn. A row's draw depends on its key and position alone, so it
        is the same however many tokens one call generates, and whatever the other rows are.

    Returns:
      i32[B].
    """
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # the likeliest stays at 0, however low the temperature
    logits = logits / jnp.maximum(draw.temperature, jnp.finfo(jnp.float32).tiny)
    if draw.top_k is not None or draw.top_p is not None:
        logits = jnp.where(_allowed(logits, draw), logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _allowed(logits, draw):
    order = jnp.argsort(-logits, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    allowed = jnp.ones(logits.shape, bool)
    if draw.top_k is not None:
        allowed &= rank < draw.top_k
    if draw.top_p is not None:  # of what top_k left
        p = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
        p = jnp.take_along_axis(p, order, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        allowed &= jnp.take_along_axis(before < draw.top_p, rank, axis=-1)
    return allowed


def row_keys(key: jax.Array | int | None, rows: int) -> jax.Array:
    """One key a row. `key` is a seed, one key, or a key for each row; None is seed 0."""
    if key is None:
        key = 0
    if isinstance(key, int | np.integer):
        if not -(2**63) <= key < 2**63:
            raise ValueError(f"sampling: key={key} does not fit 64 bits; give a smaller seed.")
        key = jax.random.key(key)
    if not isinstance(key, jax.Array):
        raise ValueError(f"sampling: key={key!r} must be a seed, a jax.random key, or a key for each row.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # an old-style key: u32[2], or u32[rows, 2]
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"sampling: key has shape {key.shape}; give one key, or one for each of the {rows} rows.")
    return key
