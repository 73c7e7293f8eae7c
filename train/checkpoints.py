"""Checkpoints of a run: written beside the training by orbax, checked when read.

A checkpoint holds the trained arrays, the optimiser's state, and a text `about` them: step, iterator, note, loss. Orbax
renames a checkpoint into place when all of it is written, so a run killed while it writes leaves none; what the disk
does to it later is found by checksums, since orbax itself returns flipped bits as they are.
"""

import base64
import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

Note = dict[str, Any]  # what JSON can hold
ODD = 2654435761  # below 2**32; scatters consecutive positions


class Checkpoints(NamedTuple):
    """The checkpoints of one folder, open for writing."""

    folder: pathlib.Path
    manager: ocp.CheckpointManager
    losses: dict[int, float]  # of the held-out rows, by step
    say: Callable[[str], None]


class Found(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: Any
    iterator: Any  # what the batches' get_state had returned on this process
    note: Note


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Which checkpoints stay, in the form that orbax asks for."""

    keep: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _best(self.losses, steps)
        return [step == best or step in steps[-self.keep :] for step in steps]


@contextlib.contextmanager
def opened(folder: str | pathlib.Path, *, keep: int, say: Callable[[str], None] = print) -> Iterator[Checkpoints]:
    """Opens the checkpoints of `folder`, made where absent, and waits at the end for what is still being written.

    Args:
      folder: A folder that all processes share. What a killed run left half written in it is removed.
      keep: How many of the last checkpoints stay. The one of the lowest held-out loss stays besides.
      say: What prints messages.

    Raises:
      ValueError: If keep is below 1.
      OSError: If a checkpoint could not be written; see `save`.
    """
    if keep < 1:
        raise ValueError(f"checkpoints: keep={keep} must be at least 1. With 2 or more, a damaged one has a spare.")
    folder, losses = pathlib.Path(folder).resolve(), {}
    options = ocp.CheckpointManagerOptions(preservation_policy=_LastAndBest(keep, losses), cleanup_tmp_directories=True)
    checkpoints = Checkpoints(folder, ocp.CheckpointManager(folder, options=options), losses, say)
    with _quiet():
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(Exception):  # the error that ended the run is the one to see
                checkpoints.manager.close()
            raise
        _plainly(checkpoints, checkpoints.manager.close)


def save(
    checkpoints: Checkpoints, step: int, state: dict[str, Any], *, iterator: Any, note: Note, loss: float | None = None
) -> None:
    """Starts to write a checkpoint, and returns when `state` has been copied and may be donated. All processes call it.

    Args:
      checkpoints: The folder.
      step: Steps taken.
      state: Pytrees of arrays by name.
      iterator: What the batches' get_state returned on this process: bytes, or what JSON can hold.
      note: What makes the run what it is.
      loss: Loss of the held-out rows after this step, or None where it was not computed.

    Raises:
      OSError: If this checkpoint, or the one before it, could not be written, as on a full disk. Those before are
        whole: none is removed until its successor is.
    """
    if loss is not None and not math.isfinite(loss):
        loss = None
    about = {
        "step": step,
        "note": note,
        "loss": loss,
        "arrays": _shapes(state),
        "checksums": _checksums(state),
        "iterators": _gather(_pack(iterator)),
    }
    if loss is not None:
        checkpoints.losses[step] = loss
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
    arguments = ocp.args.Composite(about=ocp.args.JsonSave(about | {"crc": _crc(about)}), **items)
    _plainly(checkpoints, lambda: checkpoints.manager.save(step, args=arguments, force=True))


def check(checkpoints: Checkpoints) -> None:
    """Raises an OSError if a checkpoint could not be written since the last look. Does not wait."""
    _plainly(checkpoints, checkpoints.manager.check_for_errors)


def restore(
    checkpoints: Checkpoints,
    like: dict[str, Any],
    place: Callable[[Any], Any],
    note: Note,
    *,
    may_change: Collection[str] = (),
) -> Found | None:
    """The last checkpoint that is whole; None where there is none at all. All processes call it.

    Each process reads all of it: so all see the same damage, and none waits for another. A damaged checkpoint is
    named, and moved aside, into a folder beside this one, where there is a whole one before it.

    Args:
      checkpoints: The folder.
      like: Pytrees by name, of arrays or of their shapes and dtypes, as they were saved.
      place: Puts numpy arrays, of the structure of `like`, on the devices.
      note: The note of this run, which must be that of the checkpoint.
      may_change: Keys of the note in which the two may differ.

    Raises:
      ValueError: If the checkpoint is of a run with another note or other arrays, or all of them are damaged.
    """
    steps = sorted(checkpoints.manager.all_steps(), reverse=True)
    abouts, damaged = _abouts(checkpoints.manager, steps)
    checkpoints.losses.update(_losses(abouts))
    for step, about in abouts.items():
        _same_run(checkpoints.folder / str(step), about["note"], note, may_change)
        _same_arrays(checkpoints.folder / str(step), about["arrays"], _shapes(like))
        try:
            arrays = {name: _read(checkpoints.manager, step, name, tree) for name, tree in like.items()}
        except Exception as error:  # orbax and tensorstore have many kinds
            damaged[step] = error
            continue
        state = place(arrays)
        if altered := _altered(about, state):
            damaged[step] = ValueError(f"{altered} was altered")
            continue
        multihost_utils.assert_equal(step, "the processes found different checkpoints: do they share the folder?")
        _set_aside(checkpoints, {bad: error for bad, error in damaged.items() if bad > step})
        return Found(step, state, _own(checkpoints.folder / str(step), about["iterators"]), about["note"])
    if steps:
        raise ValueError(
            f"{checkpoints.folder} has no whole checkpoint: {_reasons(damaged)}. Move the folder away to begin anew."
        )
    return None


def load(folder: str | pathlib.Path, like: Any, *, name: str = "trainable", which: int | str = "last") -> Found:
    """Reads one of the pytrees of a checkpoint, such as the trained heads, without opening the folder for writing.

    Args:
      folder: The folder of the checkpoints.
      like: A pytree of arrays, or of their shapes and dtypes, as it was saved.
      name: Which of the pytrees.
      which: "last", "best" (the lowest held-out loss), or a step.

    Returns:
      The checkpoint, with this pytree of numpy arrays as its state.

    Raises:
      ValueError: If there is no such checkpoint, it is damaged, or its arrays are others.
    """
    folder = pathlib.Path(folder).resolve()
    if not folder.is_dir():
        raise ValueError(f"load: {folder} is no folder of checkpoints.")
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        abouts, damaged = _abouts(manager, steps)
        step = {"last": max(steps, default=None), "best": _best(_losses(abouts), steps)}.get(which, which)
        if step not in steps:
            raise ValueError(f"load: {folder} has no checkpoint {which!r}, but those of steps {sorted(steps)}.")
        if step in damaged:
            raise ValueError(f"load: {folder / str(step)} is damaged: {_reasons(damaged)}. Take another step.")
        about = abouts[step]
        saved = {path: shape for path, shape in about["arrays"].items() if path.startswith(f"['{name}']")}
        _same_arrays(folder / str(step), saved, _shapes({name: like}))
        try:
            state = _read(manager, step, name, like)
        except Exception as error:  # orbax and tensorstore have many kinds
            raise ValueError(f"load: {folder / str(step)} is damaged: {error}. Take another step.") from error
        if altered := _altered(about, {name: state}):
            raise ValueError(f"load: {folder / str(step)} is damaged: {altered} was altered. Take another step.")
    return Found(step, state, _unpack(about["iterators"][0]), about["note"])


def _plainly(checkpoints: Checkpoints, write: Callable[[], Any]) -> None:
    """Calls what writes; an error of it says what is left and what to do."""
    try:
        write()
        return
    except Exception as error:  # a full disk comes as a ValueError of tensorstore, or as an OSError
        reason = _first_line(error)
    # Raised here, without its cause: that holds on to threads of orbax, which print pages when Python ends.
    raise OSError(
        f"{checkpoints.folder}: a checkpoint could not be written: {reason}. What was saved before is untouched. Is "
        f"the disk full? Make room, and give the same command again: it goes on from the last checkpoint."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging a failure a dozen times, with pages of tracebacks: it raises it, too."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 300 else f"{line[:120]} ... {line[-160:]}"  # the cause is at the end


def _abouts(manager: ocp.CheckpointManager, steps: Sequence[int]) -> tuple[dict[int, Any], dict[int, Exception]]:
    """The texts of the checkpoints, and what is wrong with those that cannot be read, by step."""
    abouts, damaged = {}, {}
    for step in steps:
        try:
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            if about.pop("crc") != _crc(about):
                raise ValueError("the text about it was altered")
            abouts[step] = about
        except Exception as error:  # orbax has many kinds
            damaged[step] = error
    return abouts, damaged


def _losses(abouts: dict[int, Any]) -> dict[int, float]:
    return {step: about["loss"] for step, about in abouts.items() if about["loss"] is not None}


def _best(losses: dict[int, float], steps: Sequence[int]) -> int | None:
    """The step of the lowest loss, the latest of equals."""
    return min((step for step in sorted(steps, reverse=True) if step in losses), key=losses.get, default=None)


def _read(manager: ocp.CheckpointManager, step: int, name: str, like: Any) -> Any:
    """One pytree of a checkpoint, as numpy arrays."""
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=whole)
    return manager.restore(step, args=ocp.args.Composite(**{name: arguments}))[name]


def _shapes(tree: Any) -> dict[str, list]:
    """Shape and dtype of each array, by its path, as JSON holds them."""
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _checksums(tree: Any) -> dict[str, int]:
    """A checksum of each array by its path, the same however it is spread over devices. Any changed element shows."""
    return dict(zip(_shapes(tree), map(int, jax.device_get(_sums(jax.tree.leaves(tree)))), strict=True))


@jax.jit
def _sums(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [_checksum(array) for array in arrays]


def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32))
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, length in enumerate(bits.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Modulo 2**32 an odd factor loses nothing of a difference, and a sum has no order.
    return jnp.sum(bits.astype(jnp.uint32) * (place * jnp.uint32(ODD) | jnp.uint32(1)), dtype=jnp.uint32)


def _altered(about: dict[str, Any], state: Any) -> str:
    """The paths of the arrays that are not what was saved."""
    return ", ".join(path for path, value in _checksums(state).items() if about["checksums"][path] != value)


def _crc(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _same_run(path: pathlib.Path, was: Note, now: Note, may_change: Collection[str]) -> None:
    now = json.loads(json.dumps(now))  # tuples become lists, as they did in the checkpoint
    differing = [
        f"{key} was {was.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if key not in may_change and was.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differing)}. Take another folder, or the settings it was made with."
        )


def _same_arrays(path: pathlib.Path, was: dict[str, list], now: dict[str, list]) -> None:
    differing = [
        f"{key} was {was.get(key)} and is {now.get(key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(f"{path} holds other arrays: {'; '.join(differing[:3])}. Take another folder.")


def _reasons(damaged: dict[int, Exception]) -> str:
    return "; ".join(f"{step}: {_first_line(error)}" for step, error in sorted(damaged.items()))


def _set_aside(checkpoints: Checkpoints, damaged: dict[int, Exception]) -> None:
    """Moves damaged checkpoints out of the way of those that the run will write again."""
    if not damaged:
        return
    aside = checkpoints.folder.parent / f"{checkpoints.folder.name}-damaged"
    if jax.process_index() == 0:
        aside.mkdir(exist_ok=True)
        for step in damaged:
            taken = sum(1 for other in aside.iterdir() if other.name.split("-")[0] == str(step))
            (checkpoints.folder / str(step)).rename(aside / (f"{step}-{taken}" if taken else str(step)))
        checkpoints.say(f"Damaged checkpoints are skipped, and moved to {aside}: {_reasons(damaged)}.")
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    checkpoints.manager.reload()


def _pack(iterator: Any) -> str:
    """The state of an iterator, bytes or what JSON can hold, as a text."""
    if isinstance(iterator, bytes):
        return json.dumps({"bytes": base64.b64encode(iterator).decode()})
    return json.dumps({"json": iterator})


def _unpack(text: str) -> Any:
    packed = json.loads(text)
    return packed["json"] if "json" in packed else base64.b64decode(packed["bytes"])


def _gather(text: str) -> list[str]:
    """The texts of all processes, in order; one where they are equal."""
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(own))).reshape(-1)
    padded = multihost_utils.process_allgather(np.pad(own, (0, lengths.max() - len(own)))).reshape(len(lengths), -1)
    texts = [bytes(row[:length]).decode() for row, length in zip(np.asarray(padded), lengths, strict=True)]
    return texts[:1] if len(set(texts)) == 1 else texts


def _own(path: pathlib.Path, iterators: list[str]) -> Any:
    """The iterator's state of this process."""
    if len(iterators) not in (1, jax.process_count()):
        raise ValueError(
            f"{path} was written by {len(iterators)} processes whose iterators differ, and there are "
            f"{jax.process_count()}. Go on with as many as there were."
        )
    return _unpack(iterators[jax.process_index() if len(iterators) > 1 else 0])
