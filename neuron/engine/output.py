"""One engine's output: follows the log file, keeps the last lines in memory, limits the size of the file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from neuron.engine.file_watch import FileWatch
from neuron.engine.log import MAX_SIZE, EngineLog, LogFollower
from shared.tasks import first_of, timeout

log = logging.getLogger(__name__)

LOADING_PAUSE_SECS = 0.2
LOADED_PAUSE_SECS = 1.0
"""Reading a file that has not grown costs an `open` and an `lseek` in a thread."""
MIN_PAUSE_SECS = 0.01

RING_LINES = 2000
RING_CHARS = 512 * 1024
MAX_UNREAD = 10_000  # lines


class EngineOutput:
    """Owns the follower, the line ring and the rotation of the file `path`.

    For an adopted engine the ring starts with the end of `engine.log`. While the disk is full, the engine's writes
    fail, and what it writes then is lost.
    """

    def __init__(self, path: Path, *, max_file_bytes: int = MAX_SIZE) -> None:
        self.file = EngineLog(path)
        """For reading more than the ring holds, in a thread."""
        self._follower = LogFollower(self.file)
        self._ring = LineRing(max_lines=RING_LINES, max_chars=RING_CHARS)
        self._max_file_bytes = max_file_bytes
        self._listeners: list[Callable[[list[str]], None]] = []
        self._reading: asyncio.Task[None] | None = None
        self._rotate_above = max_file_bytes
        self._unreadable = False
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """True when the engine is gone and all its output is read."""
        return self._closed.is_set()

    async def follow(
        self,
        on_lines: Callable[[list[str]], None],
        pause: Callable[[], float],
        *,
        at_once: Callable[[], bool] = lambda: False,
    ) -> None:
        """Reads every `pause()` seconds until it is cancelled or `close` is called, and as long as `at_once()` is true
        also when the engine writes.

        `on_lines` gets new lines, each once and in order, and an empty list after each read, for work that depends on
        the time. It must not block. A call after a cancellation continues where the last one stopped.
        """
        written = asyncio.Event()
        with self._subscribed(on_lines), contextlib.closing(FileWatch(self.file.path, written.set)) as watch:
            while not self.closed:
                written.clear()
                await self.read()
                on_lines([])
                if at_once():
                    await self._until_written(written, pause())
                else:
                    watch.close()
                    await self.pause(pause())

    async def _until_written(self, written: asyncio.Event, secs: float) -> None:
        """Waits for the engine to write or end, at most `secs`. An engine that writes all the time is read 100 times a
        second."""
        await first_of({"written": written.wait(), "closed": self._closed.wait()}, timeout_secs=secs)
        await self.pause(MIN_PAUSE_SECS)

    async def tail(self, lines: int) -> list[str]:
        """At most `lines` of the last lines up to now: from memory if that has enough, otherwise from the last 512 KiB
        of the files."""
        await self.read()
        if len(self._ring) >= lines or (self._follower.from_start and not self._ring.dropped):
            return self.in_memory(lines)
        try:
            return await asyncio.to_thread(self.file.tail, lines)
        except OSError as error:
            log.warning("%s cannot be read, so only the lines in memory are returned: %s", self.file.path, error)
            return self.in_memory(lines)

    def in_memory(self, lines: int, *, complete: bool = False) -> list[str]:
        """At most `lines` of the last lines read so far. The last may be incomplete, unless `complete` is set."""
        partial = [] if complete else self._follower.partial[:lines]
        return self._ring.tail(lines - len(partial)) + partial

    @contextlib.contextmanager
    def listening(self) -> Iterator[LineReader]:
        """A reader that gets new lines from now on, at its own pace."""
        listener = LineReader(self)
        with self._subscribed(listener.take):
            yield listener

    @contextlib.contextmanager
    def counting(self, counts: Callable[[str], bool]) -> Iterator[LineCount]:
        """A count of the lines from now on for which `counts` is true."""
        count = LineCount(self, counts)
        with self._subscribed(count.take):
            yield count

    @property
    def partial_chars(self) -> int:
        """Characters of the incomplete line at the end, as of the last read."""
        return sum(map(len, self._follower.partial))

    async def close(self) -> None:
        """Call when the engine is gone: reads its last output and ends `follow` and all readers."""
        await self.read()
        self._publish(self._follower.rest())
        self._closed.set()

    @contextlib.contextmanager
    def _subscribed(self, on_lines: Callable[[list[str]], None]) -> Iterator[None]:
        self._listeners.append(on_lines)
        try:
            yield
        finally:
            self._listeners.remove(on_lines)

    def _publish(self, lines: list[str]) -> None:
        if lines:
            self._ring.extend(lines)
            for on_lines in list(self._listeners):
                on_lines(lines)

    async def read(self) -> None:
        """Reads to the end of the file. One read runs at a time; it survives the cancellation of its caller, because
        the lines read would be lost."""
        if self._reading is not None and not self._reading.done():
            await asyncio.shield(self._reading)  # it may have passed the present end already
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name=f"read {self.file.path}")
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        try:
            while True:
                self._publish(await asyncio.to_thread(self._step))
                if not self._follower.behind:
                    break
        except OSError as error:
            if not self._unreadable:
                log.warning("%s cannot be read: %s", self.file.path, error)
            self._unreadable = True
        else:
            self._unreadable = False

    def _step(self) -> list[str]:
        lines = self._follower.new_lines()
        if self._follower.size > self._rotate_above:
            bounded = self.file.trim(max_bytes=self._max_file_bytes, follower=self._follower)
            lines += self._follower.new_lines()
            # If the rotation fails, do not retry at every read but once the file has grown by the limit again.
            self._rotate_above = self._max_file_bytes if bounded else self._follower.size + self._max_file_bytes
        return lines

    async def pause(self, secs: float) -> None:
        """Waits for `secs`, or until the engine is gone."""
        try:
            async with timeout(secs):
                await self._closed.wait()
        except asyncio.TimeoutError:
            return


class LineReader:
    """New lines for one reader. A reader that is 10,000 lines behind loses the oldest."""

    def __init__(self, output: EngineOutput) -> None:
        self._output = output
        self._unread: deque[str] = deque(maxlen=MAX_UNREAD)

    async def start(self, lines: int) -> list[str]:
        """At most `lines` of the last lines in memory; `next` continues after them."""
        await self._output.read()
        self._unread.clear()
        return self._output.in_memory(lines, complete=True)

    async def next(self, pause_secs: float) -> list[str] | None:
        """Reads new lines; an empty list when none came for `pause_secs`, None after the engine's end."""
        await self._output.read()
        if not self._unread and not self._output.closed:
            await self._output.pause(pause_secs)
        lines = list(self._unread)
        self._unread.clear()
        return lines if lines or not self._output.closed else None

    def take(self, lines: list[str]) -> None:
        self._unread.extend(lines)


