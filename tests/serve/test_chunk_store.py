import contextlib
import dataclasses
import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from safetensors import safe_open

from kvjax.serve import disk, entries, paging
from kvjax.serve.chunk_store import Store, namespace_of
from kvjax.serve.entries import Damaged, rounded
from tests.tiny import CONFIG, random_params

ROOT = Path(__file__).parents[2]


def make(seed=0, layers=2, shape=(1, 2, 5, 8), dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [tuple(rng.standard_normal(shape).astype(dtype) for _ in "kv") for _ in range(layers)]


SIZE = sum(x.nbytes for layer in make() for x in layer)  # bytes of an entry as `make` gives it, in memory
ON_DISK = 2 * SIZE  # more than its file takes, less than two


def open_store(folder, **settings):
    return Store(folder, **{"namespace": "here", "host_bytes": 0, **settings})


def assert_same(entry, layers):
    assert entry is not None and entry.layers == len(layers)
    for i, layer in enumerate(layers):
        for found, given_ in zip(entry.layer(i), layer, strict=True):
            assert found.dtype == given_.dtype
            assert_array_equal(np.asarray(found), np.asarray(given_))


def files(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)  # in place: what no store ever does


# ---- what comes back ----


@pytest.mark.parametrize("tiers", [{}, {"host_bytes": 2**20}, {"folder": None, "host_bytes": 2**20}])
def test_an_entry_comes_back_with_what_was_put_beside_it(tmp_path, tiers):
    about = {"I": np.arange(3, dtype=np.float32), "pos": np.int64(7), "s_old": ["a", "b"], "nested": {"x": None}}
    with open_store(**{"folder": tmp_path, **tiers}) as store:
        assert store.put("passage", make(), about)
        entry = store.get("passage")
        assert_same(entry, make())
        assert_array_equal(entry.about.pop("I"), about.pop("I"))
        assert entry.about == about
        assert store.about("passage")["s_old"] == ["a", "b"]  # what the caller changes is the caller's


DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.int8, np.uint32, np.bool_, np.dtype(">f4")]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    data=st.lists(st.tuples(SHAPES, SHAPES, st.sampled_from(DTYPES), st.sampled_from(DTYPES)), min_size=1, max_size=4),
    key=st.text(max_size=8),
    int8=st.booleans(),
)
def test_any_shapes_dtypes_and_keys_come_back_bit_for_bit_or_rounded_in_their_dtype(data, key, int8):
    def array(shape, dtype):
        return np.random.default_rng(1).integers(0, 100, shape).astype(dtype)

    layers = [(array(a, one), array(b, two)) for a, b, one, two in data]
    with tempfile.TemporaryDirectory() as folder, open_store(folder, int8=int8) as store:
        assert store.put(key, layers, {})
        entry = store.get(key)
        for i, layer in enumerate(layers):
            for found, x in zip(entry.layer(i), layer, strict=True):
                assert found.dtype == x.dtype.newbyteorder("=") and found.shape == x.shape
                if not int8:
                    assert_array_equal(found, x)


def test_the_file_is_one_that_safetensors_reads(tmp_path):
    with open_store(tmp_path) as store:
        store.put("passage", make(dtype=ml_dtypes.bfloat16), {})
    with safe_open(files(tmp_path)[0], "numpy") as file:
        assert_array_equal(file.get_tensor("0001.v"), make(dtype=ml_dtypes.bfloat16)[1][1])


def test_layers_from_disk_are_read_only_views_of_the_map_and_nothing_is_copied(tmp_path):
    layers = make(shape=(1, 2, 64, 512))
    with open_store(tmp_path) as store:
        store.put("passage", layers, {})
        tracemalloc.start()
        entry = store.get("passage")
        views = [x for i in range(entry.layers) for x in entry.layer(i)]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < views[0].nbytes / 2
        assert not any(x.flags.owndata or x.flags.writeable for x in views)


def test_what_the_store_keeps_does_not_change_with_the_callers_arrays():
    layers = make()
    with open_store(None, host_bytes=2**20) as store:
        store.put("passage", layers, {})
        layers[0][0][:] = 0
        entry = store.get("passage")
        assert_same(entry, make())
        with pytest.raises(ValueError, match="read-only"):
            entry.layer(0)[0][:] = 0


