"""Entries of the chunk store: the caches of a passage's layers, how they are rounded to int8, and their file."""

import base64
import dataclasses
import functools
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

VERSION = 1  # of the file and of the index
SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
NAMES = {code: name for name, code in SAFETENSORS.items()}
ALIGN = 64  # bytes; where arrays begin in a file, so that a device can take the first of them as they lie


class Damaged(ValueError):
    """What was stored is not what is read. `reason` is "torn" (too short, or gone) or "damaged" (a checksum)."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Rounded(NamedTuple):
    """An array as 8-bit codes: x is near low + step codes, by half a step and what f32, or its dtype, rounds."""

    codes: np.ndarray  # u8, of the array's shape
    step: np.ndarray  # f32, with 1 on the axis that shares it
    low: np.ndarray  # f32, likewise
    dtype: np.dtype  # of the array

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.codes.nbytes + self.step.nbytes + self.low.nbytes


def rounded(x: np.ndarray, axis: int) -> np.ndarray | Rounded:
    """`x` with the numbers along `axis` sharing a step: (largest - smallest) / 255, so the error is half of that.

    What has no steps stays as it is: integers, f64, numbers that are not finite, arrays without numbers or axis.
    """
    if x.dtype.name not in ("float32", "float16", "bfloat16") or not x.size or not -x.ndim <= axis < x.ndim:
        return x
    wide = x.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        low = wide.min(axis=axis, keepdims=True)
        step = (wide.max(axis=axis, keepdims=True) - low) / np.float32(255)
    if not (np.isfinite(step).all() and np.isfinite(low).all()):
        return x
    wide -= low
    wide /= np.where(step > 0, step, 1)  # all alike, or a span below the smallest f32: codes of 0
    return Rounded(np.rint(wide, out=wide).clip(0, 255).astype(np.uint8), step, low, x.dtype)


def loaded(x: Any) -> Any:
    """The array again: a `Rounded` one computed in f32, in the dtype that it had; any other as it is."""
    if not isinstance(x, Rounded):
        return x
    wide = x.codes.astype(np.float32)
    wide *= x.step
    wide += x.low
    return wide.astype(x.dtype, copy=False)


@dataclasses.dataclass
class Entry:
    """A cache as the store gives it.

    Attributes:
      text: What `about` holds, as JSON.
      stored: For each layer (k, v): arrays of numpy or jax, or `Rounded`.
      tier: Where it was found: "device", "host" or "disk".
      check: (layer) -> None, raises `Damaged`; None where every layer was checked.
      version: Of the file that it comes from, or None.
    """

    text: str
    stored: tuple[tuple[Any, Any], ...]
    tier: str
    check: Callable[[int], None] | None = None
    version: int | None = None

    @functools.cached_property
    def about(self) -> dict:
        """What was put beside the vectors. JSON knows no tuples: they come back as lists."""
        return json.loads(self.text, object_hook=_from_json)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are stored."""
        return sum(x.nbytes for layer in self.stored for x in layer)

    def layer(self, i: int) -> tuple[Any, Any]:
        """(k, v) of one layer: jax arrays from the device; else numpy ones, read-only, which are views of the memory
        map or the store's own memory. Only what is stored as int8 is made anew.

        Raises:
          Damaged: If the entry was asked for `late`, and this layer's bytes are not those that were stored.
        """
        layer = self.stored[i]
        if self.check is not None:
            self.check(range(self.layers)[i])
        return loaded(layer[0]), loaded(layer[1])

    def stream(self) -> Iterator[tuple[Any, Any]]:
        """Layer after layer, as `layer` gives them. While the caller computes, a thread reads the next one."""
        with ThreadPoolExecutor(1, "kvjax-read-ahead") as ahead:
            coming = ahead.submit(self.layer, 0)
            for i in range(self.layers):
                here = coming.result()
                if i + 1 < self.layers:
                    coming = ahead.submit(self.layer, i + 1)
                yield here


def to_json(about: dict) -> str:
    """`about` as text; arrays in it as base64.

    Raises:
      ValueError: If it is no dictionary, or holds what JSON cannot.
    """
    if not isinstance(about, dict):
        raise ValueError(f"put: about is a {type(about).__name__}, and must be a dictionary. Pass {{}} for nothing.")
    try:
        return json.dumps(about, default=_to_json)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"put: about holds what JSON cannot ({error}). Give numbers, strings, lists and small arrays."
        ) from None


def _to_json(x: Any) -> Any:
    if isinstance(x, np.generic):
        return x.item()
    if not hasattr(x, "__array__"):
        raise TypeError(f"a {type(x).__name__}")
    x = np.asarray(x, order="C")
    if x.dtype.name not in SAFETENSORS:
        raise TypeError(f"an array of {x.dtype}")
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return {"__array__": [x.dtype.name, x.shape, base64.b64encode(x.tobytes()).decode()]}


