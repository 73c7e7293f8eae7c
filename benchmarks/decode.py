"""kvjax on a CPU beside transformers and kvpress: SmolLM2 in f32, each figure with its rival in the same run, in turns.

`make bench` installs the rivals (torch, transformers, kvpress) and runs it; about ten minutes on two cores. On a
machine without a GPU install the CPU build of torch first. Writes a table and benchmarks/results/decode-cpu.json.
"""

import argparse
import functools
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import decoding, policies, tasks

LENGTH, BUDGET, ROWS, NEW = 2048, 256, 8, 32
RESULTS = Path(__file__).parent / "results"


def in_turns(runs: int, **contenders) -> dict[str, float]:
    """Median seconds of each of `contenders`, called in turns after one round that is not counted."""
    seconds = {name: [] for name in contenders}
    for i in range(runs + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


class Stepper:
    """A compiled decode step over a prefilled cache, called again and again."""

    def __init__(self, params, policy, tokens, rows):
        self.params, self.policy = params, policy
        logits, cache = kvjax.prefill(params, policy, tokens, room=64)
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=0) if leaf.ndim else leaf, cache)
        self.token = jnp.repeat(jnp.argmax(logits, -1).astype(jnp.int32), rows)
        self.cache_bytes = kvjax.nbytes(cache)
        step = jax.jit(kvjax.step, donate_argnames="cache")
        self.program = step.lower(params, policy, self.token, cache).compile()
        self.cache = cache

    def __call__(self):
        logits, self.cache = self.program(self.params, self.policy, self.token, self.cache)
        self.token = jnp.argmax(logits, -1).astype(jnp.int32).block_until_ready()

    def memory(self) -> dict[str, float]:
        """Temporaries and aliased bytes of the compiled step, of the cache's bytes."""
        memory = self.program.memory_analysis()
        return {
            "temporaries / cache": memory.temp_size_in_bytes / self.cache_bytes,
            "aliased / cache": memory.alias_size_in_bytes / self.cache_bytes,
        }


