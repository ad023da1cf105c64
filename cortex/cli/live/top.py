"""`cortex top`: the fleet on the whole screen, as it changes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from cortex.cli.live.followed import FollowedFleet
from cortex.cli.live.screen import ORDERS, Order, footer, screen, visible
from shared.terminal.command_line import fail

LOOK_SECS = 0.25
_KEY = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])|.", re.DOTALL)
_END = ("q", "Q", "\x1b", "\x04")
_LINES = {"\x1b[A": -1, "\x1bOA": -1, "k": -1, "\x1b[B": 1, "\x1bOB": 1, "j": 1}
_PAGES = {"\x1b[5~": -1, "\x1b[6~": 1, " ": 1}


def run_top(url: str, order: Order) -> int:
    """Until q or Ctrl-C. Fails if cortex does not answer at first."""
    console = Console()
    if not console.is_terminal or not sys.stdin.isatty():
        fail("cortex", "top needs a terminal; `cortex status --watch` or `--json` print to files and pipes")
    followed = FollowedFleet(url)
    followed.changed.wait()
    if followed.fleet is None:
        fail("cortex", followed.problem or "cortex tells nothing")
    with (
        _single_keys(),
        Live(console=console, screen=True, auto_refresh=False) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        first = 0
        while True:
            shown, first = _shown(console, followed, order, first)
            live.update(shown, refresh=True)
            followed.changed.clear()
            for key in _keys(LOOK_SECS):
                if key in _END:
                    return 0
                if key == "s":
                    order = ORDERS[(ORDERS.index(order) + 1) % len(ORDERS)]
                first += _LINES.get(key, 0) + _PAGES.get(key, 0) * (console.height - 2)
    return 0


def _shown(console: Console, followed: FollowedFleet, order: Order, first: int) -> tuple[RenderableType, int]:
    """What fits on the screen from this line on, and the first line shown."""
    fleet = followed.fleet
    if fleet is None:
        return Text(followed.problem or ""), 0
    age_secs, width, height = time.monotonic() - followed.heard_at, console.width, console.height - 1
    whole = screen(fleet, problem=followed.problem, order=order, now=time.time(), age_secs=age_secs, width=width)
    lines = console.render_lines(whole)
    seen, first = visible(lines, first=first, height=max(1, height))
    last = footer(order, first=first, shown=len(seen), total=len(lines))
    return Group(SegmentLines(seen, new_lines=True), last), first


def _keys(secs: float) -> list[str]:
    """The keys that are pressed within this time. Read from the descriptor, because `sys.stdin` would keep some of them
    in its buffer. An arrow key sends several characters, of which the first alone is Escape."""
    ready, _, _ = select.select([sys.stdin], [], [], secs)
    if not ready:
        return []
    pressed = os.read(sys.stdin.fileno(), 1024).decode(errors="replace")
    return _KEY.findall(pressed) if pressed else ["\x04"]  # the terminal is gone


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Keys arrive without Enter, and are not shown."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
