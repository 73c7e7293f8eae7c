"""Trains Locret's retaining heads: `python -m train.locret configs/locret_smollm2.toml`.

A head learns the largest logit that any token of the answer will have for a prompt's token (Huang et al. 2024,
arXiv:2410.01805). The label needs the answer's queries alone, and the heads of a layer nothing but its projections: so
each layer's gradient is computed as the frozen model passes it, and nothing is kept for a backward pass.

Source: the paper, and its authors' code for the scale of the labels (1 / sqrt(D)), the smoothing, summed over layers,
and the clipping by value. Differs: labels and gradients are computed online and in f32, pairs are batched, and of a
long answer the first `answer` tokens count.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import kvjax
from kvjax import heads
from kvjax.attention import attend_slots
from kvjax.models import llama
from kvjax.models.llama import Config, Params
from train import backbone, main
from train.loop import Task

QUERIES = 128  # of the answer, whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Settings(main.Settings):
    """A run's settings, a flat TOML file; those of all trainers are in `train.main.Settings`."""

    width: int = 1024  # of the heads' inner layer
    answer: int = 256  # tokens of an answer that make labels
    smoothing: float = 0.0025  # of squared steps between neighbours, summed over layers
    learning_rate: float = 5e-4
    warm_up: int = 2000  # steps; then down to 0 at `steps`
    weight_decay: float = 0.01
    clip: float = 0.5  # of each number of a gradient
    start: str = ""  # trained heads to begin with: a file, or the name of those that come with kvjax; of this width


class Labels(NamedTuple):
    """What heads shall say, f32[B, H, T], and where they are asked, bool[B, T]."""

    wanted: jax.Array
    asked: jax.Array


def labels(q: jax.Array, k: jax.Array, batch: dict[str, jax.Array], answer: int) -> Labels:
    """The largest logit of each prompt token over queries of the answer, and over the heads of its group.

    Args:
      q: [B, H, G, T, D], rotated, not scaled.
      k: [B, H, T, D], rotated.
      batch: Its prompt_lengths and lengths i32[B].
      answer: Tokens of the answer, from its first, whose queries count.
    """
    count, scale = q.shape[3], q.shape[-1] ** -0.5
    start, stop = batch["prompt_lengths"], batch["lengths"]
    size = min(QUERIES, answer)

    def block(most, first):
        at = start[:, None] + first + jnp.arange(size)  # i32[B, t]
        counts = (at < jnp.minimum(stop, start + answer)[:, None])[:, None, None, :, None]
        some = jnp.take_along_axis(q, jnp.minimum(at, count - 1)[:, None, None, :, None], axis=3)
        logits = jnp.einsum("bhgtd,bhnd->bhgtn", some, k, preferred_element_type=jnp.float32)
        return jnp.maximum(most, jnp.where(counts, logits, -jnp.inf).max(axis=(2, 3))), None

    lowest = jnp.full(k.shape[:3], -jnp.inf)
    wanted, _ = jax.lax.scan(block, lowest, jnp.arange(0, answer, size))
    asked = (jnp.arange(count) < start[:, None]) & (start < stop)[:, None]
    return Labels(jnp.where(asked[:, None], wanted * scale, 0.0), asked)


def errors(said: jax.Array, target: Labels) -> tuple[jax.Array, jax.Array]:
    """Regression and roughness of one layer, f32[B] each: means over its heads and the tokens asked for.

    Args:
      said: Scores f32[B, H, T].
      target: What they should have been.
    """
    asked, kv_heads = target.asked[:, None], said.shape[1]
    pairs = asked[..., 1:] & asked[..., :-1]
    error = optax.losses.huber_loss(said, target.wanted)  # 0.5 z^2 below 1, |z| - 0.5 beyond
    step = jnp.square(jnp.diff(said, axis=-1))

    def mean(x, where):
        return jnp.where(where, x, 0.0).sum(axis=(1, 2)) / jnp.maximum(kv_heads * where.sum(axis=(1, 2)), 1)

    return mean(error, asked), mean(step, pairs)


