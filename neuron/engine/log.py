"""An engine's output file and its rotation. Everything here blocks: call it in a thread.

The engine has the file open and appends to it (O_APPEND), so renaming it would not help. A rotation copies the file to
`engine.log.1` and truncates it; the engine continues at its beginning.
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
MAX_SIZE = 32 * 2**20  # bytes of each of the two files, approximately: engines log every request
_LINE_END = re.compile(rb"\r\n|\n|\r")  # progress bars redraw their line with a bare carriage return
# The end of a progress bar. Its next state, which ends its line, may come a minute later.
_BAR = re.compile(rb"\d%.*\]\s*\Z", re.DOTALL)
_COPY_ROUNDS = 3  # each copies what was appended during the round before


class EngineLog:
    """The file `path`; a missing file reads as empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def previous(self) -> Path:
        """The copy made by the last rotation."""
        return self.path.with_name(self.path.name + ".1")

    def tail(self, lines: int, *, max_bytes: int = MAX_READ) -> list[str]:
        """At most `lines` of the last lines, from at most `max_bytes`, without blank ones. Includes lines from before
        the last rotation."""
        if lines <= 0:
            return []
        data, start = _end_of(self.path, max_bytes)
        if start == 0 and len(data) < max_bytes:
            before, start = _end_of(self.previous, max_bytes - len(data))
            data = before + data
        pieces = _LINE_END.split(data)
        if start > 0 and len(pieces) > 1:
            pieces = pieces[1:]  # the first piece is probably an incomplete line
        return [line for line in map(_text, pieces) if line.strip()][-lines:]

    def trim(self, *, max_bytes: int = MAX_SIZE, follower: LogFollower | None = None) -> bool:
        """Rotates a file larger than `max_bytes`. True when the file is not larger afterwards.

        Lines that the engine appends between the last read and the truncation are lost: usually none (measured: 1 % of
        the output of a process that only writes). `follower` gets what it has not read yet. If the file grew far beyond
        the limit while no neuron ran, its last `max_bytes` are kept.

        Both files together take twice `max_bytes`, three times during the copy. On a full disk only the last 512 KiB
        are kept, and the truncation frees space. (What an engine writes to a full disk is lost: it gets an error, and
        Python's logging skips the line.)
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
                    for _ in range(_COPY_ROUNDS):
                        shutil.copyfileobj(source, copy, MAX_READ)
                new.replace(self.previous)
                if follower is not None:
                    follower.read_to_end()
                start = source.tell()
                last = source.read()
                os.truncate(self.path, 0)  # immediately: what is appended in between is lost
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
            follower.read_to_end()
        end, start = _end_of(self.path, MAX_READ)
        os.truncate(self.path, 0)
        if follower is not None:
            follower.truncated(end, start)
        with _private(self.previous) as file:
            file.write(end)


class LogFollower:
    """Reads appended lines.

    If the file is larger than MAX_READ at the first read (an adopted engine), only its last MAX_READ bytes are read.
    """

    def __init__(self, log: EngineLog) -> None:
        self._log = log
        self.from_start = True
        """True when it has read the output from its beginning."""
        self.size = 0
        """Size of the file at the last read, in bytes."""
        self._position: int | None = None
        self._found: list[str] = []  # not returned yet
        self._partial = b""
        self._shown = b""  # a progress bar that was returned before its line ended

    @property
    def behind(self) -> bool:
        """True when the last read did not reach the end of the file."""
        return self._position is not None and self._position < self.size

    @property
    def partial(self) -> list[str]:
        """The incomplete last line, unless it was returned already: a list of one or none."""
        line = self._partial.rstrip()
        return [] if not line or line == self._shown else [_text(line)]

    def new_lines(self) -> list[str]:
        """The lines appended since the last call, without blank ones, and the present state of a progress bar. Reads at
        most MAX_READ bytes; the next call continues there."""
        self._take(self._read())
        lines, self._found = self._found, []
        return lines

    def read_to_end(self) -> None:
        """Reads to the end; the next `new_lines` returns the lines."""
        while data := self._read():
            self._take(data)

    def truncated(self, last: bytes, start: int) -> None:
        """Call after truncating the file; `last` is its former content from byte `start` on, which is not past the
        present position. An incomplete line continues at the beginning of the file."""
        if self._position is not None:
            self._take(last[self._position - start :])
            self._position = 0

    def rest(self) -> list[str]:
        """The incomplete last line, once the engine is gone and all of `new_lines` is read."""
        lines, self._partial = self.partial, b""
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
    """The last bytes of a file, and their offset."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - max_bytes)
            file.seek(start)
            return file.read(max_bytes), start
    except FileNotFoundError:
        return b"", 0


def _private(path: Path) -> BinaryIO:
    """A new file that only this user can read; replaces an existing one."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip()
