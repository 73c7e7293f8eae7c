"""Trains Attention-Gates: `python -m train.attention_gate configs/attention_gate_smollm2.toml`.

Each layer's gate says before attention which prompt tokens stay, and learns from the loss of what follows the prompt,
through the frozen model, and from a term that holds the share of what it keeps at a target. With `lora_rank` the model
is fitted along with it, which is the paper's recipe for a task; `gate = "none"` is the control that a comparison needs:
the same training without a gate.

Source: arXiv:2410.12876, of which only abstracts, reviews and digests could be read. From these: the two terms, a
straight-through estimator, a frozen model in continued pre-training, and LoRA in fine-tuning. Reconstructed: |mean -
target| in place of a difference without a bound, the gate inside the softmax, the ramp, the optimiser. The gate reads
the prompt alone and the loss is that of later tokens, so no label leaks.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kvjax import heads
from kvjax.models import llama
from kvjax.models.llama import Config, Params
from train import backbone, main
from train import mesh as meshes
from train.gated import gated_attention
from train.loop import Task

LOGITS = 128  # tokens whose logits over the vocabulary exist at once
KINDS = {"attention": heads.AttentionGate, "linear": heads.LinearGate, "none": None}


@dataclasses.dataclass(frozen=True)
class Settings(main.Settings):
    """A run's settings, a flat TOML file; those of all trainers are in `train.main.Settings`."""

    gate: Literal["attention", "linear", "none"] = "attention"
    heads: int = 4  # of an attention gate
    head_dim: int = 128
    reach: Literal["prompt", "causal"] = "prompt"  # the tokens that a gate sees
    threshold: float = 0.5
    target: float = 0.5  # share of the prompt's tokens to keep
    strength: float = 1.0  # of the term that holds it there
    bracket: Literal["abs", "square", "hinge"] = "abs"
    scope: Literal["layer", "global"] = "layer"  # each layer near the target, or their mean
    ramp: float = 0.1  # share of the steps over which the strength goes up
    last: int = 1  # last tokens of the prompt that stay in any case
    sinks: int = 0
    clamp: float | None = 10.0  # see train.gated
    learning_rate: float = 1e-3
    warm_up: float = 0.03  # share of the steps; then a cosine
    clip: float = 1.0  # norm of a gradient
    lora_rank: int = 0
    lora_rate: float = 1e-4  # learning rate


