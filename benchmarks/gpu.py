"""Every GPU kernel: right on fresh random inputs, and timed beside its rivals; then whole decode steps.

`python -m benchmarks.gpu` on a machine with a GPU of compute capability 8.0 or above, with `pip install -e '.[gpu]'`.
Writes a table and benchmarks/results/gpu-NAME.json. About ten minutes, most of them XLA's.

A time is that of a program of several calls on inputs of their own, together larger than the GPU's L2 cache, over the
number of calls; contenders run in turns, and the median counts. `--tiny` only shows that all of it runs: with
TRITON_INTERPRET=1 on a CPU, in a minute, and its times mean nothing.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import re
import secrets
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from benchmarks.common import RESULTS, in_turns, machine
from benchmarks.compile_step import LLAMA, shapes_of
from kvjax import codecs, policies
from kvjax.decoding import empty_cache
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.fold_slots import fold_slots
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prune_channels import prune_channels
from pallas_kernels.slot_attention import slot_attention
from pallas_kernels.slot_write import slot_write
from pallas_kernels.topk_slots import topk_slots

L2 = 64 * 2**20  # bytes; inputs of a program are more than twice as much
RUNS = 7


@dataclasses.dataclass
class Bench:
    """What is measured with, and what was found so far."""

    tiny: bool
    key: jax.Array
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    copy: float = math.nan  # bytes a second that a device copy reads and writes

    def normal(self, *shape, dtype=jnp.bfloat16) -> jax.Array:
        """Fresh random numbers."""
        self.key, mine = jax.random.split(self.key)
        return jax.random.normal(mine, shape, dtype)

    def shuffled(self, batch, heads, slots) -> jax.Array:
        """Positions 0..slots-1 in another order for each row and head, i32[B, H, N]."""
        self.key, mine = jax.random.split(self.key)
        order = jax.random.permutation(mine, jnp.tile(jnp.arange(slots, dtype=jnp.int32), (batch * heads, 1)), 1, True)
        return order.reshape(batch, heads, slots)

    def size(self, full: int, tiny: int) -> int:
        """The number that this run uses."""
        return tiny if self.tiny else full

    def show(self, name: str, value: float, unit: str = "", reach: str = "") -> None:
        """Prints and notes a figure."""
        self.figures[name] = value
        print(f"{name:<78}{value:>11.4g} {unit:<6} {reach}", flush=True)

    def times(self, make: Callable[[], tuple], **contenders: Callable) -> dict[str, float]:
        """Seconds of one call of each contender, on inputs that `make` makes afresh."""
        first = make()
        own = sum(x.nbytes for x in jax.tree.leaves(first))
        inputs = [first, *(make() for _ in range(0 if self.tiny else min(15, 2 * L2 // own)))]
        programs = {name: _program(one, inputs) for name, one in contenders.items()}
        taken = in_turns(
            1 if self.tiny else RUNS,
            **{name: functools.partial(_seconds, *program) for name, program in programs.items()},
        )
        return {name: seconds / len(inputs) for name, seconds in taken.items()}

    def close(self, name: str, got, want, atol: float) -> None:
        """Refuses results that are not those of the reference."""
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            same = (a == b) | (np.abs(a - b) <= atol)
            assert same.all(), (
                f"{name}: {(~same).sum()} of {same.size} differ, by {np.nanmax(np.abs(a - b)):.3g} at most"
            )
        print(f"{name:<78}as the reference, to {atol:g}", flush=True)


def _program(function, inputs):
    """`function` of all inputs, compiled as one, and the inputs."""
    if jax.default_backend() == "cpu":
        return functools.partial(map_all, function), inputs
    return jax.jit(functools.partial(map_all, function)).lower(inputs).compile(), inputs


def map_all(function, inputs):
    """One result for each."""
    return [function(*one) for one in inputs]


def _seconds(program, inputs) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(inputs))
    return time.perf_counter() - start


def copies(bench: Bench) -> None:
    """The yardstick."""
    count = bench.size(2**29, 2**10)
    taken = bench.times(lambda: (jnp.ones(count, jnp.bfloat16),), copy=lambda x: x + 1)["copy"]
    bench.copy = 4 * count / taken
    bench.show("bandwidth of a device copy", bench.copy / 1e9, "GB/s")


def packed(bench: Bench, bits: int, *shape) -> jax.Array:
    """Vectors in the form that kvjax stores."""
    return jax.jit(codecs.integer(bits).store)(bench.normal(*shape))


def decode_attention(bench: Bench) -> None:
    """`slot_attention` in the shapes that the figures are asked for."""
    rows, slots, dim = bench.size(32, 1), bench.size(4096, 32), bench.size(128, 32)

    def call(rows, slots, store=bench.normal):
        def make():
            shape = (rows, 8, slots, dim)
            q = bench.normal(rows, 8, 4, 1, dim)
            at = jnp.full((rows, 1, 1), slots, jnp.int32)
            return q, store(*shape), store(*shape), at, bench.shuffled(rows, 8, slots)

        return make

    run = functools.partial(slot_attention, scale=dim**-0.5)
    gpu = functools.partial(run, implementation="gpu")
    small = call(1, bench.size(1000, 20))()
    for stat in (None, "mass", "logits"):
        got, want = gpu(*small, stat=stat), run(*small, stat=stat, implementation="reference")
        bench.close(f"slot_attention, stat={stat}", got, want, 2e-2)  # bf16 has 8 bits
    for bits in (8, 4, 2):
        small = call(1, bench.size(1000, 20), functools.partial(packed, bench, bits))()
        bench.close(f"slot_attention, {bits} bits", gpu(*small), run(*small, implementation="reference"), 2e-2)

    moved = 2 * rows * 8 * slots * dim * 2
    contenders = {
        "plain": gpu,
        "mass": functools.partial(gpu, stat="mass"),
        "reference": functools.partial(run, implementation="reference"),
    }
    if not bench.tiny:
        contenders["cudnn"] = functools.partial(_cudnn, causal=False)
    taken = bench.times(call(rows, slots), **contenders)
    shape = f"{rows} rows x 8 x 4, {slots} slots, D {dim}"
    bench.show(f"slot_attention, {shape}: share of copy bandwidth", moved / taken["plain"] / bench.copy, "", ">= 0.8")
    bench.show("the same with mass, of the time without", taken["mass"] / taken["plain"], "", "<= 1.05")
    for rival in contenders.keys() - {"plain", "mass"}:
        bench.show(f"the same, time of {rival} over ours", taken[rival] / taken["plain"])
    plain = taken["plain"]
    for bits, reach in ((8, ">= 1.6"), (4, ">= 2.5"), (2, "")):
        coded = bench.times(call(rows, slots, functools.partial(packed, bench, bits)), coded=gpu)["coded"]
        bench.show(f"slot_attention, {shape}: int{bits}, times as fast as bf16", plain / coded, "", reach)
    slots = bench.size(32768, 64)
    taken = bench.times(call(1, slots), plain=gpu)["plain"]
    share = 2 * 8 * slots * dim * 2 / taken / bench.copy
    bench.show(f"slot_attention, 1 row, {slots} slots: share of copy bandwidth", share, "", ">= 0.6")


def _cudnn(q, k, v, *_, causal: bool):
    """cudnn's attention of [B, H, G, T, D] queries, which it wants as [B, T, heads, D]."""
    batch, heads, group, count, dim = q.shape
    q = q.reshape(batch, heads * group, count, dim).swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), is_causal=causal, implementation="cudnn", scale=dim**-0.5
    )
    return out


