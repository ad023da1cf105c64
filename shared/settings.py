"""Configuration: TOML plus environment variables, validated.

Mistakes are found before anything starts; messages name the file or variable, the key and the value.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.protocol import plain_reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings", bound=BaseModel)


class SettingsModel(BaseModel):
    """Base of configuration sections: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def token_lines(text: str) -> list[str]:
    """The tokens in a file: one in each line. Blank lines and those that begin with `#` are none."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class SettingsError(Exception):
    """Problems in a configuration, one line each in `problems`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_toml(path: Path) -> dict[str, Any]:
    """The file as a dict.

    Raises:
        SettingsError: it is unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError([f"{path}: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise SettingsError([f"{path}: not UTF-8: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"{path}: not valid TOML: {error}"]) from error


def load_settings(
    model: type[Settings],
    path: Path | None,
    *,
    env_prefix: str,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """`path` overlaid with `PREFIX_KEY=` and `PREFIX_SECTION__KEY=` from the environment, validated.

    A value that starts with `[` or `{` is read as JSON if it parses. A variable whose first part is not a key of
    `model` is ignored (other programs may use the prefix), unless it contains `__`: that is an error.

    Raises:
        SettingsError: with one line for each problem.
    """
    data = read_toml(path) if path is not None else {}
    sources: dict[tuple[str, ...], str] = {}
    problems: list[str] = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(env_prefix):
            continue
        keys = tuple(variable[len(env_prefix) :].lower().split("__"))
        if keys[0] not in model.model_fields:
            if len(keys) > 1:
                problems.append(f"environment {variable}: no such key {'.'.join(keys)!r}")
            continue
        problem = _overlay(data, keys, text)
        if problem is not None:
            problems.append(f"environment {variable}: {problem}")
        sources[keys] = f"environment {variable}"
    if problems:
        raise SettingsError(problems)
    return validate_settings(model, data, source=str(path or "configuration"), sources=sources)


def _overlay(data: dict[str, Any], keys: tuple[str, ...], text: str) -> str | None:
    """Sets `text` at `keys` in `data`. Returns the reason if it cannot."""
    value = text
    if text[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # `[::1]:80` is an address, not JSON
            value = json.loads(text)
    table = data
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            return f"{key!r} is not a table"
        table = inner
    table[keys[-1]] = value
    return None


def validate_settings(
    model: type[Settings],
    data: Mapping[str, Any],
    *,
    source: str,
    sources: Mapping[tuple[str, ...], str] | None = None,
) -> Settings:
    """`data` as `model`.

    Raises:
        SettingsError: naming `source` (or the variable a value came from), the key, the value and the reason.
    """
    found = None
    problems: list[dict[str, Any]] = []
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        problems = [dict(problem) for problem in error.errors(include_url=False)]
    problems += [*_wrong_types(model, data, sources or {}), *_nul_characters(data)]
    described = _described(data, problems, source, sources or {})
    if found is None or described:
        raise SettingsError(described)
    return found


_SCALAR_PROBLEMS = frozenset({"bool_type", "float_type", "int_from_float", "int_type", "literal_error", "string_type"})


def _wrong_types(
    model: type[BaseModel], data: Mapping[str, Any], sources: Mapping[tuple[str, ...], str]
) -> list[dict[str, Any]]:
    """The values of another type than their keys have, such as "5" for a number. Only values of the environment, which
    are always strings, are converted."""
    try:
        model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        return [
            dict(problem)
            for problem in error.errors(include_url=False)
            if problem["type"] in _SCALAR_PROBLEMS
            and not any(tuple(map(str, problem["loc"][: len(keys)])) == keys for keys in sources)
        ]
    return []


def _nul_characters(value: Any, location: tuple[str | int, ...] = ()) -> Iterator[dict[str, Any]]:
    """The texts that no path, argument or environment variable may contain."""
    if isinstance(value, str) and "\0" in value:
        yield {"type": "value_error", "loc": location, "input": value, "msg": "must not contain a NUL character"}
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _nul_characters(f"{key}" if "\0" in f"{key}" else inner, (*location, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _nul_characters(inner, (*location, number))


def _described(
    data: Mapping[str, Any],
    problems: Sequence[dict[str, Any]],
    source: str,
    sources: Mapping[tuple[str, ...], str],
) -> list[str]:
    """One line for each key. A value that may have one of several types has a problem with each of them."""
    by_key: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for problem in problems:
        by_key.setdefault(_real_location(data, problem), []).append(problem)
    return [
        _describe(location, found, source, sources)
        for location, found in by_key.items()
        if not location or not any(other[: len(location)] == location != other for other in by_key)
    ]


def _real_location(data: Any, problem: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The keys of a problem's value, without the names of the types that were tried."""
    keys: list[str | int] = []
    *before, last = problem["loc"] or (None,)
    for part in before:
        inner = data.get(part) if isinstance(data, Mapping) else None
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            inner = data[part]
        if inner is not None:
            keys.append(part)
            data = inner
    absent = problem["type"] in ("missing", "extra_forbidden")
    listed = isinstance(data, list) and isinstance(last, int)
    if last is not None and (absent or listed or (isinstance(data, Mapping) and last in data)):
        keys.append(last)
    return tuple(keys)


def _describe(
    location: tuple[str | int, ...],
    problems: Sequence[dict[str, Any]],
    source: str,
    sources: Mapping[tuple[str, ...], str],
) -> str:
    names, problem = tuple(map(str, location)), problems[0]
    origin = next((sources[names[:n]] for n in range(len(names), 0, -1) if names[:n] in sources), source)
    key = _dotted(location) or "(file)"
    if problem["type"] == "extra_forbidden":
        return f"{origin}: {key}: unknown key (value {_shown(key, problem['input'])})"
    message = " or ".join(dict.fromkeys(map(plain_reason, problems)))
    if problem["type"] == "missing" or isinstance(problem["input"], Mapping):  # a rule about a table: do not print it
        return f"{origin}: {key}: {message}"
    return f"{origin}: {key} = {_shown(key, problem['input'])}: {message}"


_SECRETS = ("token", "secret", "password", "key", "database")
"""Words in the names of keys whose values have secrets. A database's URL has a password."""


def _shown(key: str, value: Any) -> str:
    """A value for an error message, which logs and `/fleet` show too: without secrets, also those of a mistyped key."""
    if value == "":
        return "''"
    name = key.rpartition(".")[2].lower()
    if any(word in name for word in _SECRETS) or difflib.get_close_matches(name, _SECRETS, cutoff=0.7):
        return "not shown"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return "a list of tables"
    return _USER_INFO.sub("//...@", repr(value))


_USER_INFO = re.compile(r"//\S*@")  # up to the last @: a password may have a slash that should have been escaped


def _dotted(location: tuple[str | int, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
