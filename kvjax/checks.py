"""What a caller can get wrong, said before anything is computed: what came, what was wanted and the mend.

Shapes are checked always; values only where they are known, which is not under jit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import FREE, Cache, LayerCache
from kvjax.models.llama import Config, Params
from kvjax.policy import Policy


def known(*arrays) -> bool:
    """Whether the values can be looked at: not under jit."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_params(params) -> None:
    """It must be `Params`."""
    if not isinstance(params, Params):
        raise ValueError(f"params are a {type(params).__name__}, and must be kvjax.Params: pass model.params.")


def as_array(name: str, given):
    """`given` with a shape and a dtype: lists become numpy arrays."""
    if hasattr(given, "dtype"):
        return given
    try:
        return np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths. Pad them on the right: see model.encode.") from None


def check_tokens(tokens) -> tuple[int, int]:
    """Shape (B, T) of `tokens`, which must be integers and not empty."""
    shape, dtype = tokens.shape, tokens.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"tokens are {dtype}{list(shape)}, and must be integers [B, T], padded on the right: see model.encode."
        )
    if 0 in shape:
        raise ValueError(f"tokens have shape {shape}: the prompt is empty. Give every row at least one token.")
    return shape


def check_lengths(lengths, batch: int, count: int) -> jax.Array:
    """`lengths` as i32[B], each within 1..T; None stands for T."""
    lengths = np.full(batch, count, np.int32) if lengths is None else as_array("lengths", lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths are {lengths.dtype}, and must be integers, i32[B].")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths have shape {lengths.shape}; tokens of shape {(batch, count)} want {(batch,)}.")
    if known(lengths):
        values = np.asarray(lengths)
        bad = np.flatnonzero((values < 1) | (values > count))
        if bad.size:
            raise ValueError(
                f"lengths[{bad[0]}]={values[bad[0]]} is outside 1..{count}, the width of tokens. Give every row at "
                f"least one token, and widen tokens to the longest row."
            )
    return jnp.asarray(lengths, jnp.int32)


def check_stop(config: Config, stop) -> jax.Array:
    """Stop tokens as i32[K]."""
    ids = np.asarray(stop)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"stop={stop!r} must be a sequence of token ids, such as model.stop_tokens.")
    wrong = ids[(ids < 0) | (ids >= config.vocab)]
    if wrong.size:
        raise ValueError(f"stop={stop!r}: {wrong[0]} is outside 0..{config.vocab - 1}, the model's vocabulary.")
    return jnp.asarray(ids, jnp.int32)


def check_ids(config: Config, tokens, lengths) -> None:
    """Token ids must be in the vocabulary; padding may be anything."""
    if not known(tokens, lengths):
        return
    ids = np.asarray(tokens)
    wrong = ((ids < 0) | (ids >= config.vocab)) & (np.arange(ids.shape[1]) < np.asarray(lengths)[:, None])
    if wrong.any():
        row, at = np.argwhere(wrong)[0]
        raise ValueError(
            f"tokens[{row}, {at}]={ids[row, at]} is outside 0..{config.vocab - 1}, the model's vocabulary. Was the "
            f"text encoded by another tokenizer?"
        )


def check_given(policy: Policy, names, given, shape: tuple[int, ...], heads: tuple[int, int]) -> dict[str, jax.Array]:
    """Arrays of `shape`, [B, T] or [B], or of [L, B, H, ...], under `names`: statistics of the policy's layers."""
    if not isinstance(given, dict):
        raise ValueError(f"given is a {type(given).__name__}, and must be {{name of a statistic: array}}.")
    layers, kv_heads = heads
    each = (layers, shape[0], kv_heads, *shape[1:])
    for name, x in given.items():
        if name not in names:
            raise ValueError(f"given[{name!r}] is no statistic of {policy.name}, which has {sorted(names)}.")
        if np.shape(x) not in (shape, each):
            raise ValueError(
                f"given[{name!r}] has shape {np.shape(x)}, and must be {shape}, as tokens are, or {each}, with layers "
                f"and kv_heads."
            )
    return {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}


def given_to_layer(given: dict[str, jax.Array], names, layer: int) -> dict[str, jax.Array]:
    """What concerns one layer: [B, T] or [B, H, T] under those `names` that it has."""
    own = {name: x for name, x in given.items() if name in names}
    return {name: x[layer] if x.ndim > 2 else x for name, x in own.items()}


def check_context(config: Config, policy: Policy, start, lengths, chunk: int, room: int) -> None:
    """No position may lie beyond the model's context. Where positions are given anew, only what is in hand counts."""
    if not known(start, lengths):
        return
    read = int(np.max(np.asarray(start) + np.asarray(lengths)))
    for own in set(policy.of_layers(config.layers)):
        if own.ranks is None:
            last, mend = read + room, "Shorten the prompt, or ask for fewer new tokens."
        else:
            in_hand = min(read, own.capacity(read) - 1 + chunk), min(read + room, own.capacity(read, room))
            last, mend = max(in_hand), "Lower the budget, shorten the prompt, or read it with chunk=512."
        if last > config.context:
            raise ValueError(f"position {last - 1} is beyond the model's context of {config.context} tokens. {mend}")


def check_cache(params: Params, policy: Policy, cache: Cache, batch: int) -> None:
    """The cache must belong to this model, policy and batch."""
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}, and must be a kvjax.Cache, which prefill returns.")
    if cache.config != params.config:
        raise ValueError(f"the cache was made for {cache.config}, and this model is {params.config}. Prefill it anew.")
    if cache.policy is not policy:
        raise ValueError(
            f"the cache was made by {cache.policy.name}, and the policy given is {policy.name}. Give its own."
        )
    if cache.length.shape[0] != batch:
        raise ValueError(
            f"the cache holds {cache.length.shape[0]} rows and tokens have {batch}. Give one row for each."
        )


def _is_full(policy: Policy, layer: LayerCache, active: np.ndarray) -> bool:
    """Whether a row that goes on finds no free slot, where the tokens seen do not say how many are taken."""
    return policy.tail > 0 and bool((np.asarray(layer.pos)[active] != FREE).all(axis=-1).any())


def check_step(params: Params, policy: Policy, token, cache: Cache) -> None:
    """One token id a row, -1 in rows that have stopped; those that go on need a position, and a slot."""
    if token.ndim != 1 or not jnp.issubdtype(token.dtype, jnp.integer):
        raise ValueError(
            f"token has shape {token.shape} and type {token.dtype}, and must be i32[B], one a row. See "
            f"prefill for more."
        )
    check_cache(params, policy, cache, token.shape[0])
    if not known(token, cache.length):
        return
    config = params.config
    ids = np.asarray(token)
    wrong = ids[(ids < -1) | (ids >= config.vocab)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} is outside 0..{config.vocab - 1}, the model's vocabulary; -1 stops a row.")
    longest = int(np.max(np.asarray(cache.length), where=ids >= 0, initial=-1))
    for own, layer in zip(policy.of_layers(config.layers), cache.layers, strict=True):
        most = layer.slots - 1 if own.budget is None else own.budget
        position = longest if own.ranks is None else min(longest, most)
        if position >= config.context:
            raise ValueError(
                f"position {position} is beyond the model's context of {config.context} tokens. Start anew."
            )
        if own.capacity_after(layer, 1, 0, longest) != layer.capacity or _is_full(own, layer, ids >= 0):
            raise ValueError(
                f"all {layer.slots} slots are taken, and {own.name} frees none. Leave room for those to come: "
                f"prefill(..., room=64)."
            )
