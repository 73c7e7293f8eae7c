"""The k best slots of each row and head, and where they lie: selection without a sort."""

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sharding import by_row_and_head

__all__ = ["TopK", "topk_slots"]

FREE = -1  # position of a free slot
MOST_SLOTS = {"tpu": 2**18, "gpu": 2**28}  # a row stays in VMEM; a GPU has at most 65535 splits a row


class TopK(NamedTuple):
    """What `topk_slots` returns: `kept` bool[B, H, N], and `index` i32[B, H, k], ascending, then N."""

    kept: jax.Array
    index: jax.Array


def topk_slots(
    score: jax.Array,
    pos: jax.Array,
    k: int,
    *,
    protected: jax.Array | None = None,
    implementation: str | None = None,
) -> TopK:
    """Keeps the `k` best slots of each row and head, ties to the lower position; free slots never count.

    +inf is the best score. nan, -inf and all that is below the lowest finite f32 count as that: the token in a slot is
    more than no token. Scores that are smaller than the least normal f32 count as 0, so that all devices agree.

    Args:
      score: f32[B, H, N], higher stays.
      pos: i32[B, H, N], position of each slot's token, -1 where free; distinct where not free.
      k: Slots to keep, 1..N. Where fewer are occupied, all of them stay.
      protected: bool[B, H, N], slots that rank above all others, as if their score were +inf. None protects none.
      implementation: "tpu", "gpu" or "reference"; None takes what this machine has, or the reference where no kernel
        does: on TPU above 2^18 slots, on GPU above 2^28.

    Returns:
      `TopK`: kept bool[B, H, N], at most k true in a row; index i32[B, H, k], the numbers of the slots that were kept,
      ascending, and N in the places beyond them.

    Raises:
      ValueError: If the shapes or dtypes do not fit together, or the implementation is not to be had.
    """
    _check(score, pos, k, protected)

    def unfit(name: str) -> str | None:
        if score.shape[2] > MOST_SLOTS[name]:
            return f"score has {score.shape[2]} slots, and the kernel takes {MOST_SLOTS[name]} at most"
        return None

    name = dispatch.choose("topk_slots", implementation, unfit)
    backend = importlib.import_module(f"{__name__}.{name}")

    def part(score, pos, protected):
        return backend.topk_slots(score, pos, k, protected=protected)

    return TopK(*by_row_and_head(part, (score, pos, protected), ("bh",) * 3, ("bh",) * 2))


def _check(score, pos, k, protected):
    if score.ndim != 3 or not score.size:
        raise ValueError(f"topk_slots: score {score.shape} must be [B, H, N], none of them 0.")
    if score.dtype != jnp.float32:
        raise ValueError(f"topk_slots: score is {score.dtype}, and must be float32; cast it.")
    if pos.shape != score.shape:
        raise ValueError(f"topk_slots: pos {pos.shape} must be [B, H, N] as score, {score.shape}.")
    if pos.dtype != jnp.int32:
        raise ValueError(f"topk_slots: pos is {pos.dtype}, and must be int32; -1 marks free slots.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= score.shape[2]:
        raise ValueError(f"topk_slots: k={k!r} must be an int in 1..{score.shape[2]}, the slots there are.")
    if protected is not None and (protected.shape != score.shape or protected.dtype != jnp.bool_):
        raise ValueError(
            f"topk_slots: protected {protected.dtype}{list(protected.shape)} must be bool{list(score.shape)}, as score."
        )
