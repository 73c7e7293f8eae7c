"""A page that shows which tokens of a prompt each layer and head keeps, at how many bits, and what they merge.

`kvjax view` writes it: `view.html` with the title and the data filled in, which needs no network and no server. What is
kept is packed, one bit a position, layer and head, so a prompt of 8000 tokens in 32 layers of 8 heads is a page of
0.5 MB; bits of two kinds double that, and merges take 4 bytes where what is kept takes a bit.
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
from kvjax.folds import at, first_best
from kvjax.models.llama import Params
from kvjax.policy import Policy
from pallas_kernels import dispatch

AT_ONCE = 512  # tokens whose values are followed together: each is a channel more
LARGE = 2.0**64  # of a mark, so that the smallest weight of f32 leaves something of it
NOT_SOUGHT = "Merged tokens were not looked for; they can be shown for a prompt that is read whole."


def kept(cache: Cache) -> np.ndarray:
    """Which positions of row 0 each layer and head keeps: bool[L, H, n], where n is the row's length."""
    length = int(cache.length[0])
    held = np.zeros((len(cache.layers), cache.config.kv_heads, length), bool)
    for i, layer in enumerate(cache.layers):
        pos = np.concatenate([np.asarray(tier.pos[0]) for tier in layer.tiers], axis=-1)  # [H, N]
        head, slot = np.nonzero(pos != FREE)
        held[i, head, pos[head, slot]] = True
    return held


def bits(cache: Cache) -> np.ndarray:
    """Bits of a number of each kept position of row 0, see `Policy.bits`, and 0 for the others: u8[L, H, n]."""
    held = np.zeros((len(cache.layers), cache.config.kv_heads, int(cache.length[0])), np.uint8)
    for i, layer in enumerate(cache.layers):
        for tier in layer.tiers:
            pos = np.asarray(tier.pos[0])  # [H, N]
            head, slot = np.nonzero(pos != FREE)
            held[i, head, pos[head, slot]] = np.asarray(tier.made_by.bits(tier)[0])[head, slot]
    return held


