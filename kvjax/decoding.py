"""Prefill, step and decode: the model's layers over a cache.

A token's way: `llama.project` gives q, k, v; `attention.attend` writes k and v into the layer's slots, attends over
them and lets the policy free the losers; `llama.finish` adds the MLP. Prefill runs the layers one by one, each a
compiled program shared by all of them, so that one layer at most is ever at full length; under the caller's own jit
they become one program. Decoding is one unrolled program with the cache donated and written in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import kernels
from kvjax.attention import attend
from kvjax.cache import FREE, Cache, Capacity, LayerCache, LayerShape, resize
from kvjax.checks import (
    as_array,
    check_cache,
    check_context,
    check_given,
    check_ids,
    check_lengths,
    check_params,
    check_step,
    check_stop,
    check_tokens,
    given_to_layer,
    known,
)
from kvjax.counts import whole
from kvjax.models import llama
from kvjax.models.llama import Block, Config, Params
from kvjax.policy import Policy, Turn, check_policy
from kvjax.sampling import Draw, make_draw, row_keys, sample

BURST = 16  # tokens that one call of the decode program may produce before the host looks


class Decoded(NamedTuple):
    """What `decode` returns.

    Attributes:
      tokens: i32[B, max_new_tokens], 0 after a row's end.
      lengths: i32[B], tokens before the stop token, which is neither counted nor cached.
      cache: Has seen the prompt and all of `tokens`; goes into the next turn.
      logits: f32[B, V], what comes next.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Cache
    logits: jax.Array


def prefill(
    params: Params,
    policy: Policy,
    tokens: jax.Array,
    *,
    lengths: jax.Array | Sequence[int] | None = None,
    cache: Cache | None = None,
    chunk: int | None = None,
    room: int = 0,
    given: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, Cache]:
    """Reads tokens into a new cache, or into one that has seen an earlier part of the sequence.

    Args:
      params: The model.
      policy: Made by `kvjax.policies`; that of `cache`, if there is one.
      tokens: i32[B, T], padded on the right.
      lengths: i32[B], tokens of each row, 1..T; None takes T for all.
      cache: What earlier tokens left behind; it is not changed, and can be continued again.
      chunk: Reads this many tokens at a time, and evicts after each, so that no layer is ever at full length. The
        policy then chooses from less; None reads all at once and evicts at the end.
      room: Tokens to leave room for, for policies that keep every token (`full`); the others have their budget.
      given: What is known of the tokens beforehand, {name of a statistic of the policy: [B, T], or [L, B, H, T] where
        layers and kv_heads differ}; see `attend`.

    Returns:
      Logits f32[B, V] of each row's last token, and the cache.

    Raises:
      ValueError: If arguments do not fit together; token ids, lengths and the model's context are checked where
        their values are known, that is not under jit.
    """
    check_params(params)
    check_policy(policy)
    tokens = as_array("tokens", tokens)
    batch, count = check_tokens(tokens)
    if chunk is not None:
        chunk = whole("prefill", "chunk", chunk, least=1, mend="None reads the prompt in one piece.")
    chunk = min(chunk or count, count)
    room = whole("prefill", "room", room, least=0, mend="It counts tokens that are to follow.")
    lengths = check_lengths(lengths, batch, count)
    if cache is not None:
        check_cache(params, policy, cache, batch)
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    check_context(params.config, policy, start, lengths, chunk, room)
    check_ids(params.config, tokens, lengths)
    tokens = jnp.asarray(tokens, jnp.int32)

    layers = [None] * len(params.blocks) if cache is None else list(cache.layers)
    policies = policy.of_layers(len(layers))
    given, names = _given(params, policy, given, (batch, count))
    seen = int(np.max(start)) if known(start) else None

    capacities = [
        own.capacity(count, room) if layer is None else own.capacity_after(layer, count, room, seen)
        for own, layer in zip(policies, layers, strict=True)
    ]
    for own in set(policies) if chunk < count and not seen else ():
        if own.stepwise == "turns":
            raise ValueError(f"prefill: {own.name} must see a prompt whole; leave out chunk={chunk}.")
        for name, head in heads_of_layer(params, own, 0, given).items():
            if not head.alone:
                raise ValueError(
                    f"prefill: the heads {name!r} of this model look at other tokens, and must see a prompt whole; "
                    f"leave out chunk={chunk}."
                )
    if chunk < count or (chunk == 1 and cache is not None):
        # Every chunk meets the slots that the last one leaves, so one program serves them all.
        if cache is None:
            layers = list(empty_cache(params, policy, batch, tokens=count, room=room).layers)
        layers = [_resize(layer, capacity) for layer, capacity in zip(layers, capacities, strict=True)]
    if seen == 0 or cache is None:  # where a sequence begins, some policies must know it: their first call is exact
        begins = [own.stepwise == "turns" or own.begins_exactly for own in policies]
        layers = [None if begin else layer for begin, layer in zip(begins, layers, strict=True)]
    if chunk < count:
        pad = -count % chunk
        tokens, given = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]), (tokens, given))

    turn = Turn(start, start + lengths, room)
    last = jnp.zeros((batch, params.config.width), params.embed.dtype)
    for at in range(0, count, chunk):
        positions = jnp.arange(at, at + chunk)
        positions = jnp.where(positions < lengths[:, None], start[:, None] + positions, FREE)
        x, angles = _embed(params, tokens[:, at : at + chunk], positions)
        for i, (block, own) in enumerate(zip(params.blocks, policies, strict=True)):
            theirs = {name: x[..., at : at + chunk] for name, x in given_to_layer(given, names[i], i).items()}
            x, layers[i] = run_layer(
                block, x, layers[i], positions, angles, i, own, params.config, capacities[i], theirs,
                heads_of_layer(params, own, i, theirs), turn,
            )  # fmt: skip
        last = _keep_last(last, x, lengths - 1 - at)
    return _logits(params, last), Cache(tuple(layers), start + lengths, policy, params.config)


