"""Tables for the commands' output."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence, Set

_UNLIMITED_COLUMNS = 1_000_000


class Coloured(str):
    """A cell that has a colour on a terminal: `Coloured("down", "red")`."""

    __slots__ = ("colour",)

    colour: str

    def __new__(cls, text: str, colour: str) -> Coloured:
        cell = super().__new__(cls, text)
        cell.colour = colour
        return cell


def table(rows: Sequence[Sequence[object]], *, right: Set[int] = frozenset()) -> str:
    """Aligned columns, two spaces apart, without a final newline. The first row is the head; the columns in `right`
    are flush right.

    On a terminal cells wrap at its width, the head is bold, and `Coloured` cells have their colour unless NO_COLOR is
    set. Elsewhere the text is plain, and a row stays on one line, for scripts.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for column in range(len(rows[0])):
        grid.add_column(justify="right" if column in right else "left", overflow="fold", no_wrap=not terminal)
    for number, row in enumerate(rows):
        cells = (Text(str(cell), cell.colour if isinstance(cell, Coloured) else "") for cell in row)
        grid.add_row(*cells, style="bold" if number == 0 else None)
    console = Console(
        file=io.StringIO(),
        width=shutil.get_terminal_size().columns if terminal else _UNLIMITED_COLUMNS,
        force_terminal=terminal,
        legacy_windows=False,
    )
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
