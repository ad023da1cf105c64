"""`cortex top`: the fleet on the whole screen, as it changes."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from cortex.cli.live.followed import FollowedFleet
from cortex.cli.live.screen import ORDERS, Order, screen
from shared.terminal.command_line import fail

LOOK_SECS = 0.25


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
        while True:
            live.update(_shown(followed, order), refresh=True)
            followed.changed.clear()
            key = _key(LOOK_SECS)
            if key in ("q", "Q", "\x1b", "\x04"):
                return 0
            if key == "s":
                order = ORDERS[(ORDERS.index(order) + 1) % len(ORDERS)]
    return 0


def _shown(followed: FollowedFleet, order: Order) -> RenderableType:
    fleet = followed.fleet
    if fleet is None:
        return Text(followed.problem or "")
    age_secs = time.monotonic() - followed.heard_at
    return screen(fleet, problem=followed.problem, order=order, now=time.time(), age_secs=age_secs)


def _key(secs: float) -> str | None:
    """A key that is pressed within this time."""
    ready, _, _ = select.select([sys.stdin], [], [], secs)
    return sys.stdin.read(1) if ready else None


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Keys arrive without Enter, and are not shown."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
