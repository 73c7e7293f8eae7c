"""Imports point one way, up the layers below; `import kvjax` is quick."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for folder in ("kvjax", "pallas_kernels", "train") for path in (ROOT / folder).rglob("*.py"))
LAYERS = [
    ["pallas_kernels"],
    [
        "counts",
        "cache",
        "codecs",
        "draws",
        "policy",
        "scorers",
        "selects",
        "folds",
        "tiers",
        "kernels",
        "attention",
        "models.rope",
    ],
    ["policies"],
    ["models", "files", "heads", "checks", "sampling", "report", "decoding"],
    ["plans", "serve", "tasks", "tables", "compare", "view", "cli"],
    ["train"],
]
HEIGHT = {
    name if name in ("pallas_kernels", "train") else f"kvjax.{name}": height
    for height, names in enumerate(LAYERS)
    for name in names
}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def height(module):
    """Of the longest name in `HEIGHT` that `module` begins with."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    known = [HEIGHT[name] for name in names if name in HEIGHT]
    assert known, f"{module} has no place in LAYERS yet"
    return known[0]


def imported(path):
    """Names of the modules that a file imports, also late, but not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_from_its_own_layer_and_those_below(path):
    module = name_of(path)
    if module == "kvjax":
        return  # gathers the public names
    for name in imported(path):
        top = name.split(".")[0]
        if top in ("kvjax", "pallas_kernels", "train"):
            # The command may use the public names; nothing else may import the whole.
            assert name != "kvjax" or height(module) >= HEIGHT["kvjax.cli"], f"{module} imports all of kvjax"
            assert name == "kvjax" or height(name) <= height(module), f"{module} imports {name}"
        assert top not in ("tests", "torch", "transformers"), f"{module} imports {name}"
        if module.startswith(("kvjax.policies", "pallas_kernels")):
            assert top not in ("flax", "optax"), f"{module} imports {name}"


def test_importing_kvjax_takes_under_a_second_beyond_jax_and_loads_nothing_else():
    program = (  # seconds of the processor: others may keep it busy
        "import sys, time, jax, jax.numpy\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import kvjax\n"
        "took, new = time.process_time() - start, {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(took, *sorted(new - set(sys.stdlib_module_names)))\n"
    )
    took, *loaded = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).split()
    assert loaded == ["kvjax", "pallas_kernels"]  # neither gguf, tokenizers, flax, matplotlib, ...
    assert float(took) < 1.0
