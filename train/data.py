"""Rows for the trainers of eviction heads: a prompt, then the tokens whose attention or loss teaches.

Every row is `tokens i32[T]` padded on the right with 0, `prompt_length` (tokens before the answer) and `length` (all
real tokens). Files are JSON Lines or Parquet; a line, or a row of Parquet, is one of

  {"prompt": "...", "answer": "..."}                      a question, or a text and a question, and what is answered
  {"prompt": "...", "answer": ["...", "...", "..."]}      answer, next question, next answer: a longer chat
  {"prompt": "...", "question": "...", "answer": ...}     the user's words go on; the prompt ends before the question
  {"text": "..."}                                         plain text

A pair stays a row of its own, padded: its labels are what its answer attends to in its prompt, and a neighbour's answer
must not look into it. Plain text has no such border. Documents are joined by the end-of-text token, cut into rows of
exactly `sequence` tokens, and each row is split into prompt and answer at a random place in its middle half.

Rows are kept in memory, 4 B a token: the heads learn from thousands of examples, not from billions of tokens.
"""

import contextlib
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from kvjax.models.weights import Model

FORMATS = ("chat", "plain", "raw")
SYSTEM = "An assistant reads what a person writes and answers as helpfully and exactly as it can."
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
KEYS = ("prompt", "question", "answer", "text")
NAMED = 5  # left-out lines that are named, of each reason
CHUNK_LINES, CHUNK_BYTES = 256, 1 << 18  # what one task of a worker holds, at most

IN_LINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # rows are in memory: threads would only cost

UNREADABLE, UNKNOWN, MISTYPED = "not JSON", "no known keys", "wrong types"
BROKEN = (UNREADABLE, UNKNOWN, MISTYPED)
EMPTY, LONG, CHANGED = "empty", "longer than the sequence", "changed by the chat template"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was read, and what was left out; `print` it.

    Attributes:
      lines: Lines read, in all files.
      rows: Rows they gave.
      tokens: Tokens in these rows, without padding.
      left_out: Lines left out, by reason.
      named: The first few of them, "file:line", by reason.
      remainder: Tokens at the end of the packed text that fill no row.
      digest: Of all rows; two runs with the same digest read the same rows.
    """

    lines: int
    rows: int
    tokens: int
    left_out: dict[str, int]
    named: dict[str, tuple[str, ...]]
    remainder: int
    digest: int

    def __str__(self) -> str:
        said = [f"{self.rows} rows of {self.tokens} tokens from {self.lines} lines"]
        for reason, count in self.left_out.items():
            named = ", ".join(self.named[reason])
            said.append(f"left out, {reason}: {count} ({named}{', ...' if count > NAMED else ''})")
        if self.remainder:
            said.append(f"left out, the end of the packed text: {self.remainder} tokens")
        return "\n".join(said)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows in memory.

    Attributes:
      sequence: Length T that rows are padded to.
      tokens: i32, all rows one after the other.
      ends: i64[rows], where each ends in `tokens`.
      prompt_lengths: i32[rows].
      names: "file:line" of each row; of packed text, the document that it begins in.
      summary: What was read and left out.
    """

    sequence: int
    tokens: np.ndarray
    ends: np.ndarray
    prompt_lengths: np.ndarray
    names: tuple[str, ...]
    summary: Summary

    def row(self, index: int) -> dict[str, np.ndarray]:
        """A row: tokens i32[T], prompt_lengths i32, lengths i32, and ids i32, its index."""
        real = self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]
        padded = np.zeros(self.sequence, np.int32)
        padded[: len(real)] = real
        return {
            "tokens": padded,
            "prompt_lengths": self.prompt_lengths[index],
            "lengths": np.int32(len(real)),
            "ids": np.int32(index),
        }


