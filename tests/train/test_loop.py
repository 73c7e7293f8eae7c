"""The training loop on a toy: what it writes, what it leaves alone, and that nothing that happens to a run is lost."""

import csv
import dataclasses
import os
import pathlib
import resource
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

from tests.train import cases
from train import checkpoints, loop
from train import mesh as meshes

STEPS, SAVE_EVERY = 9, 3
NOTE = {"backbone": "toy", "rate": 0.01, "files": ("a", "b"), "steps": STEPS}


def run(folder, batches=None, task=None, params=None, **settings):
    made, frozen, fresh = cases.toy()
    mesh = meshes.make_mesh()
    if params is None:
        params = meshes.place(frozen, meshes.replicated(mesh))
    settings = dict(steps=STEPS, save_every=SAVE_EVERY, keep=3, seed=0, note=NOTE) | settings
    return loop.train(task or made, params, batches or fresh, folder=folder, mesh=mesh, **settings)


def rows(folder, name="metrics.csv"):
    """The lines of a table without their times."""
    if not (folder / name).exists():
        return []
    with open(folder / name, newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(file)]


def steps_saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@dataclasses.dataclass(frozen=True)
class Unbroken:
    folder: pathlib.Path
    trainable: object


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return Unbroken(folder, run(folder))


@pytest.fixture
def copy(unbroken, tmp_path):
    return pathlib.Path(shutil.copytree(unbroken.folder, tmp_path / "run"))


def test_every_step_is_written_down_and_the_loss_falls(unbroken):
    table = rows(unbroken.folder)
    assert list(table[0]) == ["step", "loss", "active.0", "active.1", "gradient_norm"]
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    assert float(table[-1]["loss"]) < float(table[0]["loss"]) / 2


def test_all_steps_are_one_trace_and_the_frozen_weights_leave_bit_for_bit_as_they_came(tmp_path):
    task, frozen, _ = cases.toy()
    params, traces = jax.device_put(frozen), []

    def gradients(*arguments):
        traces.append(None)
        return task.gradients(*arguments)

    batches = cases.ToyBatches()
    run(tmp_path, batches, task._replace(gradients=gradients), params, steps=4)
    assert len(traces) == 1
    assert_equal(params, frozen)


def test_gradients_computed_in_four_parts_are_those_of_the_whole_batch(unbroken, tmp_path):
    got = run(tmp_path, accumulate=4)
    # f32 sums in another order; nine steps of AdamW, whose first ones divide small numbers by small ones
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, unbroken.trainable)
    losses = [[float(row["loss"]) for row in rows(folder)] for folder in (tmp_path, unbroken.folder)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("moment", ["while it trains", "while it saves"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, moment):
    process = cases.start("toy", tmp_path, 10**6, 2)
    try:
        saves = tmp_path / "checkpoints"
        cases.wait_for(process, lambda: len(rows(tmp_path)) > 3)
        if moment == "while it saves":
            cases.wait_for(process, lambda: any("tmp" in name for name in os.listdir(saves)))
    finally:
        process.kill()
        process.wait()
    steps = max(steps_saved(tmp_path), default=0) + 4
    got = run(tmp_path, steps=steps, save_every=2, note={})
    want = run(tmp_path / "unbroken", steps=steps, save_every=steps, note={})
    assert rows(tmp_path) == rows(tmp_path / "unbroken")
    assert_equal(got, want)


def cut_short(checkpoint):
    for path in (checkpoint / "trainable" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:20])


def flip_a_bit(checkpoint):
    (path,) = (checkpoint / "optimizer" / "d").iterdir()  # the values; orbax itself takes what this reads for good
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 3] ^= 4
    path.write_bytes(changed)


def lose_the_text_about_it(checkpoint):
    shutil.rmtree(checkpoint / "about")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_the_text_about_it])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(unbroken, copy, damage, capfd):
    damage(copy / "checkpoints" / "9")
    got = run(copy)
    said = " ".join(capfd.readouterr().err.split())
    assert "Damaged checkpoints are skipped" in said and "9:" in said and "Goes on from step 6" in said
    assert [path.name for path in (copy / "checkpoints-damaged").iterdir()] == ["9"]
    assert rows(copy) == rows(unbroken.folder)
    assert_equal(got, unbroken.trainable)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_by_itself(copy):
    for step in steps_saved(copy):
        lose_the_text_about_it(copy / "checkpoints" / str(step))
    before = rows(copy)
    with pytest.raises(ValueError, match=r"has no whole checkpoint: 3: .*Move the folder away to begin anew"):
        run(copy)
    assert steps_saved(copy) == [3, 6, 9] and rows(copy) == before


