"""Ways of sending requests: a fixed number at a fixed concurrency, many streams at once, streams that stay open."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.load.check import AnswerCounts
from benchmarks.load.connection import Answer, ClientConnection
from benchmarks.load.pool import Pool


class _Run:
    """A fixed number of requests over the connections of a pool: each sends its next one when its answer is whole."""

    def __init__(self, pool: Pool, request: bytes, spec: AnswerSpec, count: int, pause: float) -> None:
        self._pool = pool
        self._request = request
        self._spec = spec
        self._unsent = self._unanswered = count
        self._pause = pause
        self._tasks: set[asyncio.Task[None]] = set()
        self.counted = AnswerCounts()
        self.over = asyncio.Event()

    def start(self, connection: ClientConnection) -> None:
        if self._unsent:
            self._unsent -= 1
            try:
                connection.send(self._request, self._done)
            except ConnectionError:  # closed between two answers, as a server may
                task = asyncio.ensure_future(self._reconnect())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _reconnect(self) -> None:
        try:
            connection = await self._pool.open()
            self._pool.connections.append(connection)
            connection.send(self._request, self._done)
        except OSError:  # ConnectionError is one
            self._count(None)

    def _done(self, connection: ClientConnection, answer: Answer | None) -> None:
        self._count(answer)
        if self._pause:
            asyncio.get_running_loop().call_later(self._pause, self.start, connection)
        else:
            self.start(connection)

    def _count(self, answer: Answer | None) -> None:
        self.counted.add(answer, self._spec)
        self._unanswered -= 1
        if not self._unanswered:
            self.over.set()


async def repeat(
    pool: Pool, request: bytes, spec: AnswerSpec, *, count: int, timeout: float, pause: float = 0.0, spread: float = 0.0
) -> AnswerCounts:
    """`count` requests over all connections of the pool; each connection pauses `pause` seconds after an answer, and
    the connections start over `spread` seconds. What has no answer after `timeout` seconds is a fault."""
    run = _Run(pool, request, spec, count, pause)
    loop = asyncio.get_running_loop()
    connections = pool.connections[:count]
    for number, connection in enumerate(connections):
        if spread:
            loop.call_later(spread * number / len(connections), run.start, connection)
        else:
            run.start(connection)
    try:
        await asyncio.wait_for(run.over.wait(), timeout)
    except asyncio.TimeoutError:
        run.counted.faults[f"no answer within {timeout:.0f} s"] += count - run.counted.answers - run.counted.failed
    return run.counted


async def hold_open(
    port: int,
    request: bytes,
    spec: AnswerSpec,
    *,
    count: int,
    per_second: float,
    timeout: float,
    when_open: Callable[[], Awaitable[None]],
) -> AnswerCounts:
    """Opens `count` streams, `per_second` of them, waits for each one's first byte, calls `when_open`, which has to let
    the engine end them, and waits for the ends."""
    counted = AnswerCounts()
    all_begun, all_ended = asyncio.Event(), asyncio.Event()
    begun = ended = 0
    connections: list[ClientConnection] = []

    def on_first() -> None:
        nonlocal begun
        begun += 1
        if begun + counted.failed >= count:
            all_begun.set()

    def on_end(answer: Answer | None) -> None:
        nonlocal ended
        counted.add(answer, spec)
        ended += 1
        if ended == count:
            all_ended.set()
        if begun + counted.failed >= count:
            all_begun.set()

    async def one() -> None:
        pool = Pool(port, 1)
        try:
            connection = await pool.open()
            connection.send(request, lambda _, answer: on_end(answer), on_first=on_first)
        except OSError:
            on_end(None)
            return
        connections.append(connection)

    try:
        batch = max(1, round(per_second / 50))
        for start in range(0, count, batch):
            await asyncio.gather(*(one() for _ in range(start, min(start + batch, count))))
            await asyncio.sleep(batch / per_second)
        await _within(all_begun, timeout)
        await when_open()
        await _within(all_ended, timeout)
        if count > ended:
            counted.faults["no end"] += count - ended
    finally:
        for connection in connections:
            connection.close()
    return counted


async def _within(event: asyncio.Event, timeout: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except asyncio.TimeoutError:
        return
