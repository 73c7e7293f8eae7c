"""The frozen model as one scan over its layers: its weights are stacked, so that a pod compiles one layer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.models import llama
from kvjax.models.llama import Block, Config, Params, Projected
from kvjax.models.rope import rotate
from train import mesh as meshes


def stack(layers: Sequence[Any]) -> Any:
    """One pytree [L, ...] out of one for each layer."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack(stacked: Any, layers: int) -> tuple[Any, ...]:
    """One pytree for each layer out of one [L, ...]."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(layers))


def stacked(params: Params) -> Params:
    """The same model, with one `Block` of arrays [L, ...], and without heads."""
    return dataclasses.replace(params, blocks=stack(params.blocks), heads={})


def shardings(params: Params, mesh: Mesh) -> Params:
    """Where the weights of a stacked model lie; see `train.mesh.shardings`. Shapes are enough."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params.blocks)
    layout = meshes.shardings(dataclasses.replace(params, blocks=(one,)), mesh)

    def behind(sharding):
        return NamedSharding(mesh, PartitionSpec(None, *sharding.spec))

    return dataclasses.replace(layout, blocks=jax.tree.map(behind, layout.blocks[0]))


def positions_of(batch: dict[str, jax.Array]) -> jax.Array:
    """i32[B, T], -1 for padding."""
    at = jnp.arange(batch["tokens"].shape[1])
    return jnp.where(at < batch["lengths"][:, None], at, -1)


def through_layers(
    params: Params, layer: Callable[[jax.Array, Block, Any], tuple[jax.Array, Any]], tokens: jax.Array, per_layer: Any
) -> tuple[jax.Array, Any]:
    """The residual stream [B, T, width] behind all layers, and what `layer` said of each, [L, ...].

    Args:
      params: A stacked model.
      layer: (x, block, what is this layer's of `per_layer`) -> (x, what it says).
      tokens: i32[B, T].
      per_layer: A pytree [L, ...], such as stacked heads.
    """

    @jax.checkpoint  # of a gradient through all layers: gathered weights are not kept for it, but gathered again
    def body(x, own):
        block, heads = own
        x, said = layer(x, meshes.gathered(block), jax.tree.map(meshes.laid, heads))
        return meshes.laid(x, meshes.ROWS), said

    return jax.lax.scan(body, _embed(params, tokens), (params.blocks, per_layer))


def _embed(params: Params, tokens: jax.Array) -> jax.Array:
    """The residual stream of tokens; each device looks up all rows in its columns of the table, and they change."""
    x = llama.embed(params, meshes.laid(tokens, "data"))
    return meshes.laid(meshes.laid(x, "data", None, "fsdp"), meshes.ROWS)


def finish(block: Block, x: jax.Array, attended: jax.Array, config: Config) -> jax.Array:
    """`llama.finish`, row by row: its loop over the tokens of all rows would run across the devices that have them."""
    return jax.vmap(lambda x, attended: llama.finish(block, x[None], attended[None], config)[0])(x, attended)


def by_head(made: Projected, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated q [B, H, G, T, D] and k [B, H, T, D], and v, as attention over slots takes them; q is not scaled."""
    batch, count, q_heads, head_dim = made.q.shape
    kv_heads = config.kv_heads
    q = made.q.reshape(batch, count, kv_heads, q_heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    cos, sin = config.rope.angles(made.positions, head_dim)
    q = rotate(q, cos[:, None, None], sin[:, None, None])
    return q, rotate(made.k.swapaxes(1, 2), cos[:, None], sin[:, None]), made.v.swapaxes(1, 2)


def joined(out: jax.Array) -> jax.Array:
    """[B, T, Hq, D] of attention's output [B, H, G, T, D]."""
    batch, kv_heads, group, count, head_dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, count, kv_heads * group, head_dim)