def live_slots(params, policy, chunk) -> dict[str, int]:
    """Most slots of a layer, and most layers above twice the budget, alive at once while 4096 tokens are prefilled."""
    head_dim, seen = params.config.head_dim, {"longest": 0, "layers at full length": 0}
    heads = params.config.kv_heads

    def watched(*args):
        out = decoding_layer(*args)
        jax.block_until_ready(out)
        slots = [
            a.shape[2] for a in jax.live_arrays() if a.ndim == 4 and a.shape[1] == heads and a.shape[3] == head_dim
        ]
        seen["longest"] = max(seen["longest"], *slots)
        seen["layers at full length"] = max(seen["layers at full length"], sum(n > 2 * BUDGET for n in slots) // 2)
        return out

    decoding_layer, decoding.run_layer = decoding.run_layer, watched
    try:
        kvjax.prefill(params, policy, np.resize(np.arange(1000, 3000), (1, 4096)), chunk=chunk)
    finally:
        decoding.run_layer = decoding_layer
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


def torch_model():
    """The same weights in transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count())
    path = kvjax.models.weights._find_smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def main(runs: int) -> None:
    import kvpress
    import torch

    logging.getLogger("transformers").setLevel(logging.ERROR)
    params = kvjax.load("smollm2").params
    encode = functools.partial(kvjax.load("smollm2").tokenizer.encode, add_special_tokens=False)
    tokens = tasks.prose_rows(lambda text: encode(text).ids, rows=1, tokens=LENGTH, seed=1)
    rival = torch_model()
    ids = torch.tensor(tokens.astype(np.int64))
    figures, notes = {}, {}

    def show(name, value, reach):
        figures[name] = value
        print(f"{name:<66}{value:>10.3f}   reach {reach}", flush=True)

    # Prefill -------------------------------------------------------------------------------------------------------
    with torch.inference_mode():
        taken = in_turns(
            runs,
            kvjax=lambda: jax.block_until_ready(kvjax.prefill(params, policies.full(), tokens)),
            transformers=lambda: rival(ids, use_cache=True, logits_to_keep=1),
        )
    notes["prefill seconds"] = taken
    show("prefill 2048: tokens/s, full / transformers", taken["transformers"] / taken["kvjax"], ">= 1.2")

    # Steps ---------------------------------------------------------------------------------------------------------
    full = Stepper(params, policies.full(), tokens, ROWS)
    h2o = Stepper(params, policies.h2o(BUDGET, window=64), tokens, ROWS)
    streaming = Stepper(params, policies.streaming_llm(BUDGET), tokens, ROWS)
    with torch.inference_mode():
        past = rival(ids, use_cache=True).past_key_values
        past.batch_repeat_interleave(ROWS)
        token = torch.zeros((ROWS, 1), dtype=torch.long)
        taken = in_turns(
            3 * runs, full=full, h2o=h2o, streaming_llm=streaming,
            transformers=lambda: rival(token, past_key_values=past, use_cache=True),
        )  # fmt: skip
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
    ratio = 1 - BUDGET / LENGTH
    rivals = {
        "snapkv": (policies.snapkv(BUDGET), kvpress.SnapKVPress(ratio)),
        "streaming_llm": (policies.streaming_llm(BUDGET), kvpress.StreamingLLMPress(ratio)),
        "keydiff": (policies.keydiff(BUDGET), kvpress.KeyDiffPress(ratio)),
        "tova": (policies.tova(BUDGET), kvpress.TOVAPress(ratio)),
    }
    for name, (policy, press) in rivals.items():
        with torch.inference_mode():
            taken = in_turns(
                runs,
                kvjax=lambda policy=policy: kvjax.decode(params, policy, tokens, max_new_tokens=NEW),
                kvpress=lambda press=press: press_and_decode(rival, press, ids),
            )
        notes[f"{name}: prefill, compress and 32 tokens, seconds"] = taken
        show(
            f"{name}(256): prefill + compress + 32 tokens, time / kvpress", taken["kvjax"] / taken["kvpress"], "<= 0.8"
        )
        _, cache = kvjax.prefill(params, policy, tokens)
        show(f"{name}(256): kept positions that kvpress keeps too", overlap(cache, kept_by(rival, press, ids)), "= 1")

    # Prefill memory and first call ---------------------------------------------------------------------------------
    whole = live_slots(params, policies.h2o(BUDGET, window=64), None)
    pieces = live_slots(params, policies.h2o(BUDGET, window=64), BUDGET)
    show("prefill 4096: layers at full length between layers", whole["layers at full length"], "<= 1")
    show("prefill 4096 with chunk=256: slots of the longest layer", pieces["longest"], "< 512")
    directory = str(Path(".cache/bench-programs").absolute())
    notes["first call, cold, seconds"] = first_call(directory)
    show("first call of decode, warm compilation cache [s]", first_call(directory), "< 10")

    RESULTS.mkdir(exist_ok=True)
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "torch", "transformers", "kvpress")
    }
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"figures": figures, "notes": notes, "machine": machine, "versions": versions, "runs": runs}
    (RESULTS / "decode-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(notes, indent=1))


def press_and_decode(model, press, ids):
    """kvpress: prefill under the press, then greedy tokens at their true positions."""
    import torch
    import transformers

    cache = transformers.DynamicCache()
    with press(model):
        out = model(ids, past_key_values=cache, logits_to_keep=1)
    for i in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        at = torch.full((1, 1), ids.shape[1] + i)
        out = model(token, past_key_values=cache, position_ids=at, logits_to_keep=1)
    return out


def kept_by(model, press, ids) -> list[np.ndarray]:
    """Positions i64[H, budget] that the press keeps, a layer each."""
    import torch
    import transformers

    kept, score = [], press.score

    def watched(*args, **kwargs):
        scores = score(*args, **kwargs)
        kept.append(scores.topk(BUDGET, dim=-1).indices[0].numpy())
        return scores

    press.score = watched
    try:
        with torch.inference_mode(), press(model):
            model(ids, past_key_values=transformers.DynamicCache(), logits_to_keep=1)
    finally:
        del press.score
    return kept


def overlap(cache, kept) -> float:
    """Share of our kept positions that are in `kept`, over layers and heads."""
    shares = []
    for layer, theirs in zip(cache.layers, kept, strict=True):
        for ours, other in zip(np.asarray(layer.pos[0]), theirs, strict=True):
            ours = ours[ours >= 0]
            shares.append(np.isin(ours, other).mean())
    return float(np.mean(shares))


def cpu_name() -> str:
    """The processor, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted rounds of each comparison")
    main(parser.parse_args().runs)
