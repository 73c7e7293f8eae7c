"""What the programs that train heads share: their settings, and the way from a file of settings to a file of heads."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import kvjax
from kvjax import heads
from kvjax.models.llama import Config
from train import backbone, config, data, loop
from train import mesh as meshes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all trainers have. A program adds its own."""

    model: str  # as kvjax.load takes it
    dtype: str = "float32"  # of the frozen model
    files: tuple[str, ...]  # JSON Lines or Parquet, with prompt and answer, or text
    format: str = "chat"  # of pairs: "chat", "plain" or "raw"
    folder: str  # of checkpoints and metrics
    output: str  # the heads, a safetensors file
    sequence: int  # tokens of a row; longer pairs are left out
    batch: int = 1  # rows of a step
    accumulate: int = 1  # parts of a batch that are computed one after another
    steps: int
    seed: int = 42
    held_out: int = 0  # rows that are never trained on
    evaluate_every: int | None = None  # steps
    save_every: int = 50  # steps
    keep: int = 3  # checkpoints
    workers: int = 0  # processes that tokenise
    data: int | None = None  # devices along this axis; None takes what the others leave
    fsdp: int = 1
    tensor: int = 1


def run(
    kind: type[Settings],
    task: Callable[[Config, Settings], loop.Task],
    schedule: Callable[[Settings], optax.Schedule],
    *,
    heads_of: Callable[[Any], Any] = lambda trained: trained,
    show: Sequence[str] = (),
) -> None:
    """The command: reads the settings, trains, and writes the heads.

    Args:
      kind: The program's settings.
      task: What is trained, of the model's config and the settings.
      schedule: The learning rate, of the settings.
      heads_of: The stacked heads among what was trained; None where there are none.
      show: Metrics for the progress bar.
    """
    arguments = argparse.ArgumentParser(description=f"Trains heads: python -m train.{kind.__module__.split('.')[-1]}")
    arguments.add_argument("config", help="a TOML file of settings, such as configs/locret_smollm2.toml")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="in place of what the file says")
    arguments.add_argument("--processes", nargs=3, metavar=("HOST:PORT", "COUNT", "INDEX"),
                           help="of several, where jax does not find them by itself")  # fmt: skip
    given = arguments.parse_args()
    try:
        settings = config.read(given.config, kind, given.overrides)
        coordinator, count, index = given.processes or (None, None, None)
        meshes.start_processes(coordinator, *(None if n is None else int(n) for n in (count, index)))
        train(settings, task, schedule, heads_of=heads_of, show=show)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def train(
    settings: Settings,
    task: Callable,
    schedule: Callable,
    *,
    heads_of: Callable[[Any], Any] = lambda trained: trained,
    show: Sequence[str] = (),
) -> Any:
    """Trains as `settings` say, writes the heads to `settings.output`, and returns all that was trained."""
    mesh = meshes.make_mesh(settings.data, settings.fsdp, settings.tensor)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # one chip of many may not hold the model
        model = kvjax.load(settings.model, dtype=settings.dtype)
        frozen = backbone.stacked(model.params)
    rows = data.read_rows(
        settings.files,
        model,
        sequence=settings.sequence,
        format=settings.format,
        seed=settings.seed,
        workers=settings.workers,
    )
    first = jax.process_index() == 0
    if first:
        print(rows.summary, flush=True)
    where = {"batch": settings.batch, "seed": settings.seed, "process": meshes.rows_of_process(mesh)}
    work = task(model.config, settings)
    frozen = meshes.place(frozen, backbone.shardings(frozen, mesh))
    trained = loop.train(
        work,
        frozen,
        data.batches(rows, held_out=settings.held_out, **where),
        steps=settings.steps,
        folder=settings.folder,
        mesh=mesh,
        seed=settings.seed,
        save_every=settings.save_every,
        keep=settings.keep,
        accumulate=settings.accumulate,
        evaluate_every=settings.evaluate_every,
        held_out=data.held_out_batches(rows, held_out=settings.held_out, **where) if settings.held_out else (),
        learning_rate=schedule(settings),
        show=show,
        note={
            "data": rows.summary.digest,
            **{name: str(value) for name, value in dataclasses.asdict(settings).items()},
        },
        may_change=("folder", "output", "save_every", "keep", "workers", "data", "fsdp", "tensor"),
    )
    trained = jax.device_get(jax.jit(lambda tree: tree, out_shardings=meshes.replicated(mesh))(trained))
    if first and heads_of(trained) is not None:
        pathlib.Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        per_layer = backbone.unstack(heads_of(trained), model.config.layers)
        heads.save(settings.output, per_layer, model.params, steps=str(settings.steps), data=", ".join(settings.files))
        print(f"Wrote {settings.output}.", flush=True)
    return trained
