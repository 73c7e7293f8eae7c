"""The command: what it prints and writes, and that whatever is wrong is said in one line with exit status 2."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import kvjax
from kvjax import compare, policies, tables
from kvjax.cli import app
from tests.plain import smollm2
from tests.test_compare import FULL, H2O
from tests.test_view import data_of, unpack

REFERENCE = pathlib.Path(__file__).parent / "references" / "llama3"
LAST_LINE = r"{}: \d+\.\d\d MiB of cache, \d+\.\d% of a full one of \d+ tokens; \d+\.\d tokens/s after the first"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A small random checkpoint with a tokenizer and a chat template, and a context that holds a few sentences."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(REFERENCE, path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}), "utf-8")
    return str(path)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run_well(*args):
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result


def everything_in(path):
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


# ---- generate ----


def test_generate_says_what_decode_gives(tiny):
    result = run_well("generate", "Tell me.", "--model", tiny, "--policy", "h2o", "--budget", 9, "--window", 4,
                      "--max-new-tokens", 20)  # fmt: skip
    model = kvjax.load(tiny)
    tokens, lengths = model.encode([model.chat("Tell me.")], add_special_tokens=False)
    out = kvjax.decode(
        model.params,
        policies.h2o(9, window=4),
        tokens,
        lengths=lengths,
        max_new_tokens=20,
        stop=model.stop_tokens,
    )
    assert result.stdout == model.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])]) + "\n"
    assert len(result.stdout) > 10


def test_generate_ends_with_a_line_of_bytes_and_speed(tiny):
    args = ("--model", tiny, "--policy", "h2o", "--budget", 9, "--window", 4, "--max-new-tokens", 5)
    result = run_well("generate", "Tell me.", *args)
    assert re.fullmatch(LAST_LINE.format(r"h2o\(budget=9, window=4\)"), result.stderr.splitlines()[-1])


def test_generate_reads_a_file_as_it_reads_a_prompt(tiny, here):
    (here / "prompt.txt").write_text("Où est la Tour ?\n🗼", "utf-8")
    args = ("--model", tiny, "--max-new-tokens", 8)
    from_file = run_well("generate", "--file", "prompt.txt", *args)
    assert from_file.stdout == run_well("generate", "Où est la Tour ?\n🗼", *args).stdout


def test_generate_draws_by_seed(tiny):
    args = ("Tell me.", "--model", tiny, "--max-new-tokens", 12, "--temperature", 1.5)
    said = [run_well("generate", *args, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_generate_with_one_token_likely_enough_is_greedy(tiny):
    args = ("Tell me.", "--model", tiny, "--max-new-tokens", 8)
    drawn = run_well("generate", *args, "--temperature", 1.5, "--top-k", 1)
    assert drawn.stdout == run_well("generate", *args).stdout


def test_generate_shows_a_character_of_several_tokens_whole(tiny, monkeypatch):
    model = kvjax.load(tiny)
    ids = model.tokenizer.encode("a 🗼 b", add_special_tokens=False).ids
    assert len(ids) > len("a 🗼 b")
    monkeypatch.setattr(kvjax, "decode", _saying(ids))
    assert run_well("generate", "hi", "--model", tiny).stdout == "a 🗼 b\n"


def test_generate_shows_half_a_character_at_the_end(tiny, monkeypatch):
    model = kvjax.load(tiny)
    ids = model.tokenizer.encode("a 🗼", add_special_tokens=False).ids[:-1]
    monkeypatch.setattr(kvjax, "decode", _saying(ids))
    assert run_well("generate", "hi", "--model", tiny).stdout == "a \ufffd\n"


def _saying(ids):
    """A `decode` that reads the prompt, and says `ids` whatever it is."""

    def decode(params, policy, tokens, *, lengths, on_token, **rest):
        _, cache = kvjax.prefill(params, policy, tokens, lengths=lengths)
        for one in ids:
            on_token(np.array([one]))
        return kvjax.Decoded(np.array([ids]), np.array([len(ids)]), cache, None)

    return decode


# ---- view ----


def test_view_writes_every_token_of_the_prompt_and_what_each_head_keeps(tiny, here):
    args = ("--model", tiny, "--policy", "h2o", "--budget", 9, "--window", 4)
    result = run_well("view", "What <b> is 🗼?", *args, "--out", "pages/a.html")
    assert result.stdout.startswith("pages/a.html written: h2o(budget=9, window=4) keeps ")
    assert everything_in(here) == ["pages", "pages/a.html"]
    data = data_of((here / "pages" / "a.html").read_text("utf-8"))
    model = kvjax.load(tiny)
    tokens, _ = model.encode([model.chat("What <b> is 🗼?")], add_special_tokens=False)
    assert data["tokens"] == [model.tokenizer.decode([one], skip_special_tokens=False) for one in tokens[0].tolist()]
    assert unpack(data).shape == (model.config.layers, model.config.kv_heads, tokens.shape[1])
    assert (unpack(data).sum(axis=-1) == 9).all()
    assert unpack(data)[..., -4:].all()  # the window


def test_view_takes_chunks(tiny, here):
    run_well("view", "Tell me a story.", "--model", tiny, "--policy", "tova", "--budget", 6, "--chunk", 4, "--out", "a")
    assert (unpack(data_of((here / "a").read_text("utf-8"))).sum(axis=-1) == 6).all()


# ---- compare ----

SMALL = ("--tokens", 640, "--contexts", 2, "--prose", 2, "--group", 2, "--per-kind", 1, "--forced", 6)


def test_compare_writes_a_table_a_csv_and_a_picture(tiny, here):
    pytest.importorskip("matplotlib")
    result = run_well("compare", "--model", tiny, "--methods", "h2o,tova", "--budgets", "1/4,0.125", *SMALL)
    assert everything_in(here) == ["out", "out/compare.csv", "out/compare.md", "out/compare.png"]
    expected = [("full", "640"), ("h2o", "160"), ("h2o", "80"), ("tova", "160"), ("tova", "80")]
    with open("out/compare.csv", encoding="utf-8") as file:
        assert [(line["method"], line["budget"]) for line in csv.DictReader(file)] == expected
    title, blank, *table = pathlib.Path("out/compare.md").read_text("utf-8").splitlines()
    assert "contexts of 640 tokens, compressed before the question; n = 2 a kind, 2 x 6 tokens of prose" in title
    assert [tuple(line.strip("| ").split(" | ")[:2]) for line in table[2:]] == expected
    for method, budget in expected:
        assert re.search(rf"^│ {method} +│ +{budget} │", result.stdout, re.M), result.stdout


def test_compare_knows_all_methods(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "compare", lambda model, names, size, advance: asked.extend(names) or [FULL, H2O])
    run_well("compare", "--model", tiny, "--methods", "all")
    learned = {"attention_gate", "locret"}  # there are no heads for this model
    assert sorted(asked) == sorted(set(policies.__all__) - learned)


def test_compare_without_matplotlib_writes_the_rest_and_says_so(tiny, here, monkeypatch):
    def absent(rows, title):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(compare, "compare", lambda *given: [FULL, H2O])
    monkeypatch.setattr(tables, "picture", absent)
    result = run_well("compare", "--model", tiny)
    assert everything_in(here) == ["out", "out/compare.csv", "out/compare.md"]
    assert "no picture: No module named 'matplotlib'. pip install 'kvjax[plot]'" in result.stderr


def test_compare_that_fails_midway_leaves_what_was_there(tiny, here, monkeypatch):
    def fail(model, names, size, advance):
        advance("reading", 1, 9)
        raise ValueError("the 5th context is cursed")

    (here / "out").mkdir()
    (here / "out" / "compare.csv").write_text("old", "utf-8")
    monkeypatch.setattr(compare, "compare", fail)
    result = run("compare", "--model", tiny)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "kvjax: the 5th context is cursed"
    assert everything_in(here) == ["out", "out/compare.csv"]
    assert (here / "out" / "compare.csv").read_text("utf-8") == "old"


def test_compare_that_cannot_write_a_file_leaves_no_half_of_it(tiny, here, monkeypatch):
    (here / "out" / "compare.csv").mkdir(parents=True)
    monkeypatch.setattr(compare, "compare", lambda *given: [FULL, H2O])
    result = run("compare", "--model", tiny)
    assert result.exit_code == 2
    assert "compare.csv" in result.stderr.splitlines()[-1]
    assert everything_in(here) == ["out", "out/compare.csv", "out/compare.md"]  # a whole table, and the directory


# ---- what is wrong ----


@pytest.fixture
def refused(here):
    """Runs a command that must end with status 2 and one line on stderr, print nothing else and write nothing."""

    def refused(*args):
        before = everything_in(here)
        result = run(*args)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert everything_in(here) == before
        (line,) = result.stderr.splitlines()
        assert line.startswith("kvjax: ")
        return line

    return refused


@pytest.mark.parametrize("command", ["generate", "view"])
@pytest.mark.parametrize(
    "given, named",
    [
        ("--policy best", "there is no method 'best'; there are attention_gate, cam, "),
        (
            "--policy h2o --budget 8 --window 4 --sinks 2",
            "h2o takes no --sinks; it takes --budget, --window, --set prompt=, --set positions=.",
        ),
        ("--policy full --budget 8", "full takes no --budget; it takes nothing."),
        ("--policy h2o --window 4", "h2o needs --budget."),
        ("--policy h2o", "h2o needs --budget and --window."),
        ("--policy h2o --budget 8 --window 8", "h2o: window=8 is outside 1..7."),
        ("--policy streaming_llm --budget 4", "streaming_llm: sinks=4 is outside 0..3."),
        ("--policy snapkv --budget 90 --set pool=4", "snapkv: pool=4 is not a positive odd number"),
        ("--policy tova --budget 0", "tova: budget=0 leaves no slot"),
        ("--policy tova --budget 8 --dtype float99", "dtype='float99'; wanted one of ('float32', 'bfloat16')"),
        ("--policy tova --budget 8 --dtype int8", "dtype=int8; wanted one of"),
        ("--policy tova --budget 8 --model nosuch", "there is no 'nosuch' here"),
        ("--policy tova --budget 8 --chunk 0", "chunk=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(command, given, named, refused, tiny):
    assert named in refused(command, "hi", "--model", tiny, *given.split())


@pytest.mark.parametrize("command", ["generate", "view"])
@pytest.mark.parametrize(
    "name, content, named",
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt is not UTF-8: "),
        ("utf16.txt", "café".encode("utf-16"), "utf16.txt is not UTF-8: "),
        ("empty.txt", b"", "empty.txt is empty."),
        ("blank.txt", b" \n\t\n", "blank.txt is empty."),
        ("missing.txt", None, "No such file or directory: 'missing.txt'"),
    ],
)
def test_prompt_files_that_cannot_be_read_are_refused(command, name, content, named, refused, here):
    if content is not None:
        (here / name).write_bytes(content)
    assert named in refused(command, "--file", name, "--policy", "tova", "--budget", 8)


def test_a_directory_is_no_prompt_file(refused, here):
    (here / "folder").mkdir()
    assert "'folder'" in refused("generate", "--file", "folder")


@pytest.mark.parametrize("given", [["hi", "--file", "prompt.txt"], [], [""], [" \n"]])
@pytest.mark.parametrize("command", ["generate", "view"])
def test_one_prompt_is_wanted(command, given, refused, here):
    (here / "prompt.txt").write_text("hi", "utf-8")
    assert "give a prompt or --file, one of them." in refused(command, *given, "--policy", "tova", "--budget", 8)


@pytest.mark.parametrize(
    "given, named",
    [
        ("--max-new-tokens 0", "max_new_tokens=0 must be at least 1"),
        ("--max-new-tokens 3000", "is beyond the model's context of 2048 tokens"),
        ("--temperature -1", "temperature=-1.0 must be 0 (greedy) or above"),
        ("--temperature 1 --top-p 2", "top_p=2.0 must be above 0 and at most 1"),
        ("--temperature 1 --top-k 0", "top_k=0"),
    ],
)
def test_settings_of_generate_that_do_not_fit_are_refused(given, named, refused, tiny):
    assert named in refused("generate", "hi", "--model", tiny, *given.split())


@pytest.mark.parametrize(
    "given, named",
    [
        ("--budgets 1/2,x", "budgets='1/2,x' must be fractions such as 1/2,1/4,1/8."),
        ("--budgets 1/0", "budgets='1/0' must be fractions"),
        ("--budgets nan", "budgets='nan' must be fractions"),
        ("--budgets 256", "fractions=256.0 must be a finite number above 0 and at most 1"),
        ("--budgets 0", "fractions=0.0 must be a finite number above 0 and at most 1"),
        ("--budgets 1/500", "sinks=4 is outside 0..1. The sinks are part of budget=2"),
        ("--methods h2o,best", "there is no method 'best'; there are full, "),
        ("--methods h2o,", "there is no method ''"),
        ("--contexts 3", "contexts=3 and prose=4 must be multiples of group=4"),
        ("--contexts 0", "contexts=0 must be at least 1"),
        ("--prose 0", "prose=0 must be at least 1"),
        ("--group 0", "group=0 must be at least 1"),
        ("--per-kind 0", "per_kind=0 must be at least 1"),
        ("--per-kind 13", "per_kind=13 is above 12"),
        ("--forced 3", "forced=3 must be at least 4"),
        ("--seed -1", "seed=-1 must be at least 0"),
        ("--tokens 2000", "tokens=2000 and what follows do not fit the model's context of 2048 tokens"),
        ("--model nosuch", "there is no 'nosuch' here"),
        ("--dtype float99", "dtype='float99'"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(given, named, refused, tiny):
    assert named in refused("compare", "--model", tiny, *given.split())


@pytest.mark.parametrize("command", ["generate hi", "view hi --policy full", "compare"])
def test_a_checkpoint_without_a_tokenizer_is_refused(command, refused):
    assert "without a tokenizer" in refused(*command.split(), "--model", REFERENCE.with_name("linear"))


def test_contexts_too_short_for_their_facts_are_refused(tiny):
    result = run("compare", "--model", tiny, "--tokens", 200)
    assert result.exit_code == 2
    assert re.search(r"too few to hide 6 facts between\. Give more tokens", result.stderr.splitlines()[-1])


def test_options_that_are_no_numbers_are_named():
    result = run("generate", "hi", "--budget", "many")
    assert result.exit_code == 2
    assert "--budget" in result.stderr


# ---- the real model ----


@pytest.mark.real_model
def test_smollm2_says_paris(here):
    """The installed command, in a process of its own."""
    command = [pathlib.Path(sys.executable).with_name("kvjax"), "generate", "What is the capital of France?"]
    done = subprocess.run(
        [*command, "--policy", "h2o", "--budget", "256", "--window", "64"],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert re.fullmatch(LAST_LINE.format(r"h2o\(budget=256, window=64\)"), done.stderr.splitlines()[-1])
    assert everything_in(here) == []


@pytest.mark.real_model
def test_view_of_smollm2_shows_its_tokens(here, monkeypatch):
    monkeypatch.setattr(kvjax, "load", lambda name, dtype: smollm2())
    run_well("view", "What is the capital of France?", "--policy", "h2o", "--budget", 12, "--window", 4)
    data = data_of((here / "out" / "view.html").read_text("utf-8"))
    assert "".join(data["tokens"]) == smollm2().chat("What is the capital of France?")
    assert unpack(data).shape == (30, 3, len(data["tokens"]))
    assert (unpack(data).sum(axis=-1) == 12).all()
