"""docs/configuration.md agrees with the configuration classes, key by key."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cortex.config.catalogue import Catalogue
from cortex.config.diff import RELOAD_OF, Reload
from cortex.config.settings import CortexConfig
from neuron.config import NeuronConfig
from tests.contract.documents import documented_keys, documented_reloads

FILES: dict[str, type[BaseModel]] = {
    "cortex.toml": CortexConfig,
    "neuron.toml": NeuronConfig,
    "models.toml": Catalogue,
}


def inner_model(annotation: object) -> tuple[type[BaseModel], str] | None:
    """The configuration class that a field holds, and how: "one", "list" or "dict"; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, "one"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    for argument in arguments:
        found = inner_model(argument)
        if found is not None:
            if origin in (list, tuple):
                return found[0], "list"
            if origin in (dict, Mapping):
                return found[0], "dict"
            return found
    return None


def tables_of(model: type[BaseModel], path: str = "", form: str = "one") -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """(table, its plain keys) for the class and all nested classes, named as in TOML."""
    plain: dict[str, FieldInfo] = {}
    nested: list[tuple[type[BaseModel], str, str]] = []
    for name, field in model.model_fields.items():
        found = inner_model(field.annotation)
        if found is None or name == "devices":  # a list of preset names or tables
            plain[name] = field
        if found is not None:
            below = f"{path}.{name}" if path else name
            nested.append((found[0], f"{below}.NAME" if found[1] == "dict" else below, found[1]))
    if path or plain:
        yield (f"[[{path}]]" if form == "list" else f"[{path}]") if path else "", plain
    for inner, below, kind in nested:
        yield from tables_of(inner, below, kind)


def documented_default(cell: str) -> object:
    """The literal that a cell starts with, None without one; TOML writes strings, numbers and booleans as JSON does."""
    literal = re.match(r"`([^`]+)`", cell)
    try:
        return None if literal is None else json.loads(literal[1])
    except ValueError:  # the name of another key
        return None


CASES = [(file, table, keys) for file, model in FILES.items() for table, keys in tables_of(model)]


@pytest.mark.parametrize(("file", "table", "keys"), CASES, ids=[f"{file} {table or 'top'}" for file, table, _ in CASES])
def test_documented_keys_are_the_keys(file: str, table: str, keys: dict[str, FieldInfo]) -> None:
    """Every key is documented, and no key that does not exist."""
    assert set(documented_keys(file)[table]) == set(keys)


@pytest.mark.parametrize(("file", "table", "keys"), CASES, ids=[f"{file} {table or 'top'}" for file, table, _ in CASES])
def test_documented_defaults_are_the_defaults(file: str, table: str, keys: dict[str, FieldInfo]) -> None:
    """The last column has the default."""
    rows = documented_keys(file)[table]
    for key, field in keys.items():
        last = rows[key].rsplit("|", 2)[1].strip()
        assert last, key
        assert (last == "required") == field.is_required(), key
        if isinstance(field.default, bool | int | float | str):
            assert documented_default(last) == field.default, key


@pytest.mark.parametrize("file", FILES)
def test_documented_tables_are_the_tables(file: str) -> None:
    """The document has every table of the file and no other."""
    assert set(documented_keys(file)) == {table for name, table, _ in CASES if name == file}


def test_walk_finds_every_kind_of_table() -> None:
    """`tables_of` finds optional sections, lists and dicts of tables."""
    tables = {table for file, table, _ in CASES if file == "neuron.toml"}
    assert {"", "[simulate]", "[[simulate.devices]]", "[harness.NAME]", "[[default_models]]"} <= tables


CORTEX_KEYS = {
    f"{table.strip('[]')}.{key}".removeprefix(".")
    for table, keys in tables_of(CortexConfig)
    if not table.startswith("[[")
    for key in keys
} | {"neurons"}


def test_every_key_says_what_a_reload_does() -> None:
    """A new key without an entry in `RELOAD_OF` fails here, so that no reload reports a change that it does not
    apply."""
    assert set(RELOAD_OF) == CORTEX_KEYS


@pytest.mark.parametrize("reload", Reload)
def test_documented_reloads_are_the_reloads(reload: Reload) -> None:
    """The table of "What happens when a file changes?" lists what applies at once and what needs a restart."""
    tables = {name.partition(".")[0] for name in CORTEX_KEYS if "." in name}
    documented = {
        key
        for name in documented_reloads("apply to the next" if reload is Reload.APPLIES else "need a restart")
        for key in CORTEX_KEYS
        if key == name or (name.strip("[]") in tables and key.startswith(f"{name.strip('[]')}."))
    }
    rows_of_their_own = {"neurons", "models_config"} if reload is Reload.APPLIES else set()
    assert documented | rows_of_their_own == {key for key, each in RELOAD_OF.items() if each is reload}
