"""Several processes, each with devices of its own, train what one process trains, and none outlives the others."""

import csv
import signal

import numpy as np
import pytest

from tests.train import cases

STEPS = 5


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("case", cases.CASES)
def test_two_processes_of_four_devices_have_the_losses_of_one_device(case, tmp_path):
    cases.main(case, tmp_path / "one", STEPS, STEPS)
    # Rows over two, rows and weights over two, heads over two; each process holds a half of the rows.
    together = cases.start_all(2, case, tmp_path / "two", STEPS, STEPS, "fsdp=2", "tensor=2", devices=4)
    for process in together:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert len(losses(tmp_path / "one")) == STEPS
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)  # sums in another order


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_process_is_killed_the_other_ends_with_an_error_within_a_minute(dying, tmp_path):
    processes = cases.start_all(2, "toy", tmp_path, 10**6, 10**6, devices=1)
    try:
        cases.wait_for(processes[0], (tmp_path / "metrics.csv").exists)
        processes[dying].kill()
        # The killed one is taken for dead after cases.SILENT_PROCESS = 10 seconds; the rest is for a busy machine.
        processes[1 - dying].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[1 - dying].returncode not in (0, -signal.SIGKILL)


def test_a_sigterm_to_one_process_stops_both_after_the_same_step_and_one_process_can_go_on(tmp_path):
    processes = cases.start_all(2, "toy", tmp_path / "run", 10**6, 10**6, devices=1)
    cases.wait_for(processes[0], (tmp_path / "run" / "metrics.csv").exists)
    processes[1].terminate()
    for process in processes:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    reached = len(losses(tmp_path / "run"))
    for folder in ("run", "at_once"):
        cases.main("toy", tmp_path / folder, reached + 2, 10**6)
    assert len(losses(tmp_path / "run")) == reached + 2
    # Each step passes the rounding of the one before on, and how many there are depends on the machine.
    np.testing.assert_allclose(*map(losses, (tmp_path / "run", tmp_path / "at_once")), rtol=1e-3)
