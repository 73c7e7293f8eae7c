"""The loop that fits eviction heads to a frozen backbone: one code path from one CPU to a pod of TPUs.

The backbone's weights are an argument of the compiled step and leave it as they came; what is trained, and the
optimiser's state, are donated. The host runs a step ahead of the numbers it reads: while step n computes, those of step
n - 1 are checked and written down.
"""

import contextlib
import functools
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train import checkpoints
from train import mesh as meshes

Batch = dict[str, Any]
Metrics = dict[str, Any]
NAMED_ROWS = 32  # rows of a batch that an error names


class Task(NamedTuple):
    """What is trained: pure functions whose results are means over the rows of a batch, so any mesh gives the same.

    Metrics are a dictionary of scalars or small arrays, "loss" among them.
    """

    init: Callable[[jax.Array], Any]  # key -> trainable, a pytree of f32 arrays
    gradients: Callable[[Any, Any, Batch, jax.Array], tuple[Any, Metrics]]  # of trainable, params, batch, step i32
    optimizer: optax.GradientTransformation
    evaluate: Callable[[Any, Any, Batch], Metrics] | None = None  # of trainable, params, batch


class Batches(Protocol):
    """An iterator over dictionaries of numpy arrays [rows, ...]: the rows of this process, equally many each time.

    A key "ids" names the rows in messages, and is not given to the task.
    """

    def __next__(self) -> Batch:
        """The next batch."""

    def get_state(self) -> Any:
        """Where the iterator is: bytes, or what JSON can hold."""

    def set_state(self, state: Any) -> None:
        """Goes back there: the batch comes next that would have come."""


class _Pending(NamedTuple):
    """A step that the devices have been given, and whose numbers nobody has read."""

    step: int
    metrics: Metrics
    stop: jax.Array  # bool: a process was asked to stop
    finite: jax.Array  # bool: loss and gradient are
    ids: Any
    tokens: int


