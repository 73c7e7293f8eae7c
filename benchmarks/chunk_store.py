"""How fast an entry comes from disk when its pages are in memory, with and without checksums.

`python -m benchmarks.chunk_store`, a minute; takes half a GiB on disk and in memory. Writes a table and
benchmarks/results/chunk-store-cpu.json. Every figure includes opening the file and touching each of its pages.
"""

import argparse
import json
import tempfile
import time
import zlib

import numpy as np

from benchmarks.common import RESULTS, in_turns, machine
from kvjax.serve.chunk_store import Store

LAYERS, TOKENS, HEADS, HEAD_DIM = 32, 4096, 8, 128  # an 8B model's passage in bf16: 512 MiB
PAGE = 4096


def touch(entry) -> int:
    """Reads a byte of every page."""
    views = (x.reshape(-1).view(np.uint8) for i in range(entry.layers) for x in entry.stored[i])
    return sum(int(x[::PAGE].sum()) for x in views)


def main(runs: int, layers: int, folder: str | None) -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2**16, (2, 1, HEADS, TOKENS, HEAD_DIM), np.uint16)
    passage = [(one[0], one[1])] * layers
    size = sum(x.nbytes for layer in passage for x in layer)
    with tempfile.TemporaryDirectory(dir=folder) as place, Store(place, namespace="bench", host_bytes=0) as store:

        def put():
            start = time.perf_counter()
            if not store.put("passage", passage, {}):
                raise SystemExit("The entry could not be stored: is there room on the disk?")
            return time.perf_counter() - start

        def verified():
            start = time.perf_counter()
            touch(store.get("passage"))
            return time.perf_counter() - start

        def streamed():
            start = time.perf_counter()
            for k, _ in store.get("passage", late=True).stream():
                k.shape  # noqa: B018
            return time.perf_counter() - start

        def unchecked():
            start = time.perf_counter()
            entry = store.get("passage", late=True)
            entry.check = None
            touch(entry)
            return time.perf_counter() - start

        def first_layer():
            start = time.perf_counter()
            store.get("passage", late=True).layer(0)
            return time.perf_counter() - start

        def copied():
            start = time.perf_counter()
            entry = store.get("passage", late=True)
            entry.check = None
            for i in range(entry.layers):
                for x in entry.layer(i):
                    x.copy()
            return time.perf_counter() - start

        def checksum():
            start = time.perf_counter()
            for _ in range(layers):
                zlib.crc32(one.reshape(-1).view(np.uint8))
            return time.perf_counter() - start

        written = put()
        seconds = in_turns(
            runs,
            **{
                "get, verified": verified,
                "stream, verified": streamed,
                "no verification": unchecked,
                "no verification, copied": copied,
                "first layer of a stream": first_layer,
                "crc32 alone, one thread": checksum,
            },
        )
    figures = {"first layer of a stream [ms]": 1e3 * seconds.pop("first layer of a stream")}
    figures |= {f"{name} [GB/s]": size / taken / 1e9 for name, taken in seconds.items()}
    figures |= {"put, checksummed and synced [GB/s]": size / written / 1e9}
    for name, value in figures.items():
        print(f"{name:<40}{value:>9.2f}")
    result = {"figures": figures, "bytes": size, "zlib": zlib.ZLIB_RUNTIME_VERSION, "machine": machine(), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "chunk-store-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", help="where the store is made; a temporary folder by default")
    args = parser.parse_args()
    main(args.runs, args.layers, args.folder)
