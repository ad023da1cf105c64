"""Changes, passed on to listeners as they happen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

QUEUE_LIMIT = 1000


@dataclass(frozen=True)
class Event:
    """One change. `number` counts up while neuron lives; `data` is JSON."""

    number: int
    name: str
    data: str

    def encoded(self) -> bytes:
        """As a server-sent event. JSON has no bare line break, so one data line is enough."""
        return f"event: {self.name}\nid: {self.number}\ndata: {self.data}\n\n".encode()


@dataclass(eq=False)
class EventSubscriber:
    """One listener's events. One that lets `QUEUE_LIMIT` of them pile up is dropped: it starts over with a snapshot
    when it comes back, instead of holding memory here indefinitely."""

    _queue: asyncio.Queue[Event | None] = field(default_factory=lambda: asyncio.Queue(QUEUE_LIMIT + 1))
    dropped: bool = False

    async def next(self) -> Event | None:
        """The next event; None when there will be no more."""
        return None if self.dropped else await self._queue.get()

    def put(self, event: Event) -> None:
        if not self.dropped and self._queue.qsize() >= QUEUE_LIMIT:
            self.close()
        elif not self.dropped:
            self._queue.put_nowait(event)

    def close(self) -> None:
        self.dropped = True
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(None)


class EventHub:
    """Numbers events and hands each to every listener, without ever waiting for one."""

    def __init__(self) -> None:
        self._listeners: set[EventSubscriber] = set()
        self.last_number = 0

    def publish(self, name: str, data: str) -> None:
        self.last_number += 1
        event = Event(self.last_number, name, data)
        for listener in self._listeners:
            listener.put(event)

    @contextlib.contextmanager
    def listening(self) -> Iterator[EventSubscriber]:
        """A listener that gets everything published from now on."""
        listener = EventSubscriber()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Ends every listener's stream."""
        for listener in self._listeners:
            listener.close()