def _given(params, policy, given, shape):
    """What was given as arrays, checked, and the names of each layer's statistics, if there is any."""
    config = params.config
    names = [()] * config.layers
    given = {} if given is None else given
    if isinstance(given, dict) and given:
        layers = jax.eval_shape(lambda: empty_cache(params, policy, shape[0])).layers
        names = [layer.stats for layer in layers]
    known = frozenset().union(*names)
    given = check_given(policy, known, given, shape, (config.layers, config.kv_heads))
    return given, names


def step(
    params: Params, policy: Policy, token: jax.Array, cache: Cache, *, given: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, Cache]:
    """Reads one token a row.

    Compile it with the cache donated, and nothing of the cache's size is copied:
    `jax.jit(kvjax.step, donate_argnames="cache")`. Outside jit the given cache stays as it is.

    Args:
      params: The model.
      policy: That of `cache`.
      token: i32[B]; -1 in a row that has stopped, which then changes nothing.
      cache: What prefill or an earlier step returned.
      given: As in `prefill`, of one token: [B], or [L, B, H].

    Returns:
      Logits f32[B, V] of what follows (arbitrary for a row that has stopped), and the cache.

    Raises:
      ValueError: If arguments do not fit together; outside jit also if the policy keeps every token and no slot is
        free: prefill with room=. Under jit the logits of such a row are nan.
    """
    check_params(params)
    check_policy(policy)
    token = as_array("token", token)
    check_step(params, policy, token, cache)
    return step_with(run_layer, params, policy, token, cache, given)


def step_with(layer_program: Callable, params: Params, policy: Policy, token: jax.Array, cache: Cache, given=None):
    """`step` with a choice of the program that runs each layer: `run_layer`, or `run_layer_in_place`."""
    given, names = _given(params, policy, given, token.shape)
    active = token >= 0
    positions = jnp.where(active, cache.length, FREE)[:, None]
    x, angles = _embed(params, token[:, None], positions)
    layers = []
    policies = policy.of_layers(len(cache.layers))
    for i, (block, layer) in enumerate(zip(params.blocks, cache.layers, strict=True)):
        theirs = {name: x[..., None] for name, x in given_to_layer(given, names[i], i).items()}
        x, layer = layer_program(
            block, x, layer, positions, angles, i, policies[i], params.config, layer.capacity, theirs,
            heads_of_layer(params, policies[i], i, theirs) if policies[i].given_in_steps else None,
        )  # fmt: skip
        layers.append(layer)
    return _logits(params, x[:, 0]), Cache(tuple(layers), cache.length + active, policy, params.config)