def read_rows(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    model: Model,
    *,
    sequence: int,
    format: str = "chat",
    seed: int = 0,
    workers: int = 0,
    most_broken: float = 0.1,
) -> Rows:
    """Reads and tokenises files; the rows do not depend on the number of workers.

    Args:
      files: Paths of JSON Lines or Parquet; a Parquet file is known by its first bytes.
      model: Its tokenizer and chat template are used, not its weights.
      sequence: Longest row, in tokens. Longer pairs are left out.
      format: How a pair becomes text. "chat": in the model's own template. "plain": "### Human:" and "### Assistant:"
        after a line for the system, as Locret's authors trained. "raw": joined as it stands.
      seed: Of the places where plain text is split.
      workers: Processes that tokenise; 0 does it in this one. They are spawned, so a program that asks for them has
        its work under `if __name__ == "__main__"`.
      most_broken: Largest share of lines that may be broken: not JSON, without known keys, of wrong types.

    Raises:
      ValueError: If a setting is out of range, a file is missing or damaged, more lines are broken than `most_broken`,
        or no row is left.
      ModuleNotFoundError: If a Parquet file is given and pyarrow is not installed.

    Source: Huang et al. 2024, arXiv:2410.01805 (pairs, and the plain format); the split of text in its middle half is
      for Zeng et al. 2024, arXiv:2410.12876. Differs: pairs are left out where the paper cuts their prompts.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    _check_settings(paths, model, sequence, format, workers, most_broken)
    chunks = [chunk for path in paths for chunk in _chunks(path)]
    end = _end_of_text(model)
    read = functools.partial(_read_chunk, model=dataclasses.replace(model, params=None), format=format)
    pairs, texts, left_out, named, lines = [], [], {}, {}, 0
    for chunk in _in_order(chunks, read, workers):
        for found in chunk.found:
            lines += 1
            reason = found.reason or (LONG if found.prompt >= 0 and len(found.tokens) > sequence else None)
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
                if left_out[reason] <= NAMED:
                    named[reason] = (*named.get(reason, ()), found.name)
            elif found.prompt >= 0:
                pairs.append(found)
            else:
                texts.append(found)
    broken = sum(left_out.get(reason, 0) for reason in BROKEN)
    if broken > most_broken * lines:
        first = "; ".join(f"{reason}: {', '.join(named[reason])}" for reason in BROKEN if reason in named)
        raise ValueError(
            f"data: {broken} of {lines} lines are broken ({first}), and at most {most_broken:.0%} may be. Wanted "
            f"objects with prompt and answer, or with text, one a line. Mend the files or raise most_broken."
        )
    packed, remainder = _pack(texts, sequence, end)
    split = [int(np.random.default_rng([seed, i]).integers(sequence // 4, 3 * sequence // 4 + 1))
             for i in range(len(packed))]  # fmt: skip
    rows = pairs + [found._replace(prompt=place) for found, place in zip(packed, split, strict=True)]
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or f"{remainder} tokens of text"
        raise ValueError(
            f"data: no row is left of {lines} lines ({why}). Give other files or another sequence than {sequence}."
        )
    tokens = np.concatenate([found.tokens for found in rows])
    ends = np.cumsum([len(found.tokens) for found in rows])
    prompt_lengths = np.array([found.prompt for found in rows], np.int32)
    digest = zlib.crc32(prompt_lengths.tobytes(), zlib.crc32(ends.tobytes(), zlib.crc32(tokens.tobytes())))
    summary = Summary(lines, len(rows), len(tokens), left_out, named, remainder, digest)
    return Rows(sequence, tokens, ends, prompt_lengths, tuple(found.name for found in rows), summary)


def batches(
    rows: Rows,
    *,
    batch: int,
    seed: int,
    epochs: int | None = None,
    held_out: int = 0,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Shuffled batches for one process, an iterator with `get_state` and `set_state`.

    An item is {tokens i32[b, T], prompt_lengths i32[b], lengths i32[b], ids i32[b]}, b = batch / processes. Batch
    number i of all processes together holds the same rows, however many processes there are. Epochs are shuffled anew
    and follow each other without a gap, so a batch may hold the end of one and the beginning of the next; rows that
    fill no batch at the end of the last one are left out.

    Args:
      rows: From `read_rows`; the same in every process.
      batch: Rows of a batch, over all processes.
      seed: Of the order, and of the choice of held-out rows.
      epochs: How often every row comes; None for ever.
      held_out: Rows that never come: `held_out_batches` with the same seed has them.
      process: Index and count of processes.

    Raises:
      ValueError: If these do not fit each other.
    """
    each = _check_batch(rows, batch, held_out, process)
    train = _shuffled(rows, seed)[: len(rows.ends) - held_out]
    if epochs is not None and (epochs < 1 or epochs * len(train) < batch):
        raise ValueError(
            f"data: epochs={epochs} of {len(train)} rows fill no batch of {batch}. Give more epochs or a smaller batch."
        )
    index, count = process
    order = grain.MapDataset.source(train).shuffle(seed=seed).repeat(epochs)
    # whole batches alone: else the last one may be whole in one process and cut in another, which then waits for ever
    mine = order[: len(order) // batch * batch][index::count]
    return iter(mine.map(rows.row).batch(each, drop_remainder=True).to_iter_dataset(IN_LINE))


def held_out_batches(
    rows: Rows, *, batch: int, seed: int, held_out: int, process: tuple[int, int] = (0, 1)
) -> list[dict[str, np.ndarray]]:
    """The rows that `batches` leaves out, always in the same order, as such batches.

    Raises:
      ValueError: If `held_out` is no multiple of `batch`: every batch must be whole to weigh the same.
    """
    each = _check_batch(rows, batch, held_out, process)
    if held_out % batch:
        raise ValueError(
            f"data: held_out={held_out} is no multiple of batch={batch}. Hold out {held_out // batch * batch} or "
            f"{-(-held_out // batch) * batch} rows."
        )
    index, count = process
    mine = _shuffled(rows, seed)[len(rows.ends) - held_out :][index::count]
    return list(grain.MapDataset.source(mine).map(rows.row).batch(each)) if mine else []


def _shuffled(rows: Rows, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(len(rows.ends)).tolist()


def _check_batch(rows: Rows, batch: int, held_out: int, process: tuple[int, int]) -> int:
    """Rows of a batch in each process."""
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"data: process={process}; wanted an index in 0..{count - 1} and the count.")
    if batch < 1 or batch % count:
        raise ValueError(f"data: batch={batch} is no positive multiple of {count} processes. Give one.")
    if not 0 <= held_out < len(rows.ends):
        raise ValueError(
            f"data: held_out={held_out} of {len(rows.ends)} rows; wanted 0 or more, and one left to train on."
        )
    return batch // count


def _check_settings(paths, model, sequence, format, workers, most_broken) -> None:
    if not paths:
        raise ValueError("data: files is empty; wanted at least one path of JSON Lines or Parquet.")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"data: {', '.join(missing)} is no file. Give paths of JSON Lines or Parquet.")
    if sequence < 4:
        raise ValueError(f"data: sequence={sequence}; wanted at least 4 tokens, for a prompt and an answer.")
    if format not in FORMATS:
        raise ValueError(f"data: format={format!r}; wanted one of {FORMATS}.")
    if workers < 0:
        raise ValueError(f"data: workers={workers}; wanted 0 (this process) or more.")
    if not 0 <= most_broken <= 1:
        raise ValueError(f"data: most_broken={most_broken} is outside 0..1; it is a share of the lines.")
    if model.tokenizer is None:
        raise ValueError("data: this checkpoint came without a tokenizer. Put its tokenizer.json into the directory.")
    if format == "chat" and model.chat_template is None:
        raise ValueError("data: this checkpoint has no chat template. Give format='plain' or 'raw'.")


