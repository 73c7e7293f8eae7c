"""Selections: which slots stay, given their scores. Each is (score, pos, budget) -> kept bool[B, H, N]."""

import jax
import jax.numpy as jnp

from kvjax.cache import FREE


def top_k(score: jax.Array, pos: jax.Array, budget: int) -> jax.Array:
    """Keeps the `budget` best slots of each row and head, ties to the lower position; free slots never count.

    Args:
      score: f32[B, H, N], higher stays.
      pos: i32[B, H, N], -1 where free.
      budget: Slots to keep.

    Returns:
      bool[B, H, N], at most `budget` true in a row.
    """
    lowest = jnp.finfo(score.dtype).min  # for nan too, where attention overflowed: a token is worth more than no token
    score = jnp.where(pos == FREE, -jnp.inf, jnp.where(score > lowest, score, lowest))
    excess = pos.shape[-1] - budget
    if excess <= 0:
        return pos != FREE
    if excess == 1:  # a decode step: one pass instead of a sort
        worst = score.min(axis=-1, keepdims=True)
        last = jnp.where(score == worst, pos, FREE).max(axis=-1, keepdims=True)
        full = (pos != FREE).all(axis=-1, keepdims=True)
        return (pos != FREE) & ~(full & (pos == last))
    # Slot order says nothing about age, so ties are broken by sorting the pair (score, pos).
    best_first, their_pos = jax.lax.sort((-score, pos), dimension=-1, num_keys=2)
    edge, edge_pos = -best_first[..., budget - 1 : budget], their_pos[..., budget - 1 : budget]
    return (pos != FREE) & ((score > edge) | ((score == edge) & (pos <= edge_pos)))
