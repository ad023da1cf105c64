"""One engine's output: followed for its whole life, its last lines in memory, its files bounded."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from neuron.engine.log import MAX_SIZE, EngineLog, LogFollower
from shared.tasks import timeout

log = logging.getLogger(__name__)

LOADING_PAUSE_SECS = 0.2
LOADED_PAUSE_SECS = 1.0
"""A look at a file that has not grown is an `open` and an `lseek` in a thread."""

RING_LINES = 2000
RING_CHARS = 512 * 1024
MAX_UNREAD = 10_000  # lines


class EngineOutput:
    """Owns the follower, the ring and the rotation of the file `path`; the only one that rotates it.

    The engine may have been running before: then the ring starts with what `engine.log` ends with. While the disk is
    full the engine's own writes fail, so neither the file nor the ring gets what it says then.
    """

    def __init__(self, path: Path, *, max_file_bytes: int = MAX_SIZE) -> None:
        self.file = EngineLog(path)
        """For who wants more than the ring has, in a thread."""
        self._follower = LogFollower(self.file)
        self._ring = LineRing(max_lines=RING_LINES, max_chars=RING_CHARS)
        self._max_file_bytes = max_file_bytes
        self._listeners: list[Callable[[list[str]], None]] = []
        self._looking: asyncio.Task[None] | None = None
        self._rotate_above = max_file_bytes
        self._unreadable = False
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """The engine is gone, and all it said is known."""
        return self._closed.is_set()

    async def follow(self, on_lines: Callable[[list[str]], None], pause: Callable[[], float]) -> None:
        """Reads on until it is cancelled or `close` is called, looking again every `pause()` seconds.

        `on_lines` gets what is new, each line once and in order; and an empty list after each look, so that what
        depends on the clock can be done there too. It must not block. (To follow again after a cancellation is fine:
        it goes on where the last one was.)
        """
        with self._telling(on_lines):
            while not self.closed:
                await self.look()
                on_lines([])
                await self.pause(pause())

    async def tail(self, lines: int) -> list[str]:
        """The last lines, at most `lines` of them, up to this moment: from memory where that has enough, else from the
        files, of which the last 512 KiB are looked at."""
        await self.look()
        if len(self._ring) >= lines or (self._follower.from_start and not self._ring.dropped):
            return self.in_memory(lines)
        try:
            return await asyncio.to_thread(self.file.tail, lines)
        except OSError as error:
            log.warning("%s cannot be read, so only the last lines are told: %s", self.file.path, error)
            return self.in_memory(lines)

    def in_memory(self, lines: int, *, whole: bool = False) -> list[str]:
        """The last lines that were read, at most `lines` of them, without a look for more. The last may be a line that
        was only begun, unless they must be `whole`."""
        begun = [] if whole else self._follower.begun[:lines]
        return self._ring.tail(lines - len(begun)) + begun

    @contextmanager
    def listening(self) -> Iterator[LineReader]:
        """A reader of what comes from now on, at its own pace."""
        listener = LineReader(self)
        with self._telling(listener.take):
            yield listener

    async def close(self) -> None:
        """The engine is gone: reads its last output, and ends `follow` and all listeners."""
        await self.look()
        self._tell(self._follower.rest())
        self._closed.set()

    @contextmanager
    def _telling(self, on_lines: Callable[[list[str]], None]) -> Iterator[None]:
        self._listeners.append(on_lines)
        try:
            yield
        finally:
            self._listeners.remove(on_lines)

    def _tell(self, lines: list[str]) -> None:
        if lines:
            self._ring.extend(lines)
            for on_lines in list(self._listeners):
                on_lines(lines)

    async def look(self) -> None:
        """Reads to the end. One reader at a time; it does not stop when its caller is cancelled, since what it has
        read would be lost."""
        if self._looking is not None and not self._looking.done():
            await asyncio.shield(self._looking)  # it may have been past what is asked for
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._read(), name=f"read {self.file.path}")
        await asyncio.shield(self._looking)

    async def _read(self) -> None:
        try:
            while True:
                self._tell(await asyncio.to_thread(self._step))
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
            # Not at every look, when it does not work: once more after as much again.
            self._rotate_above = self._max_file_bytes if bounded else self._follower.size + self._max_file_bytes
        return lines

    async def pause(self, secs: float) -> None:
        """Waits, but not beyond the engine's end."""
        try:
            async with timeout(secs):
                await self._closed.wait()
        except asyncio.TimeoutError:
            return


class LineReader:
    """Lines for one reader. One that falls 10,000 lines behind misses the oldest of them."""

    def __init__(self, output: EngineOutput) -> None:
        self._output = output
        self._unread: deque[str] = deque(maxlen=MAX_UNREAD)

    async def start(self, lines: int) -> list[str]:
        """The last lines in memory, at most `lines` of them: `next` goes on right behind them."""
        await self._output.look()
        self._unread.clear()
        return self._output.in_memory(lines, whole=True)

    async def next(self, pause_secs: float) -> list[str] | None:
        """What came, looking for it; an empty list when nothing did for `pause_secs`; None after the engine's end."""
        await self._output.look()
        if not self._unread and not self._output.closed:
            await self._output.pause(pause_secs)
        lines = list(self._unread)
        self._unread.clear()
        return lines if lines or not self._output.closed else None

    def take(self, lines: list[str]) -> None:
        self._unread.extend(lines)


class LineRing:
    """At most `max_lines` lines and `max_chars` characters together; a longer line than that is kept alone."""

    def __init__(self, *, max_lines: int, max_chars: int) -> None:
        self._max_lines = max_lines
        self._max_chars = max_chars
        self._lines: deque[str] = deque()
        self._chars = 0
        self.dropped = False
        """Whether there were more lines than it holds."""

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
        """The last `lines` of them, or all."""
        return list(islice(self._lines, max(len(self._lines) - lines, 0), None))
