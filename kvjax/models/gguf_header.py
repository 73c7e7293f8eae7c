"""The header of a GGUF file: its metadata and where its tensors lie.

The package `gguf` has a reader too. It builds an array for each of the hundred thousand strings of a vocabulary (2.5 s
for SmolLM2 against 0.1 s here) and trusts the counts of a damaged file. Its tables of types are used below, and its
dequantisation in `gguf_file`.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)


class Location(NamedTuple):
    """Where a tensor lies: `kind` is a gguf.GGMLQuantizationType; `shape` has rows first, as numpy."""

    kind: Any
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(NamedTuple):
    """What a GGUF file says before its weights begin."""

    metadata: dict[str, Any]
    tensors: dict[str, Location]
    data: np.ndarray  # u8[file size], mapped


def read_header(path: Path) -> Header:
    """Reads and checks the header of a GGUF file; its tensors stay on disk.

    Raises:
      ValueError: If it is no GGUF file, of an unknown version, damaged, or shorter than its header says.
    """
    if path.stat().st_size < 24:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too few for a GGUF file. Fetch it again.")
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)  # slices of a memmap are slow to make
    cursor = _Cursor(memoryview(data), 0)
    magic, version = bytes(cursor.buffer[:4]), struct.unpack_from("<I", data, 4)[0]
    if magic != b"GGUF":
        raise ValueError(f"{path} starts with {magic!r}, not with b'GGUF': it is no GGUF file.")
    if version not in VERSIONS:
        raise ValueError(f"{path} is GGUF version {version}; wanted one of {VERSIONS}, little-endian.")
    cursor.at = 8
    try:
        tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(metadata_count)}
        declared = [_tensor(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if alignment not in (1 << bits for bits in range(16)):
            raise ValueError(f"an alignment of {alignment}")
    except (struct.error, ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is truncated or damaged in its header, near byte {cursor.at} of {len(data)} ({error}). "
            f"Fetch it again."
        ) from error
    first = -(-cursor.at // alignment) * alignment
    return Header(metadata, _locate(path, declared, first, len(data)), data)


class _Cursor:
    """A place in the header that moves on as values are read; never past the end of the file."""

    def __init__(self, buffer: memoryview, at: int):
        self.buffer, self.at = buffer, at

    def scalar(self, code: str):
        value = struct.unpack_from("<" + code, self.buffer, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        count = self.scalar("Q")
        start, self.at = self.at, self.at + count
        if self.at > len(self.buffer):
            raise ValueError(f"a string of {count} bytes")
        return str(self.buffer[start : self.at], "utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in (STRING, ARRAY):
            return [self.value(item) for _ in range(count)]
        code = f"<{count}{SCALARS[item]}"
        values = list(struct.unpack_from(code, self.buffer, self.at))
        self.at += struct.calcsize(code)
        return values


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape with rows first, type and offset of the next tensor."""
    name, axes = cursor.string(), cursor.scalar("I")
    if axes > 4:
        raise ValueError(f"a tensor of {axes} axes")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _locate(path: Path, declared: list, first: int, size: int) -> dict[str, Location]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # late: takes a sixth of a second

    tensors = {}
    for name, shape, code, offset in declared:
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise ValueError(f"{path}: the tensor {name} has the unknown type {code}.") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise ValueError(
                f"{path}: the tensor {name} has rows of {shape[-1]}, no multiple of {kind.name}'s {block}."
            )
        found = Location(kind, shape, first + offset, math.prod(shape) // block * block_bytes)
        if found.start + found.nbytes > size:
            raise ValueError(
                f"{path} is truncated: the tensor {name} ends at byte {found.start + found.nbytes}, and the file at "
                f"{size}. Fetch it again."
            )
        tensors[name] = found
    return tensors
