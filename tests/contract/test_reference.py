"""docs/reference is what the configuration classes say, and they say enough."""

from __future__ import annotations

import json

import pytest

from cortex.config.diff import RELOAD_OF
from tests.contract.reference import FILES, Table, default_of, described, path_of, reference, tables_of, type_of

CASES = [(file, table) for file, model in FILES.items() for table in tables_of(model)]
IDS = [f"{file} {table.heading or 'top'}" for file, table in CASES]


@pytest.mark.parametrize("file", FILES)
def test_reference_is_up_to_date(file: str) -> None:
    assert path_of(file).read_text(encoding="utf-8") == reference(file), "run `make fmt`"


@pytest.mark.parametrize(("file", "table"), CASES, ids=IDS)
def test_every_key_is_described(file: str, table: Table) -> None:
    """A docstring below the field, a type, and a default, or `required`."""
    for key in table.keys:
        where = f"{file}: {table.path(key)}"
        assert described(table, key)[0], f"{where}: write a docstring below the field"
        assert type_of(table, key) not in ("", "any"), where
        assert default_of(table, key), f"{where}: end its docstring with `Default: ...`"


@pytest.mark.parametrize(("file", "table"), CASES, ids=IDS)
def test_defaults_in_words_begin_with_the_value(file: str, table: Table) -> None:
    """A docstring cannot say another default than the field has."""
    for key, field in table.keys.items():
        words = described(table, key)[1]
        if words and isinstance(field.default, bool | int | float | str):
            assert words.startswith(f"`{json.dumps(field.default)}`"), f"{file}: {table.path(key)}: {words}"


def test_walk_finds_every_kind_of_table() -> None:
    """`tables_of` finds optional sections, lists and dicts of tables."""
    headings = {table.heading for file, table in CASES if file == "neuron.toml"}
    assert {"", "[simulate]", "[[simulate.devices]]", "[harness.NAME]", "[[default_models]]"} <= headings


def test_types_have_limits_and_units() -> None:
    (gateway,) = [table for table in tables_of(FILES["cortex.toml"]) if table.heading == "[gateway]"]
    assert type_of(gateway, "workers") == "integer, 1 to 256"
    assert type_of(gateway, "keepalive_secs") == "number, above 0, seconds"
    assert type_of(gateway, "allowed_hosts") == "list of strings"
    assert type_of(gateway, "tls_cert") == "path"


def test_every_key_says_what_a_reload_does() -> None:
    """A new key without an entry in `RELOAD_OF` fails here, so that no reload reports a change that it does not
    apply."""
    keys = {
        table.path(key)
        for file, table in CASES
        if file == "cortex.toml" and not table.heading.startswith("[[")
        for key in table.keys
    }
    assert set(RELOAD_OF) == keys | {"neurons"}