def _end_of_text(model: Model) -> int:
    """The token between documents. A chat model's eos_token often ends a turn, so the usual names come first."""
    for name in (*END_OF_TEXT, model.eos_token):
        if name is not None and (token := model.tokenizer.token_to_id(name)) is not None:
            return token
    raise ValueError(f"data: the tokenizer has none of {END_OF_TEXT} and the checkpoint names no eos_token.")


class _Chunk(NamedTuple):
    """Neighbouring lines of a file: bytes start..stop, or rows start..stop of a Parquet row group."""

    path: Path
    first: int  # number of its first line, counted from 1
    start: int
    stop: int
    group: int | None = None


class _Found(NamedTuple):
    """What a line gave: tokens of a pair with its prompt's length, of text with prompt -1, or a reason."""

    name: str
    tokens: np.ndarray | None
    prompt: int
    reason: str | None


@dataclasses.dataclass(frozen=True)
class _Read:
    """The lines of a chunk; an object of its own, so that grain hands it over whole."""

    found: list[_Found]


def _chunks(path: Path) -> Iterator[_Chunk]:
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            yield from _parquet_chunks(path)
            return
        file.seek(0)
        start = stop = 0
        first = number = 1
        for line in file:
            stop, number = stop + len(line), number + 1
            if stop - start >= CHUNK_BYTES or number - first >= CHUNK_LINES:
                yield _Chunk(path, first, start, stop)
                start, first = stop, number
        if stop > start:
            yield _Chunk(path, first, start, stop)


def _parquet_chunks(path: Path) -> Iterator[_Chunk]:
    counted = 1
    metadata = _open_parquet(path).metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for start in range(0, rows, CHUNK_LINES):
            yield _Chunk(path, counted + start, start, min(start + CHUNK_LINES, rows), group)
        counted += rows


def _open_parquet(path: Path):
    try:
        import pyarrow.parquet  # late: JSON Lines do without
    except ImportError:
        raise ModuleNotFoundError(f"data: {path} is Parquet, which needs pyarrow: pip install pyarrow") from None
    with _refused(path):
        return pyarrow.parquet.ParquetFile(path)


@contextlib.contextmanager
def _refused(path: Path):
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise ValueError(f"data: {path} is a damaged Parquet file ({error}). Fetch it again.") from error


@functools.lru_cache(maxsize=1)  # the chunks of a row group follow each other
def _row_group(path: Path, group: int) -> list[dict]:
    file = _open_parquet(path)
    with _refused(path):
        return file.read_row_group(group, columns=[key for key in KEYS if key in file.schema_arrow.names]).to_pylist()


def _in_order(chunks: list[_Chunk], read, workers: int) -> Iterator[_Read]:
    """What `read` makes of each chunk, in the order of chunks, whoever does it."""
    if not chunks:
        return iter(())
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks absl for its flags, which only absl's own main reads
    found = grain.MapDataset.source(chunks).map(read).to_iter_dataset(IN_LINE)
    return iter(
        found.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=workers)) if workers else found
    )


