"""A long prompt read in chunks by Locret, and the memory that it takes: `python -m benchmarks.long_prompt`.

Weights and heads are random, of SmolLM2-135M's shape and in f32: memory and time do not depend on their values. Each
length is read in a process of its own, whose peak of resident memory is the program's, weights included.
"""

import argparse
import json
import resource
import subprocess
import sys

import jax
from flax import nnx

import kvjax
from benchmarks.common import timed
from benchmarks.compile_step import shapes_of
from kvjax import heads, policies
from kvjax.models.llama import Config, Params
from kvjax.models.rope import Rope

MIB = 2**20
POLICY, ROOM = policies.locret(256, tail=64), 32
HEAD_WIDTH = 256


def random_params(context: int) -> Params:
    """SmolLM2's shape with another context, and with retaining heads."""
    config = Config(
        architecture="llama",
        layers=30,
        width=576,
        mlp_width=1536,
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49152,
        context=context,
        norm_epsilon=1e-5,
        rope=Rope(100000.0),
    )
    leaves, tree = jax.tree.flatten(shapes_of(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [
        jax.random.normal(key, leaf.shape) / leaf.shape[-1] ** 0.5 for key, leaf in zip(keys, leaves, strict=True)
    ]
    made = heads.make(heads.RetainingHead, config, width=HEAD_WIDTH, rngs=nnx.Rngs(0))
    return kvjax.with_heads(jax.tree.unflatten(tree, weights), {"locret": made})


def measure(count: int, chunk: int) -> dict[str, float]:
    """Seconds and memory of one row of `count` tokens, read once its programs are compiled."""
    params = random_params(count + ROOM)
    tokens = jax.random.randint(jax.random.key(1), (1, count), 0, params.config.vocab)

    def read(tokens):
        return kvjax.prefill(params, POLICY, tokens, chunk=chunk, room=ROOM)

    jax.block_until_ready(read(tokens[:, : 2 * chunk]))
    seconds = timed(lambda: read(tokens))
    cache = jax.eval_shape(lambda t: read(t)[1], tokens)
    full = jax.eval_shape(lambda: kvjax.empty_cache(params, policies.full(), 1, tokens=count))
    return {
        "tokens": count,
        "chunk": chunk,
        "seconds": round(seconds, 1),
        "peak [MiB]": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),  # which Linux gives in KiB
        "weights [MiB]": round(kvjax.nbytes(params) / MIB),
        "cache [MiB]": round(kvjax.nbytes(cache) / MIB, 1),
        "full cache [MiB]": round(kvjax.nbytes(full) / MIB, 1),
    }


def main() -> None:
    """Prints a line of JSON for each length."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("lengths", nargs="*", type=int, default=[4096, 16384, 32768], help="tokens of the prompts")
    arguments.add_argument("--chunk", type=int, default=512, help="tokens that are read at a time")
    given = arguments.parse_args()
    if len(given.lengths) == 1:
        print(json.dumps(measure(given.lengths[0], given.chunk)), flush=True)
        return
    for length in given.lengths:
        command = [sys.executable, "-m", "benchmarks.long_prompt", str(length), "--chunk", str(given.chunk)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
