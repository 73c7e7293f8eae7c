"""Small tasks that the tests train, here or, as a program, in processes of their own.

    python -m tests.train.cases NAME FOLDER STEPS SAVE_EVERY [fsdp=2 tensor=2 coordinator=HOST:PORT count=2 index=0]

A case is a function (process) -> (task, params, batches), process being the index and count of those that read rows.
Its batches are the same rows for any count. Add one to CASES, and it is trained over two processes, too.
"""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.tiny import CONFIG, random_params
from train import attention_gate, backbone, locret, loop
from train import mesh as meshes

ROOT = pathlib.Path(__file__).parents[2]
ROWS = 16
SILENT_PROCESS = 10  # seconds after which a process counts as dead


class ToyBatches:
    """Rows of which number i depends on i alone. Before a batch whose number is in `on`, that is called."""

    def __init__(self, process=(0, 1), on=None, bad_row=None):
        self.process, self.on, self.bad_row, self.number = process, on or {}, bad_row, 0

    def __next__(self):
        self.on.get(self.number, lambda: None)()
        ids = np.arange(ROWS) + ROWS * self.number
        self.number += 1
        x = np.stack([np.random.default_rng(int(i)).standard_normal(12) for i in ids]).astype(np.float32)
        if self.bad_row is not None:
            x[ids == self.bad_row] = np.nan
        y = np.sin(x.sum(-1))
        index, count = self.process
        return {"x": x[index::count], "y": y[index::count], "ids": ids[index::count]}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def toy(process=(0, 1)):
    """A net of two layers, the first of them frozen."""

    def loss_of(trainable, params, batch):
        hidden = jnp.tanh(batch["x"] @ params["frozen"])
        got = jnp.tanh(hidden @ trainable["w"] + trainable["b"]) @ trainable["out"]
        error = (got - batch["y"]) ** 2
        return error.mean(), {"active": jnp.abs(hidden[:, :2]).mean(0)}

    def init(key):
        keys = jax.random.split(key)
        w, out = jax.random.normal(keys[0], (8, 16)) / 3, jax.random.normal(keys[1], (16,)) / 4
        return {"w": w, "b": jnp.zeros(16), "out": out}

    def gradients(trainable, params, batch, step):
        (loss, more), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, params, batch)
        return gradients, {"loss": loss, **more}

    def evaluate(trainable, params, batch):
        return {"loss": loss_of(trainable, params, batch)[0]}

    frozen = np.random.default_rng(9).standard_normal((12, 8)).astype(np.float32)
    return loop.Task(init, gradients, optax.adamw(1e-2), evaluate), {"frozen": frozen}, ToyBatches(process)


class PairBatches(ToyBatches):
    """Prompts and answers of random tokens: rows of which number i depends on i alone."""

    def __next__(self):
        ids = super().__next__()["ids"]
        rows = [np.random.default_rng(int(i)) for i in ids]
        tokens = np.stack([row.integers(0, CONFIG.vocab, 20) for row in rows]).astype(np.int32)
        prompts = np.array([row.integers(4, 15) for row in rows], np.int32)
        lengths = np.array([row.integers(15, 21) for row in rows], np.int32)
        return {"tokens": tokens, "prompt_lengths": prompts, "lengths": lengths, "ids": ids}


def locret_case(process=(0, 1)):
    """Retaining heads of a tiny model."""
    settings = locret.Settings(
        model="", files=(), folder="", output="", sequence=20, steps=5, width=4, answer=4, warm_up=2, learning_rate=1e-2
    )
    return locret.task(CONFIG, settings), backbone.stacked(random_params()), PairBatches(process)


def gate_case(process=(0, 1)):
    """Attention gates of a tiny model."""
    settings = attention_gate.Settings(
        model="", files=(), folder="", output="", sequence=20, steps=5, heads=2, head_dim=4, learning_rate=1e-2
    )
    return attention_gate.task(CONFIG, settings), backbone.stacked(random_params()), PairBatches(process)


CASES = {"toy": toy, "locret": locret_case, "attention_gate": gate_case}


def main(name, folder, steps, save_every, fsdp=1, tensor=1, coordinator=None, count=None, index=None):
    if coordinator is not None:
        meshes.start_processes(coordinator, int(count), int(index), timeout=SILENT_PROCESS)
    mesh = meshes.make_mesh(fsdp=int(fsdp), tensor=int(tensor))
    task, params, batches = CASES[name](meshes.rows_of_process(mesh))
    layout = backbone.shardings(params, mesh) if hasattr(params, "blocks") else meshes.replicated(mesh)
    settings = dict(steps=int(steps), folder=folder, mesh=mesh, seed=0, save_every=int(save_every))
    loop.train(task, meshes.place(params, layout), batches, **settings)


def start(*arguments, devices=1):
    """This program in a process of its own, which sees `devices` CPUs, and compiles as the tests do."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
    }
    environment = os.environ | cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.cases", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def start_all(count, *arguments, devices):
    """`count` such processes, which work as one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    joined = [f"coordinator={coordinator}", f"count={count}"]
    return [start(*arguments, *joined, f"index={index}", devices=devices) for index in range(count)]


def wait_for(process, condition, *, seconds=120):
    """Looks again and again until something is so, for as long as the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


if __name__ == "__main__":
    main(*sys.argv[1:5], **dict(option.split("=") for option in sys.argv[5:]))