def _read_chunk(chunk: _Chunk, *, model: Model, format: str) -> _Read:
    if chunk.group is None:
        with chunk.path.open("rb") as file:
            file.seek(chunk.start)
            lines = file.read(chunk.stop - chunk.start).removesuffix(b"\n").split(b"\n")
    else:
        lines = _row_group(chunk.path, chunk.group)[chunk.start : chunk.stop]
    parsed = [_parse(line, model, format) for line in lines]
    pairs = [said for said in parsed if isinstance(said, tuple)]
    bare = format == "chat"  # its template wrote the special tokens
    heads, tails, texts = (
        iter(model.tokenizer.encode_batch(strings, add_special_tokens=special))
        for strings, special in (
            ([head for head, _ in pairs], not bare),
            ([tail for _, tail in pairs], False),
            ([said.text for said in parsed if isinstance(said, _Text)], True),
        )
    )
    found = []
    for number, said in enumerate(parsed, chunk.first):
        name, tokens, prompt, reason = f"{chunk.path}:{number}", None, -1, None
        if isinstance(said, str):
            reason = said
        elif isinstance(said, _Text):
            tokens = next(texts).ids
            reason = None if tokens else EMPTY
        else:
            head = next(heads).ids
            tail = next(tails).ids
            tokens, prompt = head + tail, len(head)
            reason = None if head and tail else EMPTY
        found.append(_Found(name, None if reason else np.array(tokens, np.int32), prompt, reason))
    return _Read(found)


@dataclasses.dataclass(frozen=True)
class _Text:
    text: str


def _parse(line: bytes | dict, model: Model, format: str) -> tuple[str, str] | _Text | str:
    """A line as (prompt, rest), as plain text, or the reason why it is left out."""
    if isinstance(line, bytes):
        if not line.strip():
            return EMPTY
        try:
            line = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return UNREADABLE
    if not isinstance(line, dict):
        return UNKNOWN
    given = {key: line[key] for key in KEYS if line.get(key) is not None}
    if "prompt" in given and "answer" in given:
        prompt, question, answer = given["prompt"], given.get("question", ""), given["answer"]
        turns = answer if isinstance(answer, list) else [answer]
        if not all(_is_text(said) for said in (prompt, question, *turns)) or len(turns) % 2 == 0:
            return MISTYPED
        if not prompt.strip() or not all(said.strip() for said in turns):
            return EMPTY
        return _join(prompt, question, turns, model, format) or CHANGED
    if "text" in given:
        if not _is_text(given["text"]):
            return MISTYPED
        return _Text(given["text"]) if given["text"].strip() else EMPTY
    return UNKNOWN


def _is_text(said) -> bool:
    """Whether this is a string that UTF-8 can hold: JSON can spell half a surrogate pair."""
    return isinstance(said, str) and not any("\ud800" <= letter <= "\udfff" for letter in said)


def _join(prompt: str, question: str, turns: list[str], model: Model, format: str) -> tuple[str, str] | None:
    """The prompt's text and what follows, or None if the chat template does not leave the words as they are."""
    match format:
        case "raw":
            return prompt, question + "".join(turns)
        case "plain":
            before = f"{SYSTEM}\n### Human: "
            opened = f"{before}{prompt}{question}\n### Assistant: "
            forms = (" {}\n### ", "Human: {}\n### Assistant: ")  # the assistant's turns, the person's
            whole = opened + "".join(forms[i % 2].format(turn) for i, turn in enumerate(turns))
        case "chat":
            roles = ["user", "assistant"] * len(turns)
            messages = [
                {"role": role, "content": said} for role, said in zip(roles, [prompt + question, *turns], strict=False)
            ]
            before = model.chat("\0").split("\0")[0]
            opened = model.chat(messages[:1])
            whole = model.chat(messages, add_generation_prompt=False)
    head = before + prompt if question else opened
    return (head, whole[len(head) :]) if whole.startswith(head) else None


def _pack(texts: list[_Found], sequence: int, end: int) -> tuple[list[_Found], int]:
    """Documents joined by `end` and cut into rows, and the tokens that are left over."""
    if not texts:
        return [], 0
    joined = np.concatenate([part for found in texts for part in (found.tokens, [end])]).astype(np.int32)
    begins = np.cumsum([0] + [len(found.tokens) + 1 for found in texts])
    starts = range(0, len(joined) - sequence + 1, sequence)
    document = np.searchsorted(begins, starts, side="right") - 1
    rows = [
        _Found(texts[at].name, joined[start : start + sequence], -1, None)
        for at, start in zip(document, starts, strict=True)
    ]
    return rows, len(joined) % sequence
