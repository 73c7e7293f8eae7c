"""kvjax on a CPU beside transformers and kvpress: SmolLM2 in f32, each figure with its rival in the same run, in turns.

The rivals run in a process of their own (`rivals.py`), which sleeps while kvjax is timed, and the other way round.

`make bench` installs the rivals (torch, transformers, kvpress) and runs it; about ten minutes on two cores. On a
machine without a GPU install the CPU build of torch first. Writes a table and benchmarks/results/decode-cpu.json.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np

import kvjax
from benchmarks.common import RESULTS, Stepper, in_turns, machine, timed
from benchmarks.rivals import Rivals
from kvjax import decoding, policies, tasks

LENGTH, BUDGET, ROWS, NEW = 2048, 256, 8, 32


def live_slots(params, policy, chunk) -> dict[str, int]:
    """What is alive while 4096 tokens are prefilled: slots that the running layer has in hand, slots of the longest
    layer between two layers, and how many layers are above twice the budget there."""
    head_dim, heads = params.config.head_dim, params.config.kv_heads
    seen = {"in hand": 0, "between layers": 0, "layers at full length": 0}

    def watched(block, x, cache, *rest):
        out = run_layer(block, x, cache, *rest)
        jax.block_until_ready(out)
        slots = [
            a.shape[2] for a in jax.live_arrays() if a.ndim == 4 and a.shape[1] == heads and a.shape[3] == head_dim
        ]
        seen["in hand"] = max(seen["in hand"], x.shape[1] + (0 if cache is None else cache.slots))
        seen["between layers"] = max(seen["between layers"], *slots)
        seen["layers at full length"] = max(seen["layers at full length"], sum(n > 2 * BUDGET for n in slots) // 2)
        return out

    run_layer, decoding.run_layer = decoding.run_layer, watched
    try:
        kvjax.prefill(params, policy, np.resize(np.arange(1000, 3000), (1, 4096)), chunk=chunk)
    finally:
        decoding.run_layer = run_layer
    return seen


FIRST_CALL = """
import time, jax, numpy as np, kvjax
model = kvjax.load("smollm2")
tokens = np.resize(np.arange(1000, 2000), (1, 512))
start = time.perf_counter()
kvjax.decode(model.params, kvjax.policies.h2o({budget}, window=64), tokens, max_new_tokens=1)
print(time.perf_counter() - start)
"""


def first_call(cache_dir: str) -> float:
    """Seconds of the first decode of a fresh process (512 tokens in, one out), with this compilation cache."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache_dir, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    code = FIRST_CALL.format(budget=BUDGET)
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    return float(out)


