"""Calls as they are made in earnest, and at least one for each configuration that the kernels have."""

import jax
import jax.numpy as jnp
import numpy as np


def _call(
    batch=1, heads=8, group=4, count=8192, slots=None, dim=128, wide=None, dtype=jnp.bfloat16, statistics=0,
    biased=False, sliding_window=None,
):  # fmt: skip
    slots, wide = slots or count, wide or dim
    arrays = (
        jax.ShapeDtypeStruct((batch, heads, group, count, dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, slots, dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, slots, wide), dtype),
        jax.ShapeDtypeStruct((batch, 1, count), jnp.int32),
        jax.ShapeDtypeStruct((batch, heads, slots), jnp.int32),
    )
    settings = dict(scale=dim**-0.5, sliding_window=sliding_window)
    # Keywords have to be arrays, not shapes; broadcast from one number they hold no memory.
    if statistics:
        settings["weights"] = np.broadcast_to(np.float32(1), (statistics, batch, count))
    if biased:
        settings["bias"] = np.broadcast_to(np.float32(1), (batch, heads, slots))
    return arrays, settings


CASES = {
    "llama_8k": _call(),
    "llama_8k_mass": _call(statistics=1),
    "llama_8k_mass2": _call(statistics=2),
    "llama_chunk_mass": _call(count=512, slots=2048 + 512, statistics=1),
    "smollm2_f32_mass": _call(heads=3, group=3, count=2048, dim=64, dtype=jnp.float32, statistics=1),
    "smollm2_batch_mass": _call(batch=8, heads=3, group=3, count=2048, dim=64, statistics=1),
    "smollm2_chunk_bias": _call(heads=3, group=3, count=256, slots=512, dim=64, statistics=4, biased=True),
    "group1_d80_mass": _call(heads=32, group=1, count=2048, dim=80, statistics=2),
    "group8_d96_mass": _call(heads=4, group=8, count=4096, dim=96, statistics=1),
    "group2_d256_window_mass": _call(group=2, count=4096, dim=256, statistics=1, sliding_window=1024),
    "group16_d256": _call(heads=1, group=16, count=2048, dim=256),
    "f32_d128_bias_mass": _call(count=1024, dtype=jnp.float32, statistics=1, biased=True),
    "f32_d256_mass": _call(heads=4, group=8, count=1024, dim=256, dtype=jnp.float32, statistics=4),
    "short_17_of_300": _call(count=17, slots=300, statistics=1),
    "pruned_64_of_128_mass": _call(count=2048, dim=64, wide=128, statistics=1),
    "pruned_77_of_128_mass": _call(count=2048, dim=77, wide=128, statistics=1),
}
