"""Events: what happens to the models, published to the listeners of `/events` and counted in the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from neuron.spec import InstanceKey
from shared.protocol import ModelView

QUEUE_LIMIT = 1000


@dataclass(frozen=True)
class Event:
    """One change. `number` increases while neuron runs; `data` is JSON."""

    number: int
    name: str
    data: str

    def encoded(self) -> bytes:
        """As a server-sent event. JSON has no bare line break, so one data line is enough."""
        return f"event: {self.name}\nid: {self.number}\ndata: {self.data}\n\n".encode()


@dataclass(eq=False)
class EventSubscriber:
    """The queue of one listener. A listener with `QUEUE_LIMIT` unread events is dropped, so that it cannot hold memory
    without bound; it gets a snapshot when it reconnects."""

    _queue: asyncio.Queue[Event | None] = field(default_factory=lambda: asyncio.Queue(QUEUE_LIMIT + 1))
    dropped: bool = False

    async def next(self) -> Event | None:
        """The next event; None when there will be no more."""
        return None if self.dropped else await self._queue.get()

    def put(self, event: Event) -> None:
        self.dropped = self.dropped or self._queue.qsize() >= QUEUE_LIMIT
        if not self.dropped:
            self._queue.put_nowait(event)

    def close(self) -> None:
        """The listener gets the events that are queued, and no more."""
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(None)


class EventHub:
    """Numbers events and queues each for every listener; never waits for one."""

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
        """A listener that receives every event published from now on."""
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


class LifecycleMetrics(Protocol):
    """The counters of the lifecycle."""

    def loaded(self, model_id: str, seconds: float) -> None: ...

    def restarted(self, model_id: str) -> None: ...

    def known(self, model_id: str) -> None: ...


@dataclass(frozen=True)
class ModelEvents:
    """Reports what happens to instances: state changes to the hub, loads and restarts to the metrics."""

    hub: EventHub
    metrics: LifecycleMetrics

    def changed(self, view: ModelView) -> None:
        self.metrics.known(view.id)
        self.hub.publish("model", view.model_dump_json())

    def loaded(self, model_id: str, seconds: float) -> None:
        self.metrics.loaded(model_id, seconds)

    def restarted(self, model_id: str) -> None:
        self.metrics.restarted(model_id)

    def removed(self, key: InstanceKey) -> None:
        """The instance has left the list of models."""
        self.hub.publish("removed", json.dumps({"id": key.model_id, "instance": key.instance}))