def main(runs: int) -> None:
    model = kvjax.load("smollm2")
    tokens = tasks.prose_rows(
        lambda text: model.encode([text], add_special_tokens=False)[0][0], rows=1, tokens=LENGTH, seed=1
    )
    with Rivals(tokens, ROWS, BUDGET, NEW) as rivals:
        figures, notes = measure(model.params, tokens, rivals, runs)
    RESULTS.mkdir(exist_ok=True)
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "torch", "transformers", "kvpress")
    }
    result = {"figures": figures, "notes": notes, "machine": machine(), "versions": versions, "runs": runs}
    (RESULTS / "decode-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(notes, indent=1))


def measure(params, tokens, rivals: Rivals, runs: int) -> tuple[dict[str, float], dict]:
    """The figures asked, and notes on them."""
    figures, notes = {}, {}

    def show(name, value, reach):
        figures[name] = value
        print(f"{name:<66}{value:>10.3f}   reach {reach}", flush=True)

    # Prefill -------------------------------------------------------------------------------------------------------
    taken = in_turns(
        runs,
        kvjax=lambda: timed(lambda: kvjax.prefill(params, policies.full(), tokens)),
        transformers=lambda: rivals.seconds("prefill"),
    )
    notes["prefill seconds"] = taken
    show("prefill 2048: tokens/s, full / transformers", taken["transformers"] / taken["kvjax"], ">= 1.2")

    # Steps ---------------------------------------------------------------------------------------------------------
    full = Stepper(params, policies.full(), tokens, ROWS)
    h2o = Stepper(params, policies.h2o(BUDGET, window=64), tokens, ROWS)
    streaming = Stepper(params, policies.streaming_llm(BUDGET), tokens, ROWS)
    rivals.ask("fill")
    taken = in_turns(5 * runs, full=full, h2o=h2o, streaming_llm=streaming, transformers=lambda: rivals.seconds("step"))
    notes["decode seconds a step, 8 rows"] = taken
    show("decode 8 rows, 2048 in cache: tokens/s, full / transformers", taken["transformers"] / taken["full"], ">= 1.5")
    show("decode 8 rows: time of h2o(256) / full at 2048", taken["h2o"] / taken["full"], "<= 0.6")
    show("decode 8 rows: time of h2o(256) / streaming_llm(256)", taken["h2o"] / taken["streaming_llm"], "<= 1.10")
    weights = kvjax.nbytes(params)
    share = full.cache_bytes / (full.cache_bytes + weights)
    notes["f, share of KV bytes in a full step"] = share
    notes["bound of h2o / full"] = 1 - share + share * h2o.cache_bytes / full.cache_bytes
    memory = {name: one.memory() for name, one in (("full", full), ("h2o", h2o), ("streaming_llm", streaming))}
    notes["memory of the compiled step"] = memory
    show(
        "largest temporaries of a decode step / cache", max(m["temporaries / cache"] for m in memory.values()), "< 0.1"
    )
    show("least aliased share of the cache", min(m["aliased / cache"] for m in memory.values()), "= 1")
    del full, h2o, streaming

    # kvpress -------------------------------------------------------------------------------------------------------
    ours = {
        "snapkv": policies.snapkv(BUDGET),
        "streaming_llm": policies.streaming_llm(BUDGET),
        "keydiff": policies.keydiff(BUDGET),
        "tova": policies.tova(BUDGET),
    }
    for name, policy in ours.items():
        taken = in_turns(
            runs,
            kvjax=lambda policy=policy: timed(lambda: kvjax.decode(params, policy, tokens, max_new_tokens=NEW)),
            kvpress=lambda name=name: rivals.seconds("press", name),
        )
        notes[f"{name}: prefill, compress and 32 tokens, seconds"] = taken
        show(
            f"{name}(256): prefill + compress + 32 tokens, time / kvpress", taken["kvjax"] / taken["kvpress"], "<= 0.8"
        )
        _, cache = kvjax.prefill(params, policy, tokens)
        kept, _ = rivals.ask("kept", name)
        show(f"{name}(256): kept positions that kvpress keeps too", overlap(cache, kept), "= 1")

    # Prefill memory and first call ---------------------------------------------------------------------------------
    h2o = policies.h2o(BUDGET, window=64)
    whole, pieces = live_slots(params, h2o, None), live_slots(params, h2o, BUDGET)
    notes["slots while 4096 tokens are prefilled"] = {"in one piece": whole, "chunk=256": pieces}
    show("prefill 4096: layers at full length between layers", whole["layers at full length"], "<= 1")
    show("prefill 4096 with chunk=256: slots of the longest layer", pieces["between layers"], "< 512")
    with tempfile.TemporaryDirectory() as programs:
        notes["first call of decode, nothing compiled, seconds"] = first_call(programs)
        show("first call of decode, warm compilation cache [s]", first_call(programs), "< 10")
    return figures, notes


def overlap(cache, kept) -> float:
    """Share of our kept positions that are in `kept`, over layers and heads."""
    shares = []
    for layer, theirs in zip(cache.layers, kept, strict=True):
        for ours, other in zip(np.asarray(layer.pos[0]), theirs, strict=True):
            ours = ours[ours >= 0]
            shares.append(np.isin(ours, other).mean())
    return float(np.mean(shares))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted rounds of each comparison")
    main(parser.parse_args().runs)