def test_stream_yields_every_layer_and_reads_one_ahead(tmp_path):
    read = []
    with open_store(tmp_path) as store:
        store.put("passage", make(layers=5), {})
        entry = store.get("passage", late=True)
        check = entry.check
        entry.check = lambda i: (read.append(i), check(i))
        for i, (k, v) in enumerate(entry.stream()):
            deadline = time.monotonic() + 10
            while len(read) < min(i + 2, 5) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert read == list(range(min(i + 2, 5)))
            assert_array_equal(k, make(layers=5)[i][0])
            assert_array_equal(v, make(layers=5)[i][1])


# ---- keys, and to whom entries belong ----


KEYS = ["../x", "/etc/passwd", "a/../../b", "", "\0", "x" * 5000, "ü\ud800", "'; DROP TABLE entries"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_never_a_path(tmp_path, key):
    inside = tmp_path / "inside"
    with open_store(inside) as store:
        assert store.put(key, make(), {}) and key in store and store.keys() == [key]
        assert_same(store.get(key), make())
        assert [path.name for path in tmp_path.iterdir()] == ["inside"]
        assert store.remove(key) and store.get(key) is None and not files(inside)


def test_keys_are_found_by_their_beginning(tmp_path):
    with open_store(tmp_path, host_bytes=2 * SIZE) as store:
        for key in ("a/1", "a/2", "a%", "b/1"):
            store.put(key, make(), {"key": key})
        assert store.keys("a/") == ["a/1", "a/2"] and len(store) == 4
        assert store.about("a/2") == {"key": "a/2"} and store.about("c") is None


def test_entries_of_another_model_are_never_served(tmp_path):
    with open_store(tmp_path) as store:
        store.put("passage", make(), {})
    with open_store(tmp_path, namespace="elsewhere") as other:
        assert other.get("passage") is None and "passage" not in other and not other.keys()
        assert other.stats()["misses"] == {"foreign": 1}
        assert other.put("passage", make(1), {})
        assert_same(other.get("passage"), make(1))
    with open_store(tmp_path) as store:
        assert_same(store.get("passage"), make())


def test_rounded_entries_are_never_taken_for_exact_ones(tmp_path):
    with open_store(tmp_path, int8=True) as store:
        store.put("passage", make(), {})
    with open_store(tmp_path) as store:
        assert store.get("passage") is None


def test_a_namespace_is_of_every_weight_the_tokenizer_and_the_policy():
    params = random_params()
    bound = namespace_of(params, "tokens", "h2o", page=16)
    assert bound == namespace_of(random_params(), "tokens", "h2o", page=16)
    embed = params.embed
    swapped = embed.at[3, 4].set(embed[3, 5]).at[3, 5].set(embed[3, 4])  # no norm and no sum would tell
    nudged = embed.at[-1, -1].set(jnp.nextafter(embed[-1, -1], 9.0))
    others = [
        namespace_of(params, "others", "h2o", page=16),
        namespace_of(params, "tokens", "snapkv", page=16),
        namespace_of(params, "tokens", "h2o", page=32),
        namespace_of(
            dataclasses.replace(params, config=dataclasses.replace(CONFIG, context=99)), "tokens", "h2o", page=16
        ),
        namespace_of(dataclasses.replace(params, embed=swapped), "tokens", "h2o", page=16),
        namespace_of(dataclasses.replace(params, embed=nudged), "tokens", "h2o", page=16),
        namespace_of(dataclasses.replace(params, embed=embed.astype(jnp.bfloat16)), "tokens", "h2o", page=16),
    ]
    assert len({bound, *others}) == 1 + len(others)


# ---- tiers ----


def test_the_device_demotes_to_host_and_the_host_to_disk(tmp_path):
    on_device = [tuple(map(jnp.asarray, layer)) for layer in make()]
    with open_store(tmp_path, device_bytes=SIZE, host_bytes=SIZE) as store:
        for key in "abc":  # each goes to the device, and pushes the one before it one tier down
            assert store.put(key, on_device, {})
        assert store.stats()["entries"] == {"device": 1, "host": 1, "disk": 3}
        assert [store.get(key).tier for key in "cba"] == ["device", "host", "disk"]
        assert store.stats()["hits"] == {"device": 1, "host": 1, "disk": 1}
        assert store.stats()["evicted"] == {"device": 2, "host": 1, "disk": 0}
        assert hasattr(store.get("c").layer(0)[0], "devices")
        assert_same(store.get("a"), make())


def test_a_prediction_of_1_skips_the_host_tier(tmp_path):
    on_device = [tuple(map(jnp.asarray, layer)) for layer in make()]
    with open_store(tmp_path, device_bytes=SIZE, host_bytes=8 * SIZE) as store:
        store.put("soon", on_device, {}, prediction=0)
        store.put("late", on_device, {}, prediction=1)
        store.put("last", on_device, {})
        store.put("cold", make(), {}, prediction=1)
        assert [store.get(key).tier for key in ("last", "soon", "late", "cold")] == ["device", "host", "disk", "disk"]


def test_the_second_hit_in_a_tier_moves_an_entry_up(tmp_path):
    with open_store(tmp_path, device_bytes=SIZE, host_bytes=SIZE) as store:
        store.put("a", make(), {}, prediction=1)
        assert [store.get("a").tier for _ in range(5)] == ["disk", "disk", "host", "device", "device"]
        assert_same(store.get("a"), make())


def test_what_has_left_the_disk_is_written_again_when_host_memory_needs_room(tmp_path):
    with open_store(tmp_path, host_bytes=SIZE, disk_bytes=ON_DISK) as store:
        store.put("a", make(1), {})
        with open_store(tmp_path, disk_bytes=ON_DISK) as other:
            other.put("b", make(2), {})  # there is room on disk for one
            assert len(files(tmp_path)) == 1
        assert_same(store.get("a"), make(1))
        store.put("c", make(3), {}, prediction=0)
        assert store.keys() == ["a", "c"]
        assert_same(store.get("a"), make(1))


def test_arrays_that_were_donated_are_found_in_a_tier_below(tmp_path):
    on_device = [tuple(map(jnp.asarray, layer)) for layer in make()]
    with open_store(tmp_path, device_bytes=SIZE) as store:
        store.put("a", on_device, {})
        on_device[0][0].delete()
        assert store.get("a").tier == "disk"
    with open_store(None, device_bytes=SIZE) as store:
        on_device = [tuple(map(jnp.asarray, layer)) for layer in make()]
        store.put("a", on_device, {})
        on_device[0][0].delete()
        assert store.get("a") is None and store.stats()["misses"] == {"deleted": 1}


@pytest.mark.parametrize("maker", [paging.lru, paging.fifo, paging.flush_when_zero, paging.mark_zero, paging.marker])
def test_no_tier_ever_exceeds_its_bytes(tmp_path, maker):
    rng = random.Random(0)
    with open_store(tmp_path, device_bytes=3 * SIZE, host_bytes=4 * SIZE, disk_bytes=9 * SIZE, pages=maker) as store:
        most = {"device": 3 * SIZE, "host": 4 * SIZE, "disk": 9 * SIZE}
        for _ in range(40):
            key, bit = rng.choice("abcdefgh"), rng.choice([None, 0, 1])
            if store.get(key, prediction=bit) is None:
                layers = make(layers=rng.choice([1, 2, 3]))
                wrap = rng.choice([np.asarray, jnp.asarray])
                store.put(key, [tuple(map(wrap, layer)) for layer in layers], {}, prediction=bit)
            stats = store.stats()
            assert all(stats["bytes"][tier] <= most[tier] for tier in most)
            assert sum(path.stat().st_size for path in files(tmp_path)) == stats["bytes"]["disk"]
        assert stats["evicted"]["disk"] > 0


def test_a_tier_of_many_gigabytes_counts_in_larger_units(tmp_path):
    with open_store(tmp_path, host_bytes=10**11, disk_bytes=10**12) as store:
        assert store.put("a", make(), {}) and store.get("a").tier == "host"
        assert len(files(tmp_path)) == 1


def test_an_entry_larger_than_a_tier_is_left_out_of_it(tmp_path):
    with open_store(tmp_path, host_bytes=SIZE - 1, disk_bytes=ON_DISK) as store:
        assert store.put("a", make(), {}) and store.get("a").tier == "disk"
        assert not store.put("b", make(layers=20), {})
        assert store.keys() == ["a"] and len(files(tmp_path)) == 1
        assert not store.put("a", make(layers=20), {})
        assert store.get("a") is None and not files(tmp_path)  # the old one is out of date


def test_least_recent_use_counts_over_all_processes(tmp_path):
    with open_store(tmp_path) as store:
        store.put("a", make(), {})
        room = 3 * files(tmp_path)[0].stat().st_size
    # Two stores on one folder share nothing but the folder, as two processes do.
    with open_store(tmp_path, disk_bytes=room) as one, open_store(tmp_path, disk_bytes=room) as two:
        for key in "bc":
            assert one.put(key, make(), {})
        assert two.get("a") is not None
        assert two.put("d", make(), {})
        assert one.keys() == two.keys() == ["a", "c", "d"]
        assert one.get("c") is not None and two.put("e", make(), {}) and two.keys() == ["c", "d", "e"]


def test_what_another_process_removes_takes_no_room(tmp_path):
    with open_store(tmp_path, disk_bytes=2 * ON_DISK - SIZE) as one, open_store(tmp_path) as two:  # room for two
        assert one.put("a", make(), {}) and one.put("b", make(), {}) and two.remove("b")
        assert one.put("c", make(), {}) and one.keys() == ["a", "c"]


def test_a_smaller_store_opens_a_larger_folder_and_keeps_the_newest(tmp_path):
    with open_store(tmp_path) as store:
        for key in "abc":
            store.put(key, make(), {})
        store.get("a")
    with open_store(tmp_path, disk_bytes=ON_DISK) as store:
        assert store.keys() == ["a"] and len(files(tmp_path)) == 1


def test_a_map_outlives_its_file(tmp_path):
    with open_store(tmp_path, disk_bytes=ON_DISK) as store:
        store.put("a", make(1), {})
        entry = store.get("a")
        store.put("b", make(2), {})
        store.put("b", make(3), {})
        assert store.get("a") is None
        assert_same(entry, make(1))


def test_what_another_process_puts_replaces_what_is_in_memory(tmp_path):
    with open_store(tmp_path, host_bytes=2**20) as one, open_store(tmp_path) as two:
        one.put("a", make(1), {})
        two.put("a", make(2), {})
        assert_same(one.get("a"), make(2))
        assert len(files(tmp_path)) == 1


# ---- int8 ----


@pytest.mark.parametrize("dtype, own", [(np.float32, 2.0**-22), (ml_dtypes.bfloat16, 2.0**-8), (np.float16, 2.0**-11)])
def test_int8_is_off_by_half_a_step_at_most_keys_by_channel_and_values_by_token(tmp_path, dtype, own):
    layers = make(shape=(2, 3, 40, 16))
    for k, v in layers:
        k[..., 3] += 50  # a channel that stands out, as keys have
        v[..., 7, :] *= 50
    layers = [tuple(x.astype(dtype) for x in layer) for layer in layers]
    with open_store(tmp_path, int8=True) as store:
        store.put("a", layers, {})
        entry = store.get("a")
    for i, layer in enumerate(layers):
        for found, x, axis in zip(entry.layer(i), layer, (-2, -1), strict=True):
            x, found_wide = x.astype(np.float64), found.astype(np.float64)
            span = x.max(axis=axis, keepdims=True) - x.min(axis=axis, keepdims=True)
            # Half a step, and `own` of the largest: rounding to the dtype (in f32, of step, minimum and sum).
            most = span / 510 + own * np.abs(x).max(axis=axis, keepdims=True)
            assert found.dtype == dtype and (np.abs(found_wide - x) <= most).all()
    assert entry.nbytes < (0.36 if dtype == np.float32 else 0.72) * sum(x.nbytes for layer in layers for x in layer)


def test_int8_codes_of_numbers_that_are_alike_or_tiny_are_exact_or_near():
    for x in (np.full((3, 4), 7.25, np.float32), np.arange(300, dtype=np.float32).reshape(1, 300) * 2.0**-149):
        assert np.abs(entries.loaded(rounded(x, -1)) - x).max() <= 300 * 2.0**-149


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, 3e38])
def test_what_has_no_steps_is_stored_as_it_is(odd):
    x = np.array([[1.0, odd], [2.0, -odd]], np.float32)
    assert rounded(x, 0) is x


