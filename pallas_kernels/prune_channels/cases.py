"""Shapes that `prune_channels` is used at."""

import jax
import jax.numpy as jnp
import numpy as np


def _case(batch, heads, slots, channels, keep, dtype=jnp.bfloat16, group=4, window=32, masked=False):
    k = jax.ShapeDtypeStruct((batch, heads, slots, channels), dtype)
    q = jax.ShapeDtypeStruct((batch, heads, group, window, channels), dtype)
    settings = {"keep": keep}
    if masked:
        settings["there"] = np.ones((batch, heads, slots), bool)
        settings["asked"] = np.ones((batch, window), bool)
    return (k, q), settings


CASES = {
    "llama, half": _case(1, 8, 8192, 128, 64),
    "llama, 60%, masked": _case(1, 8, 8192, 128, 77, masked=True),
    "llama, 40%": _case(1, 8, 8192, 128, 51),
    "smollm2, f32": _case(8, 3, 2048, 64, 39, jnp.float32, group=3),
    "odd length": _case(2, 3, 2049, 64, 32, group=3),
    "80 channels": _case(1, 4, 4096, 80, 48),
    "96 channels": _case(1, 8, 4096, 96, 57),
    "256 channels": _case(1, 4, 8192, 256, 128),
    "256 channels, f32": _case(1, 4, 4096, 256, 153, jnp.float32, group=1),
    "long, two readings on TPU": _case(1, 2, 131072, 128, 64, masked=True),
}
