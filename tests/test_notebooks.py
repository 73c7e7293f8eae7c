"""Every notebook runs top to bottom, and asserts its own conclusion."""

import json
import pathlib
import re

import jax
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def cells(path: pathlib.Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind
    ]


def test_there_are_notebooks():
    assert "quickstart" in [path.stem for path in NOTEBOOKS]


@every_notebook
def test_notebook_begins_with_a_title_and_its_own_badge(path):
    first = cells(path, "markdown")[0]
    assert re.match(r"# \w", first)
    assert f"https://colab.research.google.com/github/kvjax/kvjax/blob/main/notebooks/{path.name}" in first


@every_notebook
def test_notebook_asserts_in_its_last_cell(path):
    assert re.search(r"^assert ", cells(path, "code")[-1], re.M)


@every_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size < 400_000


@pytest.mark.real_model
@every_notebook
def test_notebook_runs(path, tmp_path, monkeypatch):
    """In a kernel of this Python, in an empty directory."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("XLA_FLAGS", "")  # those of the tests compile quickly and run slowly
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises with the cell and its traceback
    assert list(tmp_path.iterdir()) == []
