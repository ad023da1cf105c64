"""The fleet's last 24 hours: which model was where, swaps, failures, and who waited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

import msgspec

from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import Fleet, RouteChanges
from cortex.fleet.timeline.spans import Cause, Minute, StatusSpan, StatusSpanId, continues, evicted, follow, seen
from cortex.fleet.timeline.timeline_file import Kept, TimelineFile
from cortex.routing.replica import ReplicaKey
from shared.protocol import ModelStatus
from shared.tasks import first_of

HOURS = 24.0
LOOK_SECS = 1.0
"""Between two looks, if no status changes: for who waits."""
LOADING_LOOK_SECS = 0.1
"""The same while a model loads: its phases may be short."""
MINUTE_SECS = 60.0
WRITE_SECS = 2.0
RETRY_SECS = 30.0
"""After a write that failed."""
MOST_SPANS = 20_000
"""The oldest are forgotten first."""


class ModelCounts(NamedTuple):
    """Requests since cortex began, by model: all that were answered, and those that ended in an error."""

    answered: Mapping[str, int]
    errors: Mapping[str, int]


class Timeline:
    """Owns the timeline, in memory and, if there is one, in the file. Looks at the fleet after each change of a status,
    and at least once per LOOK_SECS or LOADING_LOOK_SECS."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        causes: Callable[[], Iterable[Cause]],
        waiting: Callable[[], Mapping[str, int]],
        counts: Callable[[], Awaitable[ModelCounts]],
        file: TimelineFile | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Continues the file's timeline. `causes`: of the loads under way. `waiting`: requests by model. `clock`: Unix
        time. Blocks."""
        self._fleet = fleet
        self._causes = causes
        self._waiting = waiting
        self._counts = counts
        self._file = file
        self._clock = clock
        self._looked_at: dict[str, NodeSnapshot] = {}
        self._evicting: frozenset[ReplicaKey] = frozenset()
        self._open: dict[str, dict[ReplicaKey, StatusSpan]] = {}  # by node
        kept = Kept() if file is None else file.read(clock() - HOURS * 3600)
        self._ended: dict[StatusSpanId, StatusSpan] = {span.id: span for span in kept.spans}  # oldest end first
        self._minutes: deque[Minute] = deque(kept.minutes, maxlen=int(HOURS * 60))
        self._interrupted = {span.key: span for span in kept.interrupted}
        if file is not None:
            for span in kept.interrupted:
                file.add(span)  # otherwise the next cortex would let it end later, with the file's last line then
        self._most_waiting: dict[str, int] = {}
        self._counted = ModelCounts({}, {})
        self._minute_ends = clock() + MINUTE_SECS

    def between(self, since: float, until: float) -> dict[str, Any]:
        """The spans and minutes that touch this time, for an answer."""
        spans = chain(self._ended.values(), *(spans.values() for spans in self._open.values()))
        return {
            "spans": [span for span in spans if span.since <= until and (span.until is None or span.until >= since)],
            "minutes": [minute for minute in self._minutes if since <= minute.at <= until],
        }

    async def run(self) -> None:
        """Never returns."""
        with contextlib.closing(RouteChanges(self._fleet)) as changes:
            while True:
                self._look()
                if self._clock() >= self._minute_ends:
                    self._end_minute(await self._counts())
                await first_of({"change": changes.next()}, timeout_secs=LOADING_LOOK_SECS if self._loads else LOOK_SECS)

    async def write_loop(self) -> None:
        """Writes what is new to the file. Never returns."""
        while self._file is not None:
            await asyncio.sleep(RETRY_SECS if self._file.failed else WRITE_SECS)
            await self.flush()

    async def flush(self) -> None:
        """Writes what is new to the file now."""
        if self._file is not None and self._file.is_long:
            open_spans = chain.from_iterable(spans.values() for spans in self._open.values())
            await self._file.replace([*self._ended.values(), *open_spans], list(self._minutes))
        elif self._file is not None:
            await self._file.write()

    @property
    def _loads(self) -> bool:
        return any(span.status == ModelStatus.LOADING for spans in self._open.values() for span in spans.values())

    def _look(self) -> None:
        now, fleet = self._clock(), self._fleet.snapshot()
        nodes = fleet.nodes
        for name in self._open.keys() - nodes.keys():  # removed from the configuration
            self._end([msgspec.structs.replace(span, until=now) for span in self._open.pop(name).values()])
        for name, node in nodes.items():
            if self._looked_at.get(name) is not node:
                self._look_at(node, now)
        self._looked_at = dict(nodes)
        for key in fleet.evicting ^ self._evicting:
            self._look_at_eviction(key, fleet.evicting, now)
        self._evicting = fleet.evicting
        for model, count in self._waiting().items():
            self._most_waiting[model] = max(count, self._most_waiting.get(model, 0))

    def _look_at(self, node: NodeSnapshot, now: float) -> None:
        before, found = self._open.get(node.name, {}), seen(node)
        for key in found.keys() & self._interrupted.keys() - before.keys():
            interrupted = self._interrupted.pop(key)
            if not key.model_id:  # since when a node is silent, this cortex knows only from its own start
                interrupted = msgspec.structs.replace(interrupted, told_since=found[key].since)
            if continues(interrupted, found[key]):
                self._ended.pop(interrupted.id, None)  # it is gone after a day
                again = msgspec.structs.replace(interrupted, until=None)
                before[key] = again
                if self._file is not None:
                    self._file.add(again)
        ended, still = follow(before, found, now, self._causes)
        self._open[node.name] = still
        self._end(ended)
        for key, span in still.items():
            if span is not before.get(key):
                self._ended.pop(span.id, None)  # it ended only as far as was known while its node was down
                if self._file is not None:
                    self._file.add(span)

    def _look_at_eviction(self, key: ReplicaKey, evicting: frozenset[ReplicaKey], now: float) -> None:
        span = self._open.get(key.node, {}).get(key)
        if span is None:
            return
        changed = self._open[key.node][key] = evicted(span, evicting, now, self._causes)
        if self._file is not None and changed is not span:
            self._file.add(changed)

    def _end(self, spans: Iterable[StatusSpan]) -> None:
        for span in spans:
            self._ended[span.id] = span
            if self._file is not None:
                self._file.add(span)

    def _end_minute(self, counts: ModelCounts) -> None:
        now, before = self._clock(), self._counted
        minute = Minute(
            at=now,
            waiting=self._most_waiting,
            requests=_more(counts.answered, before.answered),
            errors=_more(counts.errors, before.errors),
        )
        self._minutes.append(minute)
        self._counted, self._most_waiting, self._minute_ends = counts, {}, now + MINUTE_SECS
        if self._file is not None:
            self._file.add(minute)
        since = now - HOURS * 3600
        old = [place for place, span in self._ended.items() if span.until is not None and span.until < since]
        for place in chain(old, islice(self._ended, max(0, len(self._ended) - MOST_SPANS))):
            self._ended.pop(place, None)


def _more(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {model: more for model, count in now.items() if (more := count - before.get(model, 0)) > 0}
