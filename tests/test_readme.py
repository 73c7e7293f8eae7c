"""The README's Python runs as it stands, and its table of methods has a line for each, whose bytes are real."""

import dataclasses
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import policies
from tests.tiny import CONFIG, random_params

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
SMOLLM2 = dataclasses.replace(CONFIG, layers=30, kv_heads=3, q_heads=9, head_dim=64, context=2048)  # its cache's shape
TOKENS, BUDGET, ROOM = 1000, 250, 32  # of a context, as in the table; slots a head; tokens to come
SETTINGS = {  # where the budget alone does not make a policy
    "full": {},
    "h2o": {"budget": BUDGET, "window": 64},
    "d2o": {"budget": BUDGET, "window": 64},
    "kvmerger": {"budget": BUDGET, "window": 50, "heavy": 13},
    "expected_attention": {"budget": BUDGET, "window": 64},
    "elastic_cache": {},
    "think": {"channels": 32},
    "mikv": {},
    "kivi": {},
}
OTHERS = {"mikv": {"low_bits": 4, "high_bits": 8}}  # of the method's second formula, which the table has measured


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


params_of = functools.cache(lambda dtype: random_params(SMOLLM2, dtype=dtype))


def cells(name: str) -> list[str]:
    """The line of a method: method, paper, file, keeps, chooses by, prefix alone, bytes, measured, departs."""
    (line,) = re.findall(rf"^\| (`{name}[`(].*) \|$", README, flags=re.M)
    return line.split(" | ")


def formulas(name: str) -> list[str]:
    """A row's bytes as the table has them, such as `L H (C+1) (2Db + 8), and 4 L once`, one for each setting."""
    return [text[text.index("L H ") :] for text in cells(name)[6].split("; ")]


def in_numbers(formula: str, names: dict[str, float]) -> float:
    """`2Db` is 2 * D * b: letters stand alone but in the names of settings, and what stands side by side multiplies."""
    words = "|".join(sorted(names, key=len, reverse=True))
    text = re.sub(rf"(\d+|{words})", r" \1 ", formula)
    return eval(re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", " ".join(text.split())), {"__builtins__": {}}, names)


def settings_of(name: str, which: int) -> dict[str, float]:
    return SETTINGS.get(name, {"budget": BUDGET}) | (OTHERS[name] if which else {})


def stated(name: str, which: int, *, batch: int, number: int) -> float:
    """Bytes that a line states for `batch` rows, with `number` bytes a number."""
    of_a_row, once = re.fullmatch(r"(.*?)(?:, and (.*) once)?", formulas(name)[which]).groups()
    parameters = inspect.signature(getattr(policies, name)).parameters.values()
    names = {one.name: one.default for one in parameters if one.default is not one.empty} | settings_of(name, which)
    names |= {"n": TOKENS, "m": ROOM, "C": BUDGET, "r": names.get("pruned", names.get("ratio"))}
    names |= {"L": SMOLLM2.layers, "H": SMOLLM2.kv_heads, "D": SMOLLM2.head_dim, "b": number}
    return batch * (in_numbers(of_a_row, names) + 4) + (in_numbers(once, names) if once else 0)


ALL = [(name, which) for name in policies.__all__ for which in range(len(formulas(name)))]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name, which", ALL)
def test_the_bytes_of_the_table_are_those_of_the_buffers(name, which, dtype):
    policy, params = getattr(policies, name)(**settings_of(name, which)), params_of(dtype)
    room = ROOM if policy.given else 0
    cache = jax.eval_shape(lambda: kvjax.empty_cache(params, policy, 3, tokens=TOKENS, room=room))
    wanted = stated(name, which, batch=3, number=jnp.dtype(dtype).itemsize)
    assert kvjax.nbytes(cache) == pytest.approx(wanted, rel=1e-12)  # shares of tokens are floats


@pytest.mark.parametrize("name", [name for name in policies.__all__ if cells(name)[7] != "-"])
def test_what_the_table_has_measured_are_the_bytes_that_it_states(name):
    measured = stated(name, len(formulas(name)) - 1, batch=1, number=4) / 2**20
    assert cells(name)[7] == f"{measured:.1f} MiB"
