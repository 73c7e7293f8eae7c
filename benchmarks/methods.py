"""The methods on a CPU beside one another: bytes, decode steps, KL and hidden facts on SmolLM2 in f32.

`python -m benchmarks.methods`, about half an hour on two idle cores. Writes a table and
benchmarks/results/methods-cpu.json. Steps are timed in turns with those of streaming_llm, in one process.
"""

import argparse
import functools
import importlib.metadata
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from benchmarks.common import RESULTS, Stepper, in_turns, machine
from kvjax import codecs, plans, policies, store, tasks
from kvjax.compare import Row, Size, compare, measure
from kvjax.decoding import empty_cache, run_layer_in_place, step_with

LENGTH, BUDGET, ROWS = 2048, 256, 8
STEPS = {  # at most `BUDGET` slots between two steps
    "h2o": policies.h2o(BUDGET, window=BUDGET // 2),
    "snapkv": policies.snapkv(BUDGET),
    "tova": policies.tova(BUDGET),
    "keydiff": policies.keydiff(BUDGET),
    "d2o": policies.d2o(BUDGET, window=BUDGET // 2),
    "cam": policies.cam(BUDGET),
    "ems": policies.ems(BUDGET - 31, window=32),
    "kvmerger": policies.kvmerger(BUDGET - 31, window=50, heavy=13),
    "elastic_cache": policies.elastic_cache(1 - BUDGET / LENGTH),
    "compactor": policies.compactor(BUDGET),
    "expected_attention": policies.expected_attention(BUDGET, window=64),
}
FOUR_WAY = store(
    policies.d2o(380, window=190),
    keys=codecs.pipe(codecs.pipe(codecs.prune_channels(48), codecs.balance()), codecs.integer(4, group=16)),
    values=codecs.integer(4),
)


def main(runs: int) -> None:
    model = kvjax.load("smollm2")
    size = Size(fractions=(1 / 8,), contexts=4, prose=16)
    figures = bytes_of(model) | steps(model, runs) | prose(model, size) | layer_budgets(model, size) | facts(model)
    RESULTS.mkdir(exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    result = {"figures": figures, "machine": machine(), "versions": versions, "runs": runs}
    (RESULTS / "methods-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


def show(name: str, value: float, reach: str = "") -> dict[str, float]:
    """Prints a figure, and returns it under its name."""
    print(f"{name:<74}{value:>9.3f}   {reach}", flush=True)
    return {name: value}


def bytes_of(model) -> dict[str, float]:
    """Capacity for 2048 tokens, one row, of keys and values of a full f32 cache."""
    config = model.config
    full = config.layers * config.kv_heads * LENGTH * 2 * config.head_dim * 4
    sizes = [
        ("think(32 of 64 channels)", policies.think(32), "at most 0.78"),
        ("mikv(0.2, int8 above int4)", policies.mikv(0.2, high_bits=8, low_bits=4), "at most 0.25"),
        ("kivi(int2, 128 whole)", policies.kivi(2, residual=128), "at most 0.17"),
        ("four ways: evict, merge, prune, quantise", FOUR_WAY, "below 0.04"),
    ]
    figures = {}
    for name, policy, reach in sizes:
        cache = empty_cache(model.params, policy, 1, tokens=LENGTH)
        figures |= show(f"bytes of a full cache: {name}", kvjax.nbytes(cache) / full, reach)
    return figures


def steps(model, runs: int) -> dict[str, float]:
    """A decode step of 8 rows at 256 slots, of the time of streaming_llm's in the same turns."""
    tokens = tasks.prose_rows(_encode(model), rows=1, tokens=LENGTH, seed=1)
    rival = Stepper(model.params, policies.streaming_llm(BUDGET), tokens, ROWS)
    figures = {}
    for name, policy in STEPS.items():
        one = Stepper(model.params, policy, tokens, ROWS)
        each = (
            32 if name in ("ems", "kvmerger") else 1
        )  # which compress once in 32 steps, and a median would not see it
        taken = in_turns(runs, mine=functools.partial(_mean, one, each), rival=functools.partial(_mean, rival, each))
        figures |= show(f"decode step, 8 rows: {name} / streaming_llm", taken["mine"] / taken["rival"], "at most 1.25")
        figures |= show(f"temporaries of the step / cache: {name}", one.memory()["temporaries / cache"])
    return figures


def _mean(step, count: int) -> float:
    return sum(step() for _ in range(count)) / count


def prose(model, size: Size) -> dict[str, float]:
    """KL on prose at 1/8 of the tokens."""
    figures = {}
    rows = compare(model, ["h2o", "d2o", "ems", "kvmerger", "expected_attention", "snapkv", "tova"], size)
    for row in rows[1:]:
        figures |= show(f"KL at 1/8 of 1000 tokens [nats]: {row.method}", row.kl, "not above h2o")
    return figures


def facts(model) -> dict[str, float]:
    """Hidden facts, compressed before the question is known, and KL, of methods that drop tokens, bits or channels."""
    figures = {}
    size = Size(fractions=(1 / 4,), contexts=8, prose=4)
    channels = model.config.head_dim - math.floor(0.4 * model.config.head_dim)
    think = Row(f"think({channels}), no eviction", size.tokens, policies.think(channels))
    rows = compare(model, ["h2o", "mikv"], size)
    rows += measure(model, [Row("full", size.tokens, policies.full()), think], size)[1:]
    for row in rows:
        questions = size.contexts * size.per_kind
        for kind, score in row.scores.items():
            figures |= show(f"facts found at {row.share:.3f} of the bytes: {row.method}, {kind} (n={questions})", score)
        figures |= show(f"KL at {row.share:.3f} of the bytes [nats]: {row.method}", row.kl)
    return figures


def layer_budgets(model, size: Size) -> dict[str, float]:
    """KL on the prose of `size` of plans that share the bytes of h2o at 1/8 of the tokens out among the layers."""
    prompt, budget = size.tokens, round(size.tokens / 8)
    uniform = policies.h2o(budget, window=budget // 2)

    def held(policy):
        return kvjax.nbytes(jax.eval_shape(lambda: empty_cache(model.params, policy, 1, tokens=prompt)))

    def planned(exempt):
        """The plan of the largest share of the tokens, in ten-thousandths, that takes no more bytes than `uniform`."""

        def plan(share):
            half = share / 20_000
            return plans.d2o(density, prompt, heavy=half, window=half, exempt=exempt)

        low, high = 1, 10_000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if held(plan(middle)) <= held(uniform) else (low, middle)
        return plan(low)

    typical = tasks.prose_rows(_encode(model), rows=4, tokens=prompt, seed=size.seed + 1)  # of other prose
    density = plans.density(model.params, typical)
    named = {"h2o": uniform}
    for name, exempt in (("plans.d2o", ()), ("plans.d2o, first two layers and last whole", (0, 1, -1))):
        named[name] = plan = planned(exempt)
        named[f"h2o, budgets of {name}"] = plans.by_layer(
            [policies.h2o(own.budget, window=own.budget // 2) if own.budget else own for own in plan.layers]
        )
    named["plans.pyramidkv"] = plans.pyramidkv(model.config.layers, budget, window=min(64, budget // 2))

    texts = tasks.prose_rows(_encode(model), rows=size.prose, tokens=prompt + size.forced, seed=size.seed)
    groups = [texts[at : at + size.group] for at in range(0, size.prose, size.group)]
    wanted = [_said(model.params, policies.full(), text, size) for text in groups]
    figures = {}
    for name, policy in named.items():
        said = (_said(model.params, policy, text, size) for text in groups)
        kl = float(np.mean([_divergence(*both) for both in zip(wanted, said, strict=True)]))
        share = held(policy) / held(uniform)
        figures |= show(f"KL at {share:.3f} of the bytes of h2o at 1/8 [nats]: {name}", kl, "not above h2o")
        jax.clear_caches()  # each plan is dozens of programs, and Linux gives a process 65530 mappings of memory
    return figures


def _said(params, policy, text, size: Size) -> jax.Array:
    """Logits f32[forced, B, V] that predict the tokens behind a compressed prompt, each given those before it."""
    logits, cache = kvjax.prefill(params, policy, text[:, : size.tokens], room=size.forced)
    said = [logits]
    for token in text[:, size.tokens : -1].T:
        logits, cache = step_with(run_layer_in_place, params, policy, jnp.asarray(token), cache)
        said.append(logits)
    return jnp.stack(said)


@jax.jit
def _divergence(wanted: jax.Array, said: jax.Array) -> jax.Array:
    """Mean KL(wanted || said) in nats of logits f32[..., V]."""
    p, q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(said)
    return (jnp.exp(p) * (p - q)).sum(axis=-1).mean()


def _encode(model):
    return lambda text: np.asarray(model.encode([text], add_special_tokens=False)[0][0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="counted rounds of each comparison of steps")
    main(parser.parse_args().runs)
