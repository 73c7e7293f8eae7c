"""The Llama family as pure functions over a pytree of weights: Llama 2 and 3, Mistral, Qwen2, SmolLM.

Matrices keep the [out, in] layout of the checkpoints, so loading puts nothing into another order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.models.rope import Rope

MLP_ROWS = 512  # tokens whose MLP is computed at once: their activations are wide, and a long prompt's would not fit
FEW_ROWS = 32  # up to here a matrix product waits for the weights: 8 rows of SmolLM2 took 31 instead of 50 ms this way


@dataclasses.dataclass(frozen=True)
class Config:
    """What the weights do not say about themselves. Hashable: it rides in `Params` as static data."""

    architecture: str  # "llama", "mistral" or "qwen2"
    layers: int
    width: int
    mlp_width: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # longest sequence the model was made for, in tokens
    norm_epsilon: float
    rope: Rope
    sliding_window: int | None = None  # keys a query sees, itself included; None sees all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Weights of one layer. Matrices are [out, in]; biases are None where the family has none."""

    attention_norm: jax.Array  # [width]
    wq: jax.Array  # [q_heads * head_dim, width]
    wk: jax.Array  # [kv_heads * head_dim, width]
    wv: jax.Array  # [kv_heads * head_dim, width]
    wo: jax.Array  # [width, q_heads * head_dim]
    bq: jax.Array | None  # [q_heads * head_dim]
    bk: jax.Array | None  # [kv_heads * head_dim]
    bv: jax.Array | None  # [kv_heads * head_dim]
    mlp_norm: jax.Array  # [width]
    w_gate: jax.Array  # [mlp_width, width]
    w_up: jax.Array  # [mlp_width, width]
    w_down: jax.Array  # [width, mlp_width]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A model: its weights, and its `config` as static data, so that functions need nothing beside it."""

    embed: jax.Array  # [vocab, width]
    blocks: tuple[Block, ...]
    norm: jax.Array  # [width]
    unembed: jax.Array | None  # [vocab, width]; None where tied to `embed`
    heads: dict[str, tuple[Any, ...]]  # trained eviction heads, for the policies that learn; {} without
    config: Config = dataclasses.field(metadata={"static": True})


def with_heads(params: Params, heads: dict[str, Any]) -> Params:
    """The same model with trained eviction heads: under the name of each policy that learns, one for each layer.

    A head is a pytree that is called with a layer's `Projected`, and gives each token a score, f32[B, H, T]; see
    `kvjax.heads`.

    Raises:
      ValueError: If `heads` is no dictionary, or has not as many as the model has layers.
    """
    if not isinstance(heads, dict):
        raise ValueError(f"with_heads: heads={heads!r} must be a dictionary, {{method: heads}}.")
    for name, each in heads.items():
        if not isinstance(each, Sequence) or len(each) != params.config.layers:
            count = len(each) if isinstance(each, Sequence) else f"a {type(each).__name__}"
            raise ValueError(
                f"with_heads: heads[{name!r}] has {count}, and must be a sequence of one head for each of the model's "
                f"{params.config.layers} layers, such as kvjax.heads.load returns."
            )
    return dataclasses.replace(params, heads={name: tuple(each) for name, each in heads.items()})


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in f32, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return wide.astype(x.dtype) * weight


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., in] times weight [out, in], plus bias: [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= FEW_ROWS:
        # W x reads W as it lies; XLA would turn it back into x W', which repacks W on a CPU, but for the barrier.
        out = jax.lax.dot_general(weight, rows, (((1,), (1,)), ((), ())))
        out = jax.lax.optimization_barrier(out).T
    else:
        out = jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())))
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Tokens i32[B, T] to the residual stream [B, T, width]."""
    return params.embed[tokens]


class Projected(NamedTuple):
    """What a layer makes of its input before it attends, and what trained heads read.

    Attributes:
      x: [B, T, width], the input after its norm.
      q: [B, T, Hq, D], not rotated, biases included.
      k: [B, T, H, D], likewise.
      v: [B, T, H, D].
      positions: i32[B, T], -1 for padding.
    """

    x: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: jax.Array


def project(block: Block, x: jax.Array, config: Config, positions: jax.Array) -> Projected:
    """The residual stream x [B, T, width] at `positions` i32[B, T], ready for attention."""
    normed = rms_norm(x, block.attention_norm, config.norm_epsilon)

    def heads(weight, bias, count):
        return linear(normed, weight, bias).reshape(*x.shape[:2], count, config.head_dim)

    return Projected(
        normed,
        heads(block.wq, block.bq, config.q_heads),
        heads(block.wk, block.bk, config.kv_heads),
        heads(block.wv, block.bv, config.kv_heads),
        positions,
    )


def finish(block: Block, x: jax.Array, attended: jax.Array, config: Config) -> jax.Array:
    """Adds the attention's output [B, T, Hq, D] and the MLP to the residual stream x [B, T, width]."""
    x = x + linear(attended.reshape(*x.shape[:2], -1), block.wo)
    rows = x.reshape(-1, config.width)
    whole = rows.shape[0] // MLP_ROWS * MLP_ROWS
    if whole <= MLP_ROWS:
        return _mlp(block, rows, config).reshape(x.shape)

    def replace(i, rows):  # in place: XLA on a CPU would allocate the outputs of all layers' loops at once
        some = jax.lax.dynamic_slice_in_dim(rows, i * MLP_ROWS, MLP_ROWS)
        return jax.lax.dynamic_update_slice_in_dim(rows, _mlp(block, some, config), i * MLP_ROWS, axis=0)

    rows = jax.lax.fori_loop(0, whole // MLP_ROWS, replace, rows)
    if whole < rows.shape[0]:
        rows = rows.at[whole:].set(_mlp(block, rows[whole:], config))
    return rows.reshape(x.shape)


def _mlp(block: Block, x: jax.Array, config: Config) -> jax.Array:
    """x [rows, width] plus its gated MLP."""
    normed = rms_norm(x, block.mlp_norm, config.norm_epsilon)
    gated = jax.nn.silu(linear(normed, block.w_gate)) * linear(normed, block.w_up)
    return x + linear(gated, block.w_down)


def logits(params: Params, x: jax.Array) -> jax.Array:
    """Vocabulary logits f32[..., vocab] of the residual stream x [..., width]."""
    normed = rms_norm(x, params.norm, params.config.norm_epsilon)
    unembed = params.embed if params.unembed is None else params.unembed
    return linear(normed, unembed).astype(jnp.float32)
