"""Locret's retaining head. Huang et al. 2024, arXiv:2410.01805."""

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.llama import Config, Projected


class RetainingHead(nnx.Module):
    """A perceptron from a token's query, key and value, not rotated, to a score for each kv_head.

    The score is an estimate of the largest attention logit that the token will ever receive. It has no bias, and
    nothing comes after the second matrix. The activation is that of the model's own MLP.

    Attributes:
      w1: [(Hq + 2 H) D, width], rows in the order q, k, v, head by head.
      w2: [width, H].
    """

    alone = True  # a token's score depends on that token alone
    method = "locret"

    def __init__(self, config: Config, *, width: int, rngs: nnx.Rngs):
        inputs = (config.q_heads + 2 * config.kv_heads) * config.head_dim
        self.w1 = nnx.Param(0.02 * rngs.params.normal((inputs, width)))
        self.w2 = nnx.Param(0.02 * rngs.params.normal((width, config.kv_heads)))

    def settings(self) -> dict:
        """What it takes to make another of the same shapes, beside the model's `Config`."""
        return {"width": self.w1.shape[1]}

    def __call__(self, made: Projected) -> jax.Array:
        """Scores f32[B, H, T]."""
        parts = [x.reshape(*x.shape[:2], -1) for x in (made.q, made.k, made.v)]
        ends = [parts[0].shape[-1], parts[0].shape[-1] + parts[1].shape[-1]]
        w1 = jnp.split(self.w1[...].astype(made.q.dtype), ends)
        inner = jax.nn.silu(sum(x @ w for x, w in zip(parts, w1, strict=True)).astype(jnp.float32))
        return (inner @ self.w2[...].astype(jnp.float32)).swapaxes(1, 2)
