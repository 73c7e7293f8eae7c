"""Settings of a run: a flat TOML file, read into a frozen dataclass that says what there is to set."""

import dataclasses
import difflib
import math
import pathlib
import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def read(path: str | pathlib.Path, kind: type[Settings], overrides: Sequence[str] = ()) -> Settings:
    """Reads the TOML file at `path` into the dataclass `kind`.

    Fields may be bool, int, float, str, a Literal of these, tuple[x, ...] or tuple[x, y] of these, and any of them
    `| None`. A field that the file leaves out takes its default.

    Args:
      path: The file, keys and values without tables.
      kind: A dataclass. What its `__post_init__` refuses is refused with the file's name before it.
      overrides: "key=value", as from a command line, in place of what the file says. The value is written as in TOML,
        but that a string needs no quotes; an empty one takes the default.

    Returns:
      An instance of `kind`.

    Raises:
      ValueError: If the file is missing or no TOML, a key is unknown, missing or given twice, or a value is of another
        type. The message names file and key.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {key: (value, path) for key, value in _load(path).items()}
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        source = f"override {text!r}"
        if not (key and equals):
            raise ValueError(f"{source}: write key=value, for instance {next(iter(fields))}=...")
        if not value:
            values.pop(key, None)
        if value or key not in fields:
            values[key] = (_parse(value, hints.get(key)), source)
    for key, (_, source) in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: unknown key {key!r}.{meant} The keys are {', '.join(sorted(fields))}.")
    settings = {key: _fit(value, hints[key], f"{source}: {key}") for key, (value, source) in values.items()}
    needed = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"{path}: missing {', '.join(missing)}. Add a line such as: {missing[0]} = ...")
    try:
        return kind(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: str | pathlib.Path) -> dict[str, Any]:
    try:
        return tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: the file of settings cannot be read ({error.strerror}).") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"{path}: no valid TOML: {error}. Lines are key = value, strings in quotes.") from error


def _parse(text: str, hint: Any) -> Any:
    """The value of an override: TOML where it is that, else, or where a string is wanted, the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if hint in (str, str | None) and not isinstance(value, str) else value


def _fit(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names what was wanted."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # x | None; TOML has no null, so a value is an x
        (hint,) = (part for part in parts if part is not types.NoneType)
        return _fit(value, hint, where)
    if origin is typing.Literal:
        if not any(type(value) is type(part) and value == part for part in parts):
            raise ValueError(f"{where} is {value!r}, and must be one of {', '.join(map(repr, parts))}.")
        return value
    if origin is tuple:
        if isinstance(value, list) and parts[-1] is Ellipsis:
            return tuple(_fit(one, parts[0], f"{where}[{i}]") for i, one in enumerate(value))
        if isinstance(value, list) and len(value) == len(parts):
            return tuple(_fit(value[i], part, f"{where}[{i}]") for i, part in enumerate(parts))
        count = "an array" if parts[-1] is Ellipsis else f"an array of {len(parts)}"
        raise ValueError(f"{where} is {value!r}, and must be {count}, such as [...].")
    if hint is float and type(value) in (int, float):
        if math.isnan(value):
            raise ValueError(f"{where} is nan, and must be a number.")
        return float(value)
    if type(value) is not hint:  # and not isinstance: a bool is no int
        raise ValueError(f"{where} is {value!r}, of type {type(value).__name__}, and must be {hint.__name__}.")
    return value
