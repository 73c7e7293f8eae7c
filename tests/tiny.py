"""Small random models, made in place."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax import heads
from kvjax.models.llama import Block, Config, Params, with_heads
from kvjax.models.rope import Rope

CONFIG = Config(
    architecture="llama",
    layers=2,
    width=32,
    mlp_width=48,
    q_heads=4,
    kv_heads=2,
    head_dim=8,
    vocab=61,
    context=256,
    norm_epsilon=1e-5,
    rope=Rope(),
)


def random_params(config: Config = CONFIG, seed: int = 0, dtype=jnp.float32) -> Params:
    """Weights large enough for attention to be far from uniform."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=None):
        scale = 1.5 / np.sqrt(shape[-1]) if scale is None else scale
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * scale, dtype)

    def block():
        ones = jnp.ones(config.width, dtype)
        q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        return Block(
            attention_norm=ones,
            wq=normal(q, config.width),
            wk=normal(kv, config.width),
            wv=normal(kv, config.width),
            wo=normal(config.width, q),
            bq=None,
            bk=None,
            bv=None,
            mlp_norm=ones,
            w_gate=normal(config.mlp_width, config.width),
            w_up=normal(config.mlp_width, config.width),
            w_down=normal(config.width, config.mlp_width),
        )

    params = Params(
        embed=normal(config.vocab, config.width, scale=1.0),
        blocks=tuple(block() for _ in range(config.layers)),
        norm=jnp.ones(config.width, dtype),
        unembed=None,
        heads={},
        config=config,
    )
    return with_heads(params, random_heads(config, seed))


def random_heads(config: Config = CONFIG, seed: int = 0) -> dict:
    """Heads that tell tokens apart, and keep about half of them."""
    locret = heads.make(heads.RetainingHead, config, width=4, rngs=nnx.Rngs(seed))
    gates = heads.make(heads.AttentionGate, config, heads=2, head_dim=4, rngs=nnx.Rngs(seed + 1))
    rng = np.random.default_rng(seed + 2)

    def far_from_zero(leaf):
        return jnp.asarray(0.5 * rng.standard_normal(leaf.shape, dtype=np.float32))

    return {"locret": jax.tree.map(far_from_zero, locret), "attention_gate": jax.tree.map(far_from_zero, gates)}


def random_tokens(batch: int, count: int, seed: int = 0, vocab: int = CONFIG.vocab) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, count)), jnp.int32)