def prompt_attention(bench: Bench) -> None:
    """`prefill_attention` with column mass, beside cudnn without."""
    count, dim = bench.size(8192, 32), bench.size(128, 32)

    def call(count):
        def make():
            at = jnp.arange(count, dtype=jnp.int32)
            q, k, v = bench.normal(1, 8, 4, count, dim), bench.normal(1, 8, count, dim), bench.normal(1, 8, count, dim)
            return q, k, v, at[None, None], jnp.broadcast_to(at, (1, 8, count))

        return make

    run = functools.partial(prefill_attention, scale=dim**-0.5)
    gpu = functools.partial(run, implementation="gpu")
    some = bench.size(1000, 24)
    small, weights = call(some)(), jnp.ones((1, 1, some))
    want = run(*small, weights=weights, implementation="reference")
    bench.close("prefill_attention", gpu(*small, weights=weights)[:2], want[:2], 2e-2)  # bf16 has 8 bits
    mass = gpu(*small, weights=weights).mass
    bench.close("prefill_attention, column mass, relative", mass / want.mass, jnp.ones_like(mass), 2e-2)
    contenders = {"plain": gpu, "mass": functools.partial(gpu, weights=jnp.ones((1, 1, count)))}
    if not bench.tiny:
        contenders["cudnn"] = functools.partial(_cudnn, causal=True)
    taken = bench.times(call(count), **contenders)
    bench.show(f"prefill_attention, {count} tokens", taken["plain"] * 1e3, "ms")
    bench.show("the same with mass, of the time without", taken["mass"] / taken["plain"])
    if "cudnn" in taken:
        bench.show("the same with mass, of the time of cudnn without", taken["mass"] / taken["cudnn"], "", "<= 1.4")


