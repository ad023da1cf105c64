"""The watched neurons: a client, a watch and two background loops for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from cortex.config.settings import NeuronEntry, PollSettings
from cortex.fleet.neuron_client import NeuronClient
from cortex.fleet.poller import NodeWatch
from cortex.fleet.state import Fleet
from cortex.upstream.pool import EnginePool
from shared.tasks import TaskSet, cancel_all, keep_running

log = logging.getLogger(__name__)


class Membership:
    """Follows the configuration. `clients` and `watches` hold, by name, those of the present neurons, and are changed
    in place: every holder of a reference sees each change."""

    def __init__(self, pool: EnginePool, fleet: Fleet) -> None:
        self.clients: dict[str, NeuronClient] = {}
        self.watches: dict[str, NodeWatch] = {}
        self._pool = pool
        self._fleet = fleet
        self._entries: dict[str, NeuronEntry] = {}
        self._loops: dict[str, list[asyncio.Task[None]]] = {}
        self._ending: dict[NodeWatch, list[asyncio.Task[None]]] = {}
        self._tasks = TaskSet()

    def configure(self, entries: Iterable[NeuronEntry], poll: PollSettings) -> set[str]:
        """Watches exactly these neurons, which the fleet must know already; unchanged ones are left alone. Returns the
        names of those removed or given another endpoint or token: what they reported is no longer valid."""
        wanted = {entry.name: entry for entry in entries}
        others = {name for name, entry in self._entries.items() if wanted.get(name) != entry}
        for name in others:
            self._end(name, left=name not in wanted)
        for watch in self.watches.values():
            watch.use(poll)
        for name, entry in wanted.items():
            if name not in self._entries:
                self._begin(entry, poll)
        return others

    async def close(self) -> None:
        """Stops watching all neurons."""
        await self._tasks.close()
        for name in list(self._entries):
            self._end(name, left=False)
        await cancel_all([loop for loops in self._ending.values() for loop in loops])
        await asyncio.gather(*(watch.close() for watch in self._ending))
        await self._tasks.close()

    def _begin(self, entry: NeuronEntry, poll: PollSettings) -> None:
        name = entry.name
        self._entries[name] = entry
        self.clients[name] = client = NeuronClient(entry, self._pool)
        self.watches[name] = watch = NodeWatch(client, self._fleet, poll)
        self._loops[name] = [
            asyncio.create_task(keep_running(f"{kind} {name}", loop), name=f"{kind} {name}")
            for kind, loop in (("poll", watch.poll_loop), ("events", watch.listen_loop))
        ]

    def _end(self, name: str, *, left: bool) -> None:
        """`left` False: the neuron stays in the configuration, and its loads continue."""
        del self._entries[name]
        client, watch, loops = self.clients.pop(name), self.watches.pop(name), self._loops.pop(name)
        if left:
            client.leave()
        watch.retire()
        for loop in loops:
            loop.cancel()
        self._ending[watch] = loops
        _ = self._tasks.spawn(self._ended(watch, loops), name=f"end of watching {name}")

    async def _ended(self, watch: NodeWatch, loops: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(cancel_all(loops), watch.finished())
        del self._ending[watch]