def reduced(cache: Cache) -> np.ndarray:
    """Which of the kept positions of row 0 are not held as they came, but at fewer bits or channels: bool[L, H, n]."""
    full = np.array([8 * jnp.dtype(layer.dtype).itemsize for layer in cache.layers])
    return kept(cache) & (bits(cache) < full[:, None, None])


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merged` found. Where nothing was merged, indexing fails: look at `why` first.

    Attributes:
      into: i32[L, H, n], the kept position that has the largest part of each position's value; -1 for those that are
        kept, or lost. None where none was merged. Indexing this object indexes it.
      parts: i32[L, H, n], how many kept positions have a part of it; or None.
      why: Why there is none, for the reader of the page; "" where there are some.
    """

    into: np.ndarray | None
    parts: np.ndarray | None
    why: str

    def __getitem__(self, index) -> np.ndarray:
        return self.into[index]


def merged(params: Params, policy: Policy, tokens: jax.Array) -> Merged:
    """Into which position each position of a prompt went, where its value lives on in another's.

    Reads the prompt i32[1, n] once more, whole, and follows each token's value through the choice at its end, however
    small the part of it that is left. Values are followed before codecs round them.
    """
    parts = policy.of_layers(len(params.blocks))
    if any(own.stepwise == "always" for own in parts):
        return Merged(None, None, "Merged tokens are not shown: this method reads a prompt token by token.")
    if any(own.given for own in parts):
        return Merged(None, None, "Merged tokens are not shown: this method must be given statistics of the tokens.")
    _, cache = prefill(params, _tracing(policy), tokens)
    into, parts = (np.stack([np.asarray(layer.carry[i][0]) for layer in cache.layers]) for i in range(2))
    return Merged(into, parts, "") if (into >= 0).any() else Merged(None, None, "No token is merged into another.")


@functools.cache
def _tracing(policy: Policy) -> Policy:
    """A policy that keeps nothing but where `policy` puts the value of each token of a prompt: carry i32[2][B, H, n].

    What it puts into a slot is linear in the values once the choice is made. So the share of a token is a derivative:
    along a channel more, which is 0 and cannot lead the choice, but in whose direction this token alone has a 1.
    """
    if policy.layers:
        return dataclasses.replace(policy, layers=tuple(map(_tracing, policy.layers)))

    def init(shape):
        return dataclasses.replace(policy.init(shape), stats={}, carry=shape.layer)

    def update(cache, seen, capacity):
        batch, heads, slots, head_dim = cache.k.shape
        shape = LayerShape(batch, heads, slots, head_dim, cache.dtype, cache.carry)
        fresh, count = policy.init(shape), min(slots, AT_ONCE)
        low = () if policy.low is None else policy.low.empty(dataclasses.replace(shape, slots=0))

        def follow(first):  # the tokens in slots first.., as many as `mark` has channels
            def values_after(v):
                own = dataclasses.replace(
                    cache, v=v, stats=fresh.stats, carry=fresh.carry, low=low, made_by=policy, dtype=v.dtype
                )
                tiers = policy.update(own, seen, policy.capacity(slots)).tiers
                return tuple(jnp.concatenate([getattr(tier, leaf) for tier in tiers], axis=2) for leaf in ("v", "pos"))

            v = jnp.pad(cache.v.astype(jnp.float32), [(0, 0)] * 3 + [(0, count)])
            mark = LARGE * (jnp.arange(slots)[:, None] - first == jnp.arange(count))
            mark = jnp.broadcast_to(jnp.pad(mark, [(0, 0), (head_dim, 0)]), v.shape)
            _, share, pos = jax.jvp(values_after, (v,), (mark,), has_aux=True)
            share = jnp.where((pos != FREE)[..., None], jnp.abs(share[..., head_dim:]), 0.0).swapaxes(2, 3)
            place, _ = first_best(share, pos[:, :, None])
            return at(pos, place), (share > 0).sum(axis=-1), pos

        def joined(x):  # [blocks, B, H, count] -> [B, H, slots]
            return jnp.moveaxis(x, 0, 2).reshape(batch, heads, -1)[..., :slots]

        with dispatch.compiling_for("reference"):  # a kernel has no derivative
            into, parts, pos = jax.lax.map(follow, jnp.arange(0, slots, count))
        into, parts = joined(into), joined(parts)
        gone = (parts > 0) & ~(pos[0][:, :, None] == cache.pos[..., None]).any(axis=-1)
        empty = resize(dataclasses.replace(cache, k=cache.k[:, :, :1], v=cache.v[:, :, :1], pos=cache.pos[:, :, :1]), 1)
        return empty.with_carry((jnp.where(gone, into, -1), jnp.where(gone, parts, 0)))

    return Policy("tracing", None, policy.needs, init, update, policy.ranks)


def page(
    tokens: Sequence[str],
    kept: np.ndarray,
    *,
    title: str,
    subtitle: str = "",
    bits: np.ndarray | None = None,
    merged: Merged | None = None,
) -> str:
    """One HTML page: the text with each token shaded by how many heads keep it, and the kept positions per head.

    Layers, heads and positions count from 0. The address picks what is shown first: `#layer=3`, `#layer=3&token=12`.

    Args:
      tokens: The text of each token, n of them; together they are the prompt.
      kept: bool[L, H, n], see `kept`.
      title: Heading of the page, such as the policy.
      subtitle: A line beneath it, such as the model.
      bits: u8[L, H, n], see `bits`; None says nothing about them, and all that is kept looks alike.
      merged: See `merged`; None says that it was not looked for.

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
    merged = Merged(None, None, NOT_SOUGHT) if merged is None else merged
    for name, more in (("bits", bits), ("merged.into", merged.into), ("merged.parts", merged.parts)):
        if more is not None and more.shape != kept.shape:
            raise ValueError(
                f"page: {name} has shape {list(more.shape)} and must have that of kept, {list(kept.shape)}."
            )
    layers, heads, _ = kept.shape
    data = {
        "layers": layers,
        "heads": heads,
        "tokens": list(tokens),
        "kept": _packed(kept),
        "bits": None if bits is None else _by_level(np.where(kept, bits, 0)),
        "into": None if merged.into is None else _base64(merged.into.astype("<i4")),
        "parts": None if merged.parts is None or merged.parts.max() < 2 else _base64(merged.parts.astype("<i4")),
        "why": merged.why,
    }
    fill = {"title": html.escape(title), "subtitle": html.escape(subtitle), "data": _embed(data)}
    template = importlib.resources.files("kvjax").joinpath("view.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], template)  # one pass: a title may hold braces


def _by_level(bits: np.ndarray) -> dict:
    """Numbers of bits other than 0, ascending, and for each kept position which of them it is, a plane for a digit."""
    levels = np.unique(bits[bits > 0])
    which = np.searchsorted(levels, bits)
    planes = [_packed((which >> digit & 1).astype(bool)) for digit in range(max(len(levels) - 1, 0).bit_length())]
    return {"levels": levels.tolist(), "planes": planes}


def _packed(held: np.ndarray) -> str:
    return _base64(np.packbits(held, axis=-1, bitorder="little"))


def _base64(x: np.ndarray) -> str:
    return base64.b64encode(x.tobytes()).decode()


def _embed(data: object) -> str:
    """JSON that may stand inside a script element: without `<`, `>` and `&` no tag can open or close there."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
