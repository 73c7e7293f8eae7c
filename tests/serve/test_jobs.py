"""Files of prompts: whatever happens, each line is answered once, and the answers stand in the order of the prompts."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from kvjax.serve import jobs
from kvjax.serve.batch_llm import Finished, Progress
from tests.serve import job_case

SHARED = np.random.default_rng(0).integers(0, 61, 30).tolist()
PROMPTS = [{"id": f"p{i}", "tokens": SHARED[: 30 - 9 * (i % 2)] + [i, 2 * i]} for i in range(8)]


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    return read(job_case.run(write(folder / "prompts.jsonl", PROMPTS), folder / "out.jsonl"))


def test_answers_stand_in_the_order_of_the_prompts_and_no_journal_is_left(wanted, tmp_path):
    assert [one["id"] for one in wanted] == [one["id"] for one in PROMPTS]
    assert all(len(one["tokens"]) == 4 and one["finish"] == "length" for one in wanted)
    job_case.run(write(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_a_bad_line_is_an_error_record_and_no_crash(wanted, tmp_path):
    bad = {
        "{": "no JSON",
        "[1]": "must be an object",
        '{"prompt": "a", "tokens": [1]}': "one of them",
        '{"id": 7}': "one of them",
        '{"prompt": " "}': "empty",
        '{"prompt": 3}': "must be a text",
        '{"tokens": []}': "empty",
        '{"tokens": [1.5]}': "whole numbers",
        '{"tokens": [99999999999]}': "32 bits",
        '{"tokens": [1], "max_new_tokens": 0}': "max_new_tokens",
        '{"tokens": [1], "temperatur": 0}': "temperatur",
        '{"id": "p0", "tokens": [1]}': "earlier line",
        json.dumps({"tokens": [1] * 500}): "context",
        '{"tokens": ' + "[" * 9999 + "]" * 9999 + "}": "no JSON",
        '{"id": NaN, "tokens": [1]}': "NaN",
        '{"prompt": "\\ud800"}': "no JSON",
    }
    found = read(job_case.run(write(tmp_path / "in.jsonl", [*PROMPTS[:2], *bad]), tmp_path / "out.jsonl"))
    assert found[:2] == wanted[:2]
    for one, why in zip(found[2:], bad.values(), strict=True):
        assert why in one["error"]


def test_a_line_may_say_how_much_it_wants(wanted, tmp_path):
    lines = [{**PROMPTS[0], "max_new_tokens": 2}, PROMPTS[1]]
    found = read(job_case.run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"))
    assert found[0]["tokens"] == wanted[0]["tokens"][:2]
    assert found[1] == wanted[1]


def test_a_run_goes_on_where_it_was(wanted, tmp_path):
    prompts, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"

    class Killed(Exception):
        pass

    def stop(progress):
        if progress.done:
            raise Killed

    with pytest.raises(Killed):
        job_case.run(prompts, out, on_progress=stop)
    journal = tmp_path / "out.jsonl.partial"
    before = journal.read_bytes().count(b"\n") - 1
    with journal.open("ab") as file:
        file.write(b'{"line": 7, "rec')  # torn
    seen = []
    assert 0 < before < len(PROMPTS)
    assert read(job_case.run(prompts, out, on_progress=seen.append)) == wanted
    assert seen[0].generated < 4 * (len(PROMPTS) - before) + 1


def test_a_journal_of_another_job_is_refused(tmp_path):
    prompts, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text('{"job": "other"}\n')
    with pytest.raises(ValueError, match="another file, model or settings"):
        job_case.run(prompts, out)


def test_a_refused_run_leaves_nothing_behind_and_the_right_one_works(wanted, tmp_path):
    prompts, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    for wrong in ({"method": "best"}, {"temperature": -1.0}, {"memory": 0}):
        with pytest.raises(ValueError):
            job_case.run(prompts, out, **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert read(job_case.run(prompts, out)) == wanted


def test_a_run_may_go_on_with_less_memory_and_on_more_machines(wanted, tmp_path):
    prompts, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"

    def stop(progress):
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job_case.run(prompts, out, on_progress=stop)
    assert job_case.run(prompts, out, part=(0, 2), memory=30_000) is None
    assert read(job_case.run(prompts, out, part=(1, 2))) == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.parametrize("content", ["a text of somebody\n", "3\n"])
def test_a_file_that_is_no_journal_is_left_alone(content, tmp_path):
    prompts, other = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl.partial"
    other.write_text(content)
    with pytest.raises(ValueError, match="no journal"):
        job_case.run(prompts, tmp_path / "out.jsonl")
    assert other.read_text() == content


def test_prompts_are_not_overwritten(tmp_path):
    prompts = write(tmp_path / "in.jsonl", PROMPTS)
    before = prompts.read_text()
    for out in (prompts, tmp_path):
        with pytest.raises(ValueError, match="folder or the prompts"):
            job_case.run(prompts, out)
    assert prompts.read_text() == before


def test_numbers_given_as_ids_do_not_collide_with_the_numbers_of_lines(tmp_path):
    lines = [{"id": 1, "tokens": [1]}, {"tokens": [2]}]
    assert all(
        "tokens" in one for one in read(job_case.run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"))
    )


def test_two_runs_do_not_write_the_same_answers(tmp_path):
    prompts, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    with jobs._journal(tmp_path / "out.jsonl.partial", "x"), pytest.raises(ValueError, match="another run"):
        job_case.run(prompts, out)


@pytest.mark.parametrize("given, why", [("", "has no lines"), (None, "cannot be read")])
def test_a_file_without_prompts_is_refused(given, why, tmp_path):
    path = tmp_path / "in.jsonl"
    if given is not None:
        path.write_text(given)
    with pytest.raises(ValueError, match=why):
        job_case.run(path, tmp_path / "out.jsonl")


def test_fifty_kills_lose_no_line_and_double_none(tmp_path, monkeypatch):
    """The journal, under answers that come a few at a time; the children are forks and compute nothing."""
    count = 400
    prompts = write(tmp_path / "in.jsonl", [{"tokens": [i]} for i in range(count)])
    out = tmp_path / "out.jsonl"

    def slowly(params, prompts, policy, *, done, on_progress, **_):
        left = [i for i in range(count) if i not in set(done)]
        for n, i in enumerate(left):
            yield Finished(i, np.array([prompts[i][0], 7]))
            if n % 4 == 3:
                on_progress(Progress(len(left), 0, 0, done=n))
                time.sleep(0.002)

    monkeypatch.setattr(jobs, "answers", slowly)
    monkeypatch.setattr(jobs, "row_keys", lambda key, count: np.zeros(count))
    monkeypatch.setattr(jobs, "namespace_of", lambda *_, **__: "model")
    model, pick, kills = job_case.model(), random.Random(1), 0
    while not out.exists():
        child = os.fork()
        if not child:
            try:
                jobs.run(model, prompts, out, max_new_tokens=4, part=(0, 1))
            finally:
                os._exit(0)
        if kills < 50:
            time.sleep(pick.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            kills += 1
        os.waitpid(child, 0)
        journal = tmp_path / "out.jsonl.partial"
        if journal.exists():
            whole = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
            lines = [line["line"] for line in whole[1:]]
            assert len(set(lines)) == len(lines)
    assert [one["tokens"] for one in read(out)] == [[i, 7] for i in range(count)]
    assert kills == 50


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_processes_of_jax_distributed_answer_their_parts(wanted, tmp_path):
    prompts, port = write(tmp_path / "in.jsonl", PROMPTS), free_port()
    command = [sys.executable, "-m", "tests.serve.job_case", prompts, tmp_path / "out.jsonl", port]
    processes = [
        subprocess.Popen([*map(str, command), str(p), "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for p in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert read(tmp_path / "out.jsonl") == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_same_parts_run_as_a_ray_data_job(wanted, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        prompts = write(tmp_path / "in.jsonl", PROMPTS)
        settings = {"max_new_tokens": 4, "batch_tokens": 64}
        assert jobs.run_on_ray(job_case.model, prompts, tmp_path / "out.jsonl", 2, **settings)
    finally:
        ray.shutdown()
    assert read(tmp_path / "out.jsonl") == wanted


@pytest.mark.real_model
def test_the_command_that_is_killed_goes_on_where_it_was(tmp_path):
    said = ["What is the capital of France?", "What is the capital of Italy?", "Say hello.", " "]
    prompts = write(tmp_path / "in.jsonl", [{"id": text, "prompt": text} for text in said])
    command = [
        sys.executable,
        "-c",
        "from kvjax.cli import app; app()",
        "batch",
        str(prompts),
        "-o",
        str(tmp_path / "out.jsonl"),
    ]
    command += ["--max-new-tokens", "12", "--memory", "16", "--batch-tokens", "64"]
    journal, first = tmp_path / "out.jsonl.partial", subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while first.poll() is None and (not journal.exists() or journal.read_bytes().count(b'"text"') < 1):
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == said
    assert "Paris" in found[0]["text"]
    assert "Italy" in found[1]["text"]
    assert "empty" in found[3]["error"]
