"""`fold_slots` for GPUs: slots sorted by target, then a warp or more for each output slot, which reads what joins it.

Sorting i32[B, H, N] is left to XLA. Each row of k and v that joins is read once and each output row is written once;
nothing is added atomically, and the order of a sum is that of the slots, so runs repeat bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call


def fold_slots(
    k: jax.Array, v: jax.Array, target: jax.Array, weight: jax.Array, slots: int, *, value_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.fold_slots`."""
    batch, heads, count = target.shape
    target = jnp.where((target >= 0) & (target < slots), target, slots).reshape(-1, count)  # the dropped go last
    order = jnp.argsort(target, axis=-1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(target, order, axis=-1)
    # Unrolled, the bisection is one kernel; as a loop it would be a dozen.
    bisect = functools.partial(jnp.searchsorted, method="scan_unrolled")
    start = jax.vmap(bisect, (0, None))(ordered, jnp.arange(slots + 1)).astype(jnp.int32)  # [B * H, C + 1]
    settings = config(max(k.shape[-1], v.shape[-1]), count, slots)
    k, v = triton_call.call(
        _fold,
        k,
        v,
        order,
        start,
        weight,
        value_weight,
        out_shapes=[jax.ShapeDtypeStruct((batch, heads, slots, x.shape[-1]), x.dtype) for x in (k, v)],
        grid=(batch * heads * slots,),
        N=count,
        C=slots,
        DK=k.shape[-1],
        DV=v.shape[-1],
        BLOCK_K=triton.next_power_of_2(k.shape[-1]),
        BLOCK_V=triton.next_power_of_2(v.shape[-1]),
        **settings,
    )
    return k, v


def config(width: int, count: int, slots: int) -> dict[str, int]:
    """Rows read at once, and warps: a warp holds 8 rows of 128 in registers, the most that can be in flight."""
    rows = min(max(triton.next_power_of_2(triton.cdiv(count, slots)), 4), 32)
    numbers = rows * triton.next_power_of_2(width)
    return {"ROWS": rows, "num_warps": min(max(numbers // 1024, 1), 8), "num_stages": 1}


@triton.jit
def _fold(
    k, v, order, start, weight, value_weight, k_out, v_out,
    N: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # head * C + output slot; k may hold more than 2**31 numbers
    head = program // C
    first = tl.load(start + program + head)  # [B * H, C + 1]
    last = tl.load(start + program + head + 1)
    k_channel, v_channel = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_sum = tl.zeros((BLOCK_K,), tl.float32)
    v_sum = tl.zeros((BLOCK_V,), tl.float32)
    for i in range(first, last, ROWS):
        place = i + tl.arange(0, ROWS)
        joins = place < last
        row = head * N + tl.load(order + head * N + place, mask=joins, other=0)
        # Where nothing joins, 0 times 0 is added.
        k_weight = tl.load(weight + row, mask=joins, other=0.0)
        v_weight = tl.load(value_weight + row, mask=joins, other=0.0)
        k_mask = joins[:, None] & (k_channel < DK)[None, :]
        v_mask = joins[:, None] & (v_channel < DV)[None, :]
        k_rows = tl.load(k + row[:, None] * DK + k_channel[None, :], mask=k_mask, other=0.0)
        v_rows = tl.load(v + row[:, None] * DV + v_channel[None, :], mask=v_mask, other=0.0)
        k_sum += tl.sum(k_rows.to(tl.float32) * k_weight[:, None], axis=0)
        v_sum += tl.sum(v_rows.to(tl.float32) * v_weight[:, None], axis=0)
    tl.store(k_out + program * DK + k_channel, k_sum.to(k_out.dtype.element_ty), mask=k_channel < DK)
    tl.store(v_out + program * DV + v_channel, v_sum.to(v_out.dtype.element_ty), mask=v_channel < DV)