def test_a_checkpoint_of_another_run_is_refused_by_name(copy):
    with pytest.raises(ValueError, match=r"checkpoints/9 is of another run: backbone was 'toy' and is 'other'; steps"):
        run(copy, note=NOTE | {"backbone": "other", "steps": 12})
    with pytest.raises(ValueError, match=r"holds other arrays: \['optimizer'\]"):
        run(copy, task=cases.toy()[0]._replace(optimizer=optax.sgd(0.1)))


def test_a_run_goes_on_for_more_steps_where_the_note_may_change(copy, tmp_path):
    run(copy, steps=12, note=NOTE | {"steps": 12}, may_change={"steps"})
    run(tmp_path / "at_once", steps=12)
    assert rows(copy) == rows(tmp_path / "at_once")


def test_a_full_disk_ends_the_run_with_an_error_and_loses_nothing(unbroken, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():  # no file can be longer than 1 kB: much as on a full disk, writing fails halfway
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    run(tmp_path, steps=3, note={})
    try:
        with pytest.raises(OSError, match=r"a checkpoint could not be written: .*Make room, and give the same command"):
            run(tmp_path, cases.ToyBatches(on={4: fill}), note={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps_saved(tmp_path) == [3]
    # In a process of its own, as in life: threads of the failed save may still write for a moment in this one.
    again = cases.start("toy", tmp_path, STEPS, SAVE_EVERY)
    assert again.wait() == 0, again.stderr.read()
    assert rows(tmp_path) == rows(unbroken.folder)
    assert_equal(checkpoints.load(tmp_path / "checkpoints", unbroken.trainable).state, unbroken.trainable)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_rows(tmp_path):
    batches = cases.ToyBatches(bad_row=6 * cases.ROWS + 5)  # the seventh batch
    with pytest.raises(FloatingPointError, match=r"step 7: loss nan.*rows 96, 97, .* 111\. .*checkpoint is of step 6"):
        run(tmp_path, batches)
    assert steps_saved(tmp_path) == [3, 6]
    assert len(rows(tmp_path)) == 6


def test_sigterm_ends_the_run_after_the_step_with_a_checkpoint(unbroken, tmp_path):
    batches = cases.ToyBatches(on={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, batches)
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    # The fifth step was the one in hand; what says that it was the last is read while the sixth computes.
    assert max(steps_saved(tmp_path)) in (5, 6)
    assert_equal(run(tmp_path), unbroken.trainable)
    assert rows(tmp_path) == rows(unbroken.folder)


def test_batches_that_end_before_the_steps_are_an_error_that_loses_nothing(tmp_path):
    def end():
        raise StopIteration

    with pytest.raises(ValueError, match=r"the batches ended after step 5, and steps=9"):
        run(tmp_path, cases.ToyBatches(on={5: end}))
    assert steps_saved(tmp_path) == [3, 5]


def test_the_best_checkpoint_by_the_held_out_loss_stays_and_can_be_loaded(tmp_path):
    held_out = [next(cases.ToyBatches())]
    task = cases.toy()[0]._replace(optimizer=optax.sgd(lambda count: 0.05 * (count < 4) - 0.05 * (count >= 4)))
    settings = dict(keep=1, save_every=2, evaluate_every=2, held_out=held_out, note={})
    run(tmp_path, task=task, steps=6, **settings)
    run(tmp_path, task=task, steps=9, **settings)  # after a restart, too, it is known which one is the best
    table = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path, "held_out.csv")}
    assert list(table) == [0, 2, 4, 6, 8, 9] and min(table, key=table.get) == 4
    assert steps_saved(tmp_path) == [4, 9]
    like = jax.eval_shape(task.init, jax.random.key(0))
    best = checkpoints.load(tmp_path / "checkpoints", like, which="best")
    loss = task.evaluate(best.state, cases.toy()[1], held_out[0])["loss"]
    assert best.step == 4
    np.testing.assert_allclose(loss, table[4], rtol=1e-6)  # summed in another program


def test_the_learning_rate_is_written_down(tmp_path):
    run(tmp_path, steps=2, learning_rate=optax.linear_schedule(0.0, 1.0, 4))
    assert [row["learning_rate"] for row in rows(tmp_path)] == ["0", "0.25"]


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(steps=0), r"steps=0 must be at least 1"),
        (dict(keep=0), r"keep=0 must be at least 1"),
        (dict(evaluate_every=3), r"evaluate_every=3 needs held_out batches"),
        (dict(accumulate=3), r"a batch of 16 rows does not divide into accumulate=3 parts"),
        (dict(params={"frozen": np.zeros(3)}), r"params\['frozen'\] is not on the \d+ devices of the mesh"),
        (dict(show=("overlap",)), r"show names \['overlap'\], and the task has loss, active\.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path, **settings)


def test_a_folder_that_is_ahead_of_the_steps_asked_for_is_refused(copy):
    with pytest.raises(ValueError, match=r"has taken 9 steps, more than steps=4"):
        run(copy, steps=4)