# ---- damage ----


def test_a_flipped_byte_anywhere_is_a_miss_and_the_entry_goes(tmp_path):
    with open_store(tmp_path) as store:
        store.put("a", make(), {"n": 1})
        content = files(tmp_path)[0].read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        at = [0, 7, 8, begin // 2, begin - 1, begin, len(content) - 1, *range(9, len(content), 97)]
        for position in at:
            flip(files(tmp_path)[0], position)
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                assert store.get("a") is None, position
            assert "a" not in store and not files(tmp_path)
            store.put("a", make(), {"n": 1})
        assert store.stats()["misses"] == {"damaged": len(at)}
        assert_same(store.get("a"), make())


@pytest.mark.parametrize("how", ["shorter", "longer", "empty", "gone"])
def test_a_torn_file_is_a_miss_said_once(tmp_path, how):
    with open_store(tmp_path) as store:
        for _ in range(2):
            store.put("a", make(), {})
            path = files(tmp_path)[0]
            content = path.read_bytes()
            path.write_bytes({"shorter": content[:-1], "longer": content + b"x", "empty": b"", "gone": b""}[how])
            if how == "gone":
                path.unlink()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert store.about("a") is None and store.get("a") is None
            assert len(said) == (1 if store.stats()["misses"]["torn"] == 1 else 0)
        assert store.stats()["misses"] == {"torn": 2} and len(store) == 0


def test_an_index_that_points_to_another_entry_is_a_miss(tmp_path):
    with open_store(tmp_path) as store, open_store(tmp_path, namespace="elsewhere") as other:
        other.put("a", make(1), {})
        store.put("a", make(2), {})
        ours, theirs = store._disk._digest("a"), other._disk._digest("a")
        row = other._disk.row("a")
        store._disk._path(theirs, row.version).rename(store._disk._path(ours, row.version))
        with contextlib.closing(sqlite3.connect(tmp_path / disk.INDEX)) as db, db:
            db.execute("UPDATE entries SET version = ?, size = ?, crc = ? WHERE digest = ?", (*row, ours))
        with pytest.warns(RuntimeWarning, match="another entry"):
            assert store.get("a") is None


def test_a_late_check_raises_where_the_damage_is_and_the_entry_goes(tmp_path):
    with open_store(tmp_path) as store:
        store.put("a", make(layers=4), {})
        flip(files(tmp_path)[0], files(tmp_path)[0].stat().st_size - 1)
        entry = store.get("a", late=True)
        seen = []
        with pytest.warns(RuntimeWarning, match="layer 3"), pytest.raises(Damaged, match="layer 3"):
            for k, _ in entry.stream():
                seen.append(k)
        assert len(seen) == 3 and store.get("a") is None
        assert store.stats()["misses"] == {"damaged": 1, "absent": 1}


def test_host_memory_is_not_harmed_by_what_happens_to_the_file(tmp_path):
    with open_store(tmp_path, host_bytes=2**20) as store:
        store.put("a", make(), {})
        flip(files(tmp_path)[0], -1)
        assert_same(store.get("a"), make())


@pytest.mark.parametrize("damage", ["no database", "a page"])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    with open_store(tmp_path) as store:
        for i in range(40):
            store.put(f"{i}", make(layers=1, shape=(1,)), {})
    content = bytearray((tmp_path / disk.INDEX).read_bytes())
    content[:100] = bytes(100) if damage == "no database" else content[:100]
    content[4096:] = b"\xff" * len(content[4096:]) if damage == "a page" else content[4096:]
    (tmp_path / disk.INDEX).write_bytes(content)
    with pytest.warns(RuntimeWarning, match="damaged"):
        store = open_store(tmp_path)
    with store:
        assert store.get("0") is None and not files(tmp_path)
        assert store.put("0", make(), {}) and store.get("0") is not None


# ---- dying, and living together ----

WRITER = """
import os, sys
import numpy as np
from kvjax.serve.chunk_store import Store

def content(key, turn):
    rng = np.random.default_rng([int(key), turn])
    return [(rng.standard_normal((3, 40), np.float32), rng.standard_normal((2, 5), np.float32)) for _ in range(2)]

def write(folder, writer):
    store = Store(folder, namespace="here", host_bytes=0)
    for turn in range(10**6):
        key = str(10 * writer + turn % 4)
        assert store.put(key, content(key, turn), {"turn": turn})
        os.write(1, f"{key} {turn}\\n".encode())

if __name__ == "__main__":
    for line in sys.stdin:
        children = []
        for writer in range(2):
            child = os.fork()
            if not child:
                write(line.strip(), writer)
            children.append(child)
        os.write(1, f"pids {children[0]} {children[1]}\\n".encode())
        for child in children:
            os.waitpid(child, 0)
        os.write(1, b"dead\\n")
"""


def test_fifty_kills_while_writing_lose_nothing_and_leave_nothing_behind(tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    folder, rng, wrong = tmp_path / "store", random.Random(0), []
    namespace = {"__name__": "writer"}
    exec(WRITER, namespace)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}  # jax warns of forks
    server = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    acknowledged, cut_short = {}, 0
    with server:
        for _ in range(25):  # two writers each
            server.stdin.write(f"{folder}\n")
            server.stdin.flush()
            acknowledged_now, pids = {}, None
            while pids is None or not acknowledged_now:  # the first writes are over: now at any moment
                word, *rest = server.stdout.readline().split()
                if word == "pids":
                    pids = [int(pid) for pid in rest]
                else:
                    acknowledged_now[word] = int(rest[0])
            for pid in pids:
                time.sleep(rng.uniform(0, 0.03))
                os.kill(pid, signal.SIGKILL)
            for line in iter(server.stdout.readline, "dead\n"):
                key, turn = line.split()
                acknowledged_now[key] = int(turn)
            acknowledged |= acknowledged_now
            left = set(os.listdir(folder))
            with open_store(folder) as store:
                cut_short += len(left - set(os.listdir(folder)) - {f"{disk.INDEX}-wal", f"{disk.INDEX}-shm"})
                assert {path.name for path in files(folder)} | {disk.INDEX, disk.LOCK} == set(
                    name for name in os.listdir(folder) if not name.endswith(("-wal", "-shm"))
                )
                assert len(files(folder)) == len(store)
                for key, turn in acknowledged.items():
                    entry = store.get(key)
                    found = None if entry is None else entry.about["turn"]
                    # The write that the kill cut short may have got as far as its row, but was not acknowledged.
                    if found is None or (key in acknowledged_now and found < turn):
                        wrong.append((key, turn, found))
                    else:
                        assert_same(entry, namespace["content"](key, found))
                assert not store.stats()["misses"]
        server.stdin.close()
    assert not wrong
    assert cut_short > 0  # kills did fall into writes


CRASHES = """
import os, sys
import numpy as np
from kvjax.serve import disk
from kvjax.serve.chunk_store import Store
from writer import content

def die(*_):
    os._exit(9)

def then_die(does):
    return lambda *given: (does(*given), die())

points = {
    "before the write": (disk.entries, "write", die),
    "before the first sync": (os, "fsync", die),
    "before the rename": (os, "rename", die),
    "after the rename": (os, "rename", then_die(os.rename)),
    "before the row": (disk.Disk, "_commit", die),
    "after the row": (disk.Disk, "_commit", then_die(disk.Disk._commit)),
}
for point, patch in points.items():
    if not (child := os.fork()):
        store = Store(os.path.join(sys.argv[1], point), namespace="here", host_bytes=0)
        store.put("0", content("0", 1), {"turn": 1})
        setattr(*patch)
        store.put("0", content("0", 2), {"turn": 2})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""


def test_a_crash_between_any_two_steps_of_a_write_leaves_the_old_entry_or_the_new_one(tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", CRASHES, str(tmp_path / "stores")], env=env, check=True)
    turns, more = {}, 0
    for folder in (tmp_path / "stores").iterdir():
        more += len([name for name in os.listdir(folder) if name.endswith(("safetensors", "writing"))]) - 1
        with open_store(folder) as store:
            turns[folder.name] = store.get("0").about["turn"]
            assert len(files(folder)) == 1 and not list(folder.glob("*.writing"))
    assert turns.pop("after the row") == 2 and set(turns.values()) == {1} and len(turns) == 5
    assert more == 6  # each crash had left a file behind


WITNESS = """
import sys
from writer import content
from kvjax.serve.chunk_store import Store

store = Store(sys.argv[1], namespace="here", host_bytes=0, disk_bytes=20_000)
for turn in range(150):
    key = str((turn * 7 + int(sys.argv[2])) % 11)
    entry = store.get(key)
    if entry is not None:
        for (k, v), (k2, v2) in zip(entry.stream(), content(key, entry.about["turn"])):
            assert (k == k2).all() and (v == v2).all()
    assert store.put(key, content(key, turn), {"turn": turn})
assert set(store.stats()["misses"]) <= {"absent"}, store.stats()
assert store.stats()["bytes"]["disk"] <= 20_000
"""


def test_concurrent_writers_that_replace_and_evict_one_anothers_entries_see_only_whole_ones(tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    (tmp_path / "witness.py").write_text(WITNESS)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-W", "error::RuntimeWarning", str(tmp_path / "witness.py"), str(tmp_path / "store")]
    both = [subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    said = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    with open_store(tmp_path / "store") as store:
        assert len(files(tmp_path / "store")) == len(store) > 0


def test_threads_may_share_a_store(tmp_path):
    def work(seed):
        rng = random.Random(seed)
        for _ in range(40):
            key = rng.choice("abcdef")
            entry = store.get(key)
            if entry is not None:
                assert_same(entry, make(ord(key)))
            elif rng.random() < 0.9:
                assert store.put(key, make(ord(key)), {}, prediction=rng.choice([0, 1]))
            else:
                store.remove(key)

    with open_store(tmp_path, host_bytes=2 * SIZE, disk_bytes=3 * ON_DISK) as store:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert store.stats()["bytes"]["host"] <= 2 * SIZE
        assert set(store.stats()["misses"]) == {"absent"}
        assert len(files(tmp_path)) == store.stats()["entries"]["disk"]


def test_the_file_of_a_living_writer_is_left_alone_and_that_of_a_dead_one_goes(tmp_path, monkeypatch):
    at_work = []

    def write(file, *rest):
        size, crc = real(file, *rest)
        with open_store(tmp_path) as other:  # opens, and cleans, while the file is being written
            at_work.append(len(list(tmp_path.glob("*.writing"))))
            assert other.get("a") is None
        return size, crc

    real = entries.write
    with open_store(tmp_path) as store:
        monkeypatch.setattr(entries, "write", write)
        assert store.put("a", make(), {})
        assert_same(store.get("a"), make())
        path = files(tmp_path)[0]  # listed without a row, which has come since: its writer was alive, and has finished
        digest, version, _ = path.name.split(".")
        store._disk._remove_if_abandoned(path, bytes.fromhex(digest), int(version, 16))
        assert_same(store.get("a"), make())
    name = f"{'0' * 64}.{'0' * 16}"
    for suffix in ("writing", "safetensors"):
        (tmp_path / f"{name}.{suffix}").write_bytes(b"half")
    (tmp_path / "notes.safetensors").write_bytes(b"not ours")
    with open_store(tmp_path) as store:
        assert at_work == [1] and len(list(tmp_path.glob("*.writing"))) == 0
        assert len(files(tmp_path)) == 2  # the entry, and what is not ours
        assert_same(store.get("a"), make())


def test_a_forked_process_must_open_its_own(tmp_path):
    with open_store(tmp_path) as store:
        store._disk._pid -= 1  # what a child of a fork would see
        with pytest.raises(ValueError, match="forked"):
            store.get("a")
        store._disk._pid += 1


# ---- folders that cannot be written ----


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open"])
def test_a_full_or_read_only_disk_loses_the_put_alone_and_is_said_once(tmp_path, monkeypatch, code, call):
    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    with open_store(tmp_path) as store:
        store.put("a", make(), {})
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as said:
            where = {"write": (entries, "write"), "fsync": (os, "fsync"), "rename": (os, "rename")}
            target, name = where.get(call, (disk, "open"))
            patch.setattr(target, name, fails, raising=False)
            assert not store.put("b", make(), {}) and not store.put("c", make(), {})
        assert len(said) == 1 and store.stats()["failed_writes"] == 2
        assert_same(store.get("a"), make())
        assert len(files(tmp_path)) == 1 and not list(tmp_path.glob("*.writing"))
        assert store.put("b", make(), {}) and store.keys() == ["a", "b"]


def test_a_disk_that_is_really_full_loses_the_put_alone(tmp_path):
    code = """
import resource, sys
import numpy as np
from kvjax.serve.chunk_store import Store
store = Store(sys.argv[1], namespace="here", host_bytes=0)
assert store.put("a", [(np.ones(9), np.ones(9))], {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
assert not store.put("a", [(np.ones(99_999), np.ones(9))], {})
assert not store.put("b", [(np.ones(99_999), np.ones(9))], {})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert store.get("a") is None, "an entry that could not be replaced is out of date"
assert store.put("a", [(np.ones(99_999), np.ones(9))], {}) and store.get("a") is not None
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("RuntimeWarning") == 1 and "File too large" in out.stderr
    assert len(files(tmp_path)) == 1 and not list(tmp_path.glob("*.writing"))


def test_what_the_disk_refuses_goes_to_host_memory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with open_store(tmp_path, host_bytes=2**20) as store:
        monkeypatch.setattr(entries, "write", full)
        with pytest.warns(RuntimeWarning, match="full"):
            assert store.put("a", make(), {})
        assert store.get("a").tier == "host"


@pytest.mark.parametrize("filled", [True, False])
def test_a_read_only_folder_is_read(filled):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        folder.mkdir()
        if filled:
            with open_store(folder) as store:
                store.put("a", make(), {})
        for path in (*folder.iterdir(), folder, Path(place)):
            path.chmod(0o555 if path.is_dir() else 0o444)
        code = f"""
import os, sys, warnings
import numpy as np
from kvjax.serve.chunk_store import Store
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)  # nobody: permissions are nothing to root
store = Store(sys.argv[1], namespace="here", host_bytes=0)
assert (store.get("a") is not None) == (len(store) == 1) == {filled}
assert not store.put("b", [(np.ones(3), np.ones(3))], {{}}) and not store.remove("a") and len(store) == {filled}
"""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True)
        for path in (Path(place), folder):
            path.chmod(0o755)
        assert out.returncode == 0, out.stderr
        assert out.stderr.count("cannot be written") == 1


def test_an_index_that_fails_is_a_miss(tmp_path, monkeypatch):
    class Broken:
        in_transaction = False

        def execute(self, *_):
            raise sqlite3.OperationalError("disk I/O error")

        def close(self):
            pass

    with open_store(tmp_path) as store:
        store.put("a", make(), {})
        monkeypatch.setattr(store._disk, "_db", Broken())
        with pytest.warns(RuntimeWarning, match="does not answer"):
            assert store.get("a") is None and "a" not in store and store.keys() == []
        with pytest.warns(RuntimeWarning, match="could not be written"):
            assert not store.put("b", make(), {})


def test_a_transaction_that_fails_changes_nothing(tmp_path, monkeypatch):
    def fails(db):
        settle(db)
        raise sqlite3.OperationalError("disk is full")

    with open_store(tmp_path, disk_bytes=2 * ON_DISK - SIZE) as store:  # room for two
        store.put("a", make(1), {})
        store.put("b", make(2), {})
        settle = store._disk._settle
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="disk is full"):
            patch.setattr(store._disk, "_settle", fails)
            assert not store.put("c", make(), {})
        assert_same(store.get("b"), make(2))
        assert store.keys() == ["a", "b"] and len(files(tmp_path)) == 2
        assert store.put("d", make(), {}) and store.keys() == ["b", "d"]


# ---- bad input ----


def test_a_store_of_another_version_is_refused_and_left_as_it_is(tmp_path):
    with open_store(tmp_path) as store:
        store.put("a", make(), {})
    with contextlib.closing(sqlite3.connect(tmp_path / disk.INDEX)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="version 99, and this kvjax reads 1"):
        open_store(tmp_path)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"folder": None}, "no tier can hold anything"),
        ({"disk_bytes": 0}, "leaves no room"),
        ({"host_bytes": -1}, "host_bytes=-1"),
        ({"device_bytes": 1.5}, "device_bytes=1.5"),
        ({"disk_bytes": True}, "disk_bytes=True"),
        ({"namespace": ""}, "namespace=''"),
        ({"int8": "no"}, "int8='no'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        open_store(**{"folder": tmp_path, **settings})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        open_store(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    "given_, said",
    [
        ((7, make(), {}), "key=7 must be a text"),
        (("a", [], {}), "a pair"),
        (("a", [make()[0][:1]], {}), "a pair"),
        (("a", np.ones((2, 2)), {}), "a pair"),
        (("a", [(1, 2)], {}), "hold int"),
        (("a", [(np.array(["x"]), np.ones(1))], {}), "hold <U1"),
        (("a", make(), None), "must be a dictionary"),
        (("a", make(), {"x": {1, 2}}), "what JSON cannot"),
    ],
)
def test_what_is_no_entry_is_refused_and_nothing_is_stored(tmp_path, given_, said):
    with open_store(tmp_path) as store, pytest.raises(ValueError, match=said):
        store.put(*given_)
    assert not files(tmp_path)


def test_a_closed_store_says_so(tmp_path):
    store = open_store(tmp_path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.get("a")


def test_what_is_bound_to_must_be_said_in_texts():
    with pytest.raises(ValueError, match="tokenizer is a int"):
        namespace_of({}, 7)
    with pytest.raises(ValueError, match="pytree of arrays"):
        namespace_of({"a": "b"})
    with pytest.raises(ValueError, match="must be for JSON"):
        namespace_of({}, x=json)


def test_an_entry_that_is_checked_layer_by_layer_moves_to_host_memory_at_its_second_hit(tmp_path):
    with open_store(tmp_path, host_bytes=2**20) as store:
        store.put("a", make(), {}, prediction=1)  # to disk alone
        assert [store.get("a", late=True).tier for _ in range(3)] == ["disk", "disk", "host"]
