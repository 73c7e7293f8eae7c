"""The jitted simulator is the host, bit by bit; the bounds, on more sequences than the host can do; `kvjax paging`."""

import csv
import itertools

import numpy as np
import pytest
from typer.testing import CliRunner

from kvjax.cli import app
from kvjax.serve import paging, simulate, traces
from tests.oracles import paging as oracle
from tests.serve.test_paging import sequences

K = 4
HOST = {
    "lru": lambda seed: paging.lru(K),
    "fifo": lambda seed: paging.fifo(K),
    "flush_when_full": lambda seed: paging.flush_when_full(K),
    "marker": lambda seed: paging.marker(K, seed=seed, replay=True),
    "flush_when_zero": lambda seed: paging.flush_when_zero(K),
    "flush_when_zero, real flush": lambda seed: paging.flush_when_zero(K, lazy=False),
    "mark_zero": lambda seed: paging.mark_zero(K, seed=seed, replay=True),
    "mark_zero, at once": lambda seed: paging.mark_zero(K, seed=seed, lazy=False, replay=True),
    "mark_and_predict": lambda seed: paging.mark_and_predict(K, seed=seed, replay=True),
}


@pytest.mark.parametrize("name", simulate.JITTED)
def test_the_simulator_misses_what_the_host_misses(name):
    random = np.random.default_rng(0)
    trace, bits = random.integers(9, size=(3, 250)), random.integers(2, size=(3, 250))
    seeds = [0, 7, 2**32 - 1]
    found = simulate.simulate(name, trace, K, bits=bits, seeds=seeds)
    for row, row_bits, seed, row_found in zip(trace, bits, seeds, found, strict=True):
        pages = paging.belady(K, row.tolist()) if name == "belady" else HOST[name](seed)
        assert (row_found == simulate.faults(pages, row, row_bits)).all()


def test_one_row_or_many():
    trace, bits = traces.loop(20, pages=5), np.zeros((3, 20), np.uint8)
    one = simulate.simulate("flush_when_zero", trace, K, bits=bits[0])
    assert one.shape == (20,)
    assert (simulate.simulate("flush_when_zero", trace, K, bits=bits) == one).all()
    assert (simulate.simulate("lru", trace, K) == simulate.faults(paging.lru(K), trace)).all()  # no bits count as 1


@pytest.mark.parametrize("k, pages, length", [(2, 3, 8), (3, 4, 7)])
def test_flush_when_zero_stays_below_its_bound_on_all_short_sequences(k, pages, length):
    """All sequences with all bits: of 8 requests for 3 pages, 2 of which fit, and of 7 for 4 pages, 3 of which fit."""
    rows = np.array(list(sequences(length, pages)))
    bits = np.array(list(itertools.product((0, 1), repeat=length)))
    truths = [oracle.lfd(row, k) for row in rows.tolist()]
    best, truth = np.array([sum(found) for found, _ in truths])[:, None], np.array([bits for _, bits in truths])
    zeros = ((bits[None] == 0) & (truth[:, None] == 1)).sum(axis=-1)
    ones = ((bits[None] == 1) & (truth[:, None] == 0)).sum(axis=-1)
    every = np.repeat(rows, len(bits), axis=0), np.tile(bits, (len(rows), 1))
    lazy, real = (
        simulate.simulate(name, every[0], k, bits=every[1]).sum(axis=-1).reshape(zeros.shape)
        for name in ("flush_when_zero", "flush_when_zero, real flush")
    )
    assert (real <= best + (k - 1) * zeros + ones).all()
    assert (best <= lazy).all() and (lazy <= real).all()
    assert (lazy < real).any()
    assert (lazy[zeros + ones == 0] == best[:, 0]).all()


def test_errors_that_are_drawn_are_as_many_as_asked_for():
    bits = np.zeros(20_000, np.uint8)
    assert abs(traces.flip(bits, 0.1).mean() - 0.1) < 0.01  # five standard errors
    assert traces.flip(bits, 0).sum() == 0 and traces.flip(bits, 1).all()
    following = traces.next_requests([1, 2, 1, 3])
    assert (traces.late(following, 0) == following).all()
    late = traces.late(following, 300)
    assert late[0] >= 2 and (late[1:] == traces.NEVER).all()


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: simulate.simulate("best", [1, 2], 2), "there is no policy 'best'; there are 'belady', "),
        (lambda: simulate.simulate("lru", [1, 2], 0), "simulate: capacity=0 must be at least 1"),
        (lambda: simulate.simulate("lru", [1, 2], 2, bits=[1]), "simulate: 1 predictions for 2 requests"),
        (lambda: simulate.simulate("lru", [1, 2], 2, bits=[1, 2]), "simulate: bits must be 0 or 1"),
        (lambda: simulate.simulate("lru", [1, 2], 2, seeds=-1), "simulate: seeds=-1 must be whole numbers"),
        (lambda: simulate.simulate("lru", [], 2), "trace: "),
        (lambda: simulate.sweep([1, 2], 2, seeds=0), "sweep: seeds=0 must be at least 1"),
        (lambda: simulate.sweep([1, 2], 2, flips=[2]), "sweep: flips=2 must be"),
    ],
)
def test_simulations_that_cannot_be_done_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def run(*args):
    return CliRunner().invoke(app, ["paging", *map(str, args)])


def test_the_command_writes_costs_that_grow_with_the_error(tmp_path):
    (tmp_path / "log.txt").write_text("\n".join(f"page-{page}" for page in traces.rag(300, chunks=40)), "utf-8")
    result = run("--trace", tmp_path / "log.txt", "--capacity", 8, "--seeds", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "follow_the_leader" in result.stdout
    assert (tmp_path / "out" / "paging.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "paging.csv").open()))
    ratio = {(row["policy"], row["error"], float(row["noise"])): float(row["ratio"]) for row in rows}
    assert ratio["mark_zero", "flip", 0] == ratio["blind_oracle", "late", 0] == 1
    assert 1 < ratio["mark_zero", "flip", 0.1] < ratio["mark_zero", "flip", 0.5]
    assert min(ratio.values()) == 1


@pytest.mark.parametrize(
    "given, named",
    [
        (("--capacity", 0), "capacity=0 must be at least 1"),
        (("--length", 0), "rag: length=0 must be at least 1"),
        (("--trace", "nosuch.txt"), "nosuch.txt"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_in_a_line(given, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*given)
    assert result.exit_code == 2
    assert named in result.stderr.splitlines()[-1]
