"""Shapes that `topk_slots` is used at."""

import jax
import jax.numpy as jnp
import numpy as np


def _shapes(batch, heads, slots):
    shape = (batch, heads, slots)
    return jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)


CASES = {
    "256 rows of 8k": (_shapes(32, 8, 8192), {"k": 1024}),
    "odd length": (_shapes(8, 3, 2049), {"k": 256}),
    "odd length, protected": (_shapes(1, 3, 2049), {"k": 256, "protected": np.zeros((1, 3, 2049), bool)}),
    "a decode step": (_shapes(8, 8, 513), {"k": 512}),
    "all of 1k": (_shapes(1, 8, 1024), {"k": 1024}),
    "16k, the longest in registers": (_shapes(4, 8, 16384), {"k": 2048}),
    "32k": (_shapes(1, 8, 32768), {"k": 2048}),
    "half of 32k, protected": (_shapes(1, 1, 32768), {"k": 16384, "protected": np.zeros((1, 1, 32768), bool)}),
    "128k": (_shapes(1, 8, 131072), {"k": 4096}),
    "256k, the longest on TPU": (_shapes(1, 8, 262144), {"k": 8192}),
}
