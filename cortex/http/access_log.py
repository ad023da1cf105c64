"""The access log: one line per request, written in batches. A write per line would cost more than the relaying."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Final

FLUSH_SECS: Final = 0.1
MAX_LINES: Final = 256

# Not a format specifier: compiled, that costs as much as all the rest of a line.
_MILLIS: Final = [f"{number:03}" for number in range(1000)]


class AccessLog:
    """Writes lines in the format of `shared.logs`, at most FLUSH_SECS late.

    `write` receives complete lines; None turns the log off. `as_json`: one JSON object a line instead of text.
    """

    def __init__(self, write: Callable[[str], object] | None, *, as_json: bool = False) -> None:
        self._write = write
        self._as_json = as_json
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._stamp = ""

    @property
    def on(self) -> bool:
        return self._write is not None

    def line(self, text: str, request_id: str) -> None:
        """Adds a line. `text` must contain the request's id."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            if self._as_json:
                self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            else:
                self._stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        millis = _MILLIS[int((now - second) * 1000)]
        if self._as_json:
            fields = {
                "time": f"{self._stamp}.{millis}Z",
                "level": "info",
                "logger": "cortex.access",
                "message": text,
                "request_id": request_id,
                "exception": None,
            }
            self._lines.append(json.dumps(fields) + "\n")
        else:
            self._lines.append(f"{self._stamp},{millis} INFO    cortex.access: {text}\n")
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECS, self.flush)
        elif len(self._lines) >= MAX_LINES:
            self.flush()

    def flush(self) -> None:
        """Writes the lines collected so far."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        if lines and self._write is not None:
            self._write("".join(lines))
