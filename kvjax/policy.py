"""What a method is: a `Policy`, assembled from a scorer and a selection."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax import selects
from kvjax.cache import FREE, Capacity, LayerCache, LayerShape, after, empty, free_losers, resize, write
from kvjax.codecs import Codec, check_codec
from kvjax.counts import whole
from pallas_kernels import dispatch
from pallas_kernels.slot_attention import Packed


class Mass(NamedTuple):
    """A statistic that attention can return: the probability each slot received, summed over queries.

    Its value in `Seen.mass` is f32[B, H, N], the mean over the query heads of the group.

    Attributes:
      last: Only the newest `last` queries of this call count, in each row; None counts all.
      by_query_head: True gives each query head its own, f32[B, H, G, N].
    """

    last: int | None = None
    by_query_head: bool = False

    def __str__(self) -> str:
        """As it is written: settings that are not the default."""
        said = [f"last={self.last}"] * (self.last is not None) + ["by_query_head=True"] * self.by_query_head
        return f"Mass({', '.join(said)})"

    def __lt__(self, other: "Mass") -> bool:
        """An order, which jax wants of the keys of a dictionary; the one that counts all queries comes first."""
        return (self.last or 0, self.by_query_head) < (other.last or 0, other.by_query_head)


class Masses(dict[Mass, jax.Array]):
    """The statistics that a policy asked for; another one is refused by name."""

    def __missing__(self, need):
        asked = ", ".join(map(str, self)) or "nothing"
        raise ValueError(f"the policy reads {need!s}, but asked for {asked}. Add it to its needs.")


class Turn(NamedTuple):
    """A prompt, or a later question, of which a call of attention may read a part only.

    Attributes:
      start: i32[B], position of each row's first token.
      stop: i32[B], position behind its last.
      room: Tokens to leave room for, which are to be generated after it.
    """

    start: jax.Array
    stop: jax.Array
    room: int | jax.Array = 0


class Seen(NamedTuple):
    """What a policy sees of one call, once attention is done.

    Attributes:
      positions: i32[B, T] of this call's tokens; -1 is padding, or a row that has stopped.
      q: [B, H, G, T, D], this call's queries as attention used them (rotated).
      k: [B, H, T, D], this call's keys as they were given: not rotated, if attention rotated them.
      out: [B, H, G, T, D], attention's output.
      lse: f32[B, H, G, T], log-sum-exp of the logits; -inf for a query that saw nothing.
      mass: The statistics that the policy asked for in `needs`.
      low: The same for the slots of the cheaper tier; None without one.
      turn: What this call is a part of; None for a decode step.
    """

    positions: jax.Array
    q: jax.Array
    k: jax.Array
    out: jax.Array
    lse: jax.Array
    mass: Masses
    low: Masses | None = None
    turn: Turn | None = None

    @property
    def now(self) -> jax.Array:
        """i32[B], position of the newest token of each row; -1 for a row without a token in this call."""
        return self.positions.max(axis=-1)

    def done(self, slot: jax.Array) -> jax.Array:
        """The integers `slot`, but not before attention has read all keys and values, so that they can be written."""
        return after(self.out[0, 0, :, 0, 0].sum(), slot)  # each query head of a group is a product of its own


class Scorer(NamedTuple):
    """By what slots are kept.

    Attributes:
      needs: Statistics that attention must return.
      stats: Names of the statistics that it keeps with each slot, with their trailing shapes.
      observe: (cache, seen) -> the new stats.
      score: (cache, seen) -> f32[B, H, N]; higher stays, +inf always.
      carry: (LayerShape) -> state of the layer that is not slot-aligned.
      given: Those of its statistics that must be handed to attention with each token, such as a trained head's score.
    """

    needs: frozenset[Mass]
    stats: dict[str, tuple[int, ...]]
    observe: Callable[[LayerCache, Seen], dict[str, jax.Array]]
    score: Callable[[LayerCache, Seen], jax.Array]
    carry: Callable[[LayerShape], Any] = lambda shape: ()
    given: frozenset[str] = frozenset()


class Form(NamedTuple):
    """How a whole layer is stored, where codecs, which see single tokens, cannot say it.

    Attributes:
      written: (stored LayerCache, k and v [B, H, 1, D], position i32[B]) -> the same with one token more.
      loaded: (stored LayerCache) -> the same with vectors.
      settled: (LayerCache after `update`, with vectors; the stored one before, which in a decode step is what `written`
        made, or None at the start; Seen) -> the layer to store.
      rounded: (stored LayerCache) -> two bool[B, H, N], the slots whose key and whose value is read from k and from v
        of the cache, and no longer held as it was given.
    """

    written: Callable[..., LayerCache]
    loaded: Callable[[LayerCache], LayerCache]
    settled: Callable[[LayerCache, LayerCache | None, Seen | None], LayerCache]
    rounded: Callable[[LayerCache], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A way to keep a cache small: pure functions, and what they want to see.

    Static under jit, compared by identity; the functions in `kvjax.policies` return the same object for the same
    arguments, so nothing is compiled twice.

    Attributes:
      name: What it is called in reports and errors, e.g. "h2o(budget=256, window=64)".
      budget: Most slots of a row and head in use once `update` is done; None keeps every token, and grows.
      needs: Statistics that attention must return; empty costs nothing.
      init: (LayerShape) -> LayerCache of free slots.
      update: (LayerCache with N slots, Seen, capacity) -> LayerCache with `capacity` slots.
      ranks: None where keys are cached rotated, at their true positions. Else keys are cached un-rotated, and
        (LayerCache with N slots) -> i32[B, H or 1, N] gives each slot the position, below N, at which attention reads
        it.
      grow: For a policy without a budget, (tokens of prompts and answers so far, tokens to leave room for) -> the most
        slots that they take; None keeps every token.
      keeps_later: Whether all tokens behind a prompt stay, which `grow` cannot tell from the prompt's own: slots for
        them are asked for beside those in use.
      layers: A policy for each layer, of which this one is made (`plans.by_layer`); () where all are alike.
      keys: How keys are stored (`codecs`); None as they are. The functions above see them projected, and loaded.
      values: How values are stored.
      stepwise: Which calls of several tokens are read token by token, as decode steps: "never"; "turns", all but a
        prompt; or "always".
      bias: None, or (LayerCache, Turn or None) -> f32[B, H, N], added to the attention logits of each slot but the
        query's own; -inf hides a slot, so that a statistic that is `given` can act before attention.
      given: Statistics that must be handed to attention with each token; the others start at 0 unless they are given.
        The model gives those that have the name of trained heads (`kvjax.with_heads`).
      given_in_steps: Whether a decode step must be given them too.
      tail: The last tokens of each turn, which are read once the policy has chosen among those before them.
      make_room: (LayerCache, the tail's tokens i32[B], tokens to leave room for) -> the cache, in which they find free
        slots; called before a tail.
      scorer: By what slots are kept, in policies that `evict` made.
      choose: `update` without the scorer's `observe`, likewise.
      low: The policy of a cheaper tier, which takes the tokens that this one loses; None drops them.
      form: How layers are stored, in a policy that keeps every token in the slot of its position; None as codecs say.
    """

    name: str
    budget: int | None
    needs: frozenset[Mass]
    init: Callable[[LayerShape], LayerCache]
    update: Callable[[LayerCache, Seen, int], LayerCache]
    ranks: Callable[[LayerCache], jax.Array] | None = None
    bias: Callable[[LayerCache, Turn | None], jax.Array] | None = None
    given: frozenset[str] = frozenset()
    given_in_steps: bool = True
    tail: int = 0
    make_room: Callable[[LayerCache, jax.Array, int | jax.Array], LayerCache] | None = None
    grow: Callable[[int, int], int] | None = None
    keeps_later: bool = False
    stepwise: str = "never"
    layers: tuple["Policy", ...] = ()
    keys: Codec | None = None
    values: Codec | None = None
    scorer: Scorer | None = None
    choose: Callable[[LayerCache, Seen, Capacity], LayerCache] | None = None
    low: "Policy | None" = None
    form: Form | None = None

    def of_layers(self, count: int) -> tuple["Policy", ...]:
        """The policies of a model's `count` layers."""
        if self.layers and len(self.layers) != count:
            raise ValueError(f"{self.name} is a plan for {len(self.layers)} layers, and this model has {count}.")
        return self.layers or (self,) * count

    def empty(self, shape: LayerShape) -> LayerCache:
        """Free slots for one layer, marked as this policy's, in the form that its codecs store."""
        slots, below = shape.slots if isinstance(shape.slots, tuple) else (shape.slots, shape.slots)
        shape = dataclasses.replace(shape, slots=slots)
        cache = dataclasses.replace(self.init(shape), made_by=self)
        if self.low is not None:
            cache = dataclasses.replace(cache, low=self.low.empty(dataclasses.replace(shape, slots=below)))
        if shape.slots and self.form is not None:
            return self.form.settled(cache, None, None)
        if shape.slots == 0 or not self.has_codecs:
            return cache
        q = jnp.zeros((shape.batch, shape.kv_heads, 1, 1, shape.head_dim), shape.dtype)
        cache = self.fit(cache, cache.k, cache.v, cache.pos != FREE, q, jnp.full((shape.batch, 1), FREE))
        return self.stored(cache, *self.projected(cache.k, cache.v, cache.fitted))

    def bits(self, cache: LayerCache) -> jax.Array:
        """Bits of a number of each token in this tier, i32[B, H, N], as it is stored; 0 for a free slot.

        A mean over the channels of key and value, rounded. A pruned channel counts as 0 bits, a code as its own
        without its group's step and minimum.
        """
        channels = jax.eval_shape(self.loaded, cache).v.shape[-1]  # those of values are never pruned
        full = 8 * jnp.dtype(cache.dtype).itemsize * channels
        coded = (True, True) if self.form is None else self.form.rounded(cache)

        def stored(x):  # bits of a vector
            if isinstance(x, Packed):
                return x.bits * x.channels
            return sum(8 * leaf.dtype.itemsize * leaf.size // max(cache.pos.size, 1) for leaf in jax.tree.leaves(x))

        both = sum(jnp.where(mine, stored(x), full) for mine, x in zip(coded, (cache.k, cache.v), strict=True))
        return jnp.where(cache.pos != FREE, jnp.round(both / (2 * channels)), 0).astype(jnp.int32)

    @property
    def has_codecs(self) -> bool:
        """Whether keys or values are stored in another form."""
        return self.keys is not None or self.values is not None

    @property
    def begins_exactly(self) -> bool:
        """Whether a sequence's first call must meet no slots: its keys are projected once it is known how."""
        tiers = (self,) if self.low is None else (self, self.low)
        return any(tier.keys is not None and tier.keys.query is not None for tier in tiers)

    def first(self, cache: LayerCache, seen: Seen, capacity: int) -> LayerCache:
        """What is kept of a sequence's first call, whose keys and values attention saw as they came."""
        cache = self.update(cache, seen, capacity)
        if self.form is not None:
            return self.form.settled(cache, None, seen)
        if self.low is None and not self.has_codecs:
            return cache
        k, v, there = (
            jnp.concatenate(parts, axis=2)
            for parts in zip(*((t.k, t.v, t.pos != FREE) for t in cache.tiers), strict=True)
        )
        return self._encoded(cache, k, v, there, seen.q, seen.positions)

    def _encoded(self, cache: LayerCache, k, v, there, q, positions, start: int = 0) -> LayerCache:
        """The layer in the form that its codecs store, which are fitted on k, v [B, H, N, D] and q.

        Those are the vectors of all tiers; this one's slots begin at `start`.
        """
        if self.has_codecs:
            asked = positions != FREE
            fitted_k, k = ((), k) if self.keys is None else self.keys.fitted_to(k, there, q, asked)
            fitted_v, v = ((), v) if self.values is None else self.values.fitted_to(v, there, q, asked)
            cache = cache.with_fitted((asked.any(axis=1), fitted_k, fitted_v))
        stop = start + cache.slots
        cache = self.stored(cache, k[:, :, start:stop], v[:, :, start:stop])
        if self.low is None:
            return cache
        low = self.low._encoded(cache.low, k, v, there, self.asked(q, cache.fitted), positions, stop)
        return dataclasses.replace(cache, low=low)

    def asked(self, q: jax.Array, fitted: Any) -> jax.Array:
        """Queries [B, H, G, T, D] as they meet projected keys."""
        return q if self.keys is None or self.keys.query is None else self.keys.query(q, fitted[1])

    def fit(self, cache: LayerCache, k, v, there, q, positions) -> LayerCache:
        """The layer with what its codecs choose from k and v [B, H, T, D] and queries, in rows that begin here."""
        asked = positions != FREE
        codecs = ((self.keys, k), (self.values, v))
        begins = asked.any(axis=1)

        def choose():
            return tuple(() if codec is None else codec.fit(x, there, q, asked) for codec, x in codecs)

        if cache.fitted == ():
            return cache.with_fitted((begins, *choose()))
        begun, *old = cache.fitted

        def keep(old, new):
            return jnp.where(begun.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        old = tuple(old)
        chosen = jax.lax.cond(begun.all(), lambda: old, lambda: jax.tree.map(keep, old, choose()))  # not every step
        return cache.with_fitted((begun | begins, *chosen))

    def projected(self, k: jax.Array, v: jax.Array, fitted: Any) -> tuple[jax.Array, jax.Array]:
        """k and v [B, H, T, D] as attention and the functions of the policy see them."""
        if not self.has_codecs:
            return k, v
        return tuple(
            x if codec is None else codec.project(x, own)
            for codec, x, own in zip((self.keys, self.values), (k, v), fitted[1:], strict=True)
        )

    def stored(self, cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
        """The layer with projected keys and values in the form that its codecs store."""
        k = k if self.keys is None else self.keys.store(k)
        v = v if self.values is None else self.values.store(v)
        return dataclasses.replace(cache, k=k, v=v)

    def later(self, cache: LayerCache, stored: LayerCache, seen: Seen, capacity: Capacity) -> LayerCache:
        """What is kept after a call that is not the first; `cache` was loaded from `stored`, and extended if T > 1."""
        updated = self.update(cache, seen, capacity)
        if self.form is not None:
            return self.form.settled(updated, stored, seen)
        return self.settled(updated, cache, stored if seen.positions.shape[1] == 1 else None)

    def written(self, cache: LayerCache, k, v, position: jax.Array, stats: dict | None = None) -> LayerCache:
        """The stored layer with one token more in each row, of projected k and v [B, H, 1, D]; stats f32[B, H]."""
        if self.form is not None:
            return self.form.written(cache, k, v, position)
        new = self.stored(cache, k, v)
        return write(cache, *jax.tree.map(lambda leaf: leaf[:, :, 0], (new.k, new.v)), position, stats)

    def loaded(self, cache: LayerCache) -> LayerCache:
        """The layer with projected keys and values as vectors."""
        if self.form is not None:
            return self.form.loaded(cache)
        k = cache.k if self.keys is None else self.keys.load(cache.k).astype(cache.dtype)
        v = cache.v if self.values is None else self.values.load(cache.v).astype(cache.dtype)
        return dataclasses.replace(cache, k=k, v=v)

    def read(self, stored: LayerCache, loaded: LayerCache) -> tuple[Any, Any]:
        """Keys and values for attention: as they are stored where a kernel may read codes, else as vectors."""
        if dispatch.preferred() == "reference" or self.form is not None:
            return loaded.k, loaded.v
        pairs = ((stored.k, loaded.k), (stored.v, loaded.v))
        return tuple(own if isinstance(own, Packed) else vectors for own, vectors in pairs)

    def settled(self, cache: LayerCache, held: LayerCache, stored: LayerCache | None) -> LayerCache:
        """The layer as it is stored, after `update` has made `cache` of `held`, which was loaded from `stored`."""
        if stored is not None and cache.k is held.k and cache.v is held.v:  # nothing was written into them
            return dataclasses.replace(cache, k=stored.k, v=stored.v)
        return self.stored(cache, cache.k, cache.v) if self.has_codecs else cache

    def needed(self, tokens: int, room: int = 0) -> int:
        """Slots that `tokens`, and `room` more, take in this tier: one above the budget, where the next is written."""
        if self.budget is not None:
            return self.budget + 1
        return tokens + room if self.grow is None else self.grow(tokens, room)

    def capacity(self, tokens: int, room: int = 0) -> Capacity:
        """Slots to allocate for a sequence of `tokens` with room for more, in each tier.

        On a TPU a multiple of 16: it lays out other numbers of slots in another order of the axes, and a kernel that
        reads them would have all of them copied in every step.
        """
        own = _aligned(self.needed(tokens, room))
        return own if self.low is None else (own, self.low.capacity(tokens, room))

    def capacity_after(self, cache: LayerCache, more: int, room: int = 0, seen: int | None = None) -> Capacity:
        """Slots to allocate for `more` tokens in a layer that has seen `seen`; None takes all its slots for taken.

        A slot that is still free from an earlier turn is not asked for again.
        """
        if self.low is not None:
            own = dataclasses.replace(self, low=None).capacity_after(cache, more, room, seen)
            return own, self.low.capacity_after(cache.low, more, room, seen)
        if self.keeps_later and seen != 0:
            used = cache.slots if seen is None else int((cache.pos != FREE).sum(axis=-1).max())
            needed = used + more + room
        elif seen is not None:
            needed = self.needed(seen + more, room)
        elif self.budget is not None:
            needed = self.needed(more)
        else:
            needed = min(cache.slots + more + room, self.needed(2**31, room))  # some that grow do so up to a bound
        return cache.slots if needed <= cache.slots else _aligned(needed)

    def __repr__(self) -> str:
        return self.name


def _aligned(slots: int) -> int:
    return -(-slots // 16) * 16 if dispatch.preferred() == "tpu" else slots


def evict(
    scorer: Scorer,
    *,
    budget: int | None,
    select: Callable = selects.top_k,
    fate: Callable | None = None,
    ranks: Callable | None = None,
    bias: Callable | None = None,
    stepwise: str = "never",
    limit: Callable | None = None,
    grow: Callable[[int, int], int] | None = None,
) -> Policy:
    """A policy that scores every slot, keeps what `select` chooses and frees the rest.

    Args:
      scorer: By what slots are kept.
      budget: Slots kept in each row and head; None keeps all, or what `limit` says.
      select: (score f32[B, H, N], pos i32[B, H, N], budget, most: how many slots above the budget may be occupied) ->
        kept bool[B, H, N].
      fate: (cache, kept, seen, losers: the most that a row and head may lose) -> the cache without its losers, once it
        is settled what becomes of them (see `folds`). None drops them.
      ranks: See `Policy`.
      bias: See `Policy`.
      stepwise: See `Policy`.
      limit: (seen) -> i32[B], slots kept in each row, where that is not a constant; see `grow`.
      grow: See `Policy`.
    """

    if not isinstance(scorer, Scorer):
        raise ValueError(f"evict: scorer={scorer!r} is no Scorer; kvjax.scorers makes some, such as attention_mass().")
    if budget is not None:
        budget = whole("evict", "budget", budget, least=1, mend="None keeps every token.")
    for name, given in (("select", select), ("fate", fate)):
        if given is not None and not callable(given):
            raise ValueError(
                f"evict: {name}={given!r} must be a function, such as those of kvjax.{name}s or kvjax.folds."
            )
    if budget is None and limit is None and (fate is not None or select is not selects.top_k):
        raise ValueError(
            "evict: without a budget or a limit nothing leaves, and select and fate have no use. Give one."
        )
    every_call = select is not selects.top_k  # others may free slots within the budget, and more than have come

    def init(shape):
        return empty(shape, scorer.stats, scorer.carry(shape))

    def choose(cache, seen, capacity):
        # What was there before this call is within the budget, and so no more than its own tokens have to go.
        most = max(0, min(cache.slots - (budget or 0), seen.positions.shape[1]))
        if limit is not None:
            kept = selects.first(scorer.score(cache, seen), cache.pos, limit(seen)[:, None, None])
        elif budget is not None and (cache.slots > budget or every_call):
            kept = select(scorer.score(cache, seen), cache.pos, budget, most)
        else:
            return resize(cache, capacity)
        if fate is None:
            return resize(free_losers(cache, kept), capacity)
        return resize(fate(cache, kept, seen, cache.slots if every_call else most), capacity)

    def update(cache, seen, capacity):
        return choose(dataclasses.replace(cache, stats=scorer.observe(cache, seen)), seen, capacity)

    return Policy(
        "evict", budget, scorer.needs, init, update, ranks, bias, scorer.given, grow=grow, stepwise=stepwise,
        scorer=scorer, choose=choose,
    )  # fmt: skip


def store(policy: Policy, *, keys: Codec | None = None, values: Codec | None = None) -> Policy:
    """The same policy, with keys or values stored in another form: `store(h2o(256, window=64), keys=integer(4))`.

    A prompt's own attention is exact, or that of its first chunk; then what is kept is fitted, projected and stored.
    Later tokens are stored as they arrive, and attended to in that form. What a policy folds is stored again, which
    rounds it again. Under the caller's jit a cache that is given counts as one that has seen tokens.

    Raises:
      ValueError: If the codecs do not fit the policy, or one another.
    """
    check_policy(policy)
    for kind, codec in (("keys", keys), ("values", values)):
        if codec is not None:
            check_codec(f"store: {kind}=", codec)
    if policy.layers:
        raise ValueError(f"store: {policy.name} is made of a policy for each layer; store those.")
    if policy.has_codecs:
        raise ValueError(f"store: {policy.name} already has codecs; join them with codecs.pipe.")
    if policy.low is not None and keys is not None and keys.narrows:
        raise ValueError(
            f"store: {policy.name} has a lower tier, which takes keys of full width; give {keys.name} to that one."
        )
    for kind, given, below in (
        ("keys", keys, policy.low and policy.low.keys),
        ("values", values, policy.low and policy.low.values),
    ):
        if policy.low is not None and given is not None and below is None:
            raise ValueError(
                f"store: {policy.name} has a lower tier, whose {kind} would stay as they are. Store those of "
                f"{policy.low.name}, which it was made with, or take kivi(channels=)."
            )
    if policy.form is not None:
        raise ValueError(f"store: {policy.name} has a form of its own, which no codec can read.")
    if keys is None and values is None:
        raise ValueError("store: give a codec, keys= or values=, such as codecs.integer(4).")
    if values is not None and values.query is not None:
        raise ValueError(f"store: values cannot be stored as {values.name}: there is no query to make up for it.")
    if keys is not None and keys.query is not None and policy.ranks is not None:
        raise ValueError(
            f"store: {policy.name} gives keys new positions, and {keys.name} keeps or scales single channels, which "
            f"cannot be turned. Take codecs.integer."
        )
    return _store(policy, keys, values)


@functools.cache
def _store(policy, keys, values):
    said = [f"{kind} {codec.name}" for kind, codec in (("keys", keys), ("values", values)) if codec is not None]
    return dataclasses.replace(policy, name=f"{policy.name} with {'; '.join(said)}", keys=keys, values=values)


def check_policy(policy: Any) -> None:
    """Refuses what is no policy."""
    if not isinstance(policy, Policy):
        raise ValueError(
            f"policy={policy!r} is no policy. Make one with kvjax.policies, such as kvjax.policies.tova(budget=256)."
        )


def check_budget(name: str, budget: int) -> None:
    """Refuses a budget without a slot."""
    if budget < 1:
        raise ValueError(f"{name}: budget={budget} leaves no slot; it must be at least 1.")


def method(make: Callable[..., Policy]) -> Callable[..., Policy]:
    """Gives the policies of `make` their name, and the same object for the same arguments."""
    signature = inspect.signature(make)

    @functools.cache
    def made(settings: tuple[tuple[str, Any, type], ...]) -> Policy:
        said = [f"{key}={value!r}" for key, value, _ in settings if value != signature.parameters[key].default]
        name = f"{make.__name__}({', '.join(said)})"
        return dataclasses.replace(make(**{key: value for key, value, _ in settings}), name=name)

    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        counts = {key for key, parameter in signature.parameters.items() if parameter.annotation is int}
        settings = []
        for key, value in bound.arguments.items():
            value = whole(make.__name__, key, value) if key in counts else value
            if value.__hash__ is None:
                raise ValueError(f"{make.__name__}: {key}={value!r} is a {type(value).__name__}, which no setting is.")
            settings.append((key, value, type(value)))  # the type, since True == 1.0
        return made(tuple(settings))

    return wrapper