def recall(said: jax.Array, target: Labels) -> jax.Array:
    """How much of the labels' top tenth is in the scores' top tenth, f32[B], mean over heads; of equals, the older."""
    many = jnp.maximum(target.asked.sum(axis=-1) // 10, 1)[:, None, None]

    def top(x):
        order = jnp.argsort(jnp.where(target.asked[:, None], -x, jnp.inf), axis=-1, stable=True)
        return jnp.argsort(order, axis=-1) < many

    return ((top(said) & top(target.wanted)).sum(axis=-1) / many[..., 0]).mean(axis=-1)


def gradients(
    trained: Any, params: Params, batch: dict[str, jax.Array], step: jax.Array | None, *, answer: int, smoothing: float
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the mean loss of a batch by the stacked heads, and metrics.

    Args:
      trained: A stacked `RetainingHead`, f32.
      params: A stacked model.
      batch: tokens i32[B, T], prompt_lengths and lengths i32[B].
      step: Not used.
      answer: See `Settings`.
      smoothing: See `Settings`.
    """
    config, positions = params.config, backbone.positions_of(batch)

    def layer(x, block, head):
        made = llama.project(block, x, config, positions)
        q, k, v = backbone.by_head(made, config)
        target = labels(q, k, batch, answer)
        scaled = (q * config.head_dim**-0.5).astype(q.dtype)
        k_pos = jnp.broadcast_to(positions[:, None], k.shape[:3])
        out = attend_slots(scaled, k, v, positions[:, None], k_pos, sliding_window=config.sliding_window).out

        def loss(head):
            said = head(made)
            error, rough = errors(said, target)
            return (error / config.layers + smoothing * rough).mean(), (said, error.mean(), rough.mean())

        gradient, (said, error, rough) = jax.grad(loss, has_aux=True)(head)
        return backbone.finish(block, x, backbone.joined(out), config), (
            gradient,
            error,
            rough,
            recall(said, target).mean(),
        )

    _, (gradient, error, rough, found) = backbone.through_layers(params, layer, batch["tokens"], trained)
    return gradient, {
        "loss": error.mean() + smoothing * rough.sum(),
        "regression": error.mean(),
        "roughness": rough.mean(),
        "recall": found.mean(),
        "recall_by_layer": found,
    }


def schedule(settings: Settings) -> optax.Schedule:
    """From 0 up to the learning rate at `warm_up`, and down to 0 at `steps`, both straight."""
    up = optax.linear_schedule(0.0, settings.learning_rate, settings.warm_up)
    down = optax.linear_schedule(settings.learning_rate, 0.0, settings.steps - settings.warm_up)
    return optax.join_schedules([up, down], [settings.warm_up])


def task(config: Config, settings: Settings) -> Task:
    """What `train.loop.train` takes."""
    per_batch = functools.partial(gradients, answer=settings.answer, smoothing=settings.smoothing)

    def init(key):
        if settings.start:
            begun = heads.load(settings.start, kvjax.load(settings.model, dtype=settings.dtype).params)["locret"]
            if begun[0].settings() != {"width": settings.width}:
                raise ValueError(f"start={settings.start!r} has heads of {begun[0].settings()}, not {settings.width=}.")
            return backbone.stack([jax.tree.map(lambda x: x.astype(jnp.float32), head) for head in begun])
        return backbone.stack(heads.make(heads.RetainingHead, config, width=settings.width, rngs=nnx.Rngs(key)))

    rate = schedule(settings)
    adam = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=settings.weight_decay)
    return Task(
        init=init,
        gradients=per_batch,
        optimizer=optax.chain(optax.clip(settings.clip), adam),
        evaluate=lambda trained, params, batch: per_batch(trained, params, batch, None)[1],
    )


if __name__ == "__main__":
    main.run(Settings, task, schedule, show=("recall",))
