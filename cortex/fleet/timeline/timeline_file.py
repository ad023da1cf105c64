"""The timeline on disk: a line of JSON for each span that begins, changes or ends, and for each minute."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from cortex.fleet.timeline.spans import Minute, StatusSpan, StatusSpanId
from shared.system.files import replace_file

log = logging.getLogger(__name__)

NAME = "timeline.jsonl"
LONG_LINES = 50_000
"""A file with more is written again without what is out of date."""


class _Line(msgspec.Struct, omit_defaults=True):
    """One of both."""

    span: StatusSpan | None = None
    minute: Minute | None = None


_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(_Line)


class Kept(NamedTuple):
    """What a file has: spans that have ended, oldest end first. The `interrupted` among them were open in its last
    line, and end with it as far as anyone knows."""

    spans: Sequence[StatusSpan] = ()
    minutes: Sequence[Minute] = ()
    interrupted: Sequence[StatusSpan] = ()


class TimelineFile:
    """Owns the file. One that cannot be read or written costs a warning, and nothing else. `failed`: the last write."""

    def __init__(self, directory: Path, acquire_lock: Callable[[], None]) -> None:
        """`acquire_lock` raises OSError while another cortex writes in the directory; it is called before each write,
        in a thread."""
        self._path = directory / NAME
        self._acquire_lock = acquire_lock
        self._new: list[bytes] = []
        self._lines = 0
        self.failed = False

    @property
    def is_long(self) -> bool:
        """It is time for `replace`."""
        return self._lines > LONG_LINES

    def read(self, since: float) -> Kept:
        """What has ended since this Unix time, or not at all. Lines that do not read, as the last after a crash, are
        left out. Blocks."""
        try:
            content = self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return Kept()
        except OSError as error:
            log.warning("%s cannot be read, the timeline begins now: %s", self._path, error.strerror)
            return Kept()
        lines = content.splitlines()
        self._lines = len(lines)
        if lines and not content.endswith(b"\n"):
            self._new.append(b"\n")  # the next line must not continue one that a crash has cut
        spans: dict[StatusSpanId, StatusSpan] = {}
        minutes: list[Minute] = []
        last = 0.0
        for each in lines:
            try:
                line = _DECODER.decode(each)
            except msgspec.MsgspecError:
                continue
            if line.span is not None:
                spans[line.span.id] = line.span
                last = max(last, line.span.until or line.span.since)
            if line.minute is not None:
                minutes.append(line.minute)
                last = max(last, line.minute.at)
        interrupted = [msgspec.structs.replace(span, until=last) for span in spans.values() if span.until is None]
        ended = [span for span in spans.values() if span.until is not None] + interrupted
        return Kept(
            sorted((span for span in ended if span.until is not None and span.until >= since), key=_end),
            [minute for minute in minutes if minute.at >= since],
            [span for span in interrupted if last >= since],
        )

    def add(self, what: StatusSpan | Minute) -> None:
        """For the next `write`."""
        line = _Line(span=what) if isinstance(what, StatusSpan) else _Line(minute=what)
        self._new.append(_ENCODER.encode(line) + b"\n")

    async def write(self) -> None:
        """Appends what was added."""
        if self._new:
            lines, self._new = self._new, []
            await self._attempt(self._append, lines)

    async def replace(self, spans: Sequence[StatusSpan], minutes: Sequence[Minute]) -> None:
        """Writes the file again, with these alone."""
        self._new = []
        lines = [_Line(span=span) for span in spans] + [_Line(minute=minute) for minute in minutes]
        await self._attempt(self._write_whole, [_ENCODER.encode(line) + b"\n" for line in lines])

    async def _attempt(self, write: Callable[[list[bytes]], None], lines: list[bytes]) -> None:
        try:
            await asyncio.to_thread(write, lines)
        except OSError as error:
            if not self.failed:
                log.warning("the timeline cannot be kept in %s: %s", self._path, error.strerror or error)
            self.failed = True
            self._lines = LONG_LINES + 1  # what is missing is written with the whole
        else:
            if self.failed:
                log.info("the timeline is kept in %s again", self._path)
            self.failed = False

    def _append(self, lines: list[bytes]) -> None:
        self._acquire_lock()
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "ab") as file:  # noqa: PTH123 - by descriptor
            file.write(b"".join(lines))
        self._lines += len(lines)

    def _write_whole(self, lines: list[bytes]) -> None:
        self._acquire_lock()
        replace_file(self._path, b"".join(lines), durable=False)
        self._lines = len(lines)


def _end(span: StatusSpan) -> float:
    return span.until or 0.0
