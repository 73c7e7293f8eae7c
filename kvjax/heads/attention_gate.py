"""The gates of Attention-Gate, arXiv:2410.12876, of which only abstracts, reviews and digests could be read.

Certain: a reduced multi-head attention over the whole context, a sigmoid and a threshold, one for each layer. Every
shape is a reconstruction: an output for each kv_head, the rotation, the reach of its attention, the initial values.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.llama import Config, Projected
from kvjax.models.rope import rotate

BLOCK_LOGITS = 2**18  # queries times keys whose attention is computed at once, for each head
REACHES = ("prompt", "causal")


class AttentionGate(nnx.Module):
    """Attention of a few narrow heads over the layer's input, and from it a probability to stay for each kv_head.

    At the start it keeps everything: `wo` is 0, and the bias 2.

    Attributes:
      wq: [width, heads, head_dim] of the gate; also wk and wv.
      wo: [heads, head_dim, H].
      bias: [H].
      reach: "prompt", where each token sees all tokens of the call (the prompt), or "causal".
      rope: Rotates the gate's queries and keys; None leaves them, and then a first layer cannot tell places apart.
    """

    alone = False
    method = "attention_gate"

    def __init__(
        self, config: Config, *, heads: int = 4, head_dim: int = 128, reach: str = "prompt", rotated: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if reach not in REACHES:
            raise ValueError(f"AttentionGate: reach={reach!r} must be one of {REACHES}.")

        def normal():
            return nnx.Param(0.02 * rngs.params.normal((config.width, heads, head_dim)))

        self.wq, self.wk, self.wv = normal(), normal(), normal()
        self.wo = nnx.Param(jnp.zeros((heads, head_dim, config.kv_heads)))
        self.bias = nnx.Param(jnp.full(config.kv_heads, 2.0))
        self.reach = reach
        self.rope = config.rope if rotated else None

    def settings(self) -> dict:
        """What it takes to make another of the same shapes, beside the model's `Config`."""
        heads, head_dim = self.wq.shape[1:]
        return {"heads": heads, "head_dim": head_dim, "reach": self.reach, "rotated": self.rope is not None}

    def __call__(self, made: Projected) -> jax.Array:
        """Probabilities to stay f32[B, H, T]."""
        x, there = made.x, made.positions >= 0

        def heads(w):
            return jnp.einsum("btw,whd->bhtd", x, w[...].astype(x.dtype))

        q, k, v = heads(self.wq), heads(self.wk), heads(self.wv)
        if self.rope is not None:
            cos, sin = (part[:, None] for part in self.rope.angles(made.positions, q.shape[-1]))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = _mixed(q, k, v, there, causal=self.reach == "causal")
        z = jnp.einsum("bhtd,hdk->bkt", mixed.astype(jnp.float32), self.wo[...].astype(jnp.float32))
        return jax.nn.sigmoid(z + self.bias[...].astype(jnp.float32)[:, None])


class LinearGate(nnx.Module):
    """The control without attention: a linear map of the layer's input.

    Attributes:
      w: [width, H].
      bias: [H].
    """

    alone = True
    method = "attention_gate"

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.w = nnx.Param(jnp.zeros((config.width, config.kv_heads)))
        self.bias = nnx.Param(jnp.full(config.kv_heads, 2.0))

    def settings(self) -> dict:
        """There are none beside the model's `Config`."""
        return {}

    def __call__(self, made: Projected) -> jax.Array:
        """Probabilities to stay f32[B, H, T]."""
        w = self.w[...].astype(made.x.dtype)
        z = (made.x @ w).astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return jax.nn.sigmoid(z).swapaxes(1, 2)


def _mixed(q, k, v, there, *, causal):
    """Attention [B, h, T, d] of all queries over the keys that are `there` bool[B, T], a block of queries at a time."""
    count, scale = q.shape[2], q.shape[3] ** -0.5
    size = max(1, min(count, BLOCK_LOGITS // count))
    pad = -count % size
    blocks = jnp.moveaxis(
        jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(*q.shape[:2], -1, size, q.shape[3]), 2, 0
    )

    @jax.checkpoint
    def block(first, q):
        logits = jnp.einsum("bhtd,bhnd->bhtn", q, k, preferred_element_type=jnp.float32) * scale
        visible = there[:, None, None]
        if causal:
            visible = visible & (jnp.arange(count) <= first + jnp.arange(size)[:, None])
        logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhtn,bhnd->bhtd", jax.nn.softmax(logits).astype(v.dtype), v)

    mixed = jax.lax.map(lambda args: block(*args), (jnp.arange(0, count + pad, size), blocks))
    return jnp.moveaxis(mixed, 0, 2).reshape(*q.shape[:2], count + pad, q.shape[3])[:, :, :count]
