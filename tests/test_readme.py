"""The README's Python runs as it stands, and its table names every method."""

import re
from pathlib import Path

import pytest

from kvjax import policies

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


@pytest.mark.real_model
def test_the_python_of_the_readme_runs_and_says_paris(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.S))
    exec(compile(code, "README.md", "exec"), {})
    assert "The capital of France is Paris." in capsys.readouterr().out


@pytest.mark.parametrize("name", policies.__all__)
def test_the_table_of_methods_has_a_line_for_each(name):
    assert re.search(rf"^\| `{name}[`(]", README, flags=re.M)
    assert f"kvjax/policies/{name}.py" in README


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert not re.search(r"^[A-Z]+$", README, flags=re.M)
