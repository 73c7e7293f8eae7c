"""What the benchmarks share: clocks, and a compiled decode step."""

import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import kvjax

RESULTS = Path(__file__).parent / "results"


def in_turns(runs: int, **contenders) -> dict[str, float]:
    """Median of the seconds that each of `contenders` returns, called in turns after one round that is not counted."""
    seconds = {name: [] for name in contenders}
    for i in range(runs + 1):
        for name, run in contenders.items():
            taken = run()
            if i:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def timed(run) -> float:
    """Seconds until what `run` returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


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

    def __call__(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        logits, self.cache = self.program(self.params, self.policy, self.token, self.cache)
        self.token = jnp.argmax(logits, -1).astype(jnp.int32).block_until_ready()
        return time.perf_counter() - start

    def memory(self) -> dict[str, float]:
        """Temporaries and aliased bytes of the compiled step, of the cache's bytes."""
        memory = self.program.memory_analysis()
        return {
            "temporaries / cache": memory.temp_size_in_bytes / self.cache_bytes,
            "aliased / cache": memory.alias_size_in_bytes / self.cache_bytes,
        }


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
