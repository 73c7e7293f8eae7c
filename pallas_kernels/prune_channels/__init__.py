"""The channels of the keys that count most for a few queries, and the keys cut to them, as ThinK does."""

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sharding import by_row_and_head

__all__ = ["Pruned", "prune_channels"]

MOST_CHANNELS = 256  # D of the kernels


class Pruned(NamedTuple):
    """What `prune_channels` returns: `keys` [B, H, N, keep], and `index` i32[B, H, keep], ascending."""

    keys: jax.Array
    index: jax.Array


def prune_channels(
    k: jax.Array,
    q: jax.Array,
    keep: int,
    *,
    there: jax.Array | None = None,
    asked: jax.Array | None = None,
    implementation: str | None = None,
) -> Pruned:
    """Keeps the `keep` channels of each row and head with the largest score, ties to the lower channel.

    Channel j has the score (sum over queries of q_j squared) x (sum over slots of k_j squared), in f32; nan counts as
    the lowest. Keys are copied bit for bit, those of slots that are not `there` too.

    Args:
      k: [B, H, N, D], f32 or bf16.
      q: [B, H, G, T, D], the queries of the window.
      keep: Channels that stay, 1..D-1.
      there: bool[B, H, N], slots whose keys count for the score. None: all.
      asked: bool[B, T], queries that count. None: all.
      implementation: "tpu", "gpu" or "reference"; None takes what this machine has, or the reference where no kernel
        does: of D > 256, and other dtypes of k than f32 and bf16.

    Returns:
      `Pruned`: keys [B, H, N, keep] in k's dtype, and index i32[B, H, keep], the channels that stay, ascending.

    Raises:
      ValueError: If the shapes or dtypes do not fit together, or the implementation is not to be had.

    Source: Xu et al. 2024, arXiv:2407.21018.
    """
    _check(k, q, keep, there, asked)

    def unfit(name: str) -> str | None:
        if k.dtype not in (jnp.float32, jnp.bfloat16):
            return f"k is {k.dtype}, and kernels are for float32 and bfloat16"
        if k.shape[3] > MOST_CHANNELS:
            return f"k has {k.shape[3]} channels, and kernels take {MOST_CHANNELS} at most"
        return None

    name = dispatch.choose("prune_channels", implementation, unfit)
    backend = importlib.import_module(f"{__name__}.{name}")

    def part(k, q, there, asked):
        return backend.prune_channels(k, q, keep, there=there, asked=asked)

    return Pruned(*by_row_and_head(part, (k, q, there, asked), ("bh", "bh", "bh", "b"), ("bh",) * 2))


def _check(k, q, keep, there, asked):
    if k.ndim != 4 or not k.size:
        raise ValueError(f"prune_channels: k {k.shape} must be [B, H, N, D], none of them 0.")
    batch, heads, slots, width = k.shape
    if q.ndim != 5 or q.shape[:2] != (batch, heads) or q.shape[4] != width:
        raise ValueError(
            f"prune_channels: q {q.shape} must be [B, H, G, T, D] with the B, H and D of k {k.shape}, [B, H, N, D]."
        )
    for name, x in (("k", k), ("q", q)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"prune_channels: {name} is {x.dtype}; give a floating dtype.")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep < width:
        raise ValueError(f"prune_channels: keep={keep!r} must be an int in 1..{width - 1}, below the {width} of k.")
    for name, x, shape in (("there", there, (batch, heads, slots)), ("asked", asked, (batch, q.shape[3]))):
        if x is not None and (x.shape != shape or x.dtype != jnp.bool_):
            raise ValueError(f"prune_channels: {name} {x.dtype}{list(x.shape)} must be bool{list(shape)}.")
