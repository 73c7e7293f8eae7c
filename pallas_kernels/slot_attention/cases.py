"""Shapes that are used in earnest: each is compiled for TPUs and GPUs that are not here."""

import jax
import jax.numpy as jnp

from pallas_kernels.slot_attention.packed import Packed, words

GROUP = 32  # channels that share a step


def _array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def _stored(lead, channels, bits, dtype):
    if bits is None:
        return _array(dtype, *lead, channels)
    per_group = _array(jnp.float16, *lead, channels // GROUP)
    return Packed(_array(jnp.uint32, *lead, words(channels, bits)), per_group, per_group, bits, GROUP)


def _case(
    rows, heads, group, queries, slots, head_dim, *, dtype=jnp.bfloat16, keep=None, bits=None, bias=False, **settings
):
    """`keep` is the channels of a key where it is pruned; `bits` is None for arrays."""
    keep, lead = keep or head_dim, (rows, heads, slots)
    shapes = (
        _array(dtype, rows, heads, group, queries, keep),
        _stored(lead, keep, bits, dtype),
        _stored(lead, head_dim, bits, dtype),
        _array(jnp.int32, rows, 1, queries),
        _array(jnp.int32, *lead),
    )
    return (*shapes, _array(jnp.float32, *lead)) if bias else shapes, {"scale": head_dim**-0.5, **settings}


LLAMA = (32, 8, 4, 1, 4096, 128)  # rows, kv_heads, group, queries, slots, head_dim of Llama-3.1-8B
SMOLLM2 = (8, 3, 3, 1, 2048, 64)

CASES = {
    "llama": _case(*LLAMA),
    "llama mass": _case(*LLAMA, stat="mass"),
    "llama logits": _case(*LLAMA, stat="logits"),
    "llama f32 mass": _case(*LLAMA, dtype=jnp.float32, stat="mass"),
    "llama one row 32768": _case(1, 8, 4, 1, 32768, 128),
    "llama one row 32768 mass": _case(1, 8, 4, 1, 32768, 128, stat="mass"),
    "llama four queries mass": _case(8, 8, 4, 4, 4096, 128, stat="mass"),
    "llama sixteen queries": _case(8, 8, 4, 16, 4096, 128, stat="mass"),
    "llama bias window": _case(*LLAMA, bias=True, sliding_window=1024, stat="mass"),
    "llama int8": _case(*LLAMA, bits=8),
    "llama int4": _case(*LLAMA, bits=4),
    "llama int4 mass": _case(*LLAMA, bits=4, stat="mass"),
    "llama int4 one row 32768": _case(1, 8, 4, 1, 32768, 128, bits=4, stat="mass"),
    "llama int4 sixteen queries": _case(8, 8, 4, 16, 4096, 128, bits=4, stat="mass"),
    "llama int4 logits": _case(*LLAMA, bits=4, stat="logits"),
    "llama int2": _case(*LLAMA, bits=2, stat="mass"),
    "llama int4 f32": _case(*LLAMA, dtype=jnp.float32, bits=4, stat="mass"),
    "llama 77 channels": _case(*LLAMA, keep=77, stat="mass"),
    "llama 64 channels int4": _case(*LLAMA, keep=64, bits=4, stat="mass"),
    "llama 1000 slots": _case(8, 8, 4, 1, 1000, 128, stat="mass"),
    "llama 5000 slots": _case(8, 8, 4, 1, 5000, 128, stat="mass"),
    "llama 5000 slots int4": _case(8, 8, 4, 1, 5000, 128, bits=4, stat="mass"),
    "smollm2 f32": _case(*SMOLLM2, dtype=jnp.float32, stat="mass"),
    "smollm2": _case(*SMOLLM2, stat="mass"),
    "smollm2 int8": _case(*SMOLLM2, bits=8, stat="mass"),
    "smollm2 int2": _case(*SMOLLM2, bits=2, stat="mass"),
    "head_dim 80": _case(8, 8, 4, 1, 2048, 80, stat="mass"),
    "head_dim 96": _case(8, 32, 1, 1, 2048, 96, stat="mass"),
    "head_dim 96 int4": _case(8, 8, 4, 1, 2048, 96, bits=4, stat="mass"),
    "head_dim 256": _case(8, 4, 2, 1, 4096, 256, stat="mass"),
    "head_dim 256 f32 sixteen queries": _case(2, 4, 8, 16, 4096, 256, dtype=jnp.float32, stat="mass"),
    "head_dim 256 int8": _case(8, 4, 2, 1, 4096, 256, bits=8, stat="mass"),
    "group 1": _case(8, 32, 1, 1, 2048, 128, stat="mass"),
    "group 8": _case(8, 8, 8, 1, 4096, 128, stat="mass"),
    "group 8 sixteen queries int4": _case(2, 8, 8, 16, 4096, 128, bits=4, stat="mass"),
}
