"""The store: a layer's cache is a set of slots with no order, and `pos` says which token a slot holds.

    pos   [ 0 | 7 | -1 | 5 ]      token 9 arrives         pos   [ 0 | 7 | 9 | 5 ]
    k     [ a | h |  . | f ]      ---- write ---->        k     [ a | h | j | f ]

Evicting a token is freeing its slot (pos = -1); nothing else moves. Letters in shape comments: B batch, T tokens in
this call, C slot capacity, N slots in hand, H kv_heads, Hq q_heads, G group (Hq / H), D head_dim.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.slot_write import slot_write
from pallas_kernels.topk_slots import topk_slots

if TYPE_CHECKING:
    from kvjax.models.llama import Config
    from kvjax.policy import Policy

FREE = -1
Capacity = int | tuple[int, int]  # slots of a layer; of its two tiers, if it has two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The slots of one layer. Slot order carries no meaning; `pos` does.

    Methods that choose the same tokens for all heads (streaming_llm, tova) rely on this: their heads hold them in the
    same slots. So permute slots of all heads alike, or not at all.
    """

    k: Any  # [B, H, N, D], or a codec's tree of [B, H, N, ...]; rotated, unless the policy gives positions anew
    v: Any  # [B, H, N, D], or a codec's tree
    pos: jax.Array  # i32[B, H, N], position in the sequence; -1 marks a free slot
    stats: dict[str, jax.Array]  # f32[B, H, N, ...], owned by scorers; 0 for a token that has just arrived
    carry: Any  # per-layer state that is not slot-aligned, or ()
    made_by: "Policy | None" = dataclasses.field(default=None, metadata={"static": True})  # nobody else can read it
    dtype: Any = dataclasses.field(default=None, metadata={"static": True})  # of the vectors, however they are stored
    fitted: Any = ()  # what codecs chose for this layer, with `begun` bool[B]; () without codecs
    low: Any = ()  # the LayerCache of a cheaper tier, which takes what this one loses; () without one

    @property
    def slots(self) -> int:
        """How many slots there are, free ones included."""
        return self.pos.shape[-1]

    @property
    def tiers(self) -> "tuple[LayerCache, ...]":
        """This one, and the one below it if there is one."""
        return (self,) if self.low == () else (self, self.low)

    @property
    def capacity(self) -> "Capacity":
        """Its slots, and those of the tier below if there is one."""
        return self.slots if self.low == () else (self.slots, self.low.slots)

    def slot_aligned(self) -> tuple[Any, ...]:
        """What belongs to a token and moves with it: k, v, pos and stats."""
        return self.k, self.v, self.pos, self.stats

    def with_slots(self, aligned: tuple[Any, ...]) -> "LayerCache":
        """The same layer with other slots, given as `slot_aligned` gives them."""
        k, v, pos, stats = aligned
        return dataclasses.replace(self, k=k, v=v, pos=pos, stats=stats)

    def with_carry(self, carry: Any) -> "LayerCache":
        """The same slots beside another state of the layer."""
        return dataclasses.replace(self, carry=carry)

    def with_fitted(self, fitted: Any) -> "LayerCache":
        """The same slots beside other choices of their codecs."""
        return dataclasses.replace(self, fitted=fitted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of a model: a value, threaded through prefill, step and decode.

    Attributes:
      layers: One `LayerCache` a layer; layers may differ in capacity.
      length: i32[B], tokens each row has seen, which is the position of its next one.
      policy: The policy that fills it (static).
      config: The model that it belongs to (static).
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    policy: "Policy" = dataclasses.field(metadata={"static": True})
    config: "Config" = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a policy needs to allocate the slots of one layer."""

    batch: int
    kv_heads: int
    slots: Capacity
    head_dim: int
    dtype: Any
    layer: int  # index of the layer, for policies that draw at random


def empty(shape: LayerShape, stats: dict[str, tuple[int, ...]], carry: Any = ()) -> LayerCache:
    """Free slots only. `stats` names each statistic with its trailing shape, () for one number a slot."""
    lead = (shape.batch, shape.kv_heads, shape.slots)
    return LayerCache(
        k=jnp.zeros((*lead, shape.head_dim), shape.dtype),
        v=jnp.zeros((*lead, shape.head_dim), shape.dtype),  # its own buffer: one array used twice cannot be donated
        pos=jnp.full(lead, FREE, jnp.int32),
        stats={name: jnp.zeros((*lead, *trailing), jnp.float32) for name, trailing in stats.items()},
        carry=carry,
        dtype=jnp.dtype(shape.dtype),
    )


def extend(
    cache: LayerCache, k: Any, v: Any, positions: jax.Array, stats: dict[str, jax.Array] | None = None
) -> LayerCache:
    """Appends T slots: k, v [B, H, T, D] at `positions` i32[B, T] or i32[B, H, T], -1 for a slot left free.

    Where the cache holds a codec's trees, so are k and v. Statistics start at 0, but for
    those that are given, [B, H, T, ...].
    """
    batch, heads, count = *cache.pos.shape[:2], positions.shape[-1]
    pos = jnp.broadcast_to(positions if positions.ndim == 3 else positions[:, None, :], (batch, heads, count))
    zeros = {name: jnp.zeros((batch, heads, count, *stat.shape[3:]), stat.dtype) for name, stat in cache.stats.items()}
    new = (k, v, pos, zeros | (stats or {}))
    if cache.slots == 0:
        return cache.with_slots(new)
    return cache.with_slots(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), cache.slot_aligned(), new))


def write(
    cache: LayerCache, k: Any, v: Any, position: jax.Array, stats: dict[str, jax.Array] | None = None
) -> LayerCache:
    """Puts one token, k and v [B, H, D], into the first free slot of each row and head, in place.

    `position` is i32[B], or i32[B, H] where heads differ. Where the cache holds a codec's trees, so are k and v.
    Statistics start at 0, but for those that are given, [B, H, ...].

    A row whose position is -1 is left as it is. A row without a free slot loses the token: policies leave one, and
    `kvjax.step` checks it for the policies that grow.
    """
    batch, heads, slots = cache.pos.shape
    position = position if position.ndim == 2 else position[:, None]
    slot = jnp.argmin(cache.pos, axis=-1)  # [B, H], the first -1
    free = jnp.take_along_axis(cache.pos, slot[..., None], axis=-1)[..., 0] == FREE
    slot = jnp.where(free & (position >= 0), slot, slots)  # out of range: dropped
    stats = {name: jnp.zeros(stat.shape[:2] + stat.shape[3:]) for name, stat in cache.stats.items()} | (stats or {})
    buffers, tree = jax.tree.flatten(cache.slot_aligned())
    if dispatch.preferred() != "reference" and max(buffer.ndim for buffer in buffers) <= 4:
        rows = jax.tree.leaves((k, v, jnp.broadcast_to(position, slot.shape), stats))
        return cache.with_slots(jax.tree.unflatten(tree, slot_write(buffers, rows, slot)))
    row, head = jnp.arange(batch)[:, None], jnp.arange(heads)[None, :]

    def put(buffer, new):
        return buffer.at[row, head, slot].set(new.astype(buffer.dtype), mode="drop", unique_indices=True)

    here = jnp.arange(slots) == slot[..., None]  # [B, H, N]

    def begin(name, stat):
        return jnp.where(here.reshape(here.shape + (1,) * (stat.ndim - 3)), stats[name][:, :, None], stat)

    return cache.with_slots(
        (
            jax.tree.map(put, cache.k, k),
            jax.tree.map(put, cache.v, v),
            jnp.where(here, position[..., None], cache.pos),
            {name: begin(name, stat) for name, stat in cache.stats.items()},
        )
    )


def take(cache: LayerCache, index: jax.Array) -> LayerCache:
    """Gathers slots `index` i32[B, H, M]: all that belongs to a token moves together."""

    def gather(leaf):
        return jnp.take_along_axis(leaf, index.reshape(index.shape + (1,) * (leaf.ndim - 3)), axis=2)

    return cache.with_slots(jax.tree.map(gather, cache.slot_aligned()))


def take_or_free(cache: LayerCache, index: jax.Array) -> LayerCache:
    """As `take`, where an index beyond the slots stands for a free one."""
    there = index < cache.slots
    taken = take(cache, jnp.minimum(index, cache.slots - 1))
    return dataclasses.replace(taken, pos=jnp.where(there, taken.pos, FREE))


def free_losers(cache: LayerCache, kept: jax.Array) -> LayerCache:
    """Frees every slot that is not in `kept` bool[B, H, N]."""
    return dataclasses.replace(cache, pos=jnp.where(kept, cache.pos, FREE))


def after(anchor: jax.Array, x: jax.Array) -> jax.Array:
    """The integers x, but not before `anchor` is known: XLA on a CPU ignores optimization barriers.

    An order that XLA does not see costs buffers. It would compute what depends on nothing for all layers at once, and
    where a buffer is written while its old content is still to be read, it copies the buffer.
    """
    return x + (anchor.ravel()[0] > jnp.inf).astype(x.dtype)  # 0, whatever the anchor


def resize(cache: LayerCache, capacity: Capacity) -> LayerCache:
    """The same tokens in `capacity` slots; a row that holds more loses the last ones in slot order."""
    if isinstance(capacity, tuple):
        capacity, below = capacity
        cache = dataclasses.replace(cache, low=resize(cache.low, below))
    if cache.slots > capacity > 0 and dispatch.preferred() != "reference":
        slot = jnp.broadcast_to(jnp.arange(cache.slots, dtype=jnp.int32), cache.pos.shape)
        first = topk_slots(jnp.zeros(cache.pos.shape), jnp.where(cache.pos == FREE, FREE, slot), capacity)
        return take_or_free(cache, first.index)
    if cache.slots > capacity:
        occupied_first = jnp.argsort(cache.pos == FREE, axis=-1, stable=True)
        return take(cache, occupied_first[..., :capacity])
    if cache.slots < capacity:
        spare = capacity - cache.slots

        def pad(leaf, fill=0):
            widths = [(0, 0)] * leaf.ndim
            widths[2] = (0, spare)
            return jnp.pad(leaf, widths, constant_values=fill)

        k, v, pos, stats = cache.slot_aligned()
        return cache.with_slots((jax.tree.map(pad, k), jax.tree.map(pad, v), pad(pos, FREE), jax.tree.map(pad, stats)))
    return cache


def nbytes(tree: Any) -> int:
    """Bytes of every buffer in a cache (or any pytree of arrays or `jax.ShapeDtypeStruct`)."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
