"""What plans of shared prefixes save and how long planning takes: `python -m benchmarks.prefix_plan`.

Host code alone, on one core; takes less than a minute. Prints the figures and writes them to
benchmarks/results/prefix_plan.json. Seconds of planning are medians of three. Schedules have 2048 tokens an iteration
and memory for 450,000.
"""

import json
import statistics
import time

import numpy as np

from benchmarks.common import RESULTS, machine
from kvjax.serve.prefix_plan import Group, bound, ordered, plan
from kvjax.serve.scheduling import Scheduler
from kvjax.serve.workloads import Workload, industry, lru_saving, micro

MEMORY = 450_000  # tokens; about what Llama-3.1-8B, in 16 bits, leaves of the paper's 80 GB
METHODS = ("naive", "paper", "exact")
SIZES = [(2000, 200, 16), (2000, 1000, 16), (1000, 1000, 16), (2000, 200, 4)]  # prefix, suffix, degree


def main() -> None:
    figures = planning() | savings() | schedules()
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    measured = {"figures": figures, "machine": machine() | {"numpy": np.__version__}}
    (RESULTS / "prefix_plan.json").write_text(json.dumps(measured, indent=1) + "\n")


def planning() -> dict[str, float]:
    """Seconds for 10,000 prompts of 1,600 tokens; and for a chain of prompts, each a beginning of the next."""
    arrays = micro(1400, 200, 16, 10_000, out=100).prompts
    lists = [prompt.tolist() for prompt in arrays]
    chain = [np.ones(count + 2, np.int32) for count in range(4000)]
    figures = {f"10,000 x 1600 tokens, arrays, {method} [s]": seconds(arrays, method) for method in METHODS}
    figures["10,000 x 1600 tokens, lists, exact [s]"] = seconds(lists, "exact")
    figures["a chain of 4,000 prompts, exact [s]"] = seconds(chain, "exact")
    return figures


def seconds(prompts, method: str) -> float:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        plan(prompts, method=method)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def savings() -> dict[str, float]:
    figures = {}
    for sizes in SIZES:
        work = micro(*sizes, 6400, out=100)
        made = plan(work.prompts)
        figures[f"micro{sizes}: saved [%]"] = made.saving
        figures[f"micro{sizes}: saved by an LRU cache [%]"] = lru_saving(
            made, [len(prompt) for prompt in work.prompts], work.outputs, capacity=MEMORY
        )
    prompts = industry(8000).prompts
    for method in METHODS:
        figures[f"industry, 8000 prompts: saved, {method} [%]"] = plan(prompts, method=method).saving
    figures["industry, 8000 prompts: bound [%]"] = 100 * bound(prompts) / sum(map(len, prompts))
    figures["industry, 8000 prompts: saved in pages of 128 [%]"] = plan(prompts, page=128).saving
    return figures


def schedules() -> dict[str, float]:
    """Iterations, how full they are, and the host's time for each."""
    figures = {}
    for name, work in {"micro(2000, 200, 16)": micro(2000, 200, 16, 1600, out=100), "industry": industry(3000)}.items():
        lengths = [len(prompt) for prompt in work.prompts]
        shared = ordered(plan(work.prompts, page=128), lengths, work.outputs).groups
        for title, groups in {"shared": shared, "not shared": [Group(0, (i,)) for i in range(len(lengths))]}.items():
            figures |= {f"{name}, {title}: {key}": value for key, value in schedule(groups, lengths, work).items()}
    return figures


def schedule(groups, lengths: list[int], work: Workload) -> dict[str, float]:
    suffixes = list(lengths)
    for length, members in groups:
        for i in members:
            suffixes[i] -= length
    start = time.perf_counter()
    iterations = list(
        iter(Scheduler(groups, suffixes, work.outputs, batch_tokens=2048, memory=MEMORY, page=128).next, None)
    )
    taken = time.perf_counter() - start
    rows = [len(iteration.decode) for iteration in iterations]
    read = sum(chunk.count for one in iterations for chunk in one.suffixes + one.prefixes)
    return {
        "iterations": len(iterations),
        "tokens an iteration": (sum(rows) + read) / len(iterations),
        "rows that decode": sum(rows) / len(iterations),
        "host's time an iteration [ms]": 1e3 * taken / len(iterations),
    }


if __name__ == "__main__":
    main()
