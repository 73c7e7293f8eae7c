"""A file of settings becomes a dataclass, or an error that names file and key."""

import dataclasses
from typing import Literal

import pytest

from train import config


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str
    rate: float
    steps: int = 10
    clip: float | None = None
    shuffle: bool = True
    files: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    form: Literal["plain", "chat"] = "plain"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")


NEEDED = 'model = "smollm2"\nrate = 5e-4\n'


def read(tmp_path, text, overrides=()):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config.read(path, Settings, overrides)


def test_a_file_becomes_the_dataclass_and_what_it_leaves_out_takes_the_default(tmp_path):
    got = read(tmp_path, 'model = "smollm2"\nrate = 1\nclip = 0.5\nfiles = ["a", "b"]\nbetas = [0, 1]\nform = "chat"\n')
    assert got == Settings("smollm2", 1.0, clip=0.5, files=("a", "b"), betas=(0.0, 1.0), form="chat")
    assert type(got.rate) is float


def test_an_override_stands_in_place_of_the_file(tmp_path):
    overrides = ("steps=3", "rate = 1e-3", "model=2024", "files=['x']", "shuffle=false", "form=chat", "clip=")
    got = read(tmp_path, NEEDED + "clip = 1.0\n", overrides)
    assert got == Settings("2024", 1e-3, steps=3, files=("x",), shuffle=False, form="chat")


@pytest.mark.parametrize(
    "text, overrides, said",
    [
        (
            NEEDED + "stpes = 3\n",
            (),
            r"run\.toml: unknown key 'stpes'\. Did you mean 'steps'\? The keys are betas, clip",
        ),
        ('model = "smollm2"\n', (), r"run\.toml: missing rate\. Add a line such as: rate ="),
        (NEEDED + "steps = 3.0\n", (), r"run\.toml: steps is 3\.0, of type float, and must be int"),
        (NEEDED + "steps = true\n", (), r"run\.toml: steps is True, of type bool, and must be int"),
        (NEEDED + "shuffle = 1\n", (), r"run\.toml: shuffle is 1, of type int, and must be bool"),
        (NEEDED + "clip = nan\n", (), r"run\.toml: clip is nan"),
        (NEEDED + "files = ['a', 1]\n", (), r"run\.toml: files\[1\] is 1, of type int, and must be str"),
        (NEEDED + "betas = [0.9]\n", (), r"run\.toml: betas is \[0\.9\], and must be an array of 2"),
        (NEEDED + "form = 'xml'\n", (), r"run\.toml: form is 'xml', and must be one of 'plain', 'chat'"),
        (NEEDED + "[rate]\n", (), r"run\.toml: no valid TOML: .*Lines are key = value"),
        (NEEDED + "steps = 0\n", (), r"run\.toml: steps=0 must be at least 1"),
        (NEEDED, ("steps=many",), r"override 'steps=many': steps is 'many', of type str, and must be int"),
        (NEEDED, ("step=3",), r"override 'step=3': unknown key 'step'\. Did you mean 'steps'"),
        (NEEDED, ("steps",), r"override 'steps': write key=value"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, text, overrides, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, text, overrides)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.toml: the file of settings cannot be read \(No such file"):
        config.read(tmp_path / "absent.toml", Settings)
