"""Layers that are not treated alike: a policy for each, with budgets by a rule or from what the model attends to.

Capacities really differ: a layer's buffers have the slots of its own policy. Every other policy is another program to
compile, so round budgets where layers are many.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies
from kvjax.cache import empty, resize
from kvjax.counts import real, whole
from kvjax.decoding import prefill
from kvjax.models.llama import Params
from kvjax.policy import Mass, Policy, check_policy


def by_layer(parts: Sequence[Policy]) -> Policy:
    """A policy made of one for each layer, first to last; they need not be of one method.

    `by_layer([full(), full(), *[h2o(256, window=64)] * 27, full()])`. Bytes: those of its parts.

    Raises:
      ValueError: If one of them is no policy; and, where it is used, if the model has another number of layers.
    """
    for part in parts:
        check_policy(part)
        if part.layers:
            raise ValueError(f"by_layer: {part.name} is itself made of {len(part.layers)} policies. Give those.")
    if not parts:
        raise ValueError("by_layer: there is no policy. Give one for each layer of the model.")
    return _by_layer(tuple(parts))


@functools.cache  # the same object for the same parts, so that nothing is compiled twice
def _by_layer(parts: tuple[Policy, ...]) -> Policy:
    runs = []
    for part in parts:
        if runs and part is runs[-1][0]:
            runs[-1][1] += 1
        else:
            runs.append([part, 1])
    name = " + ".join(f"{count} {part.name}" for part, count in runs)
    return Policy(f"by_layer({name})", None, frozenset(), _of_its_layers, _of_its_layers, layers=parts)


def _of_its_layers(*_):
    raise AssertionError("a policy made of one for each layer has no functions of its own")


def density(params: Params, tokens: jax.Array, *, lengths: jax.Array | None = None) -> np.ndarray:
    """How unevenly attention falls on the tokens of a prompt, for each layer, as D2O measures it.

    Reads the prompt once and keeps nothing of it. Give the prompt that is to be compressed, or typical ones.

    Args:
      params: The model.
      tokens: i32[B, T], padded on the right.
      lengths: i32[B]; None takes T for all.

    Returns:
      f64[L] within 0..1, mean over rows: for each query head the variance of the attention that tokens received, scaled
      to 0..1 over the layer's heads, mean over heads. Small is dense: such a layer needs more slots.

    Source: D2O's published code, arXiv:2406.13035.
    """
    _, cache = prefill(params, _measure(), tokens, lengths=lengths)
    return np.array([np.mean(np.asarray(layer.carry, np.float64)) for layer in cache.layers])


@functools.cache
def _measure() -> Policy:
    need = Mass(by_query_head=True)

    def init(shape):
        return empty(shape, {}, jnp.zeros(shape.batch, jnp.float32))

    def update(cache, seen, capacity):
        there = (cache.pos >= 0)[:, :, None]  # [B, H, 1, N]
        number = there.sum(axis=-1)
        mass = seen.mass[need]  # [B, H, G, N]
        mean = jnp.where(there, mass, 0.0).sum(axis=-1) / jnp.maximum(number, 1)
        spread = jnp.where(there, jnp.square(mass - mean[..., None]), 0.0).sum(axis=-1) / jnp.maximum(number - 1, 1)
        low, high = spread.min(axis=(1, 2), keepdims=True), spread.max(axis=(1, 2), keepdims=True)
        scaled = (spread - low) / (high - low + 1e-6)
        return resize(cache, capacity).with_carry(scaled.mean(axis=(1, 2)))

    return Policy("density", 1, frozenset({need}), init, update)


def d2o(
    density: Sequence[float],
    tokens: int,
    *,
    heavy: float = 0.15,
    window: float = 0.05,
    sinks: int = 4,
    exempt: Sequence[int] = (0, 1, -1),
    multiple: int = 1,
    **settings,
) -> Policy:
    """D2O with its budgets by layer: dense layers get up to e times the slots of sparse ones.

    What is held in the end is not the share asked for: exempt layers come on top, and no layer gets more than 1 or less
    than 0.01. Look at `kvjax.report`.

    Args:
      density: f64[L], from `density`.
      tokens: Of the prompt, to which the shares refer.
      heavy: Share of the tokens that a layer keeps for their attention, sinks included, on average.
      window: Share of the tokens that it keeps for being new.
      sinks: First tokens that are always kept.
      exempt: Layers that keep every token; the paper's are the first two and the last. They need `room` in prefill.
      multiple: Budgets are rounded up to a multiple.
      settings: Those of `policies.d2o` beside these.

    Source: the published code. Differs: budgets are fixed before the prompt is compressed, which costs a second reading
    where they are to come from the prompt itself.
    """
    density = np.asarray(density, np.float64)
    if density.ndim != 1 or not density.size or not np.isfinite(density).all():
        raise ValueError(f"plans.d2o: density={density} must be a number for each layer: see plans.density.")
    heavy = real("plans.d2o", "heavy", heavy, above=0, below=1, mend="It is a share of the tokens.")
    window = real("plans.d2o", "window", window, above=0, below=1, mend="It is a share of the tokens.")
    layers, ratio = len(density), heavy + window
    if ratio > 1:
        raise ValueError(f"plans.d2o: heavy={heavy} and window={window} must be together at most 1; lower them.")
    whole("plans.d2o", "tokens", tokens, least=1)
    whole("plans.d2o", "sinks", sinks, least=0)
    whole("plans.d2o", "multiple", multiple, least=1)
    if any(not -layers <= whole("plans.d2o", "exempt", i, mend="It lists layers.") < layers for i in exempt):
        raise ValueError(f"plans.d2o: exempt={tuple(exempt)} must be layers of {layers}.")
    weight = np.exp(density.min() - density)
    share = np.clip(weight / weight.sum() * layers * ratio, 0.01, 1.0)
    whole_layers = {i % layers for i in exempt}

    def part(i):
        if i in whole_layers:
            return policies.full()
        newest = max(int(tokens * share[i] * window / ratio + 1e-9), 1)
        important = max(int(tokens * share[i] * heavy / ratio + 1e-9), sinks + 1)
        budget = -(-(newest + important) // multiple) * multiple
        return policies.d2o(budget, window=newest, sinks=sinks, **settings)

    return by_layer([part(i) for i in range(layers)])


def pyramidkv(layers: int, budget: int, *, window: int = 64, pool: int = 5, steepness: float = 20.0) -> Policy:
    """SnapKV with budgets that fall evenly from the first layer to the last. Cai et al. 2024, arXiv:2406.02069.

    Args:
      layers: Of the model.
      budget: Slots of a layer on average, window included.
      window: See `policies.snapkv`.
      pool: See `policies.snapkv`.
      steepness: The last layer gets (budget - window) / steepness slots beside its window, but at least one; 1 gives
        all the same.

    Source: the paper. Differs: running sums are rounded, and not budgets, so that the total is exact.
    """
    whole("pyramidkv", "layers", layers, least=1)
    budget, window = whole("pyramidkv", "budget", budget), whole("pyramidkv", "window", window)
    if not 0 < window < budget:
        raise ValueError(f"pyramidkv: window={window} is outside 1..{budget - 1}, and part of budget={budget}.")
    steepness = real("pyramidkv", "steepness", steepness, least=1, mend="The paper's is 20.")
    last = max(1.0, (budget - window) / steepness)
    places = np.linspace(2 * (budget - window) - last, last, layers) if layers > 1 else np.array([budget - window])
    sizes = np.diff(np.round(np.cumsum(places)), prepend=0).astype(int)
    return by_layer([policies.snapkv(window + int(size), window=window, pool=pool) for size in sizes])
