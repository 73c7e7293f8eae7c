"""The methods on a CPU beside one another: bytes, decode steps, KL and hidden facts on SmolLM2 in f32.

`python -m benchmarks.methods`, about twenty minutes on two idle cores. Writes a table and
benchmarks/results/methods-cpu.json. Steps are timed in turns with those of streaming_llm, in one process.
"""

import argparse
import functools
import importlib.metadata
import json
import math

import numpy as np

import kvjax
from benchmarks.common import RESULTS, Stepper, in_turns, machine
from kvjax import codecs, policies, store, tasks
from kvjax.compare import Row, Size, compare, measure
from kvjax.decoding import empty_cache

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
    figures = bytes_of(model) | steps(model, runs) | quality(model)
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


def quality(model) -> dict[str, float]:
    """KL on prose and hidden facts, compressed before the question is known."""
    figures = {}
    size = Size(fractions=(1 / 8,), contexts=4, prose=16)
    rows = compare(model, ["h2o", "d2o", "ems", "kvmerger", "expected_attention", "snapkv", "tova"], size)
    for row in rows[1:]:
        figures |= show(f"KL at 1/8 of 1000 tokens [nats]: {row.method}", row.kl, "not above h2o")

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


def _encode(model):
    return lambda text: np.asarray(model.encode([text], add_special_tokens=False)[0][0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="counted rounds of each comparison of steps")
    main(parser.parse_args().runs)
