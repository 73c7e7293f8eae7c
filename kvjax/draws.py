"""Draws that belong to a token: they depend on seed, layer, head and position alone.

So a sequence draws the same in any batch, and however its prompt is cut into calls.
"""

import jax
import jax.numpy as jnp


def check_seed(name: str, seed: int) -> None:
    """Refuses a seed that does not fit 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name}: seed={seed} is outside 0..{2**32 - 1}; it is mixed into 32 bits.")


def uniform(seed: int, layer: jax.Array, pos: jax.Array) -> jax.Array:
    """f32[B, H, N] in [0, 1), of 24 bits, for positions i32[B, H, N] in a layer (u32)."""
    head = jnp.arange(pos.shape[1], dtype=jnp.uint32)[None, :, None]
    stream = mix(mix(jnp.uint32(seed) ^ mix(layer)) ^ head)
    return (mix(mix(pos.astype(jnp.uint32)) ^ stream) >> 8).astype(jnp.float32) / 2**24  # exact in f32


def mix(x: jax.Array) -> jax.Array:
    """Scrambles u32 values one to one (the finaliser of MurmurHash3, after a step away from zero)."""
    x = x + jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
