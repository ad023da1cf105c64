"""Faults: a schedule computed from a seed, its execution on a fleet, and its log."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from neuron.engine import session
from tests.e2e.chaos.fleet import STOP_SECS, EngineServer, Fleet, NeuronHost, Service, leads_session, send

_FIRST_SECS = 2.0  # load before the first fault
_LAST_SECS = 4.0
_EVERY_SECS = 2.4  # average time between faults
_PAUSES_SECS = (0.2, 1.5)  # between the end of a process and its next start
_STOPPED_SECS = (0.2, 1.2)
_MOST_DOWN = 2  # hosts at once: on a slow machine, where restarts take long, too few would be left to judge anything
Item = TypeVar("Item")


@dataclass(frozen=True)
class Fault:
    """One executed fault. `at` (the signal) and `until` (everything works again) are monotonic times."""

    at: float
    until: float
    what: str
    hosts: frozenset[str] = frozenset()
    """The hosts whose engines it hit: answers in progress there may have been lost."""
    model_id: str = ""
    """The model whose engine it hit there; empty: all of them, or none."""

    def line(self, start: float) -> str:
        return f"{self.at - start:7.3f} … {self.until - start:7.3f} {self.what}"


class Effect(NamedTuple):
    """What a fault has done, in words, and the fields of `Fault` that say which engines it hit."""

    what: str
    hosts: frozenset[str] = frozenset()
    model_id: str = ""


@dataclass(frozen=True)
class Planned:
    """A fault `after` seconds from the start. `pick`, 0 to 1, selects its target among those that exist then;
    `pause_secs` is its duration, or the pause before a restart."""

    after: float
    kind: str
    pick: float
    pause_secs: float


@dataclass
class Faults:
    """Executes a schedule on a fleet. It never touches the last cortex."""

    fleet: Fleet
    log: list[Fault] = field(default_factory=list)

    async def execute(self, schedule: Sequence[Planned]) -> None:
        """Returns when all faults are over and everything runs again. Long faults overlap with later ones."""
        began, tasks = time.monotonic(), []
        for planned in schedule:
            await asyncio.sleep(max(0.0, began + planned.after - time.monotonic()))
            tasks.append(asyncio.create_task(self._one(planned), name=planned.kind))
        await asyncio.gather(*tasks)

    async def _one(self, planned: Planned) -> None:
        at = time.monotonic()
        effect = await KINDS[planned.kind](self, planned)
        what = f"{planned.kind}: {effect.what}"
        self.log.append(Fault(at, time.monotonic(), what, effect.hosts, effect.model_id))

    # Engines.

    async def kill_engine(self, planned: Planned) -> Effect:
        """Kills only the server: its core survives and holds the memory."""
        return await self._signal_engine(planned, signal.SIGKILL)

    async def kill_core(self, planned: Planned) -> Effect:
        """Kills the core: the server answers 500 for a second, then exits."""
        return await self._signal_engine(planned, signal.SIGKILL, core=True)

    async def terminate_engine(self, planned: Planned) -> Effect:
        return await self._signal_engine(planned, signal.SIGTERM)

    async def stop_engine(self, planned: Planned) -> Effect:
        """Suspends it with SIGSTOP for `pause_secs`."""
        engine = await self._engine(planned)
        if engine is None:
            return Effect("no engine")
        send(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(planned.pause_secs)
        send(engine.pid, signal.SIGCONT)
        return _hit(engine, f"{_named(engine)} was suspended for {planned.pause_secs:.1f} s")

    # Neurons.

    async def kill_neuron(self, planned: Planned) -> Effect:
        """Its engines survive; the next neuron adopts them."""
        return await self._restart(_free(self.fleet.neurons, planned), signal.SIGKILL, planned)

    async def restart_neuron(self, planned: Planned) -> Effect:
        """A normal restart. A neuron that stops its engines lets them finish their requests."""
        return await self._restart(_free(self.fleet.neurons, planned), signal.SIGTERM, planned)

    async def stop_neuron(self, planned: Planned) -> Effect:
        """Suspends it with SIGSTOP for `pause_secs`: it neither answers nor closes connections."""
        neuron = _free(self.fleet.neurons, planned)
        if neuron is None:
            return Effect("enough of them already have a fault")
        neuron.busy = True
        neuron.is_down()
        send(neuron.pid, signal.SIGSTOP)
        await asyncio.sleep(planned.pause_secs)
        send(neuron.pid, signal.SIGCONT)
        neuron.is_back()
        neuron.busy = False
        return Effect(f"{neuron.name} was suspended for {planned.pause_secs:.1f} s")

    # Cortexes.

    async def kill_cortex(self, planned: Planned) -> Effect:
        return await self._restart(_free(self.fleet.cortexes[:-1], planned), signal.SIGKILL, planned)

    async def restart_cortex(self, planned: Planned) -> Effect:
        """A normal restart: it finishes its requests."""
        return await self._restart(_free(self.fleet.cortexes[:-1], planned), signal.SIGTERM, planned)

    # Helpers.

    async def _restart(self, service: Service | None, number: signal.Signals, planned: Planned) -> Effect:
        if service is None:
            return Effect("enough of them already have a fault")
        service.busy = True
        status = await service.end(number)
        ends_engines = isinstance(service, NeuronHost) and number == signal.SIGTERM
        hosts = frozenset((service.name,)) if ends_engines else frozenset[str]()
        assert status == (0 if number == signal.SIGTERM else -number), f"{service.name}: {status}\n{service.tail()}"
        await asyncio.sleep(planned.pause_secs)
        await service.start()
        service.busy = False
        return Effect(f"{service.name}, {number.name}, back after {planned.pause_secs:.1f} s", hosts)

    async def _signal_engine(self, planned: Planned, number: signal.Signals, *, core: bool = False) -> Effect:
        engine = await self._engine(planned)
        if engine is None:
            return Effect("no engine")
        pids = [engine.pid]
        if core:
            members = await asyncio.to_thread(session.members_by_session)
            pids = sorted(members.get(engine.pid, set()) - {engine.pid})
        for pid in pids:
            send(pid, number)
        deadline = time.monotonic() + STOP_SECS
        # A server outlives its core for a while.
        while leads_session(engine.pid) and time.monotonic() < deadline:  # noqa: ASYNC110 - other process
            await asyncio.sleep(0.02)
        return _hit(engine, f"{number.name} to {_named(engine)}{', its core' if core else ''}")

    async def _engine(self, planned: Planned) -> EngineServer | None:
        return _chosen(await asyncio.to_thread(self.fleet.engines), planned.pick)


Kind = Callable[[Faults, Planned], Awaitable[Effect]]
KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        Faults.kill_engine,
        Faults.kill_core,
        Faults.terminate_engine,
        Faults.stop_engine,
        Faults.kill_neuron,
        Faults.restart_neuron,
        Faults.stop_neuron,
        Faults.kill_cortex,
        Faults.restart_cortex,
    )
}
_DECK = (
    *("kill_engine",) * 5,
    *("kill_core",) * 1,
    *("terminate_engine",) * 1,
    *("stop_engine",) * 2,
    *("kill_neuron",) * 3,
    *("restart_neuron",) * 2,
    *("stop_neuron",) * 2,
    *("kill_cortex",) * 2,
    *("restart_cortex",) * 1,
)
"""Shuffled and dealt repeatedly, so that every long run has each kind in these proportions."""


def schedule_of(seed: int, secs: float, kinds: Sequence[str] = ()) -> list[Planned]:
    """The faults for a run of `secs`. `kinds`, if given, are the only kinds."""
    chance = random.Random(f"faults/{seed}")
    planned: list[Planned] = []
    deck: list[str] = []
    after = _FIRST_SECS
    while after < secs - _LAST_SECS:
        if not deck:
            deck = [kind for kind in _DECK if not kinds or kind in kinds]
            chance.shuffle(deck)
        kind = deck.pop()
        pause_secs = chance.uniform(*(_STOPPED_SECS if kind.startswith("stop_") else _PAUSES_SECS))
        planned.append(Planned(after, kind, chance.random(), pause_secs))
        after += _EVERY_SECS * chance.uniform(0.5, 1.5)
    return planned


def _hit(engine: EngineServer, what: str) -> Effect:
    return Effect(what, frozenset((engine.host,)), engine.model_id)


def _named(engine: EngineServer) -> str:
    return f"{engine.model_id} on {engine.host} (process {engine.pid})"


ServiceT = TypeVar("ServiceT", bound=Service)


def _free(services: Sequence[ServiceT], planned: Planned) -> ServiceT | None:
    free = [service for service in services if not service.busy]
    return _chosen(free, planned.pick) if len(services) - len(free) < _MOST_DOWN else None


def _chosen(among: Sequence[Item], pick: float) -> Item | None:
    return among[min(int(pick * len(among)), len(among) - 1)] if among else None
