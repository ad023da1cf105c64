"""Tables: colours and wrapping on a terminal, plain text elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from shared.terminal.tables import Coloured, table

ROWS = [["NODE", "STATE"], ["beast", Coloured("down", "red")]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 40 columns, for standard output."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())


def test_text_is_plain_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert table(ROWS) == "NODE   STATE\nbeast  down"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    shown = table(ROWS)
    assert "\x1b[31mdown" in shown
    assert "\x1b[1mNODE" in shown


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_gets_no_colours(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    assert "\x1b[31m" not in table(ROWS)


def test_cells_wrap_at_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    assert len(table([["A"], ["x" * 100]]).splitlines()) == 4
