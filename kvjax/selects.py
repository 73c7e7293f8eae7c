"""Selections: which slots stay, given their scores.

What `policy.evict` takes as `select` is (score, pos, budget, most) -> kept bool[B, H, N]: `top_k`, or `above(0.5)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.cache import FREE
from kvjax.counts import real
from pallas_kernels import dispatch
from pallas_kernels.topk_slots import topk_slots


def ranked(score: jax.Array, pos: jax.Array) -> jax.Array:
    """All slots i32[B, H, N], the highest score first, ties by position: slot order says nothing about age."""
    slot = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2)
    return jax.lax.sort((0 - score, pos, slot), dimension=-1, num_keys=2)[2]  # 0 - x is never -0


def first(score: jax.Array, pos: jax.Array, count: jax.Array) -> jax.Array:
    """As `top_k`, for a number of slots i32[B, 1, 1] that is known only when it runs; it sorts in every step."""
    best_first = ranked(_worth(score, pos), pos)
    return (jnp.argsort(best_first, axis=-1) < count) & (pos != FREE)


def _worth(score, pos):
    """Scores that can be ordered; nan, where attention overflowed, is the least: a token is more than no token."""
    lowest = jnp.finfo(score.dtype).min
    return jnp.where(pos == FREE, -jnp.inf, jnp.where(score > lowest, score, lowest))


def above(threshold: float) -> Callable:
    """A selection: of the `top_k` slots, those with a score above `threshold`; the budget is a bound, and no aim.

    What is protected has the score +inf, and stays. Bytes are those of the budget; `kvjax.report` says what is used.
    """
    threshold = real("above", "threshold", threshold)

    def select(score, pos, budget, most=None):
        return top_k(score, pos, budget, most) & (score > threshold)

    return select


def top_k(score: jax.Array, pos: jax.Array, budget: int, most: int | None = None) -> jax.Array:
    """Keeps the `budget` best slots of each row and head, ties to the lower position; free slots never count.

    Args:
      score: f32[B, H, N], higher stays.
      pos: i32[B, H, N], -1 where free.
      budget: Slots to keep.
      most: How many slots above the budget may be occupied; None takes all that there are.

    Returns:
      bool[B, H, N], at most `budget` true in a row.
    """
    excess = pos.shape[-1] - budget if most is None else most
    if excess <= 0:
        return pos != FREE
    if excess > 1 and dispatch.preferred() != "reference":
        return topk_slots(score.astype(jnp.float32), pos, budget).kept
    score = _worth(score, pos)
    # XLA may compute a score twice, with another last bit: a slot that one pass found is told by its index after that.
    slot = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2)
    if excess == 1:  # a decode step: one pass instead of a sort
        worst = jnp.argmin(score, axis=-1, keepdims=True)
        tied = (slot == worst) | (score == jnp.take_along_axis(score, worst, axis=-1))
        last = jnp.where(tied, pos, FREE).max(axis=-1, keepdims=True)
        full = (pos != FREE).sum(axis=-1, keepdims=True) > budget
        return (pos != FREE) & ~(full & (pos == last))
    best_first = ranked(score, pos)
    row, head = jnp.arange(pos.shape[0])[:, None, None], jnp.arange(pos.shape[1])[None, :, None]
    best = jnp.zeros(pos.shape, bool).at[row, head, best_first[..., :budget]].set(True, unique_indices=True)
    return best & (pos != FREE)
