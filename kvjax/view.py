"""A page that shows which tokens of a prompt each layer and head keeps, how whole, and what they merge: `kvjax view`.

The page is `view.html` with the title and the data filled in; it needs no network and no server. The data is packed,
one bit a position, layer and head, so a prompt of 8000 tokens in 32 layers of 8 heads is a page of 0.5 MB.
"""

import base64
import dataclasses
import functools
import html
import importlib.resources
import json
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import FREE, Cache, LayerShape, resize
from kvjax.decoding import prefill
from kvjax.models.llama import Params
from kvjax.policy import Policy


def kept(cache: Cache) -> np.ndarray:
    """Which positions of row 0 each layer and head keeps: bool[L, H, n], where n is the row's length."""
    length = int(cache.length[0])
    held = np.zeros((len(cache.layers), cache.config.kv_heads, length), bool)
    for i, layer in enumerate(cache.layers):
        pos = np.concatenate([np.asarray(tier.pos[0]) for tier in layer.tiers], axis=-1)  # [H, N]
        head, slot = np.nonzero(pos != FREE)
        held[i, head, pos[head, slot]] = True
    return held


def reduced(cache: Cache) -> np.ndarray:
    """Which of the kept positions of row 0 are not held as they came, but at fewer bits or channels: bool[L, H, n]."""
    held = np.zeros((len(cache.layers), cache.config.kv_heads, int(cache.length[0])), bool)
    for i, layer in enumerate(cache.layers):
        for tier in layer.tiers:
            head, slot = np.nonzero(np.asarray(tier.made_by.reduced(tier)[0]))
            held[i, head, np.asarray(tier.pos[0])[head, slot]] = True
    return held


def merged(params: Params, policy: Policy, tokens: jax.Array) -> np.ndarray | None:
    """Into which position each position of a prompt went, where its value lives on in another's: i32[L, H, n].

    -1 for those that are kept, or lost; None for policies that fold nothing, or do not choose when a prompt ends.
    Reads the prompt i32[1, n] once more, with values that carry a mark for each token; folding is linear in them.
    """
    if policy.layers or policy.form is not None or policy.low is not None or policy.stepwise == "always":
        return None
    _, cache = prefill(params, _marking(policy), tokens)
    into = np.stack([np.asarray(layer.carry[0]) for layer in cache.layers])
    return into if (into >= 0).any() else None


@functools.cache
def _marking(policy: Policy) -> Policy:
    """A policy that keeps nothing but which token of a prompt `policy` folds into which, i32[B, H, n]."""
    small = 1e-3  # of a mark beside a value: methods that compare values must not be led by it

    def init(shape):
        return dataclasses.replace(policy.init(shape), stats={}, carry=shape.layer)

    def update(cache, seen, capacity):
        batch, heads, slots, head_dim = cache.k.shape
        shape = LayerShape(batch, heads, slots, head_dim, cache.k.dtype, cache.carry)
        fresh, v = policy.init(shape), cache.v.astype(jnp.float32)
        size = small * jnp.sqrt(jnp.square(v).mean())
        marks = jnp.broadcast_to(size * jnp.eye(slots), (batch, heads, slots, slots))
        own = dataclasses.replace(
            cache, v=jnp.concatenate([v, marks], axis=-1), stats=fresh.stats, carry=fresh.carry, made_by=policy
        )
        done = policy.update(own, seen, policy.capacity(capacity))
        share = done.v[..., head_dim:] / size * (done.pos != FREE)[..., None]  # [B, H, C, n], of each token in a slot
        target = jnp.take_along_axis(done.pos, share.argmax(axis=2), axis=2)
        moved = (share.max(axis=2) > 1e-2) & (target != cache.pos)
        kept = (done.pos[:, :, :, None] == cache.pos[:, :, None]).any(axis=2)
        empty = resize(dataclasses.replace(cache, k=cache.k[:, :, :1], v=cache.v[:, :, :1], pos=cache.pos[:, :, :1]), 1)
        return empty.with_carry(jnp.where(moved & ~kept, target, -1))

    return Policy("marking", None, policy.needs, init, update, policy.ranks)


def page(
    tokens: Sequence[str],
    kept: np.ndarray,
    *,
    title: str,
    subtitle: str = "",
    reduced: np.ndarray | None = None,
    merged: np.ndarray | None = None,
) -> str:
    """One HTML page: the text with each token shaded by how many heads keep it, and the kept positions per head.

    Layers, heads and positions count from 0. The address picks what is shown first: `#layer=3`, `#layer=3&token=12`.

    Args:
      tokens: The text of each token, n of them; together they are the prompt.
      kept: bool[L, H, n], see `kept`.
      title: Heading of the page, such as the policy.
      subtitle: A line beneath it, such as the model.
      reduced: bool[L, H, n], see `reduced`; None where all that is kept is whole.
      merged: i32[L, H, n], see `merged`; None where nothing is folded.

    Returns:
      The page, without a reference to anything outside it.

    Raises:
      ValueError: If `kept` has another shape or type, or there is nothing to show.
    """
    if kept.ndim != 3 or kept.dtype != bool or 0 in kept.shape:
        raise ValueError(
            f"page: kept is {kept.dtype}{list(kept.shape)} and must be bool[L, H, n], none of them 0, "
            f"as kvjax.view.kept returns it."
        )
    if len(tokens) != kept.shape[-1]:
        raise ValueError(
            f"page: there are {len(tokens)} tokens and kept has {kept.shape[-1]} positions. "
            f"Give the text of every token that the cache has seen."
        )
    for name, more in (("reduced", reduced), ("merged", merged)):
        if more is not None and more.shape != kept.shape:
            raise ValueError(
                f"page: {name} has shape {list(more.shape)} and must have that of kept, {list(kept.shape)}."
            )
    layers, heads, _ = kept.shape
    data = {
        "layers": layers,
        "heads": heads,
        "tokens": list(tokens),
        "kept": _bits(kept),
        "reduced": None if reduced is None or not reduced.any() else _bits(reduced),
        "merged": None if merged is None else base64.b64encode(merged.astype("<i4").tobytes()).decode(),
    }
    fill = {"title": html.escape(title), "subtitle": html.escape(subtitle), "data": _embed(data)}
    template = importlib.resources.files("kvjax").joinpath("view.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], template)  # one pass: a title may hold braces


def _bits(held: np.ndarray) -> str:
    return base64.b64encode(np.packbits(held, axis=-1, bitorder="little")).decode()


def _embed(data: object) -> str:
    """JSON that may stand inside a script element: without `<`, `>` and `&` no tag can open or close there."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