def train(
    task: Task,
    params: Any,
    batches: Batches,
    *,
    steps: int,
    folder: str | pathlib.Path,
    mesh: Mesh,
    seed: int,
    save_every: int,
    keep: int = 2,
    accumulate: int = 1,
    evaluate_every: int | None = None,
    held_out: Collection[Batch] = (),
    learning_rate: Callable[[jax.Array], Any] | None = None,
    log_every: int = 1,
    progress: bool = True,
    show: Sequence[str] = (),
    note: checkpoints.Note | None = None,
    may_change: Collection[str] = (),
) -> Any:
    """Trains until `steps` steps are taken, from the last whole checkpoint in `folder` where it has one.

    Writes `metrics.csv` (step, loss, the task's other numbers, tokens per second), `held_out.csv` and `checkpoints/`.
    A run that was killed, at whatever moment, and is started again writes what an unbroken one writes, but for the
    times, and to the last bit where programs are deterministic, as they are on CPUs and TPUs. On SIGTERM it finishes
    the step, saves, and exits with status 0; a second SIGTERM acts at once.

    Args:
      task: What is trained.
      params: The frozen arrays, on the devices of `mesh`; see `train.mesh.place`.
      batches: The rows of this process; see `train.mesh.rows_of_process`.
      steps: Steps in all, with those before a restart.
      folder: A folder that all processes share, made where absent.
      mesh: The devices.
      seed: Of the key that `task.init` gets.
      save_every: Steps between checkpoints. There is one at the end, too.
      keep: How many of the last checkpoints stay. Of those whose step was evaluated, the one of the lowest held-out
        loss stays besides.
      accumulate: Parts in which the gradient of a batch is computed, one after another, to save memory.
      evaluate_every: Steps between evaluations on `held_out`, with one before the first step and one after the last.
      held_out: Batches to evaluate on, on each process its rows.
      learning_rate: A schedule, step -> rate, to write down.
      log_every: Steps between lines of metrics.csv.
      progress: Whether process 0 shows a progress bar, where stderr is a terminal.
      show: Metrics that the bar shows beside the loss.
      note: What makes the run what it is, such as its settings and the backbone's name. It is kept in the checkpoints,
        and a run with another note does not go on from them.
      may_change: Keys of the note that may differ.

    Returns:
      The trained arrays, on the devices.

    Raises:
      ValueError: If the settings do not fit, the folder is of another run, or the batches end before the steps.
      FloatingPointError: If a loss or gradient is not finite. The checkpoints before stay as they are.
      OSError: If something cannot be written, such as a checkpoint to a full disk. The run ends rather than going on
        unsaved; earlier checkpoints are whole, and the same command goes on from the last of them.
      SystemExit: After SIGTERM.
    """
    _check_settings(task, params, mesh, steps, save_every, accumulate, evaluate_every, held_out, log_every)
    folder, note, primary = pathlib.Path(folder), note or {}, jax.process_index() == 0
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=not primary)
    readers = meshes.rows_of_process(mesh)[1]
    init = functools.partial(_first_state, task, seed)
    like = jax.eval_shape(init)
    layout = meshes.spread(like, mesh)
    update = _compile(task, layout, mesh, accumulate, learning_rate)
    measure = task.evaluate and jax.jit(task.evaluate, out_shardings=meshes.replicated(mesh))

    with contextlib.ExitStack() as stack:
        stack.enter_context(meshes.over(mesh))
        store = stack.enter_context(checkpoints.opened(folder / "checkpoints", keep=keep, say=console.print))
        found = checkpoints.restore(
            store, like, functools.partial(meshes.place, layout=layout), note, may_change=may_change
        )
        if found is None:
            step, saved, state = 0, None, jax.jit(init, out_shardings=layout)()
        else:
            step, saved, state = found.step, found.step, found.state
            if step > steps:
                raise ValueError(f"train: {folder} has taken {step} steps, more than steps={steps}. Ask for more.")
            batches.set_state(found.iterator)
            console.print(f"Goes on from step {step}, found in {folder}.")
        if primary:
            _cut(folder / "metrics.csv", saved)
            _cut(folder / "held_out.csv", saved)
        asked_to_stop = stack.enter_context(_sigterm())
        bar = stack.enter_context(_bar(console if progress else None, step, steps))
        since = time.monotonic()

        def look(pending):
            """Reads the numbers of a step, and waits for them; tells whether any process was asked to stop."""
            nonlocal since
            numbers = _flat(jax.device_get(pending.metrics))
            if not pending.finite:
                raise FloatingPointError(_not_finite(pending, numbers, saved, folder))
            now = time.monotonic()
            speed, since = pending.tokens / max(now - since, 1e-9), now
            if primary and pending.step % log_every == 0:
                _append(folder / "metrics.csv", {"step": pending.step, **numbers, "tokens_per_s": round(speed)})
            bar(
                pending.step,
                "  ".join(f"{name} {numbers[name]:.4g}" for name in _known(("loss", *show), numbers)),
                speed,
            )
            return bool(pending.stop)

        def evaluate():
            numbers = _evaluate(measure, state["trainable"], params, held_out, mesh)
            if primary:
                _append(folder / "held_out.csv", {"step": step, **numbers})
            return numbers["loss"]

        if evaluate_every and found is None:
            evaluate()
        pending, stop = None, False
        while step < steps and not stop:
            batch = next(batches, None)
            if batch is None:
                break
            ids, rows, flags = _split(batch, asked_to_stop.is_set(), mesh, accumulate)
            state, *results = update(state, params, rows, flags, np.int32(step))
            step += 1
            before, pending = pending, _Pending(step, *results, ids, _tokens(batch) * readers)
            if before is not None:
                stop = look(before)
            due, evaluated = step % save_every == 0, evaluate_every and step % evaluate_every == 0
            if due or evaluated or stop or step == steps:
                stop, pending = look(pending) or stop, None
                loss = evaluate() if evaluated or (evaluate_every and step == steps) else None
                if due or stop or step == steps:
                    checkpoints.save(store, step, state, iterator=batches.get_state(), note=note, loss=loss)
                    saved = step
                since = time.monotonic()  # the speed is that of steps alone
            checkpoints.check(store)
        if pending is not None:
            look(pending)
        if saved != step:
            checkpoints.save(store, step, state, iterator=batches.get_state(), note=note)
    if step == steps:
        return state["trainable"]
    if stop:
        console.print(f"Stopped by SIGTERM after step {step} of {steps}, which is saved. The same command goes on.")
        raise SystemExit(0)
    raise ValueError(
        f"train: the batches ended after step {step}, and steps={steps}. What was trained is saved in {folder}. Ask "
        f"for fewer steps, or for more epochs."
    )


