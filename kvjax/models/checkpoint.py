"""What a model file offers, and how it becomes `Params`: checked whole first, then read tensor by tensor."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from kvjax.models.llama import Block, Config, Params

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Stored(NamedTuple):
    """One tensor that still lies in its file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # in the precision of the file, or f32 where that was quantised


class Text(NamedTuple):
    """What a model file says about text. Everything but the ids may be missing."""

    tokenizer: "Tokenizer | None" = None
    chat_template: str | None = None
    stop_tokens: tuple[int, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None


class Checkpoint(NamedTuple):
    """A model that was looked at and not yet read.

    Attributes:
      origin: The file or directory, for errors.
      config: As the file states it.
      tied: Whether the embedding is also the output matrix.
      biased: Whether q, k and v have biases.
      names: For each field of `Params` and `Block`, what the file calls it; `{}` stands for the layer.
      tensors: What the file holds, less what means nothing to the architecture (stored rotary tables).
      text: Tokenizer, chat template and special tokens.
    """

    origin: str
    config: Config
    tied: bool
    biased: bool
    names: Mapping[str, str]
    tensors: Mapping[str, Stored]
    text: Text


def read_params(checkpoint: Checkpoint, dtype: jnp.dtype) -> Params:
    """Reads every tensor into `dtype`, one by one, after all of them have passed their checks.

    Raises:
      ValueError: If the config contradicts itself, or a tensor is missing, has another shape than the
        config gives it, or belongs to no part of the architecture.
    """
    config = checkpoint.config
    _check_config(config, checkpoint.origin)
    outer, inner = _shapes(config, checkpoint.tied, checkpoint.biased)
    _check_tensors(checkpoint, outer, inner)

    def read(field, layer=None):
        return jnp.array(checkpoint.tensors[checkpoint.names[field].format(layer)].read(), dtype)

    blocks = tuple(
        Block(
            **{
                field.name: read(field.name, layer) if field.name in inner else None
                for field in dataclasses.fields(Block)
            }
        )
        for layer in range(config.layers)
    )
    return Params(
        embed=read("embed"),
        blocks=blocks,
        norm=read("norm"),
        unembed=None if checkpoint.tied else read("unembed"),
        heads={},
        config=config,
    )


def _shapes(config: Config, tied: bool, biased: bool) -> tuple[dict, dict]:
    """The shapes of the fields of `Params`, and of those of one `Block`; absent fields are left out."""
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    outer = {"embed": (config.vocab, config.width), "norm": (config.width,)}
    if not tied:
        outer["unembed"] = (config.vocab, config.width)
    inner = {
        "attention_norm": (config.width,),
        "wq": (q, config.width),
        "wk": (kv, config.width),
        "wv": (kv, config.width),
        "wo": (config.width, q),
        "mlp_norm": (config.width,),
        "w_gate": (config.mlp_width, config.width),
        "w_up": (config.mlp_width, config.width),
        "w_down": (config.width, config.mlp_width),
    }
    if biased:
        inner |= {"bq": (q,), "bk": (kv,), "bv": (kv,)}
    return outer, inner


def _check_config(config: Config, origin: str) -> None:
    for name in ("layers", "width", "mlp_width", "q_heads", "kv_heads", "head_dim", "vocab", "context"):
        if getattr(config, name) < 1:
            raise ValueError(f"{origin}: {name}={getattr(config, name)} must be at least 1. Is the file damaged?")
    if config.q_heads % config.kv_heads:
        raise ValueError(
            f"{origin}: {config.q_heads} query heads are no multiple of {config.kv_heads} key-value heads. "
            f"Is the file damaged?"
        )
    if not 0 <= config.norm_epsilon < 1:
        raise ValueError(f"{origin}: the norm's epsilon={config.norm_epsilon} is outside 0..1. Is the file damaged?")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(f"{origin}: sliding_window={config.sliding_window} must be at least 1. Is the file damaged?")
    if config.head_dim % 2:
        raise ValueError(f"{origin}: head_dim={config.head_dim} is odd; rotary positions need pairs of channels.")


def _check_tensors(checkpoint: Checkpoint, outer: dict, inner: dict) -> None:
    names, tensors, origin = checkpoint.names, checkpoint.tensors, checkpoint.origin
    wanted = set()
    layers = (
        (names[field].format(i), shape) for i in range(checkpoint.config.layers) for field, shape in inner.items()
    )
    for name, shape in itertools.chain(((names[field], shape) for field, shape in outer.items()), layers):
        wanted.add(name)
        if name not in tensors:
            raise ValueError(
                f"{origin}: the tensor {name} {list(shape)} is missing, which its config asks for. Fetch the file "
                f"again, or check that it is a whole model of this architecture."
            )
        if tensors[name].shape != shape:
            raise ValueError(
                f"{origin}: the tensor {name} is {list(tensors[name].shape)}, and the config makes it "
                f"{list(shape)}. Do config and weights belong to the same model?"
            )
    strangers = sorted(set(tensors) - wanted)
    if strangers:
        raise ValueError(
            f"{origin}: {len(strangers)} tensors have no place in a {checkpoint.config.architecture} model of "
            f"{checkpoint.config.layers} layers: {', '.join(strangers[:3])}... Leaving them out would change what the "
            f"model says. Supported are Llama, Mistral and Qwen2, without adapters, experts or biases on outputs."
        )
