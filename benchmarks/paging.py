"""Paging with bits: cost against Belady's choice and the bounds, on three drawn traces, and what a request takes.

    python -m benchmarks.paging

Half a minute on one core, no model. Prints each figure with its reach and writes benchmarks/results/paging.json.
"""

import importlib.metadata
import json
import time

import numpy as np

from benchmarks.common import RESULTS, in_turns, machine
from kvjax.serve import paging, traces
from kvjax.serve.simulate import faults, simulate

LENGTH = 20_000
TRACES = {"zipf": (traces.zipf, 100), "rag": (traces.rag, 60), "loop": (traces.loop, 100)}  # requests, capacity


def main() -> None:
    figures = right() | wrong() | passages() | speed()
    RESULTS.mkdir(exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    result = {"figures": figures, "machine": machine(), "versions": versions, "requests": LENGTH}
    (RESULTS / "paging.json").write_text(json.dumps(result, indent=1) + "\n")


def show(name: str, value: float, reach: str = "") -> dict[str, float]:
    print(f"{name:<84}{value:>9.3f}   {reach}", flush=True)
    return {name: float(value)}


def policies(k: int) -> dict[str, paging.Pages]:
    return {
        "flush_when_zero": paging.flush_when_zero(k),
        "mark_zero": paging.mark_zero(k),
        "combine, 1/2 + 1/2": paging.combine([paging.mark_zero(k), paging.lru(k)]),
        "combine, 0.8 + 0.2": paging.combine([paging.mark_zero(k), paging.lru(k)], (0.8, 0.2)),
        "follow_the_leader": paging.follow_the_leader([paging.mark_zero(k), paging.lru(k)]),
    }


def right() -> dict[str, float]:
    """True bits: the worst of the three traces. A combination may cost its share more, by design."""
    worst = {}
    for draw, k in TRACES.values():
        trace = draw(LENGTH)
        best, bits = faults(paging.belady(k, trace.tolist()), trace).sum(), traces.discard_bits(trace, k)
        for name, pages in policies(k).items():
            worst[name] = max(worst.get(name, 0), faults(pages, trace, bits).sum() / best)
    figures = {}
    for name, ratio in worst.items():
        figures |= show(f"all bits right: faults / Belady's: {name}", ratio, "" if "combine" in name else "<= 1.05")
    return figures


def wrong() -> dict[str, float]:
    """All bits wrong: of the bound, the worst of the traces and of the adversary's pages."""
    worst = {}
    drawn = [(draw(LENGTH), k) for draw, k in TRACES.values()]
    for trace, k in [*drawn, (traces.pingpong(60, LENGTH // 2)[0], 60)]:
        best, truth = faults(paging.belady(k, trace.tolist()), trace).sum(), traces.discard_bits(trace, k)
        bits = 1 - truth
        zeros, ones = traces.errors(bits, truth)
        harmonic = sum(1 / i for i in range(1, k + 1))
        single = faults(paging.mark_zero(k), trace, bits).sum()
        robust = faults(paging.lru(k), trace).sum()
        bounds = {
            "flush_when_zero": best + (k - 1) * zeros + ones,
            "mark_zero": best + 2 * harmonic * zeros + ones,
            "combine, 1/2 + 1/2": 2 * min(single, robust),
            "combine, 0.8 + 0.2": min(single / 0.8, robust / 0.2),
            "follow_the_leader": min(single, robust),  # no bound of theory: the better of the two
        }
        for name, pages in policies(k).items():
            worst[name] = max(worst.get(name, 0), faults(pages, trace, bits).sum() / bounds[name])
    figures = {}
    for name, ratio in worst.items():
        of = "the better of its two" if "leader" in name else "the bound"
        figures |= show(f"all bits wrong: faults / {of}: {name}", ratio, "<= 1.1")
    return figures


def passages() -> dict[str, float]:
    """Queries that ask for five of 500 passages, 60 of which fit."""
    draw, k = TRACES["rag"]
    trace = draw(LENGTH)
    best, lru = (faults(pages, trace).sum() for pages in (paging.belady(k, trace.tolist()), paging.lru(k)))
    figures = show("rag: faults / Belady's: lru", lru / best)
    truth, reuse = traces.discard_bits(trace, k), traces.reuse_bits(trace, k)
    predicted = {f"{flip:.0%} of bits wrong": traces.flip(truth, flip) for flip in (0.05, 0.1, 0.2, 0.3, 0.5)}
    for what, bits in {**predicted, "bits of reuse": reuse}.items():
        for name in ("mark_zero", "follow_the_leader"):
            cost = faults(policies(k)[name], trace, bits).sum()
            reach = "< 1" if what in ("10% of bits wrong", "bits of reuse") else ""
            figures |= show(f"rag: faults / lru's: {name}, {what}", cost / lru, reach)
    zeros, ones = traces.errors(reuse, truth)
    figures |= show("rag: bits of reuse that are wrongly 0, of all requests", zeros / LENGTH)
    return figures | show("rag: bits of reuse that are wrongly 1, of all requests", ones / LENGTH)


def speed() -> dict[str, float]:
    """Medians of five rounds in turns, on the rag trace with a tenth of its bits wrong; of the CPU, on the host."""
    draw, k = TRACES["rag"]
    trace = draw(LENGTH)
    bits = traces.flip(traces.discard_bits(trace, k), 0.1)
    rows = np.tile(bits, (16, 1))

    def timed(run, clock=time.process_time):  # which does not count who else is running
        start = clock()
        run()
        return clock() - start

    taken = in_turns(
        5,
        lru=lambda: timed(lambda: faults(paging.lru(k), trace)),
        mark_zero=lambda: timed(lambda: faults(paging.mark_zero(k), trace, bits)),
        follow_the_leader=lambda: timed(lambda: faults(policies(k)["follow_the_leader"], trace, bits)),
        simulated=lambda: timed(
            lambda: simulate("mark_zero", trace, k, bits=rows, seeds=np.arange(16)), time.perf_counter
        ),
    )
    figures = {}
    for name in ("lru", "mark_zero", "follow_the_leader"):
        figures |= show(f"a request on the host [us of CPU]: {name}", 1e6 * taken[name] / LENGTH)
    return figures | show("a request in the simulator [us]: mark_zero, 16 rows", 1e6 * taken["simulated"] / rows.size)


if __name__ == "__main__":
    main()
