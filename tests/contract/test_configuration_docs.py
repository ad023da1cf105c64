"""docs/configuration.md says what the configuration classes are, key by key."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from neuron.config import NeuronConfig
from tests.contract.documents import documented_keys

FILES: dict[str, type[BaseModel]] = {
    "cortex.toml": CortexConfig,
    "neuron.toml": NeuronConfig,
    "models.toml": Catalogue,
}


def inner_model(annotation: object) -> tuple[type[BaseModel], str] | None:
    """The configuration class a field holds and how: "one", "list" or "dict"; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, "one"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    for argument in arguments:
        found = inner_model(argument)
        if found is not None:
            if origin in (list, tuple):
                return found[0], "list"
            if origin is dict:
                return found[0], "dict"
            return found
    return None


def tables_of(model: type[BaseModel], path: str = "", form: str = "one") -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """(table, its plain keys) for the class and all classes inside it, as TOML writes the table."""
    plain: dict[str, FieldInfo] = {}
    inside: list[tuple[type[BaseModel], str, str]] = []
    for name, field in model.model_fields.items():
        found = inner_model(field.annotation)
        if found is None or name == "devices":  # presets' names in a list, or tables
            plain[name] = field
        if found is not None:
            below = f"{path}.{name}" if path else name
            inside.append((found[0], f"{below}.NAME" if found[1] == "dict" else below, found[1]))
    if path or plain:
        yield (f"[[{path}]]" if form == "list" else f"[{path}]") if path else "", plain
    for inner, below, kind in inside:
        yield from tables_of(inner, below, kind)


def documented_default(cell: str) -> object:
    """The value a cell begins with; strings, numbers and booleans are written in TOML as in JSON. None: words only."""
    literal = re.match(r"`([^`]+)`", cell)
    try:
        return None if literal is None else json.loads(literal[1])
    except ValueError:  # the name of another key
        return None


CASES = [(file, table, keys) for file, model in FILES.items() for table, keys in tables_of(model)]


@pytest.mark.parametrize(("file", "table", "keys"), CASES, ids=[f"{file} {table or 'top'}" for file, table, _ in CASES])
def test_every_key_is_documented_and_no_other(file: str, table: str, keys: dict[str, FieldInfo]) -> None:
    """A key that nobody reads about does not exist; one that is read about and refused is worse."""
    assert set(documented_keys(file)[table]) == set(keys)


@pytest.mark.parametrize(("file", "table", "keys"), CASES, ids=[f"{file} {table or 'top'}" for file, table, _ in CASES])
def test_documented_defaults_are_the_defaults(file: str, table: str, keys: dict[str, FieldInfo]) -> None:
    """What the last column says a key is when it is left out."""
    rows = documented_keys(file)[table]
    for key, field in keys.items():
        last = rows[key].rsplit("|", 2)[1].strip()
        assert last, key
        assert (last == "must be given") == field.is_required(), key
        if isinstance(field.default, bool | int | float | str):
            assert documented_default(last) == field.default, key


@pytest.mark.parametrize("file", FILES)
def test_no_table_is_invented(file: str) -> None:
    """The tables of the document are those that the file can have."""
    assert set(documented_keys(file)) == {table for name, table, _ in CASES if name == file}


def test_every_kind_of_table_is_seen() -> None:
    """The walk itself: optional sections, lists and dicts of tables are all seen."""
    tables = {table for file, table, _ in CASES if file == "neuron.toml"}
    assert {"", "[simulate]", "[[simulate.devices]]", "[harness.NAME]", "[[default_models]]"} <= tables