def selection(bench: Bench) -> None:
    """`topk_slots` beside lax.top_k."""
    batch, slots, keep = bench.size(32, 1), bench.size(8192, 64), bench.size(1024, 16)

    def make():
        return bench.normal(batch, 8, slots, dtype=jnp.float32), bench.shuffled(batch, 8, slots)

    one = make()
    gpu = functools.partial(topk_slots, k=keep, implementation="gpu")
    bench.close("topk_slots", gpu(*one), topk_slots(*one, keep, implementation="reference"), 0)
    taken = bench.times(make, ours=gpu, sort=lambda score, pos: jax.lax.top_k(score, keep))
    bench.show(f"topk_slots, {batch * 8} x {slots}, k {keep}", taken["ours"] * 1e6, "us")
    bench.show("the same, time of lax.top_k over ours", taken["sort"] / taken["ours"], "", ">= 5")


def folding(bench: Bench) -> None:
    """`fold_slots`, `prune_channels` and `slot_write`, against the bytes that they must move."""
    slots, keep, dim, window = bench.size(8192, 64), bench.size(1024, 16), bench.size(128, 32), bench.size(32, 4)

    def fold():
        k, v = bench.normal(4, 8, slots, dim), bench.normal(4, 8, slots, dim)
        return k, v, bench.shuffled(4, 8, slots) % keep, jnp.full((4, 8, slots), keep / slots)

    one, gpu = fold(), functools.partial(fold_slots, slots=keep, implementation="gpu")
    bench.close("fold_slots", gpu(*one), fold_slots(*one, keep, implementation="reference"), 2e-2)  # bf16
    taken = bench.times(fold, ours=gpu, reference=functools.partial(fold_slots, slots=keep, implementation="reference"))
    moved = 4 * 8 * 2 * (slots + keep) * dim * 2
    bench.show("fold_slots: share of copy bandwidth", moved / taken["ours"] / bench.copy, "", ">= 0.7")
    bench.show("the same, time of the reference over ours", taken["reference"] / taken["ours"])

    def prune():
        return bench.normal(4, 8, slots, dim), bench.normal(4, 8, 4, window, dim)

    one, gpu = prune(), functools.partial(prune_channels, keep=dim // 2, implementation="gpu")
    bench.close("prune_channels", gpu(*one), prune_channels(*one, dim // 2, implementation="reference"), 0)
    rival = functools.partial(prune_channels, keep=dim // 2, implementation="reference")
    taken = bench.times(prune, ours=gpu, reference=rival)
    moved = 4 * 8 * slots * (dim + dim // 2) * 2
    bench.show("prune_channels: share of copy bandwidth", moved / taken["ours"] / bench.copy, "", ">= 0.7")
    bench.show("the same, time of the reference over ours", taken["reference"] / taken["ours"])

    buffers = (bench.normal(4, 8, slots, dim), bench.shuffled(4, 8, slots))
    rows = (bench.normal(4, 8, dim), jnp.ones((4, 8), jnp.int32))
    slot = bench.shuffled(4, 8, slots)[..., 0].at[0, 0].set(slots)
    want = slot_write(buffers, rows, slot, implementation="reference")
    bench.close("slot_write", slot_write(buffers, rows, slot, implementation="gpu"), want, 0)


def steps(bench: Bench) -> None:
    """Decode steps of a model of Llama-3.1-8B's shape with random weights, as many layers as the memory holds."""
    rows, tokens, budget = bench.size(16, 2), bench.size(32768, 64), bench.size(2048, 16)
    config = dataclasses.replace(LLAMA, layers=bench.size(8, 1))
    if bench.tiny:
        config = dataclasses.replace(config, width=64, mlp_width=96, q_heads=4, kv_heads=2, head_dim=32, vocab=99)
    params = jax.tree.map(lambda x: 0.02 * bench.normal(*x.shape), shapes_of(config))
    weights, sizes, taken = kvjax.nbytes(params), {}, {}
    for name, policy in {
        "full": policies.full(),
        "streaming_llm": policies.streaming_llm(budget),
        "h2o": policies.h2o(budget, window=budget // 2),
        "mikv": policies.mikv(0.1, low_bits=4, group=32),
    }.items():
        cache = _filled(bench, empty_cache(params, policy, rows, tokens=tokens + 32), tokens)
        sizes[name] = kvjax.nbytes(cache)
        taken[name] = _step_seconds(params, policy, cache, rows, 1 if bench.tiny else 20)
        del cache
        bench.show(f"step of {config.layers} layers, {rows} rows at {tokens} tokens: {name}", taken[name] * 1e3, "ms")
    f = sizes["full"] / (sizes["full"] + weights)
    bench.show("f, share of KV bytes in a full step", f)
    for name in ("streaming_llm", "h2o", "mikv"):
        bound = 1 - f + f * sizes[name] / sizes["full"]
        bench.show(f"step of {name} / full", taken[name] / taken["full"], "", f"bound {bound:.3f}")
        if name == "h2o":
            bench.show("the same over its bound", taken[name] / taken["full"] / bound, "", "<= 1.15")


def _filled(bench, cache, tokens):
    """The cache as if so many tokens had been read: all slots but those to come are taken, by anything."""

    def fill(layer):
        count = min(tokens, layer.slots - 1)
        pos = jnp.where(jnp.arange(layer.slots) < count, tokens - count + jnp.arange(layer.slots), -1)
        k, v = (
            jax.tree.map(lambda x: bench.normal(*x.shape) if x.dtype == jnp.bfloat16 else x, part)
            for part in (layer.k, layer.v)
        )
        filled = dataclasses.replace(layer, k=k, v=v, pos=jnp.broadcast_to(pos, layer.pos.shape).astype(jnp.int32))
        return filled if filled.low == () else dataclasses.replace(filled, low=fill(filled.low))

    return dataclasses.replace(
        cache, layers=tuple(map(fill, cache.layers)), length=jnp.full(cache.length.shape, tokens, jnp.int32)
    )


def _step_seconds(params, policy, cache, rows, count):
    """Median seconds of a step, one after the other."""
    token, seconds = jnp.ones(rows, jnp.int32), []
    step = jax.jit(kvjax.step, donate_argnames="cache")
    for _ in range(count + 2):  # the first compiles, the second is not counted
        start = time.perf_counter()
        logits, cache = step(params, policy, token, cache)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main(tiny: bool, seed: int) -> None:
    if not tiny and jax.default_backend() != "gpu":
        raise SystemExit(f"the default backend is {jax.default_backend()}; this wants a GPU, or --tiny.")
    bench = Bench(tiny, jax.random.key(seed))
    with compiling_for("gpu"):
        for part in (copies, decode_attention, prompt_attention, selection, folding, steps):
            part(bench)
    if tiny:
        return
    device = jax.devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jax-triton", "triton")}
    result = {"figures": bench.figures, "gpu": device, "machine": machine(), "versions": versions, "seed": seed}
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device.lower())
    (RESULTS / f"gpu-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the inputs; another each time")
    arguments = parser.parse_args()
    main(arguments.tiny, arguments.seed)
