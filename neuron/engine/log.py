"""An engine's output file, and the one before it after a rotation. Everything here blocks: call it in a thread.

The engine holds the file's descriptor and appends (O_APPEND), so the file cannot be moved away from it. A rotation
copies it to `engine.log.1` and truncates it; the engine goes on at its beginning and does not notice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

MAX_READ = 512 * 1024  # bytes of one read
MAX_SIZE = 32 * 2**20  # bytes of each of the two files, about: engines log every request
_LINE_END = re.compile(rb"\r\n|\n|\r")  # progress bars redraw their line with a bare carriage return
# What stands at the end of a bar. Its line is ended by its next state, which may be a minute away.
_BAR = re.compile(rb"\d%.*\]\s*\Z", re.DOTALL)
_CATCHING_UP = 3  # copies of what was added during the copy before


class EngineLog:
    """The file `path`; a missing file reads as empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def previous(self) -> Path:
        """What was there before the last rotation."""
        return self.path.with_name(self.path.name + ".1")

    def tail(self, lines: int, *, max_bytes: int = MAX_READ) -> list[str]:
        """The last lines, at most `lines` of them and `max_bytes` together; blank ones left out. Goes back behind a
        rotation."""
        if lines <= 0:
            return []
        data, start = _end_of(self.path, max_bytes)
        if start == 0 and len(data) < max_bytes:
            before, start = _end_of(self.previous, max_bytes - len(data))
            data = before + data
        pieces = _LINE_END.split(data)
        if start > 0 and len(pieces) > 1:
            pieces = pieces[1:]  # the first one is most likely the rest of a line
        return [line for line in map(_text, pieces) if line.strip()][-lines:]

    def trim(self, *, max_bytes: int = MAX_SIZE, follower: LogFollower | None = None) -> bool:
        """Rotates a file of more than `max_bytes`. True when it is not larger than that afterwards.

        Of what its writer appends meanwhile only that is lost which comes between the last read and the truncation,
        a moment later: nothing, or a few lines (measured: a hundredth of what a process writes that does nothing else).
        `follower` is given what it has not read yet. Of a file
        that grew far over its bound, while no neuron was there, the last `max_bytes` are kept.

        The two files have twice `max_bytes`, three times while it copies. On a full disk the last 512 KiB are kept,
        and the truncation makes room again. (What an engine writes to a full disk is lost, and no rotation helps: it
        gets the error, and Python's logging in it goes on without the line.)
        """
        try:
            if self.path.stat().st_size <= max_bytes:
                return True
            try:
                self._copy_and_truncate(max_bytes, follower)
            except OSError as error:
                log.warning("%s cannot be rotated, so only its end is kept: %s", self.path, error)
                self._keep_end(follower)
        except FileNotFoundError:
            return True
        except OSError as error:
            log.warning("%s cannot be trimmed: %s", self.path, error)
            return False
        return True

    def _copy_and_truncate(self, max_bytes: int, follower: LogFollower | None) -> None:
        new = self.previous.with_name(self.previous.name + ".new")
        try:
            with self.path.open("rb") as source:
                source.seek(max(0, source.seek(0, os.SEEK_END) - max_bytes))
                with _private(new) as copy:
                    for _ in range(_CATCHING_UP):
                        shutil.copyfileobj(source, copy, MAX_READ)
                new.replace(self.previous)
                if follower is not None:
                    follower.read_on()
                start = source.tell()
                last = source.read()
                os.truncate(self.path, 0)  # at once: what comes in between is lost
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        if follower is not None:
            follower.truncated(last, start)
        try:
            with self.previous.open("ab") as copy:
                copy.write(last)
        except OSError as error:
            log.warning("%s lacks its last %d bytes: %s", self.previous, len(last), error)

    def _keep_end(self, follower: LogFollower | None) -> None:
        self.previous.unlink(missing_ok=True)
        if follower is not None:
            follower.read_on()
        end, start = _end_of(self.path, MAX_READ)
        os.truncate(self.path, 0)
        if follower is not None:
            follower.truncated(end, start)
        with _private(self.previous) as file:
            file.write(end)


class LogFollower:
    """Reads what was added since the last time, line by line.

    Of a file that is larger than MAX_READ when it is first looked at (of an engine that was running before this neuron)
    only that much of the end is read.
    """

    def __init__(self, log: EngineLog) -> None:
        self._log = log
        self.from_start = True
        """Whether it has read all there was from the beginning."""
        self.size = 0
        """Of the file, in bytes, when it was last looked at."""
        self._position: int | None = None
        self._found: list[str] = []  # and not given out yet
        self._partial = b""
        self._shown = b""  # a bar that was given out before its line ended

    @property
    def behind(self) -> bool:
        """True while there was more to read than one read takes."""
        return self._position is not None and self._position < self.size

    @property
    def begun(self) -> list[str]:
        """The last line as far as it was written and not given out; none or one."""
        line = self._partial.rstrip()
        return [] if not line or line == self._shown else [_text(line)]

    def new_lines(self) -> list[str]:
        """The lines that came since, blank ones left out, and what a progress bar shows now; at most MAX_READ bytes are
        read, what is further behind comes next time."""
        self._take(self._read())
        lines, self._found = self._found, []
        return lines

    def read_on(self) -> None:
        """Reads to the end; what it finds comes with the next `new_lines`."""
        while data := self._read():
            self._take(data)

    def truncated(self, last: bytes, start: int) -> None:
        """The file was truncated, and this is what stood there from byte `start` on, which is not behind what was read
        so far. A line that was begun goes on at the file's beginning."""
        if self._position is not None:
            self._take(last[self._position - start :])
            self._position = 0

    def rest(self) -> list[str]:
        """The line that was begun and not ended, once its writer is gone; after all of `new_lines`."""
        lines, self._partial = self.begun, b""
        return lines

    def _read(self) -> bytes:
        try:
            with self._log.path.open("rb") as file:
                self.size = file.seek(0, os.SEEK_END)
                if self._position is None:
                    self._position = max(0, self.size - MAX_READ)
                    self.from_start = self._position == 0 and not self._log.previous.exists()
                if self.size < self._position:  # truncated by another program
                    self._position, self._partial = 0, b""
                file.seek(self._position)
                data = file.read(MAX_READ)
        except FileNotFoundError:
            return b""
        self._position += len(data)
        return data

    def _take(self, data: bytes) -> None:
        if not data:
            return
        *whole, self._partial = _LINE_END.split(self._partial + data)
        self._partial = self._partial[-MAX_READ:]
        if whole and self._shown and whole[0].rstrip() == self._shown:
            whole = whole[1:]
        if whole:
            self._shown = b""
        bar = self._partial.rstrip()
        if _BAR.search(bar) and bar != self._shown:
            whole.append(bar)
            self._shown = bar
        self._found += [line for line in map(_text, whole) if line.strip()]


def _end_of(path: Path, max_bytes: int) -> tuple[bytes, int]:
    """The last bytes of a file, and where in it they begin."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - max_bytes)
            file.seek(start)
            return file.read(max_bytes), start
    except FileNotFoundError:
        return b"", 0


def _private(path: Path) -> BinaryIO:
    """A new file for this user alone, in place of any other."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip()
