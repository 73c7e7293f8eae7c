"""Compiles every kernel for TPUs and GPUs that are not here: `python -m pallas_kernels.compile_all [operation ...]`.

Each operation's `cases.py` lists shapes that are used in earnest. A line for each says what it takes of a chip.
"""

import functools
import importlib
import pathlib
import sys
import time
from collections.abc import Iterator

import jax

from pallas_kernels import triton_call
from pallas_kernels.aot import TPUS, compile_for_tpu
from pallas_kernels.dispatch import compiling_for

GPUS = (80, 90)
OPERATIONS = sorted(path.parent.name for path in pathlib.Path(__file__).parent.glob("*/cases.py"))


def compile_operation(operation: str) -> Iterator[tuple[str, str, str]]:
    """(case, target, what it takes) of every case that a kernel exists for; errors are raised."""
    public = getattr(importlib.import_module(f"pallas_kernels.{operation}"), operation)
    cases = importlib.import_module(f"pallas_kernels.{operation}.cases").CASES
    for name, (shapes, settings) in cases.items():
        run = functools.partial(public, **settings)
        for topology in TPUS:
            compiled = compile_for_tpu(functools.partial(run, implementation="tpu"), *shapes, topology=topology)
            memory = compiled.memory_analysis()
            yield name, topology, f"temporaries {memory.temp_size_in_bytes:,} B in HBM"
        with compiling_for("gpu"), triton_call.recording() as launches:
            jax.eval_shape(functools.partial(run, implementation="gpu"), *shapes)
        assert launches, f"{operation}, {name}: no kernel was launched"
        for capability in GPUS:
            shared = [triton_call.compile_launch(launch, capability).shared for launch in launches]
            yield name, f"sm_{capability}", f"{len(launches)} kernels, shared memory {max(shared):,} B"


def main(operations: list[str]) -> None:
    """Prints a line for each case and target."""
    for operation in operations or OPERATIONS:
        for name, target, what in compile_operation(operation):
            print(f"{operation:<18}{name:<34}{target:<12}{what}", flush=True)


if __name__ == "__main__":
    start = time.perf_counter()
    main(sys.argv[1:])
    print(f"all compiled in {time.perf_counter() - start:.0f} s")
