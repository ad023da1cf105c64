"""Takes down engines that span several neurons when they have lost a part: no other part notices that by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from cortex.control.loads.neurons import NeuronAccess
from cortex.fleet.groups import EngineGroup, groups_of
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot
from cortex.fleet.state import NodeRemoved, RouteChanges
from cortex.fleet.unless_down import unless_down
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

BEGIN_SECS = 15.0
"""How long all parts of a group may take to be listed at first: a neuron may wait for its GPUs' figures."""
VANISHED_SECS = 1.0
"""How long a part that was listed may be missing: one answer of a neuron may lack an entry that does not read."""
RETRY_SECS = 2.0
"""Pause before a part that could not be unloaded is tried again, and between two looks at incomplete groups."""
_LOOK_SECS = 0.2
"""Pause between two looks: in a large fleet something changes all the time."""
_UNLOAD_SECS = 60.0


class GroupKeeper:
    """Watches all groups of the fleet, those of other cortexes too. Keeps nothing that another cortex, or this one
    after a restart, could not find out from the neurons."""

    def __init__(self, neurons: NeuronAccess, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._neurons = neurons
        self._fleet = neurons.fleet
        self._clock = clock
        self._seen: dict[str, float] = {}  # group -> when it was first seen incomplete
        self._listed: dict[str, dict[str, frozenset[int]]] = {}  # model -> group -> the parts that have been listed
        self._ending: set[str] = set()
        self._tasks = TaskSet()

    async def run(self) -> None:
        """Never returns."""
        with contextlib.closing(RouteChanges(self._fleet)) as changes:
            pending = set(self._fleet.snapshot().listed_models)
            while True:
                pending = self._look(pending)
                with contextlib.suppress(asyncio.TimeoutError):
                    async with timeout(RETRY_SECS if pending else None):
                        pending |= await changes.next()
                await asyncio.sleep(_LOOK_SECS)

    async def close(self) -> None:
        await self._tasks.close()

    def _look(self, models: set[str]) -> set[str]:
        """Takes down the broken groups of these models. Returns the models that have incomplete ones."""
        fleet = self._fleet.snapshot()
        groups = groups_of(fleet, models)
        self._note_listed(models, groups)
        incomplete = {group.id: group for group in groups if group.lacks_parts}
        self._seen = {group: self._seen.get(group, self._clock()) for group in incomplete}
        for group in incomplete.values():
            reason = group.lost_part()
            vanished = self._listed[group.model_id][group.id] - group.parts.keys()
            if reason is None and self._clock() - self._seen[group.id] >= (VANISHED_SECS if vanished else BEGIN_SECS):
                reason = group.missing_parts()
            evicting = any(part.key in fleet.evicting for part in group.parts.values())  # it goes as a whole
            if reason is not None and not evicting and group.id not in self._ending:
                log.warning("%s: unloading its parts, because %s", group.model_id, reason)
                self._ending.add(group.id)
                _ = self._tasks.spawn(self._take_down(group), name=f"take down group {group.id}")
        return {group.model_id for group in incomplete.values()}

    def _note_listed(self, models: Iterable[str], groups: Sequence[EngineGroup]) -> None:
        before = {group: parts for model in models for group, parts in self._listed.pop(model, {}).items()}
        for group in groups:
            listed = before.get(group.id, frozenset()) | group.parts.keys()
            self._listed.setdefault(group.model_id, {})[group.id] = listed

    async def _take_down(self, group: EngineGroup) -> None:
        try:
            await asyncio.gather(*(self._unload(part) for part in group.reachable))
        finally:
            self._ending.discard(group.id)

    async def _unload(self, part: EngineSnapshot) -> None:
        model_id, node, instance = part.key
        try:
            unload = self._neurons.client(node).unload(model_id, instance, timeout_secs=_UNLOAD_SECS)
            await unless_down(self._fleet, node, unload)
        except (NodeRemoved, CommandAbandoned):
            return
        except (NeuronRefused, NeuronUnreachable) as error:
            log.warning("unloading the part of %s on %s failed: %s", model_id, node, error)
        await self._neurons.refresh(node)
