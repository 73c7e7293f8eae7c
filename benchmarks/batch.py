"""An offline batch that shares prefixes beside the same one that does not, and beside transformers: SmolLM2 in f32.

python -m benchmarks.batch           kvjax alone, about five minutes on two cores
python -m benchmarks.batch --peers   also transformers' generate, in a process of its own (pip install '.[peers]')

64 prompts in 8 groups: 512 tokens that a group shares, 64 of each prompt's own, 32 to generate. Also how the time of a
decode step grows with the rows that share a long prefix. Writes benchmarks/results/batch-cpu.json.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from benchmarks.common import RESULTS, in_turns, machine, timed
from kvjax import policies
from kvjax.cache import LayerShape
from kvjax.serve.batch_llm import batch

GROUPS, EACH, PREFIX, SUFFIX, NEW = 8, 8, 512, 64, 32


def workload(vocab: int) -> np.ndarray:
    """Prompts i64[64, 576], shuffled."""
    rng = np.random.default_rng(0)
    shared = rng.integers(1000, vocab, (GROUPS, 1, PREFIX)).repeat(EACH, axis=1)
    prompts = np.concatenate([shared, rng.integers(1000, vocab, (GROUPS, EACH, SUFFIX))], axis=-1)
    return rng.permutation(prompts.reshape(GROUPS * EACH, -1))


def throughput(model, prompts, runs: int, settings) -> dict:
    said = {}

    def run(method):
        def once():
            seen = []
            start = time.perf_counter()
            found = batch(model.params, prompts, max_new_tokens=NEW, method=method, on_progress=seen.append, **settings)
            seconds = time.perf_counter() - start
            assert all(len(one.tokens) == NEW for one in found)
            said[method] = {
                "tokens read": seen[-1].read,
                "cache [MiB]": seen[-1].most_bytes / 2**20,
                "programs": seen[-1].programs,
                "iterations": len(seen),
            }
            said[method]["answers"] = [one.tokens.tolist() for one in found]
            return seconds

        return once

    seconds = in_turns(runs, exact=run("exact"), none=run("none"))
    answers = [said[method].pop("answers") for method in ("exact", "none")]
    same = sum(a == b for a, b in zip(*answers, strict=True))
    return {
        "shared": {"seconds": seconds["exact"], **said["exact"]},
        "not shared": {"seconds": seconds["none"], **said["none"]},
        "speed-up": seconds["none"] / seconds["exact"],
        "prompts with the same tokens": same,
    }


def attention(config, slots: int = 8192) -> dict[str, float]:
    """Seconds that attention of one layer takes in a decode step over a long prefix, by rows that share it."""
    full, found = policies.full(), {}
    heads, dim = config.kv_heads, config.head_dim
    prefix = full.empty(LayerShape(1, heads, slots, dim, jnp.float32, 0))
    at = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), prefix.pos.shape)
    prefix = jax.block_until_ready(jax.tree.map(jnp.copy, prefix.with_slots((prefix.k, prefix.v, at, prefix.stats))))

    @jax.jit
    def call(q, k, v, own, prefix):
        positions = jnp.full((q.shape[0], 1), slots, jnp.int32)
        return kvjax.attend(q, k, v, own, full, positions=positions, rope=config.rope, prefix=prefix)[0]

    runs = {}
    for rows in (1, 2, 4, 8, 16):
        own = full.empty(LayerShape(rows, heads, 16, dim, jnp.float32, 0))
        q, k, v = (jnp.ones((rows, 1, h, dim)) for h in (config.q_heads, heads, heads))
        runs[str(rows)] = lambda arguments=(q, k, v, own, prefix): timed(lambda: call(*arguments))
    found = in_turns(30, **runs)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    given = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", ".cache/jax")
    model = kvjax.load("smollm2")
    prompts = workload(model.config.vocab)
    result = {"machine": machine(), "jax": jax.__version__}
    result |= throughput(model, prompts, given.runs, {"batch_tokens": given.batch_tokens})
    result["attention of a step over 8192 shared slots, seconds by rows"] = attention(model.config)
    if given.peers:
        from benchmarks.rivals import Rivals

        with Rivals(prompts[:1], 1, 256, NEW) as rivals:
            rivals.ask("prefill")
            pairs = {}
            for rows in (16, 64):  # each beside a run of ours
                theirs = rivals.seconds("generate", prompts, rows)
                ours = timed(lambda: batch(model.params, prompts, max_new_tokens=NEW, batch_tokens=given.batch_tokens))
                pairs[str(rows)] = {"transformers": theirs, "shared": ours}
        best = min(pairs.values(), key=lambda pair: pair["transformers"])
        result["seconds beside transformers, by its rows at a time"] = pairs
        result["transformers / shared"] = best["transformers"] / best["shared"]
    print(json.dumps(result, indent=1))
    (RESULTS / "batch-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