def low_rank(config: Config, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """Stacked adapters of wq and wv, {name: f32[L, ...]}, that change nothing yet."""

    def pair(key, out):
        down = jax.random.normal(key, (config.layers, rank, config.width)) / config.width**0.5
        return down, jnp.zeros((config.layers, out, rank))

    keys = jax.random.split(key)
    q_down, q_up = pair(keys[0], config.q_heads * config.head_dim)
    v_down, v_up = pair(keys[1], config.kv_heads * config.head_dim)
    return {"q_down": q_down, "q_up": q_up, "v_down": v_down, "v_up": v_up}


def adapted(block: llama.Block, lora: dict[str, jax.Array]) -> llama.Block:
    """A layer, or stacked layers, with the adapters in its weights."""
    if not lora:
        return block
    wq = block.wq + (lora["q_up"] @ lora["q_down"]).astype(block.wq.dtype)
    return dataclasses.replace(block, wq=wq, wv=block.wv + (lora["v_up"] @ lora["v_down"]).astype(block.wv.dtype))


def straight_through(p: jax.Array, threshold: float) -> jax.Array:
    """1 above the threshold, else 0; its gradient is that of p."""
    return (p > threshold).astype(p.dtype) + (p - jax.lax.stop_gradient(p))


def keep_loss(kept: jax.Array, settings: Settings) -> jax.Array:
    """How far the shares kept by the layers f32[L] are from the target."""
    kept = kept.mean(keepdims=True) if settings.scope == "global" else kept
    over = kept - settings.target
    return {"abs": jnp.abs, "square": jnp.square, "hinge": jax.nn.relu}[settings.bracket](over).mean()


def answer_loss(params: Params, x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the tokens behind the prompts, in nats: of each row, then over rows.

    Args:
      params: A stacked model.
      x: [B, T, width], behind the last layer.
      batch: tokens i32[B, T], prompt_lengths and lengths i32[B].
    """
    params = meshes.gathered(dataclasses.replace(params, blocks=()))  # once, and not in each block
    tokens, start, stop = batch["tokens"], batch["prompt_lengths"][:, None], batch["lengths"][:, None]
    count = tokens.shape[1]
    at = jnp.arange(1, count)  # predicted by the token before
    counts = (at >= start) & (at < stop)
    size = min(LOGITS, count - 1)
    pad = -(count - 1) % size

    def blocks(a):
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def block(total, args):
        x, token, count = args
        lost = optax.softmax_cross_entropy_with_integer_labels(llama.logits(params, x), token)
        return total + jnp.where(count, lost, 0.0).sum(axis=1), None

    total, _ = jax.lax.scan(
        block, jnp.zeros(tokens.shape[0]), (blocks(x[:, :-1]), blocks(tokens[:, 1:]), blocks(counts))
    )
    return (total / jnp.maximum(counts.sum(axis=1), 1)).mean()


def losses(
    trained: dict[str, Any],
    params: Params,
    batch: dict[str, jax.Array],
    strength: jax.Array | float,
    settings: Settings,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, and metrics.

    Args:
      trained: "gate", a stacked gate or (); "lora", stacked adapters or {}.
      params: A stacked model.
      batch: tokens i32[B, T], prompt_lengths and lengths i32[B].
      strength: Of the term that holds what is kept at the target.
      settings: The run's.
    """
    config, positions = params.config, backbone.positions_of(batch)
    at = jnp.arange(positions.shape[1])
    prompt = (at < batch["prompt_lengths"][:, None]) & (positions >= 0)
    free = prompt & (at >= settings.sinks) & (at < (batch["prompt_lengths"] - settings.last)[:, None])

    def layer(x, block, own):
        gate, lora = own
        block = adapted(block, lora)
        made = llama.project(block, x, config, positions)
        q, k, v = backbone.by_head(made, config)
        if gate is None:
            flags, kept = jnp.ones(k.shape[:3]), jnp.ones(())
        else:
            p = gate(made._replace(positions=jnp.where(prompt, positions, -1)))
            flags = straight_through(p, settings.threshold)
            kept = jnp.where(prompt[:, None], flags, 0.0).sum() / (config.kv_heads * prompt.sum())
        scaled = (q * config.head_dim**-0.5).astype(q.dtype)
        out = gated_attention(scaled, k, v, flags, free, settings.clamp)
        return backbone.finish(block, x, backbone.joined(out), config), kept

    x, kept = backbone.through_layers(params, layer, batch["tokens"], (trained["gate"], trained["lora"]))
    said = answer_loss(params, x, batch)
    held = keep_loss(kept, settings)
    metrics = {"answer_loss": said, "kept": kept.mean(), "kept_by_layer": kept}
    loss = said if trained["gate"] is None else said + strength * held
    return loss, {"loss": loss, **metrics}


def schedule(settings: Settings) -> optax.Schedule:
    """Up over the first steps, then a cosine down to 0."""
    up = max(1, round(settings.warm_up * settings.steps))
    return optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, up, settings.steps)


def task(config: Config, settings: Settings) -> Task:
    """What `train.loop.train` takes."""
    kind = KINDS[settings.gate]
    if kind is None and not settings.lora_rank:
        raise ValueError(
            "attention_gate: gate='none' and lora_rank=0 leave nothing to train. Give lora_rank, such as 8."
        )
    shape = {"heads": settings.heads, "head_dim": settings.head_dim, "reach": settings.reach}
    shape = shape if kind is heads.AttentionGate else {}

    def init(key):
        gate = None if kind is None else backbone.stack(heads.make(kind, config, rngs=nnx.Rngs(key), **shape))
        return {"gate": gate, "lora": low_rank(config, settings.lora_rank, key) if settings.lora_rank else {}}

    def gradients(trained, params, batch, step):
        ramp = jnp.minimum(1.0, step / max(1.0, settings.ramp * settings.steps))
        of = jax.grad(losses, has_aux=True)
        return of(trained, params, batch, settings.strength * ramp, settings)

    rate = schedule(settings)
    slower = settings.lora_rate / settings.learning_rate
    adam = functools.partial(optax.adamw, b1=0.9, b2=0.95, weight_decay=0.0)
    by_kind = {"gate": adam(rate), "lora": adam(lambda step: slower * rate(step))}
    optimizer = optax.partition(by_kind, {"gate": "gate", "lora": "lora"})
    return Task(
        init=init,
        gradients=gradients,
        optimizer=optax.chain(optax.clip_by_global_norm(settings.clip), optimizer),
        evaluate=lambda trained, params, batch: losses(trained, params, batch, settings.strength, settings)[1],
    )


if __name__ == "__main__":
    main.run(Settings, task, schedule, heads_of=lambda trained: trained["gate"], show=("kept",))
