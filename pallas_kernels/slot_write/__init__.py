"""Writing one token of each row and head into its slot, in place."""

import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sharding import by_row_and_head

DTYPES = ("float32", "bfloat16", "float16", "uint32", "int32")  # that kernels exist for


def slot_write(
    buffers: Sequence[jax.Array], rows: Sequence[jax.Array], slot: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """Puts one row into slot `slot[b, h]` of every buffer, and touches nothing else.

    Args:
      buffers: [B, H, N] or [B, H, N, D] each, D and dtype as each likes. One that is donated is written in place.
      rows: [B, H] or [B, H, D] each, cast to the dtype of its buffer.
      slot: i32[B, H]; outside 0..N-1 it leaves that row and head as they are.
      implementation: "tpu", "gpu", "reference", or None for what this machine has.

    Returns:
      The buffers, in order.

    Raises:
      ValueError: If shapes disagree, slots are not integers, or the implementation cannot do this call or run here.
    """
    buffers, rows = tuple(buffers), tuple(rows)
    _check(buffers, rows, slot)

    def unfit(_):
        strange = sorted({str(x.dtype) for x in buffers} - set(DTYPES))
        if strange:
            return f"there is no kernel for {', '.join(strange)}, only for {', '.join(DTYPES)}"
        return "a buffer is empty" if any(0 in x.shape for x in buffers) else None

    name = dispatch.choose("slot_write", implementation, unfit)
    rows = tuple(row.astype(buffer.dtype) for row, buffer in zip(rows, buffers, strict=True))
    backend = importlib.import_module(f"{__name__}.{name}")
    args = (buffers, rows, slot.astype(jnp.int32))
    return by_row_and_head(backend.slot_write, args, ("bh",) * 3, ("bh",) * len(buffers))


def _check(buffers, rows, slot):
    if not buffers or len(buffers) != len(rows):
        raise ValueError(
            f"slot_write: got {len(buffers)} buffers and {len(rows)} rows; pass at least one buffer and a row for each."
        )
    if slot.ndim != 2 or not jnp.issubdtype(slot.dtype, jnp.integer):
        raise ValueError(
            f"slot_write: slot is {slot.dtype}{list(slot.shape)}; it must be i32[B, H], the slot of each row and head."
        )
    count = buffers[0].shape[2] if buffers[0].ndim > 2 else 0
    for i, (buffer, row) in enumerate(zip(buffers, rows, strict=True)):
        if buffer.ndim not in (3, 4) or buffer.shape[:3] != (*slot.shape, count):
            raise ValueError(
                f"slot_write: buffer {i} is {list(buffer.shape)}; with slot {list(slot.shape)} it must be [B, H, N] or "
                f"[B, H, N, D], B, H = {slot.shape} and N alike in all buffers. Fold further axes into one."
            )
        if row.shape != buffer.shape[:2] + buffer.shape[3:]:
            raise ValueError(
                f"slot_write: rows {i} is {list(row.shape)}; for buffer {i}, {list(buffer.shape)}, it must be "
                f"{list(buffer.shape[:2] + buffer.shape[3:])}: one row of each head, without the axis of slots."
            )
