"""The fleet for listeners that follow it: once as a whole, then only what changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from aiohttp import web

from cortex.api.fleet.view import FleetView
from shared.tasks import TaskSet, keep_running

TICK_SECS = 1.0
"""Between two looks at the fleet: 200 neurons change a hundred times a second, and people read numbers once."""
KEPT_CHANGES = 8
"""A listener that is further behind gets the whole again."""


class FleetChanges:
    """Looks at the fleet once per TICK_SECS for all listeners together, while there are any.

    A listener's place is the number of changes up to the event that it had last; None: it had none.
    """

    def __init__(self, view: FleetView) -> None:
        self._view = view
        self._listeners = 0
        self._tasks = TaskSet()
        self._ticking: asyncio.Task[Any] | None = None
        self._state: dict[str, Any] = {}
        self._changes: deque[bytes] = deque(maxlen=KEPT_CHANGES)
        self._count = 0
        self._whole: tuple[int, bytes] | None = None
        self._changed = asyncio.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Around all other calls of a listener."""
        if not self._listeners:
            self._look()
            self._ticking = self._tasks.spawn(keep_running("fleet changes", self._tick), name="fleet changes")
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1
            if not self._listeners and self._ticking is not None:
                self._ticking.cancel()

    def since(self, place: int | None) -> tuple[int, bytes]:
        """The listener's new place, and the server-sent events up to there: none, changes, or the whole."""
        if place is None or self._count - place > len(self._changes):
            return self._count, self._whole_event()
        behind = self._count - place
        return self._count, b"".join(list(self._changes)[len(self._changes) - behind :])

    async def beyond(self, place: int) -> None:
        """Waits for a change after this place."""
        while self._count == place:
            await self._changed.wait()

    async def close(self) -> None:
        await self._tasks.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECS)
            await self._view.count()
            self._look()

    def _look(self) -> None:
        state = self._view.keyed()
        patch = merge_patch(self._state, state)
        self._state = state
        if patch:
            self._count += 1
            self._changes.append(_event("change", patch))
            self._changed.set()
            self._changed = asyncio.Event()

    def _whole_event(self) -> bytes:
        if self._whole is None or self._whole[0] != self._count:
            self._whole = self._count, _event("fleet", self._state)
        return self._whole[1]


FLEET_CHANGES = web.AppKey("fleet_changes", FleetChanges)


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What makes `new` of `old`, as a JSON merge patch (RFC 7396): a field that is gone or None is null."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if before is value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            if changes := merge_patch(before, value):
                patch[name] = changes
        elif before != value:
            patch[name] = value
    return patch


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
