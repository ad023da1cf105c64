"""The commands that documents show exist, with the options that they show; the backup of the ledger is one."""

from __future__ import annotations

import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cortex.cli.commands import app as cortex_app
from neuron.__main__ import app as neuron_app
from tests.contract.documents import TOP

DOCUMENTS = (TOP / "README.md", *sorted((TOP / "docs").rglob("*.md")))
PROGRAMS: dict[str, Any] = {"cortex": typer.main.get_command(cortex_app), "neuron": typer.main.get_command(neuron_app)}
SPAN = re.compile(r"`((?:cortex|neuron) [a-z]{2}[^`]*)`")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
IN_FENCE = re.compile(r"(?:^|[\s(]|bin/)((?:cortex|neuron) [a-z]{2}[^#|()\n]*)")


def commands(path: Path) -> Iterator[str]:
    """What a document shows in a code span, or on a line of a block without a language."""
    text = path.read_text(encoding="utf-8")
    fences = [block.replace("\\\n", " ") for language, block in FENCE.findall(text) if not language]
    yield from (found for block in fences for found in IN_FENCE.findall(block))
    yield from SPAN.findall(FENCE.sub("", text))


def problem(command: str) -> str | None:
    """Why the command line cannot work; None if its subcommand and options exist."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return str(error)
    here = PROGRAMS[words[0]]
    rest = words[1:]
    while rest and hasattr(here, "commands"):
        name = rest.pop(0)
        if name not in here.commands:
            return f"no command {name!r}"
        here = here.commands[name]
    known = {option for parameter in here.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    return f"no option {', '.join(sorted(given - known))}" if given - known - {"--help"} else None


def test_documented_commands_exist() -> None:
    shown = [(path.name, command) for path in DOCUMENTS for command in commands(path)]
    assert len(shown) > 50
    wrong = [f"{name}: `{command}`: {why}" for name, command in shown if (why := problem(command)) is not None]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("command", ["cortex lode MODEL", "cortex load --onn beast MODEL", "neuron estimate 'M"])
def test_a_wrong_command_is_found(command: str) -> None:
    assert problem(command) is not None


def test_the_backup_of_the_ledger_has_what_is_in_the_log(tmp_path: Path) -> None:
    """The command of docs/operating.md, on a database in use whose last rows are in the write-ahead log only."""
    text = (TOP / "docs" / "operating.md").read_text(encoding="utf-8")
    (shown,) = [block for _, block in FENCE.findall(text) if "sqlite3" in block]
    words = shlex.split(shown.replace("\\\n", " "))
    source, target = tmp_path / "cortex.db", tmp_path / "copy.db"
    assert words[-2:] == ["/var/lib/cortex/cortex.db", "/backup/cortex.db"]
    live = sqlite3.connect(source)
    live.execute("PRAGMA journal_mode = WAL")
    live.execute("CREATE TABLE used (tokens INTEGER)")
    live.execute("INSERT INTO used VALUES (7)")
    live.commit()
    assert (tmp_path / "cortex.db-wal").stat().st_size > 0
    subprocess.run([sys.executable, *words[1:-2], str(source), str(target)], check=True)
    copy = sqlite3.connect(target)
    assert copy.execute("SELECT tokens FROM used").fetchall() == [(7,)]
    live.close()
    copy.close()