def _from_json(found: dict) -> Any:
    if found.keys() != {"__array__"}:
        return found
    name, shape, text = found["__array__"]
    return np.frombuffer(base64.b64decode(text), dtype_of(name)).reshape(shape)


def dtype_of(name: str) -> np.dtype:
    """The dtype of that name, those of ml_dtypes among them."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def unit_of(capacity: int) -> int:
    """Bytes in which a tier counts, so that its capacity fits into 31 bits, as `paging` wants; 1 up to 2 GiB."""
    return 1 << max(0, capacity.bit_length() - 31)


def _bytes_of(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)


def write(file: BinaryIO, namespace: str, key: str, stored: Sequence[tuple], text: str) -> tuple[int, int]:
    """Writes an entry as safetensors, layer after layer, each with a CRC-32 in the header; arrays are not copied.

    Returns:
      The bytes of the file, and the CRC-32 of its header, which the index keeps.
    """
    layers, dtypes = [], {}
    for i, layer in enumerate(stored):
        named = {}
        for name, x in zip((f"{i:04}.k", f"{i:04}.v"), layer, strict=True):
            if isinstance(x, Rounded):
                dtypes[name] = x.dtype.name
                named |= {f"{name}.codes": x.codes, f"{name}.low": x.low, f"{name}.step": x.step}
            else:
                named[name] = x
        layers.append(named)
    crcs = [functools.reduce(lambda crc, x: zlib.crc32(_bytes_of(x), crc), each.values(), 0) for each in layers]
    tensors = [item for each in layers for item in each.items()]
    tensors.sort(key=lambda item: -item[1].itemsize)  # so that all are aligned; layers stay in order
    own = {"version": VERSION, "namespace": namespace, "key": key, "about": text, "crc": crcs, "dtypes": dtypes}
    header, at = {"__metadata__": {"kvjax": json.dumps(own)}}, 0
    for name, x in tensors:
        header[name] = {"dtype": SAFETENSORS[x.dtype.name], "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    start = json.dumps(header).encode()
    start += b" " * (-(len(start) + 8) % ALIGN)
    start = len(start).to_bytes(8, "little") + start
    file.write(start)
    for _, x in tensors:
        file.write(_bytes_of(x))
    return len(start) + at, zlib.crc32(start)


def read(path: str | os.PathLike, namespace: str, key: str, size: int, crc: int) -> Entry:
    """The entry in a file, mapped into memory: its header is checked, its layers when they are asked for.

    Args:
      path: Of the file.
      namespace: What it must be bound to.
      key: What it must have been put under.
      size: Bytes of the file, as the index has them.
      crc: CRC-32 of its header, likewise.

    Raises:
      Damaged: If it is not that entry.
      OSError: If it cannot be opened.
    """
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size or size < 8:
            raise Damaged("torn", f"{path} has {found} bytes of {size}.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    if begin > size or zlib.crc32(mapped[:begin]) != crc:
        raise Damaged("damaged", f"{path}: its header does not match its checksum.")
    header = json.loads(mapped[8:begin])
    own = json.loads(header.pop("__metadata__")["kvjax"])
    if (own["namespace"], own["key"]) != (namespace, key):
        raise Damaged("damaged", f"{path} holds another entry than the index says.")
    arrays = {
        name: np.ndarray(x["shape"], dtype_of(NAMES[x["dtype"]]), mapped, begin + x["data_offsets"][0])
        for name, x in header.items()
    }
    unchecked = set(range(len(own["crc"])))
    by_layer = [[] for _ in own["crc"]]
    for name in sorted(arrays):  # codes, low, step: as they were written
        by_layer[int(name.split(".")[0])].append(arrays[name])

    def check(layer: int) -> None:
        if layer not in unchecked:
            return
        if functools.reduce(lambda crc, x: zlib.crc32(_bytes_of(x), crc), by_layer[layer], 0) != own["crc"][layer]:
            raise Damaged("damaged", f"{path}: layer {layer} does not match its checksum.")
        unchecked.discard(layer)

    def stored(name: str) -> np.ndarray | Rounded:
        if name not in own["dtypes"]:
            return arrays[name]
        dtype = dtype_of(own["dtypes"][name])
        return Rounded(arrays[f"{name}.codes"], arrays[f"{name}.step"], arrays[f"{name}.low"], dtype)

    layers = tuple((stored(f"{i:04}.k"), stored(f"{i:04}.v")) for i in range(len(own["crc"])))
    return Entry(own["about"], layers, "disk", check)
