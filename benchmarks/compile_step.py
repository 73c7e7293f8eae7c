"""A decode step of Llama-3.1-8B's shape, compiled for machines that are not here: `python -m benchmarks.compile_step`.

Says what each chip would hold, and that nothing of the cache's size is copied or sent between chips. Machines are
"v5e", "v5p" and "v6e", four chips each (needs libtpu), and "h100" (needs jax-triton, and jax's CUDA plugin and PJRT of
the same version, in an environment of their own: with them there, jax looks for a GPU).
"""

import argparse
import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kvjax
from kvjax import codecs, policies, store
from kvjax.decoding import empty_cache
from kvjax.models.llama import Block, Config, Params
from kvjax.models.rope import Rope
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.sharding import spread_over

LLAMA = Config(
    architecture="llama",
    layers=32,
    width=4096,
    mlp_width=14336,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    context=131072,
    norm_epsilon=1e-5,
    rope=Rope(500000.0),
)
ROWS = 16
POLICIES = {
    "h2o(2048)": policies.h2o(2048, window=1024),
    "snapkv(2048), int4": store(policies.snapkv(2048), keys=codecs.integer(4), values=codecs.integer(4)),
    "mikv at 32768": policies.mikv(0.1, low_bits=4, group=32),
}


def shapes_of(config: Config) -> Params:
    """The model's weights in bf16, as shapes."""

    def matrix(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def block():
        q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        return Block(
            attention_norm=matrix(config.width),
            wq=matrix(q, config.width),
            wk=matrix(kv, config.width),
            wv=matrix(kv, config.width),
            wo=matrix(config.width, q),
            bq=None,
            bk=None,
            bv=None,
            mlp_norm=matrix(config.width),
            w_gate=matrix(config.mlp_width, config.width),
            w_up=matrix(config.mlp_width, config.width),
            w_down=matrix(config.width, config.mlp_width),
        )

    return Params(
        embed=matrix(config.vocab, config.width),
        blocks=tuple(block() for _ in range(config.layers)),
        norm=matrix(config.width),
        unembed=matrix(config.vocab, config.width),
        heads={},
        config=config,
    )


def over_heads(mesh: Mesh, params: Params, cache: kvjax.Cache):
    """Layouts of weights and cache with the heads, and all that is as wide, over the mesh's only axis."""
    (axis,) = mesh.axis_names

    def put(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def block(one):
        rows = {name: put(axis, None) for name in ("wq", "wk", "wv", "w_gate", "w_up")}
        columns = {name: put(None, axis) for name in ("wo", "w_down")}
        alike = jax.tree.map(lambda _: put(), one)
        return dataclasses.replace(alike, **rows, **columns)

    weights = dataclasses.replace(
        jax.tree.map(lambda _: put(), params),
        blocks=tuple(map(block, params.blocks)),
        embed=put(axis, None),
        unembed=put(axis, None),
    )
    slots = jax.tree.map(lambda leaf: put(None, axis) if leaf.ndim > 2 else put(), cache)
    return weights, slots


TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
H100 = """
gpu_device_info {
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def mesh_of(machine: str) -> Mesh:
    """Four chips of a TPU slice, or an H100."""
    if machine == "h100":
        found = topologies.get_topology_desc(machine, platform="cuda", topology="1x1x1", target_config=H100)
        return Mesh(np.array(found.devices[:1]), ("heads",))
    return Mesh(np.array(topologies.get_topology_desc(TPUS[machine], platform="tpu").devices), ("heads",))


def compiled_step(policy: kvjax.Policy, mesh: Mesh, implementation: str, layers: int, tokens: int = 32768):
    """The executable of one step of `ROWS` rows, weights and heads spread over the mesh, and the bytes of its cache."""
    params = shapes_of(dataclasses.replace(LLAMA, layers=layers))
    with compiling_for(implementation, 90 if implementation == "gpu" else None), spread_over(mesh, heads="heads"):
        cache = jax.eval_shape(functools.partial(empty_cache, params, policy, ROWS, tokens=tokens))
        weights, slots = over_heads(mesh, params, cache)
        whole = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(
            lambda params, token, cache: kvjax.step(params, policy, token, cache),
            in_shardings=(weights, whole, slots),
            out_shardings=(whole, slots),
            donate_argnums=2,
        )
        token = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
        return step.lower(params, token, cache).compile(), kvjax.nbytes(cache)


def main(machines: list[str], methods: list[str], layers: int) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for machine in machines:
        mesh = mesh_of(machine)
        for name in methods:
            start = time.perf_counter()
            implementation = "gpu" if machine == "h100" else "tpu"
            compiled, size = compiled_step(POLICIES[name], mesh, implementation, layers)
            memory, text, chips = compiled.memory_analysis(), compiled.as_text(), mesh.size
            kernels = text.count('custom_call_target="tpu_custom_call"') + text.count('_target="triton_kernel_call"')
            gib, mib = 2**30, 2**20
            print(
                f"{machine} x {chips}, {layers} layers, {name}: {memory.argument_size_in_bytes / gib:.2f} GiB a chip, "
                f"{size / chips / gib:.2f} GiB of it cache, of that {memory.alias_size_in_bytes * chips / size:.1%} "
                f"written in place; {memory.temp_size_in_bytes / mib:.1f} MiB of temporaries; {kernels} kernels; "
                f"compiled in {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            assert kernels >= 2 * layers, "a layer attends or writes without a kernel"
            assert memory.temp_size_in_bytes < max(size / chips, 2**28) / 2, "something of the cache's size is copied"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", default=list(TPUS), help="of v5e, v5p, v6e, h100")
    parser.add_argument("--methods", nargs="*", default=list(POLICIES), help="; ".join(POLICIES))
    parser.add_argument("--layers", type=int, default=LLAMA.layers)
    arguments = parser.parse_args()
    main(arguments.machines, arguments.methods, arguments.layers)
