"""Weights and caches shard like any pytree: rows or heads spread over devices decode what one device decodes."""

import os
import subprocess
import sys

from tests.methods import POLICIES

PROGRAM = """
import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kvjax
import tests.conftest
from tests.methods import POLICIES
from tests.tiny import CONFIG, random_params, random_tokens

mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
small = dataclasses.replace(CONFIG, layers=1)
one, lengths = (random_params(small), random_tokens(4, 24)), np.array([24, 13, 3, 17])
replicated, over_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
spread = jax.device_put(one[0], replicated), jax.device_put(one[1], over_rows)

for name, row in POLICIES.items():
    want, got = (
        kvjax.decode(params, row.make(10), tokens, lengths=lengths, max_new_tokens=4, temperature=1.0, key=1)
        for params, tokens in (one, spread)
    )
    for layer in got.cache.layers:
        for leaf in jax.tree.leaves(layer.slot_aligned()):
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}, f"{name}: not one row a device"
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    print(name)

# Heads over two devices, rows over two: the cache keeps that layout from step to step.
mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto, AxisType.Auto))
layout = PartitionSpec("batch", "heads")


def over_heads(cache):
    layers = tuple(
        layer.with_slots(jax.device_put(layer.slot_aligned(), NamedSharding(mesh, layout))) for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=layers)


step = jax.jit(kvjax.step, donate_argnames="cache")
for name, row in POLICIES.items():
    policy = row.make(10)
    _, cache = kvjax.prefill(one[0], policy, one[1], lengths=lengths, room=4)
    spread = over_heads(cache)
    for token in ([5, 6, 7, 8], [9, 9, -1, 2]):
        token = np.array(token, np.int32)
        want, cache = kvjax.step(one[0], policy, token, cache)
        got, spread = step(one[0], policy, token, spread)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    layer = spread.layers[0]
    shards = jax.tree.leaves(layer.k)[0].addressable_shards
    assert {shard.data.shape[:2] for shard in shards} == {(2, 1)}, f"{name}: heads were gathered"
    np.testing.assert_array_equal(layer.pos, cache.layers[0].pos)
"""


def test_a_batch_spread_over_four_devices_decodes_what_one_device_decodes():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(POLICIES)
