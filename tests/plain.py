"""The whole forward pass with no cache: naive causal attention, an oracle for everything that has one."""

import functools

import jax
import jax.numpy as jnp

from kvjax.models import llama
from kvjax.models.rope import rotate
from kvjax.models.weights import Model, load


@functools.cache
def smollm2() -> Model:
    """The real model in f32, loaded once."""
    return load("smollm2")


def plain_logits(params: llama.Params, tokens) -> jax.Array:
    """Logits f32[B, T, vocab] of tokens i32[B, T]."""
    config = params.config
    tokens = jnp.asarray(tokens)
    cos, sin = config.rope.table(tokens.shape[1], config.head_dim)
    x = llama.embed(params, tokens)
    for block in params.blocks:
        made = llama.project(block, x, config, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        q, k = (rotate(part, cos[:, None], sin[:, None]) for part in (made.q, made.k))
        x = llama.finish(block, x, plain_attention(q, k, made.v, config.sliding_window), config)
    return llama.logits(params, x)


def plain_attention(q, k, v, window: int | None = None) -> jax.Array:
    """q [B, T, Hq, D] over k and v [B, T, H, D], each query over the keys up to its own: [B, T, Hq, D]."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    ago = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])  # of key k, seen from query q
    visible = (ago >= 0) & (ago < (window or q.shape[1]))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(visible, logits, -jnp.inf)), v)
