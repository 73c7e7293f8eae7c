"""`kvjax batch`: prompts of a JSON Lines file to answers in another, in a run that may be killed at any time.

    prompts.jsonl           {"id": "a", "prompt": "..."}        a line for each
    out.jsonl.partial       {"job": "<digest>"}                 and a line for each prompt that is done, as they finish
    out.jsonl               written whole, in the order of the prompts, when all are done; then the journal goes

A run that finds its journal goes on from it. Of n machines each writes a journal of its own into the same folder, and
the last to finish writes the answers.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from kvjax.counts import whole
from kvjax.files import write_whole
from kvjax.models.weights import Model
from kvjax.policy import Policy
from kvjax.sampling import row_keys
from kvjax.serve.batch_llm import Finished, Progress, answers
from kvjax.serve.chunk_store import namespace_of

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the prompts, or why it is none."""

    id: Any
    tokens: tuple[int, ...] = ()
    text: str = ""
    max_new_tokens: int | None = None
    error: str | None = None
    unnamed: bool = False  # its id is its number


def run(
    model: Model,
    prompts: str | os.PathLike,
    out: str | os.PathLike,
    policy: Policy | None = None,
    *,
    prefix_policy: Policy | None = None,
    max_new_tokens: int = 64,
    chat: bool = True,
    part: tuple[int, int] | None = None,
    key: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Path | None:
    """Answers the prompts of a file.

    A line is {"prompt": "..."} or {"tokens": [...]}, with an "id" (else its number, from 0) and "max_new_tokens" if it
    wants. Its answer is {"id", "text", "finish"}, or {"id", "tokens", "finish"} to tokens, where finish is "stop" or
    "length"; or {"id", "error"}, if the line is broken, empty, too long, or has the id of an earlier one. Nothing stops
    the run but what is wrong with all of it.

    Args:
      model: With a tokenizer, if there are prompts of text.
      prompts: The file, UTF-8.
      out: The file of answers; one that is there is replaced when all are done.
      policy: See `batch_llm.answers`, as `prefix_policy` and what else `settings` may hold.
      prefix_policy: See there.
      max_new_tokens: Of lines that do not say.
      chat: Whether prompts are put into the model's chat template, if it has one.
      part: (p, n) for the p-th of n machines; None asks `jax.distributed`, and is (0, 1) without it.
      key: A seed.
      on_progress: See there.

    Returns:
      The file of answers; None if another machine is still to write it.

    Raises:
      ValueError: If the file cannot be read, settings are refused, another run writes the same answers, or a journal is
        of another job.
    """
    out = Path(out)
    part = (jax.process_index(), jax.process_count()) if part is None else part
    if out.is_dir() or (out.exists() and out.samefile(prompts)):
        raise ValueError(
            f"batch: answers cannot be written to {out}, which is a folder or the prompts. Give another file."
        )
    lines, digest = _lines(model, Path(prompts), chat)
    # What changes an answer; not how the run is cut up: it may go on with less memory, or on more machines.
    answer = {name: value for name, value in settings.items() if name not in ("memory", "batch_tokens", "method")}
    space = namespace_of(model.params, model.tokenizer, policy, prefixes=getattr(prefix_policy, "name", None))
    job = [
        VERSION,
        digest,
        space,
        max_new_tokens,
        chat and model.chat_template,
        model.stop_tokens,
        key,
        repr(sorted(answer.items())),
    ]
    job = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    sound = [i for i, line in enumerate(lines) if not line.error]
    place = {i: n for n, i in enumerate(sound)}
    outputs = [lines[i].max_new_tokens or max_new_tokens for i in sound]
    bad = [i for i, line in enumerate(lines) if line.error and i % part[1] == part[0]]
    base = 0

    def of_part(done: Collection[int]) -> Iterator[Finished]:
        return answers(
            model.params, [lines[i].tokens for i in sound], policy, prefix_policy=prefix_policy,
            max_new_tokens=outputs, stop=model.stop_tokens, key=row_keys(key, len(lines))[np.array(sound, int)],
            part=part, done=done, on_progress=progress, **settings,
        )  # fmt: skip

    def progress(one: Progress) -> None:
        _sync(file)
        if on_progress is not None:
            on_progress(dataclasses.replace(one, prompts=one.prompts + base, done=one.done + base))

    of_part(())  # refuses what cannot be, before there is a journal
    with _journal(_journal_of(out, part), job) as file:
        before = {line for record in _records(out, job) for line in record}
        base = len(bad) + len([i for i in before if i in place])
        for i in bad:
            if i not in before:
                _append(file, i, {"id": lines[i].id, "error": lines[i].error})
        for one in of_part([place[i] for i in before if i in place]):
            line = sound[one.index]
            _append(file, line, _record(model, lines[line], one, outputs[one.index]))
        _sync(file)
        return _finish(out, job, len(lines))


def run_on_ray(load: Callable[[], Model], prompts: str | os.PathLike, out: str | os.PathLike, parts: int, **settings):
    """`run` as a Ray Data job: each of `parts` tasks loads the model and answers its part, a folder shared by all.

    Args:
      load: Makes the model, on the machine of the task.
      prompts: See `run`.
      out: See there.
      parts: Tasks; groups stay together, unless one has more than 1.25 times its share of the tokens.
      **settings: See there.

    Returns:
      The file of answers.

    Raises:
      ModuleNotFoundError: Without ray: pip install 'kvjax[ray]'.
    """
    import ray.data  # late: an extra

    parts = whole("run_on_ray", "parts", parts, least=1)
    prompts, out = Path(prompts).absolute(), Path(out).absolute()

    def one(row: dict[str, Any]) -> dict[str, Any]:
        part = int(row["id"])
        return {"part": part, "written": str(run(load(), prompts, out, part=(part, parts), **settings) or "")}

    done = ray.data.range(parts, override_num_blocks=parts).map(one).take_all()
    assert len(done) == parts
    return out


def _record(model: Model, line: Line, one: Finished, limit: int) -> dict[str, Any]:
    if one.error is not None:
        return {"id": line.id, "error": one.error}
    said = {"text": model.decode(one.tokens)} if line.text else {"tokens": one.tokens.tolist()}
    return {"id": line.id, **said, "finish": "length" if len(one.tokens) == limit else "stop"}


# Prompts


def _lines(model: Model, path: Path, chat: bool) -> tuple[list[Line], str]:
    """The lines of a file, tokenised, and its digest."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"batch: {path} cannot be read ({error.strerror}). Give a file of JSON Lines.") from None
    found, ids = [], set()
    for number, text in enumerate(content.split(b"\n")):
        if text.strip():
            line = _line(number, text)
            name = None if line.unnamed else json.dumps(line.id)
            if line.error is None and name in ids:
                line = Line(line.id, error=f"line {number + 1}: the id {line.id!r} is that of an earlier line")
            elif line.error is None and name is not None:
                ids.add(name)
            found.append(line)
    if not found:
        raise ValueError(f"batch: {path} has no lines. Give one for each prompt.")
    texts = [i for i, line in enumerate(found) if line.text]
    if texts and model.tokenizer is None:
        raise ValueError(f"batch: {path} has prompts of text, and the model has no tokenizer. Give tokens.")
    chat = chat and model.chat_template is not None
    for at in range(0, len(texts), 1000):
        some = texts[at : at + 1000]
        said = [model.chat(found[i].text) if chat else found[i].text for i in some]
        encoded = model.tokenizer.encode_batch(said, add_special_tokens=not chat)
        for i, one in zip(some, encoded, strict=True):
            found[i] = dataclasses.replace(found[i], tokens=tuple(one.ids))
    return found, hashlib.sha256(content).hexdigest()


def _no_number(said: str) -> None:
    raise ValueError(f"{said} is no number")


def _line(number: int, text: bytes) -> Line:
    """One line, not yet tokenised."""
    where = f"line {number + 1}"
    try:
        said = json.loads(text, parse_constant=_no_number)
        json.dumps(said, ensure_ascii=False).encode()  # no half of a pair of surrogates
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        return Line(number, error=f"{where} is no JSON: {error}")
    if not isinstance(said, dict):
        return Line(number, error=f"{where} is {json.dumps(said)[:40]}, and must be an object with a prompt")
    name, limit, prompt, tokens = (said.get(key) for key in ("id", "max_new_tokens", "prompt", "tokens"))
    unnamed = name is None
    name = number if unnamed else name
    if unknown := sorted(said.keys() - {"id", "max_new_tokens", "prompt", "tokens"}):
        return Line(name, error=f"{where} has {', '.join(unknown)}; known are id, prompt, tokens and max_new_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit < 2**31):
        return Line(name, error=f"{where}: max_new_tokens is {limit!r}, and must be a whole number above 0")
    if (prompt is None) == (tokens is None):
        return Line(name, error=f"{where} must have a prompt or tokens, one of them")
    if prompt is not None and not isinstance(prompt, str):
        return Line(name, error=f"{where}: the prompt is a {type(prompt).__name__}, and must be a text")
    if prompt is not None and not prompt.strip():
        return Line(name, error=f"{where}: the prompt is empty")
    if prompt is not None:
        return Line(name, (), prompt, limit, unnamed=unnamed)
    if not isinstance(tokens, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in tokens):
        return Line(name, error=f"{where}: tokens must be a list of whole numbers")
    if any(not -(2**31) <= one < 2**31 for one in tokens):
        return Line(name, error=f"{where}: tokens do not fit 32 bits")
    return Line(name, tuple(tokens), "", limit, unnamed=unnamed)


# The journal


def _journal_of(out: Path, part: tuple[int, int]) -> Path:
    return out.with_name(f"{out.name}.partial" + (f"-{part[0]}-of-{part[1]}" if part[1] > 1 else ""))


@contextlib.contextmanager
def _journal(path: Path, job: str) -> Iterator[BinaryIO]:
    """The journal of one part, open behind its last whole line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    except OSError as error:
        raise ValueError(
            f"batch: {path} cannot be written ({error.strerror}). Give another place for answers."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"batch: another run is writing {path}. Wait for it, or give another file.") from None
        file.seek(0)
        first, kept = file.readline(), 0
        begun = _read(first)
        if begun is None and first.endswith(b"\n") or begun is not None and begun.get("job") != job:
            raise ValueError(
                f"batch: {path} is of a run with another file, model or settings, or no journal. Go on with those, or "
                f"remove it."
            )
        if begun is not None:  # else empty, or torn while it was being written
            kept = len(first)
            for text in file:
                if _read(text) is None:
                    break  # torn
                kept += len(text)
        file.truncate(kept)
        file.seek(0, os.SEEK_END)
        if not kept:
            file.write(json.dumps({"job": job}).encode() + b"\n")
        yield file


def _read(text: bytes) -> dict[str, Any] | None:
    """A whole line of a journal; None if it is none."""
    try:
        found = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _append(file: BinaryIO, line: int, record: dict[str, Any]) -> None:
    file.write(json.dumps({"line": line, "record": record}).encode() + b"\n")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _journals(out: Path) -> list[Path]:
    """All journals of these answers, of however many machines."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.partial*"))


def _records(out: Path, job: str) -> list[dict[int, dict[str, Any]]]:
    """What the journals of a job hold, by line."""
    found = []
    for path in _journals(out):
        with contextlib.suppress(FileNotFoundError):
            first, *lines = [_read(text) for text in path.read_bytes().splitlines(keepends=True)] or [None]
            if first is not None and first.get("job") == job:
                found.append({one["line"]: one["record"] for one in lines if one is not None})
    return found


def _finish(out: Path, job: str, count: int) -> Path | None:
    """Writes the answers, if all lines have one, and removes the journals."""
    records: dict[int, dict[str, Any]] = {}
    for some in _records(out, job):
        records |= some
    if len(records) < count:
        return None
    write_whole(out, "".join(json.dumps(records[i], ensure_ascii=False) + "\n" for i in range(count)))
    for path in _journals(out):
        path.unlink(missing_ok=True)
    return out
