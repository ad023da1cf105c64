"""A command on a terminal of its own, as a person runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator

from tests.processes import eventually

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Terminal:
    """Owns the command's process and its side of the terminal. `text`: all that it has shown, without escapes."""

    def __init__(self, command: list[str], environment: dict[str, str], size: tuple[int, int]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", **environment}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", bytes(self._shown).decode("utf-8", "replace"))

    def until(self, *words: str) -> None:
        """Waits until all of them have been shown."""
        eventually(lambda: all(word in self.text for word in words), f"{words} on the terminal", within_secs=60)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def ended(self) -> int:
        """Its exit status."""
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        os.close(self._ours)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(self._ours, 65536):
                self._shown += data


@contextlib.contextmanager
def on_a_terminal(*command: str, size: tuple[int, int] = (40, 140), **environment: str) -> Iterator[Terminal]:
    """The command, killed at the end if it still runs. `size`: lines and columns."""
    terminal = Terminal(list(command), environment, size)
    try:
        yield terminal
    finally:
        terminal.close()
