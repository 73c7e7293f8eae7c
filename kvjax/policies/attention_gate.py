"""Attention-Gate, eviction by a trained gate before attention. arXiv:2410.12876."""

import jax
import jax.numpy as jnp

from kvjax import selects
from kvjax.cache import FREE, LayerCache, empty, free_losers, resize
from kvjax.counts import real, whole
from kvjax.policy import Policy, Seen, Turn, method


@method
def attention_gate(budget: int | None = None, *, threshold: float = 0.5, sinks: int = 0, last: int = 1) -> Policy:
    """Drops the tokens of a prompt that a trained gate does not let pass, before any other token attends to them.

    Its model needs gates, `kvjax.with_heads(params, kvjax.heads.load(...))`: before a layer attends, its gate reads the
    prompt and gives each token and kv_head a probability to stay. A token always sees itself. What comes after the
    prompt, answers and later turns, is kept.

    Bytes: L B H budget (2 D b + 8) + 4 B, and a slot more for each token to come; see `kvjax.report` for those in use.

    Args:
      budget: Slots for a prompt's tokens: of those that pass, the most probable. None has a slot for each token of the
        prompt, and so saves nothing but attention.
      threshold: Tokens with a higher probability pass; 0 keeps all.
      sinks: First tokens that stay in any case.
      last: Last tokens of the prompt that stay in any case.

    Source: reviews, digests and abstracts of the paper; neither its text nor code was to be had. Certain is what a gate
    decides, and when; the rest is a reconstruction: a flag for each kv_head, the tokens that stay in any case, and the
    cap. The choice depends on the prompt alone.
    """
    if budget is not None:
        budget = whole("attention_gate", "budget", budget, least=1, mend="None keeps all that pass.")
    threshold = real("attention_gate", "threshold", threshold, least=0, most=1, mend="It is a probability.")
    sinks = whole("attention_gate", "sinks", sinks, least=0)
    last = whole("attention_gate", "last", last, least=0)

    def init(shape):
        return empty(shape, {"attention_gate": ()})

    def stays(cache: LayerCache, turn: Turn) -> jax.Array:
        """bool[B, H, N]; rows whose prompt was read before keep what they have."""
        always = (cache.pos < sinks) | (cache.pos >= (turn.stop - last)[:, None, None])
        score = jnp.where(always, jnp.inf, cache.stats["attention_gate"])
        stay = (score > threshold) & (cache.pos != FREE)
        if budget is not None and cache.slots > budget:
            stay &= selects.top_k(score, cache.pos, budget)
        return stay | (turn.start > 0)[:, None, None]

    def bias(cache: LayerCache, turn: Turn | None) -> jax.Array | None:
        return None if turn is None else jnp.where(stays(cache, turn), 0.0, -jnp.inf)

    def update(cache: LayerCache, seen: Seen, capacity: int) -> LayerCache:
        if seen.turn is None:
            return cache
        return resize(free_losers(cache, stays(cache, seen.turn)), capacity)

    def grow(tokens, room):
        return (tokens if budget is None else min(tokens, budget)) + room

    return Policy(
        "attention_gate",
        None,
        frozenset(),
        init,
        update,
        bias=bias,
        given=frozenset({"attention_gate"}),
        given_in_steps=False,
        grow=grow,
        keeps_later=True,
    )
