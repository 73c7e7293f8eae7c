"""Heads in safetensors files, whose header says to which model they belong."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from kvjax.checks import check_params
from kvjax.files import write_whole
from kvjax.heads.attention_gate import AttentionGate, LinearGate
from kvjax.heads.locret import RetainingHead
from kvjax.models.llama import Config, Params, with_heads
from kvjax.policy import Policy

VERSION = 1
KINDS = {kind.__name__: kind for kind in (AttentionGate, LinearGate, RetainingHead)}
BUNDLED = ("smollm2-locret",)  # files beside this one
NEAR = 0.03  # how far norms of the weights may differ between two roundings of one model


def make(kind: type, config: Config, *, rngs: nnx.Rngs, **settings) -> tuple[nnx.Module, ...]:
    """New heads of one kind, one for each layer of a model."""
    return tuple(kind(config, rngs=rngs, **settings) for _ in range(config.layers))


def save(path: str | os.PathLike, heads: Sequence[nnx.Module], params: Params, **note: str) -> None:
    """Writes heads, in f16, for the model of `params`; a file that was there is replaced when the new one is whole.

    Args:
      path: Of the file.
      heads: One for each layer, all of one kind and with the same settings.
      params: The model that they were trained for.
      **note: What else the header shall say, such as where they come from.

    Raises:
      ValueError: If they do not fit together, or numbers of the heads do not fit into f16.
      OSError: If the file cannot be written.
    """
    check_params(params)
    if not isinstance(heads, Sequence) or not heads or type(heads[0]) not in KINDS.values():
        raise ValueError(
            f"heads.save: heads is a {type(heads).__name__}, and must be a sequence of one for each layer, of a kind "
            f"of {sorted(KINDS)}, such as heads.make returns."
        )
    kind, settings = type(heads[0]), heads[0].settings()
    if [_form(head) for head in heads] != [_form(_shapes(kind, params.config, settings))] * params.config.layers:
        raise ValueError(
            f"heads.save: {len(heads)} heads {kind.__name__}({settings}) do not fit a model of {params.config.layers} "
            f"layers and this shape; give one for each layer, made for this model, all with the same settings."
        )
    with np.errstate(over="ignore"):
        tensors = {
            f"{layer}.{name}": np.ascontiguousarray(np.asarray(leaf, np.float16))
            for layer, head in enumerate(heads)
            for name, leaf in _named(head).items()
        }
    if wild := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(
            f"heads.save: {wild[:3]} hold numbers that are not finite, or beyond 65504, the largest of f16. Nothing "
            f"was written; take an earlier checkpoint, or train with a smaller learning_rate."
        )
    header = {
        "version": VERSION,
        "method": kind.method,
        "kind": kind.__name__,
        "settings": settings,
        "backbone": _backbone(params),
        "note": note,
    }
    write_whole(path, to_bytes(tensors, metadata={"kvjax": json.dumps(header)}))


def load(source: str | os.PathLike, params: Params) -> dict[str, tuple[nnx.Module, ...]]:
    """Heads for the model of `params`, as `kvjax.with_heads` takes them: {method: one for each layer}.

    Args:
      source: A file, or "smollm2-locret", which comes with the package.
      params: The model. The heads get the dtype of its weights.

    Raises:
      ValueError: If there is no such file, it is damaged, of another version, or of another model; nothing is
        allocated then.
    """
    check_params(params)
    path = Path(__file__).parent / f"{source}.safetensors" if source in BUNDLED else Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"heads.load: there is no file {str(source)!r}. With the package come {', '.join(BUNDLED)}.")
    try:
        with safe_open(path, "numpy") as file:
            header = _header(path, file.metadata())
            _check_backbone(path, header["backbone"], params)
            kind = KINDS[header["kind"]]
            try:
                shapes = _shapes(kind, params.config, header["settings"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"heads.load: {path}: no {kind.__name__} has its settings ({error}).") from error
            names = {f"{layer}.{name}" for layer in range(params.config.layers) for name in _named(shapes)}
            if set(file.keys()) != names:
                raise ValueError(
                    f"heads.load: {path} lacks {sorted(names - set(file.keys()))[:3]}, or has what does not belong, "
                    f"{sorted(set(file.keys()) - names)[:3]}. Save the heads anew."
                )
            for name, wanted in _named(shapes).items():
                found = {tuple(file.get_slice(f"{layer}.{name}").get_shape()) for layer in range(params.config.layers)}
                if found != {wanted.shape}:
                    raise ValueError(f"heads.load: {path}: {name} has shapes {sorted(found)}, not {wanted.shape}.")
            dtype = params.embed.dtype

            def read(layer):
                leaves = [jnp.asarray(file.get_tensor(f"{layer}.{name}"), dtype) for name in _named(shapes)]
                return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

            return {kind.method: tuple(read(layer) for layer in range(params.config.layers))}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"heads.load: {path} is damaged, or no safetensors file ({error}). Get it anew.") from error


def with_heads_for(params: Params, policies: Iterable[Policy]) -> Params:
    """The model with the heads that `policies` want: its own, or else those that come with the package.

    Raises:
      ValueError: If there are none for this model.
    """
    wanted = {name for policy in policies for own in policy.of_layers(params.config.layers) for name in own.given}
    found = dict(params.heads)
    for name in sorted(wanted - found.keys()):
        try:
            found |= load(f"smollm2-{name.replace('_', '-')}", params)
        except ValueError as error:
            raise ValueError(f"{name} needs heads trained for this model, and none come with kvjax: {error}") from error
    return with_heads(params, found)


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """What the file says about itself, checked."""
    try:
        header = json.loads((metadata or {})["kvjax"])
        version, kind = header["version"], header["kind"]
        dict(header["settings"]), dict(header["backbone"]["config"]), np.asarray(header["backbone"]["norms"], float)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"heads.load: {path} does not say that it holds heads of kvjax. Was it saved by heads.save?"
        ) from None
    if version != VERSION:
        raise ValueError(
            f"heads.load: {path} has version {version}, and this kvjax reads {VERSION}. Take the other kvjax."
        )
    if kind not in list(KINDS):
        raise ValueError(f"heads.load: {path} holds heads of kind {kind!r}; this kvjax knows {sorted(KINDS)}.")
    return header


def _backbone(params: Params) -> dict[str, Any]:
    """What tells a model from another, whatever its weights are rounded to: its shape, and a norm for each layer."""
    norms = [float(jnp.linalg.norm(block.wq.astype(jnp.float32))) for block in params.blocks]
    return {"config": json.loads(json.dumps(dataclasses.asdict(params.config))), "norms": norms}


def _check_backbone(path: Path, theirs: dict[str, Any], params: Params) -> None:
    ours = _backbone(params)
    for key, value in ours["config"].items():
        if theirs["config"].get(key) != value:
            raise ValueError(
                f"heads.load: {path} is for a model with {key}={theirs['config'].get(key)!r}, and this one has "
                f"{value!r}. Heads fit the model that they were trained on; train some for this one."
            )
    same_length = np.shape(theirs["norms"]) == np.shape(ours["norms"])
    if not (same_length and np.allclose(theirs["norms"], ours["norms"], rtol=NEAR, atol=0)):
        raise ValueError(
            f"heads.load: {path} is for a model of the same shape with other weights. Heads fit the model that they "
            f"were trained on; train some for this one."
        )


def _shapes(kind: type, config: Config, settings: dict[str, Any]) -> nnx.Module:
    """A head of shapes alone."""
    return jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), **settings))


def _form(head: nnx.Module) -> tuple[Any, list[tuple[int, ...]]]:
    """What two heads must have in common to be of one kind, with the same settings, for the same model."""
    return jax.tree.structure(head), [leaf.shape for leaf in jax.tree.leaves(head)]


def _named(head: nnx.Module) -> dict[str, Any]:
    """Its leaves by name, in the order of the tree."""
    return {path[0].name: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(head)}
