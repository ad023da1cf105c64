"""Configuration: mistakes are found at the start, with their place."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from shared.settings import SettingsError, SettingsModel, load_settings, read_toml


class Inner(SettingsModel):
    listen: str = "127.0.0.1:1"
    size: int = Field(default=1, ge=1)
    names: list[str] = Field(default_factory=list)


class Entry(SettingsModel):
    name: str


class Outer(SettingsModel):
    inner: Inner = Inner()
    level: str = "info"
    on: bool = False
    secs: float = 1
    mode: bool | Literal["dev"] = False
    either: list[str | Entry] = Field(default_factory=list)
    entries: list[Entry] = Field(default_factory=list)
    by_name: dict[str, Inner] = Field(default_factory=dict)


def load(path: Path, text: str, **environ: str) -> Outer:
    path.write_text(text, encoding="utf-8")
    return load_settings(Outer, path, env_prefix="APP_", environ=environ)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.toml"


def problems(path: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(path, text, **environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_defaults_and_file(path: Path) -> None:
    """An empty file is valid; values of the file override defaults."""
    assert load(path, "") == Outer()
    assert load(path, "level = 'debug'\n[inner]\nsize = 5").inner.size == 5


def test_environment_without_a_file() -> None:
    """A service can be configured without a file."""
    settings = load_settings(Outer, None, env_prefix="APP_", environ={"APP_INNER__SIZE": "3"})
    assert settings.inner.size == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("levle = 'debug'", "{path}: levle: unknown key (value 'debug')"),
        ("[inner]\nsice = 5", "{path}: inner.sice: unknown key (value 5)"),
        ("[[entries]]\nname = 'a'\n[[entries]]\nname = 'b'\nage = 1", "{path}: entries[1].age: unknown key (value 1)"),
        ("[inner]\ntokn = 's3cret'", "{path}: inner.tokn: unknown key (value not shown)"),
        ("API_KEY = 's3cret'", "{path}: API_KEY: unknown key (value not shown)"),
        ("url = 'http://me:s3cret@host/'", "{path}: url: unknown key (value 'http://...@host/')"),
        ("url = 'http://me:s3/cret@host/'", "{path}: url: unknown key (value 'http://...@host/')"),
        ("[more]\ntoken = 's3cret'", "{path}: more: unknown key (value a table)"),
        ("[[entry]]\ntoken = 's3cret'", "{path}: entry: unknown key (value a list of tables)"),
        ("[[entries]]", "{path}: entries[0].name: required, but missing"),
        ("[inner]\nsize = 'much'", "{path}: inner.size = 'much': must be a whole number"),
        ("[inner]\nsize = 0", "{path}: inner.size = 0: must be at least 1"),
        ("inner = 5", "{path}: inner = 5: must be a table"),
        ("[by_name.x]\nsize = -1", "{path}: by_name.x.size = -1: must be at least"),
        ("level = ", "{path}: not valid TOML: "),
        ("level = 'a'\nlevel = 'b'", "{path}: not valid TOML: "),
    ],
)
def test_a_mistake_names_file_key_and_value(path: Path, text: str, expected: str) -> None:
    """One line says what to change and where."""
    found = problems(path, text)
    assert len(found) == 1
    assert found[0].startswith(expected.format(path=path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[inner]\nsize = '5'", "inner.size = '5': must be a whole number"),
        ("[inner]\nsize = 5.0", "inner.size = 5.0: must be a whole number"),
        ("[inner]\nsize = true", "inner.size = True: must be a whole number"),
        ("on = 'yes'", "on = 'yes': must be true or false"),
        ("on = 1", "on = 1: must be true or false"),
        ("secs = '1.5'", "secs = '1.5': must be a number"),
        ("level = 5", "level = 5: must be a string"),
        ("mode = 'yes'", "mode = 'yes': must be true or false or must be 'dev'"),
        ("[[either]]\nname = 1", "either[0].name = 1: must be a string"),
    ],
)
def test_types_in_files_are_strict(path: Path, text: str, expected: str) -> None:
    """TOML has types: a string is neither a number nor a truth value. One line for each key, in plain words."""
    assert problems(path, text)[0] == f"{path}: {expected}"


def test_values_of_variables_are_converted(path: Path) -> None:
    """The environment has only strings."""
    settings = load(path, "secs = 2", APP_ON="yes", APP_INNER__SIZE="5")
    assert (settings.on, settings.inner.size, settings.secs) == (True, 5, 2.0)


def test_all_mistakes_are_reported_at_once(path: Path) -> None:
    """Three mistakes do not take three starts to find."""
    assert len(problems(path, "wrong = 1\n[inner]\nsize = 0\nnames = 'x'")) == 3


def test_nul_characters(path: Path) -> None:
    """No path, argument or environment variable may contain one: it would fail where it is used."""
    assert problems(path, 'level = "a\\u0000b"\nentries = [{ name = "x" }, { name = "\\u0000" }]') == [
        f"{path}: level = 'a\\x00b': must not contain a NUL character",
        f"{path}: entries[1].name = '\\x00': must not contain a NUL character",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    """Messages name a missing file, a directory and a file that is not UTF-8."""
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(SettingsError, match=str(path)):
            read_toml(path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_toml(binary)


def test_environment_wins_over_the_file(path: Path) -> None:
    """This holds at the top level, in a table, in a table missing from the file, and in named tables."""
    settings = load(
        path,
        "level = 'info'\n[inner]\nsize = 5",
        APP_LEVEL="debug",
        APP_INNER__SIZE="7",
        APP_BY_NAME__X__SIZE="9",
        OTHER_LEVEL="error",
    )
    assert (settings.level, settings.inner.size, settings.by_name["x"].size) == ("debug", 7, 9)


def test_environment_gives_lists_and_tables_as_json(path: Path) -> None:
    """A variable may hold a whole list of tables, or a list inside a table."""
    settings = load(path, "", APP_ENTRIES='[{"name": "a"}, {"name": "b"}]', APP_INNER__NAMES='["x", "y"]')
    assert [entry.name for entry in settings.entries] == ["a", "b"]
    assert settings.inner.names == ["x", "y"]


def test_environment_value_that_only_looks_like_json(path: Path) -> None:
    """`[::1]:80` is an address: a value that starts with a bracket but does not parse as JSON is text."""
    assert load(path, "", APP_INNER__LISTEN="[::1]:80").inner.listen == "[::1]:80"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (
            "APP_INNER__SIZE",
            "much",
            "environment APP_INNER__SIZE: inner.size = 'much': must be a whole number",
        ),
        ("APP_INNER__SICE", "1", "environment APP_INNER__SICE: inner.sice: unknown key"),
        ("APP_INER__SIZE", "1", "environment APP_INER__SIZE: no such key 'iner.size'"),
        ("APP_ENTRIES__0__NAME", "a", "environment APP_ENTRIES__0__NAME: 'entries' is not a table"),
        ("APP_ENTRIES", "[{", "environment APP_ENTRIES: entries = '[{': must be a list"),
        ("APP_ENTRIES", '[{"nam": 1}]', "environment APP_ENTRIES: entries[0].nam"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(path: Path, variable: str, value: str, expected: str) -> None:
    """The message does not blame the file."""
    found = problems(path, "[[entries]]\nname = 'a'", **{variable: value})
    assert any(line.startswith(expected) for line in found), found


def test_other_programs_may_use_the_prefix(path: Path) -> None:
    """APP_URL is not a key of ours, and ignored."""
    assert load(path, "", APP_URL="http://x", APP_="", APP_API_KEY="k") == Outer()
