"""What a method is: a `Policy`, assembled from a scorer and a selection."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kvjax import selects
from kvjax.cache import LayerCache, LayerShape, after, empty, free_losers, resize
from kvjax.counts import whole


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


class Seen(NamedTuple):
    """What a policy sees of one call, once attention is done.

    Attributes:
      positions: i32[B, T] of this call's tokens; -1 is padding, or a row that has stopped.
      q: [B, H, G, T, D], this call's queries as attention used them (rotated).
      k: [B, H, T, D], this call's keys as they were given: not rotated, if attention rotated them.
      out: [B, H, G, T, D], attention's output.
      lse: f32[B, H, G, T], log-sum-exp of the logits; -inf for a query that saw nothing.
      mass: The statistics that the policy asked for in `needs`.
    """

    positions: jax.Array
    q: jax.Array
    k: jax.Array
    out: jax.Array
    lse: jax.Array
    mass: Masses

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
    """

    needs: frozenset[Mass]
    stats: dict[str, tuple[int, ...]]
    observe: Callable[[LayerCache, Seen], dict[str, jax.Array]]
    score: Callable[[LayerCache, Seen], jax.Array]
    carry: Callable[[LayerShape], Any] = lambda shape: ()


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
        (pos i32[B, H, N]) -> i32[B, H or 1, N] gives each slot the position, below N, at which attention reads it.
      grow: For a policy without a budget, (tokens seen) -> the most slots that they take; None keeps every token.
      layers: A policy for each layer, of which this one is made (`plans.by_layer`); () where all are alike.
      stepwise: Which calls of several tokens are read token by token, as decode steps: "never"; "turns", all but a
        prompt; or "always".
      bias: None, or (LayerCache) -> f32[B, H, N], added to the attention logits of each slot but the query's own.
    """

    name: str
    budget: int | None
    needs: frozenset[Mass]
    init: Callable[[LayerShape], LayerCache]
    update: Callable[[LayerCache, Seen, int], LayerCache]
    ranks: Callable[[jax.Array], jax.Array] | None = None
    bias: Callable[[LayerCache], jax.Array] | None = None
    grow: Callable[[int], int] | None = None
    stepwise: str = "never"
    layers: tuple["Policy", ...] = ()

    def of_layers(self, count: int) -> tuple["Policy", ...]:
        """The policies of a model's `count` layers."""
        if self.layers and len(self.layers) != count:
            raise ValueError(f"{self.name} is a plan for {len(self.layers)} layers, and this model has {count}.")
        return self.layers or (self,) * count

    def empty(self, shape: LayerShape) -> LayerCache:
        """Free slots for one layer, marked as this policy's."""
        return dataclasses.replace(self.init(shape), made_by=self)

    def capacity(self, tokens: int) -> int:
        """Slots to allocate for a sequence of `tokens`: one above the budget, where the next token is written."""
        if self.budget is not None:
            return self.budget + 1
        return tokens if self.grow is None else self.grow(tokens)

    def capacity_after(self, slots: int, tokens: int) -> int:
        """Slots to allocate for `tokens` more in a cache that has `slots`, all of them taken."""
        return self.capacity(tokens) + (slots if self.budget is None else 0)

    def __repr__(self) -> str:
        return self.name


def evict(
    scorer: Scorer,
    *,
    budget: int | None,
    select: Callable = selects.top_k,
    fate: Callable | None = None,
    ranks: Callable | None = None,
    bias: Callable | None = None,
    stepwise: str = "never",
) -> Policy:
    """A policy that scores every slot, keeps what `select` chooses and frees the rest.

    Args:
      scorer: By what slots are kept.
      budget: Slots kept in each row and head; None keeps all.
      select: (score f32[B, H, N], pos i32[B, H, N], budget) -> kept bool[B, H, N].
      fate: (cache, kept, seen, losers: the most that a row and head may lose) -> cache, before the losers are freed:
        what becomes of them (see `folds`). None drops them.
      ranks: See `Policy`.
      bias: See `Policy`.
      stepwise: See `Policy`.
    """

    def init(shape):
        return empty(shape, scorer.stats, scorer.carry(shape))

    def update(cache, seen, capacity):
        cache = dataclasses.replace(cache, stats=scorer.observe(cache, seen))
        if budget is not None and cache.slots > budget:
            kept = select(scorer.score(cache, seen), cache.pos, budget)
            if fate is not None:
                cache = fate(cache, kept, seen, cache.slots - budget)
            cache = free_losers(cache, kept)
        return resize(cache, capacity)

    return Policy("evict", budget, scorer.needs, init, update, ranks, bias, stepwise=stepwise)


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
    def made(settings: tuple[tuple[str, Any], ...]) -> Policy:
        said = [f"{key}={value!r}" for key, value in settings if value != signature.parameters[key].default]
        name = f"{make.__name__}({', '.join(said)})"
        return dataclasses.replace(make(**dict(settings)), name=name)

    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        counts = {key for key, parameter in signature.parameters.items() if parameter.annotation is int}
        settings = bound.arguments.items()
        return made(
            tuple((key, whole(make.__name__, key, value) if key in counts else value) for key, value in settings)
        )

    return wrapper
