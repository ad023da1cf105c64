"""The access line of each request, written in batches: each by itself would cost more than the relaying."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

FLUSH_SECS: Final = 0.1
MAX_LINES: Final = 256


class AccessLog:
    """Lines in the log's own format, at most FLUSH_SECS late. `write` gets whole lines; None turns the log off."""

    def __init__(self, write: Callable[[str], object] | None) -> None:
        self._write = write
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._stamp = ""

    @property
    def on(self) -> bool:
        return self._write is not None

    def line(self, text: str) -> None:
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        # Joined and not formatted: compiled, a format in an f-string costs as much as all the rest of this.
        millis = str(1000 + int((now - second) * 1000))[1:]
        self._lines.append(f"{self._stamp},{millis} INFO    cortex.access: {text}\n")
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECS, self.flush)
        elif len(self._lines) >= MAX_LINES:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        if lines and self._write is not None:
            self._write("".join(lines))
