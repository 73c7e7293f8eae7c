"""A page that shows which tokens of a prompt each layer and head keeps: `kvjax view`.

The page is `view.html` with the title and the data filled in; it needs no network and no server. The data is packed,
one bit a position, layer and head, so a prompt of 8000 tokens in 32 layers of 8 heads is a page of 0.5 MB.
"""

import base64
import html
import importlib.resources
import json
import re
from collections.abc import Sequence

import numpy as np

from kvjax.cache import FREE, Cache


def kept(cache: Cache) -> np.ndarray:
    """Which positions of row 0 each layer and head keeps: bool[L, H, n], where n is the row's length."""
    length = int(cache.length[0])
    held = np.zeros((len(cache.layers), cache.config.kv_heads, length), bool)
    for i, layer in enumerate(cache.layers):
        pos = np.concatenate([np.asarray(tier.pos[0]) for tier in layer.tiers], axis=-1)  # [H, N]
        head, slot = np.nonzero(pos != FREE)
        held[i, head, pos[head, slot]] = True
    return held


def page(tokens: Sequence[str], kept: np.ndarray, *, title: str, subtitle: str = "") -> str:
    """One HTML page: the text with each token shaded by how many heads keep it, and the kept positions per head.

    Layers, heads and positions count from 0. The address picks what is shown first: `#layer=3`, `#layer=3&token=12`.

    Args:
      tokens: The text of each token, n of them; together they are the prompt.
      kept: bool[L, H, n], see `kept`.
      title: Heading of the page, such as the policy.
      subtitle: A line beneath it, such as the model.

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
    layers, heads, _ = kept.shape
    data = {
        "layers": layers,
        "heads": heads,
        "tokens": list(tokens),
        "kept": base64.b64encode(np.packbits(kept, axis=-1, bitorder="little")).decode(),
    }
    fill = {"title": html.escape(title), "subtitle": html.escape(subtitle), "data": _embed(data)}
    template = importlib.resources.files("kvjax").joinpath("view.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], template)  # one pass: a title may hold braces


def _embed(data: object) -> str:
    """JSON that may stand inside a script element: without `<`, `>` and `&` no tag can open or close there."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
