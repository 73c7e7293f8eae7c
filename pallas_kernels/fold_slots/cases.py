"""Shapes in earnest, compiled ahead of time."""

import jax
import jax.numpy as jnp


def _case(batch, heads, count, dims, slots, dtype):
    k, v = (jax.ShapeDtypeStruct((batch, heads, count, d), dtype) for d in dims)
    target, weight = (jax.ShapeDtypeStruct((batch, heads, count), d) for d in (jnp.int32, jnp.float32))
    return (k, v, target, weight), {"slots": slots}


CASES = {
    "llama_b1_bf16": _case(1, 8, 8192, (128, 128), 1024, jnp.bfloat16),
    "llama_b32_bf16": _case(32, 8, 4096, (128, 128), 512, jnp.bfloat16),
    "llama_b1_f32_kept_half": _case(1, 8, 8192, (128, 128), 4096, jnp.float32),
    "smollm2_b8_f32": _case(8, 3, 2048, (64, 64), 256, jnp.float32),
    "pruned_keys_bf16": _case(4, 8, 4096, (64, 128), 513, jnp.bfloat16),
    "dim80_f32": _case(2, 12, 1500, (80, 80), 200, jnp.float32),
    "dim96_bf16": _case(2, 8, 2049, (96, 96), 1000, jnp.bfloat16),
    "dim256_bf16": _case(1, 4, 8192, (256, 256), 2048, jnp.bfloat16),
    "dim256_f32": _case(1, 4, 4096, (256, 256), 1024, jnp.float32),
    "short_prompt_bf16": _case(4, 8, 100, (128, 128), 24, jnp.bfloat16),
}
