"""Shapes in earnest, compiled ahead of time."""

import jax
import jax.numpy as jnp


def _case(batch, heads, slots, *kinds):
    """`kinds`: (dtype, width) of each buffer, width None for one number a slot."""
    trailing = [() if width is None else (width,) for _, width in kinds]
    buffers = tuple(
        jax.ShapeDtypeStruct((batch, heads, slots, *rest), kind[0]) for kind, rest in zip(kinds, trailing, strict=True)
    )
    rows = tuple(
        jax.ShapeDtypeStruct((batch, heads, *rest), kind[0]) for kind, rest in zip(kinds, trailing, strict=True)
    )
    return (buffers, rows, jax.ShapeDtypeStruct((batch, heads), jnp.int32)), {}


_BOOKS = ((jnp.int32, None), (jnp.float32, None))  # position and mass
_BF16, _F32 = jnp.bfloat16, jnp.float32

CASES = {
    "llama_b32_bf16": _case(32, 8, 4097, (_BF16, 128), (_BF16, 128), *_BOOKS),
    "llama_b32_bf16_even": _case(32, 8, 4096, (_BF16, 128), (_BF16, 128), *_BOOKS),
    "llama_b1_bf16": _case(1, 8, 1025, (_BF16, 128), (_BF16, 128), *_BOOKS),
    "smollm2_b8_f32": _case(8, 3, 257, (_F32, 64), (_F32, 64), *_BOOKS),
    "int4_codes_b32": _case(
        32, 8, 4097, (jnp.uint32, 16), (jnp.float16, 4), (jnp.uint32, 16), (jnp.float16, 4), *_BOOKS
    ),
    "pruned_keys_bf16": _case(8, 8, 2049, (_BF16, 64), (_BF16, 128), *_BOOKS),
    "odd_widths_bf16": _case(4, 12, 1000, (_BF16, 80), (_BF16, 96), *_BOOKS),
    "wide_heads_bf16_stat": _case(2, 4, 513, (_BF16, 256), (_BF16, 256), *_BOOKS, (_BF16, None), (_F32, 2)),
}
