"""A decode step of Llama-3.1-8B's shape, compiled for TPUs that are not here: `python -m benchmarks.compile_step`.

Says what each chip would hold, and that nothing of the cache's size is copied or sent between chips.
"""

import dataclasses
import functools
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
    "mikv at 32768": policies.mikv(0.1, low_bits=4),
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


def compiled_step(policy: kvjax.Policy, topology: str, chips: int, layers: int = LLAMA.layers, tokens: int = 32768):
    """The executable of one step of `ROWS` rows, the weights and heads spread over the chips."""
    params = shapes_of(dataclasses.replace(LLAMA, layers=layers))
    cache = jax.eval_shape(functools.partial(empty_cache, params, policy, ROWS, tokens=tokens))
    devices = np.array(topologies.get_topology_desc(topology, platform="tpu").devices)[:chips]
    mesh = Mesh(devices, ("heads",))
    weights, slots = over_heads(mesh, params, cache)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        lambda params, token, cache: kvjax.step(params, policy, token, cache),
        in_shardings=(weights, whole, slots),
        out_shardings=(whole, slots),
        donate_argnums=2,
    )
    token = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    with compiling_for("tpu"), spread_over(mesh, heads="heads"):
        return step.lower(params, token, cache).compile(), kvjax.nbytes(cache)


def main() -> None:
    for topology, chips in (("v5e:2x2", 4), ("v6e:2x2", 4), ("v5p:2x2x1", 4)):
        for name, policy in POLICIES.items():
            start = time.perf_counter()
            compiled, size = compiled_step(policy, topology, chips)
            memory = compiled.memory_analysis()
            kernels = compiled.as_text().count("tpu_custom_call")
            print(
                f"{topology:<12}{name:<22}per chip: arguments {memory.argument_size_in_bytes / 2**30:6.2f} GiB, "
                f"temporaries {memory.temp_size_in_bytes / 2**20:7.1f} MiB, "
                f"cache {size / chips / 2**30:.2f} GiB, {memory.alias_size_in_bytes * chips / size:5.1%} aliased, "
                f"{kernels} kernels; compiled in {time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
