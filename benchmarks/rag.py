"""Passages read before and met again in another order: time to the first token, and what it does to the answers.

python -m benchmarks.rag     about eight minutes on two cores; writes benchmarks/results/rag-cpu.json

SmolLM2 in f32, five passages of 256 tokens of prose with facts hidden in them. The passages are read once, in order;
then each question comes with all five in another order. KL is that to the full reading of the same prompt, over the
tokens that it answers with.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from benchmarks.common import RESULTS, machine
from kvjax import policies, tasks
from kvjax.serve.chunk_cache import ChunkCache, by_context, by_deviation, nothing

CHUNKS, TOKENS, NEW = 5, 256, 16
CHOICES = (nothing(), by_context(0.5), by_context(0.75), by_context(1.0), by_deviation(0.15))

STEP = jax.jit(kvjax.step, donate_argnames="cache")


def passages(model, contexts: int, seed: int):
    """For each context: passages of exactly 256 tokens, cut out of a text with hidden facts, and its questions."""

    def ids(text):
        return model.tokenizer.encode(text, add_special_tokens=False).ids

    size = CHUNKS * TOKENS
    made = tasks.fact_contexts(lambda text: len(ids(text)), contexts=contexts, tokens=size, per_kind=2, seed=seed)
    filler = ids(" " + " ".join(tasks.prose()[-40:]))
    for one in made:
        whole = np.array((ids(one.text) + filler)[:size])
        yield list(whole.reshape(CHUNKS, TOKENS)), one.questions


def around(model, question: str):
    """The tokens before the passages, and those of the question behind them."""
    before, after = model.chat("\0\0").split("\0\0")
    return (
        np.array(model.tokenizer.encode(text, add_special_tokens=False).ids)
        for text in (before, f"\n\n{question}{after}")
    )


def answer(model, logits, cache, forced=None):
    """Tokens that follow, greedy or `forced`, and the log-probabilities of each step."""
    said, seen = [], []
    for i in range(NEW):
        seen.append(jax.nn.log_softmax(logits[0]))
        token = int(jnp.argmax(logits)) if forced is None else forced[i]
        if token in model.stop_tokens and forced is None:
            break
        said.append(token)
        if forced is not None and i + 1 == len(forced):
            break
        logits, cache = STEP(model.params, cache.policy, jnp.array([token]), cache)
    return said, jnp.stack(seen[: max(1, len(said))])


def measure(contexts: int, seed: int) -> dict[str, dict]:
    model = kvjax.load("smollm2")
    rows = {
        name: {"seconds": [], "kl": [], "found": [], "computed": []} for name in ("full", *(c.name for c in CHOICES))
    }
    full = policies.full()
    for number, (chunks, questions) in enumerate(passages(model, contexts, seed)):
        system, first = around(model, "What are these passages about?")
        rags = [ChunkCache(choice=choice) for choice in CHOICES]
        for rag in rags:
            rag.prefill(model.params, system, chunks, first)
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(CHUNKS)
        while (np.diff(order) == 1).any():  # no two passages as they were
            order = rng.permutation(CHUNKS)
        mixed = [chunks[i] for i in order]
        for n, question in enumerate(questions):
            _, asked = around(model, question.text)
            prompt = np.concatenate([system, *mixed, asked])
            start = time.perf_counter()
            logits, cache = kvjax.prefill(model.params, full, prompt[None], room=NEW)
            jax.block_until_ready(logits)
            spent = {"full": time.perf_counter() - start}
            said, wanted = answer(model, logits, cache)
            results = {"full": (said, 0.0, len(prompt))}
            for choice, rag in zip(CHOICES, rags, strict=True):
                start = time.perf_counter()
                out = rag.prefill(model.params, system, mixed, asked, room=NEW)
                jax.block_until_ready(out.logits)
                spent[choice.name] = time.perf_counter() - start
                _, got = answer(model, out.logits, jax.tree.map(jnp.copy, out.cache), said or [0])
                kl = float((jnp.exp(wanted) * (wanted - got)).sum(axis=-1).mean())
                found, _ = answer(model, out.logits, out.cache)
                results[choice.name] = found, kl, len(asked) + sum(one.computed for one in out.parts)
            for name, (found, kl, computed) in results.items():
                row = rows[name]
                if number or n:  # the first ones compile
                    row["seconds"].append(spent[name])
                row["kl"].append(kl)
                row["found"].append(question.score(model.decode(found)))
                row["computed"].append(computed / len(prompt))
        print(f"{number + 1} of {contexts} contexts", flush=True)
    base = np.median(rows["full"]["seconds"])
    return {
        name: {
            "time to first token, of full": float(np.median(row["seconds"]) / base),
            "computed, of all tokens": float(np.mean(row["computed"])),
            "KL [nats]": float(np.mean(row["kl"])),
            "facts found": float(np.mean(row["found"])),
        }
        for name, row in rows.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", ".cache/jax")
    rows = measure(given.contexts, given.seed)
    for name, row in rows.items():
        print(f"{name:28}", "  ".join(f"{what} {value:.4f}" for what, value in row.items()))
    result = {
        "machine": machine(),
        "jax": jax.__version__,
        "questions": 2 * len(tasks.KINDS) * given.contexts,
        "rows": rows,
    }
    (RESULTS / "rag-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
