"""The neurons that are listed or found: a client, a poller and two background loops for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from cortex.config.neurons import NeuronEntry
from cortex.config.settings import PollSettings
from cortex.fleet.members.roster import combined
from cortex.fleet.neuron_client import NeuronClient
from cortex.fleet.poller import NeuronPoller
from cortex.fleet.state import Fleet
from cortex.upstream.pool import EnginePool
from shared.protocol import (
    AdapterCommand,
    EndpointReply,
    ListenReply,
    LoadCommand,
    LoadReply,
    ReachCommand,
    ReachReply,
)
from shared.subscribers import Subscribers
from shared.tasks import TaskSet, cancel_all, keep_running

log = logging.getLogger(__name__)


class NeuronCommands(Protocol):
    """What the control asks of one neuron; see `NeuronClient`."""

    async def load(self, command: LoadCommand, *, timeout_secs: float, wait: bool = True) -> LoadReply: ...

    async def unload(self, model_id: str, instance: str, *, timeout_secs: float, drain_secs: float = 0) -> None: ...

    async def sleep(self, model_id: str, instance: str, *, timeout_secs: float) -> None: ...

    async def load_adapter(self, command: AdapterCommand, *, timeout_secs: float) -> None: ...

    async def unload_adapter(self, command: AdapterCommand, *, timeout_secs: float) -> None: ...

    async def endpoint(self, model_id: str, instance: str) -> EndpointReply: ...

    async def listen_for_group(self, group: str) -> ListenReply: ...

    async def reach_group(self, command: ReachCommand) -> ReachReply: ...


class Refreshable(Protocol):
    """What the control asks of a neuron's poller."""

    async def refresh(self) -> None: ...


class Membership:
    """Follows the configuration and what is found, and tells the fleet. `clients` and `pollers` are by name, for the
    current neurons. They are changed in place: every holder of a reference sees each change."""

    def __init__(self, pool: EnginePool, fleet: Fleet, drained: Callable[[], Collection[str]] = tuple) -> None:
        """`drained`: the names of the neurons that an operator has taken out of use."""
        self.moved: Subscribers[[Collection[str]]] = Subscribers()
        """Announces the neurons that were found and are now gone, or have another endpoint or token."""
        self.listed: Mapping[str, NeuronEntry] = {}
        """Those of the configuration, by name."""
        self._found: Sequence[NeuronEntry] = ()
        self._poll = PollSettings()
        self._drained = drained
        self._clashes: frozenset[str] = frozenset()
        self.clients: dict[str, NeuronClient] = {}
        self.pollers: dict[str, NeuronPoller] = {}
        self._pool = pool
        self._fleet = fleet
        self._entries: dict[str, NeuronEntry] = {}
        self._loops: dict[str, list[asyncio.Task[None]]] = {}
        self._ending: dict[NeuronPoller, list[asyncio.Task[None]]] = {}
        self._tasks = TaskSet()

    def configure(self, entries: Iterable[NeuronEntry], poll: PollSettings) -> set[str]:
        """The neurons of the configuration from now on; leaves unchanged ones alone. Returns the names of those removed
        or given another endpoint or token: what they reported is no longer valid."""
        self.listed, self._poll = {entry.name: entry for entry in entries}, poll
        return self._apply()

    def use_found(self, entries: Iterable[NeuronEntry]) -> None:
        """The neurons that have been found, from now on, beside those of the configuration."""
        found = list(entries)
        if found != self._found:
            self._found = found
            others = self._apply()
            if others:
                self.moved.announce(others)

    def _apply(self) -> set[str]:
        wanted, clashes = combined(self.listed.values(), self._found)
        for clash in clashes:
            if clash not in self._clashes:
                log.warning("%s", clash)
        self._clashes, poll = frozenset(clashes), self._poll
        self._fleet.configure(
            [(entry.name, entry.endpoint) for entry in wanted.values()],
            unhealthy_after=poll.unhealthy_after,
            drained=self._drained(),
        )
        others = {
            name for name, entry in self._entries.items() if name not in wanted or wanted[name].access != entry.access
        }
        for name in others:
            self._end(name, removed=name not in wanted)
        for poller in self.pollers.values():
            poller.configure(poll)
        for name, entry in wanted.items():
            if name not in self._entries:
                self._begin(entry, poll)
        return others

    async def close(self) -> None:
        """Stops polling all neurons."""
        await self._tasks.close()
        for name in list(self._entries):
            self._end(name, removed=False)
        await cancel_all([loop for loops in self._ending.values() for loop in loops])
        await asyncio.gather(*(poller.close() for poller in self._ending))
        await self._tasks.close()

    def _begin(self, entry: NeuronEntry, poll: PollSettings) -> None:
        name = entry.name
        self._entries[name] = entry
        self.clients[name] = client = NeuronClient(entry, self._pool)
        self.pollers[name] = poller = NeuronPoller(client, self._fleet, poll)
        self._loops[name] = [
            asyncio.create_task(keep_running(f"{kind} {name}", loop), name=f"{kind} {name}")
            for kind, loop in (("poll", poller.poll_loop), ("events", poller.listen_loop))
        ]

    def _end(self, name: str, *, removed: bool) -> None:
        """`removed` False: the neuron stays in the configuration, and its loads continue."""
        del self._entries[name]
        client, poller, loops = self.clients.pop(name), self.pollers.pop(name), self._loops.pop(name)
        if removed:
            client.abandon_commands()
        poller.stop_updating()
        for loop in loops:
            loop.cancel()
        self._ending[poller] = loops
        _ = self._tasks.spawn(self._ended(poller, loops), name=f"stop polling {name}")

    async def _ended(self, poller: NeuronPoller, loops: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(cancel_all(loops), poller.finished())
        del self._ending[poller]
