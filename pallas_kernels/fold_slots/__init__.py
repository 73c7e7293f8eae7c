"""Folding slots into fewer: each output slot is a weighted sum of the slots that join it."""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sharding import by_row_and_head

DTYPES = ("float32", "bfloat16")  # that kernels exist for
WIDEST = 256  # head_dim that kernels have a configuration for


def fold_slots(
    k: jax.Array,
    v: jax.Array,
    target: jax.Array,
    weight: jax.Array,
    slots: int,
    *,
    value_weight: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Slot n joins output slot target[n]: k'[c] is the sum of weight[n] * k[n] over the n that join c.

    A slot alone in its target, with weight 1, comes out bit for bit (but -0 may become 0). What a dropped slot holds,
    nan or inf, does not matter, and a nan reaches no target but its own. A weight of 0 does not drop: 0 * nan is nan.

    Args:
      k: [B, H, N, Dk], f32 or bf16.
      v: [B, H, N, Dv], f32 or bf16.
      target: i32[B, H, N], the output slot that each slot joins; one outside 0..slots-1 drops it.
      weight: f32[B, H, N], what a key counts for.
      slots: C, output slots. One that nothing joins is 0.
      value_weight: f32[B, H, N], what a value counts for; None takes `weight`.
      implementation: "tpu", "gpu", "reference", or None for what this machine has.

    Returns:
      (k [B, H, C, Dk], v [B, H, C, Dv]), summed in f32 and cast once.

    Raises:
      ValueError: If shapes disagree, targets are not integers, slots is not positive, or the implementation cannot do
        this call or run here.
    """
    _check(k, v, target, weight, slots, value_weight)

    def unfit(_):
        for letter, x in (("k", k), ("v", v)):
            if str(x.dtype) not in DTYPES:
                return f"there is no kernel for {letter} in {x.dtype}, only for {' and '.join(DTYPES)}"
            if not 0 < x.shape[-1] <= WIDEST:
                return f"{letter} has head_dim {x.shape[-1]}, and kernels go from 1 to {WIDEST}"
        return "there are no slots to fold" if 0 in target.shape else None

    name = dispatch.choose("fold_slots", implementation, unfit)
    weight = weight.astype(jnp.float32)
    value_weight = weight if value_weight is None else value_weight.astype(jnp.float32)
    backend = importlib.import_module(f"{__name__}.{name}")

    def part(k, v, target, weight, value_weight):
        return backend.fold_slots(k, v, target, weight, slots, value_weight=value_weight)

    return by_row_and_head(part, (k, v, target.astype(jnp.int32), weight, value_weight), ("bh",) * 5, ("bh",) * 2)


def _check(k, v, target, weight, slots, value_weight):
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"fold_slots: k is {list(k.shape)} and v {list(v.shape)}; they must be [B, H, N, Dk] and [B, H, N, Dv], "
            f"alike in B, H and N. Give a single row its axis with k[None]."
        )
    if not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(
            f"fold_slots: target is {target.dtype}; it must be i32, the output slot that each slot joins. A mask of "
            f"kept slots is no target: its cumsum - 1 is."
        )
    for name, x in (("target", target), ("weight", weight), ("value_weight", value_weight)):
        if x is not None and x.shape != k.shape[:3]:
            raise ValueError(
                f"fold_slots: {name} is {list(x.shape)}; it must be {list(k.shape[:3])}, one for each row, head and "
                f"slot of k. Broadcast it if heads are alike."
            )
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(f"fold_slots: slots={slots!r} must be a positive int, known when the program is traced.")
