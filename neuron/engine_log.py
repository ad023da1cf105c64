"""An engine's output file, read in bounded pieces. All reads block: call them in a thread."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

log = logging.getLogger(__name__)

MAX_READ = 512 * 1024  # bytes of one read
MAX_SIZE = 64 * 2**20  # bytes of a log file, about: vLLM writes a line for each request
_LINE_END = re.compile(rb"\r\n|\n|\r")  # progress bars redraw their line with a bare carriage return


class EngineLog:
    """The file `path`; one that is not there reads as empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tail(self, lines: int, *, max_bytes: int = MAX_READ) -> list[str]:
        """The last lines, at most `lines` of them and `max_bytes` together; blank ones left out."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                start = max(0, size - max_bytes)
                file.seek(start)
                pieces = _LINE_END.split(file.read(max_bytes))
        except FileNotFoundError:
            return []
        if start > 0 and len(pieces) > 1:
            pieces = pieces[1:]  # the first one is most likely the rest of a line
        return [line for line in map(_text, pieces) if line.strip()][-lines:] if lines > 0 else []

    def trim(self, *, max_bytes: int = MAX_SIZE) -> None:
        """Cuts a file of more than `max_bytes` down to its end. Its writer, which appends, does not notice."""
        try:
            if self.path.stat().st_size > max_bytes:
                last = self.tail(sys.maxsize)
                os.truncate(self.path, 0)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in last))
        except OSError:
            log.warning("%s cannot be trimmed", self.path, exc_info=True)


class LogFollower:
    """Reads what was added since the last time, line by line."""

    def __init__(self, log: EngineLog) -> None:
        self._path = log.path
        self._position = 0
        self._partial = b""

    def new_lines(self) -> list[str]:
        """The whole lines that came since; at most MAX_READ bytes are read, what is further behind comes next time."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._position:  # truncated
                    self._position, self._partial = 0, b""
                file.seek(self._position)
                data = file.read(MAX_READ)
        except FileNotFoundError:
            return []
        self._position += len(data)
        *whole, self._partial = _LINE_END.split(self._partial + data)
        self._partial = self._partial[-MAX_READ:]
        return [line for line in map(_text, whole) if line.strip()]


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip()