def heads_of_layer(params: Params, policy: Policy, layer: int, given: dict[str, jax.Array]) -> dict[str, Any]:
    """The trained heads of one layer whose scores `policy` wants, and was not `given`."""
    return {name: params.heads[name][layer] for name in sorted(policy.given - given.keys()) if name in params.heads}


def _layer(
    block: Block,
    x: jax.Array,
    cache: LayerCache | None,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    layer: int,
    policy: Policy,
    config: Config,
    capacity: Capacity,
    given: dict[str, jax.Array] | None = None,
    heads: dict[str, Any] | None = None,
    turn: Turn | None = None,
) -> tuple[jax.Array, LayerCache]:
    """One layer over this call's tokens: the new residual stream x [B, T, width] and the new slots."""
    projected = llama.project(block, x, config, positions)
    learned = {name: head(projected) for name, head in (heads or {}).items()}
    attended, cache = attend(
        projected.q,
        projected.k,
        projected.v,
        cache,
        policy,
        positions=positions,
        rope=config.rope,
        angles=angles,
        sliding_window=config.sliding_window,
        capacity=capacity,
        layer=layer,
        given=learned | (given or {}),
        turn=turn,
    )
    return llama.finish(block, x, attended, config), cache


run_layer = kernels.jit(_layer, static_argnames=("config", "capacity"))
run_layer_in_place = kernels.jit(_layer, static_argnames=("config", "capacity"), donate_argnames="cache")
_logits = jax.jit(llama.logits)
_resize = kernels.jit(resize, static_argnames=("capacity",))


@jax.jit
def _embed(params, tokens, positions):
    """The residual stream [B, T, width] of tokens, and the angles of their positions, which all layers share."""
    return llama.embed(params, tokens), params.config.rope.angles(positions, params.config.head_dim)