class LineCount:
    """Counts the lines of an output for which `counts` is true."""

    def __init__(self, output: EngineOutput, counts: Callable[[str], bool]) -> None:
        self._output = output
        self._counts = counts
        self._lines = 0

    async def now(self) -> tuple[int, int]:
        """The complete lines up to now, and the characters of the incomplete one after them."""
        await self._output.read()
        return self._lines, self._output.partial_chars

    def take(self, lines: list[str]) -> None:
        self._lines += sum(map(self._counts, lines))


class LineRing:
    """The last lines of an output: at most `max_lines` lines of `max_chars` characters in total, or one longer line."""

    def __init__(self, *, max_lines: int, max_chars: int) -> None:
        self._max_lines = max_lines
        self._max_chars = max_chars
        self._lines: deque[str] = deque()
        self._chars = 0
        self.dropped = False
        """True when earlier lines were dropped."""

    def __len__(self) -> int:
        return len(self._lines)

    def extend(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._lines.append(line)
            self._chars += len(line)
            while len(self._lines) > self._max_lines or (self._chars > self._max_chars and len(self._lines) > 1):
                self._chars -= len(self._lines.popleft())
                self.dropped = True

    def tail(self, lines: int) -> list[str]:
        """At most the last `lines` lines."""
        return list(islice(self._lines, max(len(self._lines) - lines, 0), None))