def _check_settings(task, params, mesh, steps, save_every, accumulate, evaluate_every, held_out, log_every) -> None:
    for name, value in (
        ("steps", steps),
        ("save_every", save_every),
        ("accumulate", accumulate),
        ("log_every", log_every),
        ("evaluate_every", 1 if evaluate_every is None else evaluate_every),
    ):
        if value < 1:
            raise ValueError(f"train: {name}={value} must be at least 1.")
    if evaluate_every and (task.evaluate is None or not held_out):
        raise ValueError(
            f"train: evaluate_every={evaluate_every} needs held_out batches and a task that evaluates. Give both, or "
            f"evaluate_every=None."
        )
    devices = set(mesh.devices.flat)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not isinstance(leaf, jax.Array) or leaf.sharding.device_set != devices:
            raise ValueError(
                f"train: params{jax.tree_util.keystr(path)} is not on the {len(devices)} devices of the mesh. Put it "
                f"there with train.mesh.place(params, train.mesh.shardings(params, mesh))."
            )


def _first_state(task: Task, seed: int) -> dict[str, Any]:
    trainable = task.init(jax.random.key(seed))
    return {"trainable": trainable, "optimizer": task.optimizer.init(trainable)}


def _compile(task: Task, layout: Any, mesh: Mesh, parts: int, learning_rate: Callable | None) -> Callable:
    """A jitted (state, params, batch, flags bool[rows], step i32) -> (state, metrics, stop, finite), donating state."""

    def update(state, params, batch, flags, step):
        trainable = state["trainable"]
        gradients, metrics = _mean_gradients(task, trainable, params, batch, step, parts, mesh)
        if "loss" not in metrics:
            raise ValueError(f"train: the task's metrics are {sorted(metrics)}; one of them must be 'loss'.")
        updates, optimizer = task.optimizer.update(gradients, state["optimizer"], trainable)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)))
        metrics = metrics | {"gradient_norm": norm}
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(step), jnp.float32)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        state = {"trainable": optax.apply_updates(trainable, updates), "optimizer": optimizer}
        return state, metrics, jnp.any(flags), finite

    everywhere = meshes.replicated(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=(layout, everywhere, everywhere, everywhere))


def _mean_gradients(task: Task, trainable, params, batch: Batch, step, parts: int, mesh: Mesh) -> tuple[Any, Metrics]:
    """Gradients and metrics of a batch, computed in `parts` parts of equally many rows and averaged in f32."""
    if parts == 1:
        return task.gradients(trainable, params, batch, step)

    def split(array):  # every parts-th row is of one part, so that none has to move to another device
        array = array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(None, meshes.ROWS)))

    def of_part(part):
        return task.gradients(trainable, params, part, step)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    splits = jax.tree.map(split, batch)
    one = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), splits)
    zeros = jax.tree.map(lambda result: jnp.zeros(result.shape, jnp.float32), jax.eval_shape(of_part, one))
    sums, _ = jax.lax.scan(add, zeros, splits)
    return jax.tree.map(lambda total: total / parts, sums)


def _evaluate(measure: Callable, trainable: Any, params: Any, held_out: Collection[Batch], mesh: Mesh) -> dict:
    """Means over the rows of all held-out batches."""
    totals, count = {}, 0
    for batch in held_out:
        _, rows, flags = _split(batch, False, mesh, 1)
        count += len(flags)
        for name, value in _flat(jax.device_get(measure(trainable, params, rows))).items():
            totals[name] = totals.get(name, 0.0) + value * len(flags)
    return {name: total / count for name, total in totals.items()}