@jax.jit
def _keep_last(last, x, index):
    """The row of x [B, T, width] at `index` i32[B], where it lies in this piece; else what `last` [B, width] holds."""
    here = (index >= 0) & (index < x.shape[1])
    found = jnp.take_along_axis(x, index.clip(0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(here[:, None], found, last)


def decode(
    params: Params,
    policy: Policy,
    tokens: jax.Array,
    *,
    max_new_tokens: int,
    lengths: jax.Array | Sequence[int] | None = None,
    cache: Cache | None = None,
    chunk: int | None = None,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | int | None = None,
    given: dict[str, jax.Array] | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Decoded:
    """Reads a prompt and answers it.

    Args:
      params: The model.
      policy: Made by `kvjax.policies`; that of `cache`, if there is one.
      tokens: i32[B, T], padded on the right.
      max_new_tokens: Tokens to generate for a row at most.
      lengths: i32[B], tokens of each row, 1..T; None takes T for all.
      cache: What an earlier turn left behind; it is not changed.
      chunk: See `prefill`.
      stop: Token ids that end a row.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_k: Only the `top_k` likeliest tokens can be drawn; None allows all.
      top_p: Only the likeliest tokens that together reach this probability can be drawn; None allows all.
      key: For drawing: a seed, a key, or one key a row. The same key gives the same tokens.
      given: See `prefill`; the statistics of tokens that follow start at 0.
      on_token: Called with i32[B] for each token as it comes, -1 in rows that have stopped.

    Returns:
      A `Decoded`.

    Raises:
      ValueError: See `prefill`.
    """
    check_params(params)
    max_new_tokens = whole(
        "decode", "max_new_tokens", max_new_tokens, least=1, mend="kvjax.prefill reads and says nothing."
    )
    tokens = as_array("tokens", tokens)
    check_policy(policy)
    for own in policy.of_layers(params.config.layers):
        if missing := sorted(own.given - params.heads.keys()):
            raise ValueError(
                f"decode: {own.name} must be given {missing} with each token, and tokens to come are not known. Take "
                f"kvjax.prefill and kvjax.step, which have given=, or give the model heads: kvjax.with_heads."
            )
    draw, stop = make_draw(temperature, top_k, top_p), check_stop(params.config, stop)
    keys = row_keys(key, check_tokens(tokens)[0])
    logits, new_cache = prefill(
        params, policy, tokens, lengths=lengths, cache=cache, chunk=chunk, room=max_new_tokens, given=given
    )
    state = _State(new_cache, logits, jnp.ones(logits.shape[0], bool), keys)

    if not known(logits):  # under the caller's jit: one loop on the device
        if on_token is not None:
            raise ValueError(
                "decode: on_token cannot be called from within jit; call decode outside, or drop on_token."
            )
        state, new = _burst(params, policy, state, max_new_tokens, draw, stop, max_new_tokens)
        return _decoded(state, new)

    # The state is donated, and may hold what is the caller's: the keys, and of a cache what prefill hands on.
    state = state._replace(keys=jnp.copy(keys)) if cache is None else jax.tree.map(jnp.copy, state)
    pieces = []
    while (made := sum(piece.shape[1] for piece in pieces)) < max_new_tokens and bool(state.alive.any()):
        size = min(1 if on_token else BURST, max_new_tokens - made)
        state, new = _burst_in_place(params, policy, state, size, draw, stop, BURST)
        pieces.append(new[:, :size])
        if on_token and bool(state.alive.any()):
            on_token(np.asarray(new[:, 0]))
    new = jnp.concatenate(pieces, axis=1)
    return _decoded(state, jnp.pad(new, ((0, 0), (0, max_new_tokens - new.shape[1])), constant_values=-1))


class _State(NamedTuple):
    """Decoding between two tokens: `alive` bool[B] is false for rows that have stopped, `keys` has one key a row."""

    cache: Cache
    logits: jax.Array
    alive: jax.Array
    keys: jax.Array


def _burst(params: Params, policy: Policy, state: _State, limit: int, draw: Draw | None, stop: jax.Array, size: int):
    """Up to `limit` tokens a row, in a buffer i32[B, size], where -1 is none; ends when all rows have stopped."""

    def going(carry):
        made, state, _ = carry
        return (made < limit) & state.alive.any()

    def one_more(carry):
        made, (cache, logits, alive, keys), tokens = carry
        token = sample(logits, draw, keys, cache.length)
        alive &= ~jnp.isin(token, stop)
        token = jnp.where(alive, token, -1)
        new_logits, cache = step_with(run_layer, params, policy, token, cache)
        state = _State(cache, jnp.where(alive[:, None], new_logits, logits), alive, keys)
        return made + 1, state, tokens.at[:, made].set(token)

    tokens = jnp.full((state.alive.shape[0], size), -1, jnp.int32)
    _, state, tokens = jax.lax.while_loop(going, one_more, (0, state, tokens))
    return state, tokens


_burst_in_place = kernels.jit(_burst, static_argnames=("size",), donate_argnames="state")


def _decoded(state, tokens):
    return Decoded(jnp.maximum(tokens, 0), (tokens >= 0).sum(axis=1), state.cache, state.logits)


def empty_cache(params: Params, policy: Policy, batch: int, *, tokens: int = 0, room: int = 0) -> Cache:
    """A cache that has seen nothing, with the slots that `policy` needs for `tokens` of a prompt and `room` more."""
    check_params(params)
    check_policy(policy)
    batch, tokens = whole("empty_cache", "batch", batch, least=1), whole("empty_cache", "tokens", tokens, least=0)
    config = params.config

    def layer(i, own):
        capacity = own.capacity(tokens, room)
        return own.empty(LayerShape(batch, config.kv_heads, capacity, config.head_dim, params.embed.dtype, i))

    layers = tuple(layer(i, own) for i, own in enumerate(policy.of_layers(len(params.blocks))))
    return Cache(layers, jnp.zeros(batch, jnp.int32), policy, params.config)
