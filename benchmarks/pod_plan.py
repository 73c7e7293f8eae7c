"""Training steps for Llama-3.1-8B, compiled for TPU pods that are not here: `python -m benchmarks.pod_plan`.

A step is the one that `train.loop` runs: gradients of the heads, in f32, through or beside the frozen bf16 model;
AdamW; and the donated state. Says what each chip would hold beside what it has, and which collectives the program
names: one in a loop counts once. Needs libtpu. Prints a table and, of a run over all of it, writes
benchmarks/results/pod_plan.json. A program takes one or two minutes to compile; nothing runs, so nothing is known of
its speed.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.common import RESULTS
from benchmarks.compile_step import LLAMA, shapes_of
from pallas_kernels.dispatch import compiling_for
from train import backbone, loop
from train import mesh as meshes

GIB = 2**30


class Target(NamedTuple):
    """A slice: its topology, its mesh (data, fsdp, tensor), and the bytes of a chip's memory."""

    topology: str
    mesh: tuple[int, int, int]
    memory: int


# Rows of a step are data times fsdp, one for each group of "tensor" chips: larger slices split the heads, so that the
# batch stays near what Locret's few thousand steps can use.
TARGETS = {
    "v5e-16": Target("v5e:4x4", (1, 16, 1), 16 * GIB),
    "v5e-64": Target("v5e:8x8", (1, 16, 4), 16 * GIB),
    "v5e-256": Target("v5e:16x16", (4, 8, 8), 16 * GIB),
    "v6e-16": Target("v6e:4x4", (1, 16, 1), 32 * GIB),
    "v6e-64": Target("v6e:8x8", (1, 16, 4), 32 * GIB),
    "v6e-256": Target("v6e:16x16", (4, 8, 8), 32 * GIB),
}
SHARED = {"model": "", "dtype": "bfloat16", "files": (), "folder": "", "output": "", "steps": 3000}
TASKS = {
    "locret": {"sequence": 10240, "answer": 1024, "width": 1024},
    "attention_gate": {"sequence": 4096},
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def placed(tree: Any, layout: Any) -> Any:
    """Shapes, each with its sharding."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, layout)


def bytes_of(tree: Any) -> int:
    """Bytes of placed shapes on one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Of a compiled program's text: how many collectives of each kind, and the bytes of the largest result."""
    found = {}
    for kind in COLLECTIVES:
        sizes = []
        for result in re.findall(rf"= (.+?) {kind}(?:-start)?\(", text):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
            sizes += [max(WIDTHS[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in shapes)]
        if sizes:
            found[kind] = {"count": len(sizes), "largest": max(sizes)}
    return found


class Compiled(NamedTuple):
    """A training step for a mesh.

    Attributes:
      text: The program, as XLA leaves it.
      rows: Of a batch.
      arguments: Bytes on a chip, also of what lies there unread: Locret's step has no use for the vocabulary's matrix.
      temporaries: Bytes on a chip, at most.
    """

    text: str
    rows: int
    arguments: int
    temporaries: int


def compiled_step(name: str, mesh: Mesh, layers: int) -> Compiled:
    """The step of a trainer, with the kernels that a TPU would choose."""
    config = dataclasses.replace(LLAMA, layers=layers)
    trainer = importlib.import_module(f"train.{name}")
    settings = trainer.Settings(**SHARED, **TASKS[name])
    task = trainer.task(config, settings)

    params = jax.eval_shape(backbone.stacked, shapes_of(config))
    params = placed(params, backbone.shardings(params, mesh))
    state = jax.eval_shape(functools.partial(loop._first_state, task, settings.seed))
    layout = meshes.spread(state, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    each = {"tokens": (settings.sequence,), "prompt_lengths": (), "lengths": ()}
    batch = {key: jax.ShapeDtypeStruct((rows, *shape), jnp.int32) for key, shape in each.items()}
    rest = batch, jax.ShapeDtypeStruct((rows,), jnp.bool_)
    batch, flags = placed(rest, jax.tree.map(lambda _: meshes.batch_sharding(mesh), rest))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    state = placed(state, layout)
    with compiling_for("tpu"), meshes.over(mesh):
        update = loop._compile(task, layout, mesh, settings.accumulate, trainer.schedule(settings))
        lowered = update.lower(state, params, batch, flags, step)
    with tempfile.TemporaryDirectory() as folder:  # as_text() of an executable fails for some programs of v6e
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        text = path.read_text()
    return Compiled(text, rows, bytes_of((state, params, batch, flags)), compiled.memory_analysis().temp_size_in_bytes)


def plan(target: str, name: str, layers: int, sizes: tuple[int, int, int] | None = None) -> dict:
    """What there is to know about a step on a slice before there is a slice.

    Args:
      target: Of `TARGETS`.
      name: Of `TASKS`.
      layers: Of the model.
      sizes: Another mesh (data, fsdp, tensor) than the target's.
    """
    topology, shape, memory = TARGETS[target]
    chips = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = meshes.make_mesh(*(sizes or shape), chips=chips)
    processes = {chip.process_index for chip in chips}
    parts = {meshes.rows_of_process(mesh, process) for process in processes}  # refuses a mesh that it cannot feed

    start = time.perf_counter()
    step = compiled_step(name, mesh, layers)
    seconds, total = time.perf_counter() - start, step.arguments + step.temporaries
    return {
        "task": name,
        "target": target,
        "chips": mesh.size,
        "processes": len(processes),
        "parts": len(parts),
        "mesh": dict(mesh.shape),
        "batch": step.rows,
        "layers": layers,
        "settings": TASKS[name],
        "arguments": step.arguments,
        "temporaries": step.temporaries,
        "total": total,
        "memory": memory,
        "fits": total < memory,
        "attention": "kernel" if 'custom_call_target="tpu_custom_call"' in step.text else "jnp",
        "collectives": collectives(step.text),
        "compile_seconds": round(seconds, 1),
    }


def row(found: dict) -> str:
    """A line of the table."""
    gib = [f"{found[key] / GIB:.2f}" for key in ("arguments", "temporaries", "total")]
    said = ", ".join(f"{kind} {one['count']}" for kind, one in found["collectives"].items())
    cells = [found["task"], found["target"], " x ".join(map(str, found["mesh"].values())), found["batch"], *gib]
    cells += [f"{found['memory'] // GIB}", "yes" if found["fits"] else "no", found["attention"]]
    return " | ".join(map(str, ["", *cells, round(found["compile_seconds"]), said, ""])).strip()


HEAD = """\
| task | slice | data x fsdp x tensor | batch | arguments | temporaries | total | of | fits | attention | s | sent |
|---|---|---|---:|---:|---:|---:|---:|---|---|---:|---|"""


def main(targets: list[str], names: list[str], layers: int, sizes: tuple[int, int, int] | None) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    plans = []
    print(HEAD, flush=True)
    for name in names:
        for target in targets:
            plans.append(plan(target, name, layers, sizes))
            print(row(plans[-1]), flush=True)
    if (targets, names, layers, sizes) == (list(TARGETS), list(TASKS), LLAMA.layers, None):
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        path = RESULTS / "pod_plan.json"
        path.write_text(json.dumps({"versions": versions, "plans": plans}, indent=1) + "\n")


def _names(known: dict, text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; give some of {','.join(known)}.")
    return names


def _sizes(text: str) -> tuple[int, int, int]:
    try:
        data, fsdp, tensor = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers, data,fsdp,tensor, such as 1,16,1.") from None
    return data, fsdp, tensor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {"targets": TARGETS, "tasks": TASKS}
    for name, known in every.items():
        parser.add_argument(
            f"--{name}", type=functools.partial(_names, known), default=list(known), help=f"of {','.join(known)}"
        )
    parser.add_argument("--layers", type=int, default=LLAMA.layers)
    parser.add_argument("--mesh", type=_sizes, help="data,fsdp,tensor, in place of each target's own")
    arguments = parser.parse_args()
    try:
        main(arguments.targets, arguments.tasks, arguments.layers, arguments.mesh)
    except ValueError as error:
        parser.error(str(error))