def _split(batch: Batch, flag: bool, mesh: Mesh, parts: int) -> tuple[Any, Batch, jax.Array]:
    """The ids of a batch, its arrays over the mesh, and beside each row whether this process was asked to stop.

    The flags travel with the rows so that all processes see them in the same step, and stop after the same one.
    """
    local = {name: np.asarray(array) for name, array in batch.items() if name != "ids"}
    if len({len(array) if array.ndim else 0 for array in local.values()}) != 1:
        shapes = {name: array.shape for name, array in local.items()}
        raise ValueError(f"train: arrays of a batch have shapes {shapes}; axis 0 must be its rows, in each of them.")
    rows = len(next(iter(local.values())))
    joined = meshes.global_batch(mesh, local | {"flags": np.full(rows, flag)})
    flags = joined.pop("flags")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if len(flags) % (parts * devices):
        raise ValueError(
            f"train: a batch of {len(flags)} rows does not divide into accumulate={parts} parts over {devices} "
            f"devices. Choose a batch that is a multiple of {parts * devices}."
        )
    return batch.get("ids"), joined, flags


def _tokens(batch: Batch) -> int:
    """What a batch counts for in speed: its tokens without padding, or else its rows."""
    if "lengths" in batch:
        return int(np.sum(batch["lengths"]))
    return int(np.size(batch["tokens"])) if "tokens" in batch else len(next(iter(batch.values())))


def _flat(metrics: Metrics) -> dict[str, float]:
    """Metrics as numbers, loss first; those of an array by their place, name.0.1."""
    numbers = {"loss": float(metrics["loss"])}
    for name, value in metrics.items():
        for place in np.ndindex(np.shape(value)):
            numbers[".".join([name, *map(str, place)])] = float(np.asarray(value)[place])
    return numbers


def _known(names: Sequence[str], numbers: dict[str, float]) -> Sequence[str]:
    if unknown := [name for name in names if name not in numbers]:
        raise ValueError(f"train: show names {unknown}, and the task has {', '.join(numbers)}.")
    return names


def _not_finite(pending: _Pending, numbers: dict, saved: int | None, folder: pathlib.Path) -> str:
    rows = f"batch {pending.step} of the run"
    if pending.ids is not None:
        ids = np.ravel(pending.ids).tolist()
        rows += f", of rows {', '.join(map(str, ids[:NAMED_ROWS]))}{' and others' if len(ids) > NAMED_ROWS else ''}"
    last = "there is no checkpoint yet" if saved is None else f"the last checkpoint is of step {saved}"
    return (
        f"step {pending.step}: loss {numbers['loss']:g}, norm of the gradient {numbers['gradient_norm']:g}, on {rows}. "
        f"The run ends; {last}, in {folder}. Look at these rows, lower the learning rate, or clip."
    )


def _append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Adds a line to a CSV file, and the header where it is new."""
    header = ",".join(row) + "\n"
    line = ",".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in row.values()) + "\n"
    try:
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            first = file.readline()
            if first not in ("", header):
                raise ValueError(
                    f"{path} has the columns {first.strip()}, and now there are {header.strip()}. Take another folder."
                )
            file.write(line if first else header + line)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: give the same command again when there is room", str(path)
        ) from error


def _cut(path: pathlib.Path, step: int | None) -> None:
    """Removes what a CSV file says of later steps than `step`, half lines, too; all of it where `step` is None."""
    if step is None:
        path.unlink(missing_ok=True)
    elif path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        kept = lines[:1] + [line for line in lines[1:] if int(line.partition(",")[0]) <= step]
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(kept), encoding="utf-8")
        os.replace(whole, path)


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that the first SIGTERM sets; the second one does what it did before."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread listen
        yield asked
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def listen(number, frame):
        asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, listen)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _bar(console: Console | None, step: int, steps: int) -> Iterator[Callable[[int, str, float], None]]:
    """A progress bar, as a function of step, text, and tokens per second; one that shows nothing without a terminal."""
    if console is None or console.quiet or not console.is_terminal:
        yield lambda step, text, speed: None
        return
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        job = progress.add_task("", total=steps, completed=step, text="")
        yield lambda step, text, speed: progress.update(job, completed=step, text=f"{text}  {speed:,.0f} tokens/s")
