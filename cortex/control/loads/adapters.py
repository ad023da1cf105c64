"""Gives engines LoRA adapters while they serve, and takes them away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from cortex.config.live import LiveConfig
from cortex.control.decision import attachable
from cortex.control.demand import SAMPLE_SECS, Demand
from cortex.control.loads.neurons import NeuronAccess
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.state import NodeRemoved
from cortex.fleet.unless_down import unless_down
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.replica import ReplicaKey, WaitNote, adapter_key
from shared.errors import ServiceError, Unavailable, UpstreamError
from shared.protocol import AdapterCommand, ErrorCode
from shared.retry_after import LOAD_TIMED_OUT_SECS
from shared.tasks import TaskSet

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class AdapterNotLoaded(Unavailable):
    """An engine cannot load the adapter. `full`: it has as many as it can have, and all of them are in use."""

    default_code = ErrorCode.ADAPTER_FAILED

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message, retry_after=LOAD_TIMED_OUT_SECS)
        self.full = full


class AdapterLoads:
    """Owns the loads of adapters. Requests that need the same adapter at the same engine share one."""

    def __init__(self, neurons: NeuronAccess, *, live: LiveConfig, counts: CountTotals, demand: Demand) -> None:
        self._neurons = neurons
        self._live = live
        self._counts = counts
        self._demand = demand
        self._loads: dict[ReplicaKey, asyncio.Task[AdapterNotLoaded | None]] = {}  # by the adapter's key
        self._claims: Counter[ReplicaKey] = Counter()  # likewise
        self._sources = self._sources_now()
        self._tasks = TaskSet()
        live.changes.subscribe(self._drop_outdated)

    async def load_at_one(self, keys: Sequence[ReplicaKey], adapter: str) -> ReplicaKey:
        """Returns when the first of these engines that can has the adapter, and which one it is.

        Raises:
            AdapterNotLoaded: none can. `full` if another attempt may help: one of them has no room now.
        """
        problems: list[AdapterNotLoaded] = []
        for key in keys:
            try:
                await self.load(key, adapter)
            except AdapterNotLoaded as problem:
                problems.append(problem)
                continue
            return key
        reasons = "; ".join(problem.message for problem in problems)
        full = any(problem.full for problem in problems)
        raise AdapterNotLoaded(f"no engine can load the adapter {adapter!r}: {reasons}", full=full)

    async def load(self, key: ReplicaKey, adapter: str) -> None:
        """Returns when the engine `key` has the adapter. Raises AdapterNotLoaded."""
        name = adapter_key(adapter, key)
        if name not in self._loads:
            self._loads[name] = self._tasks.spawn(self._load(key, adapter), name=f"load {adapter} on {key.name}")
            self._loads[name].add_done_callback(lambda _: self._loads.pop(name))
        with self._claimed(key, adapter):
            problem = await asyncio.shield(self._loads[name])
        if problem is not None:
            raise problem

    async def unload(self, key: ReplicaKey, adapter: str) -> ServiceError | None:
        """Returns when the engine takes no requests for the adapter; those that run continue. The error if it may still
        take some."""
        command = AdapterCommand(model_id=key.model_id, instance=key.instance or None, adapter=adapter)
        try:
            client = self._neurons.client(key.node)
            await self._told(key, client.unload_adapter(command, timeout_secs=self._timeout_secs))
        except NeuronRefused as error:
            if error.code != ErrorCode.MODEL_NOT_FOUND:  # it is gone
                return UpstreamError(f"{key.node}: {error.message}", code=ErrorCode.UNLOAD_FAILED)
        except (NeuronUnreachable, CommandAbandoned, NodeRemoved) as error:
            return Unavailable(
                f"{key.node}: {error}", code=ErrorCode.NEURON_UNAVAILABLE, retry_after=LOAD_TIMED_OUT_SECS
            )
        return None

    def note(self, adapter: str) -> WaitNote:
        """What a client that waits for the adapter may be told, while its base serves."""
        for key in self._loads:
            if key.model_id == adapter:
                return WaitNote(text=f"loading the adapter {adapter} on {key.node}", node=key.node)
        return WaitNote(text=f"{adapter} waits until an engine of its base has room for another adapter")

    def _drop_outdated(self) -> None:
        """Takes adapters that have left the catalogue, or have other weights now, from the engines."""
        before, self._sources = self._sources, self._sources_now()
        outdated = {name for name, source in before.items() if self._sources.get(name) != source}
        for node in self._neurons.fleet.snapshot().healthy if outdated else ():
            for key, view in node.listed:
                for name in outdated.intersection(view.adapters):
                    _ = self.in_background(self._drop(key, name), name=f"unload {name} on {key.name}")

    async def _drop(self, key: ReplicaKey, adapter: str) -> None:
        error = await self.unload(key, adapter)
        if error is not None:
            log.warning("cannot unload the adapter %s from %s: %s", adapter, key.name, error.message)

    async def spread_loop(self) -> None:
        """Loads an adapter at one more engine of its base while those that have it get too many requests and another
        one does not. Never returns."""
        while True:
            await asyncio.sleep(SAMPLE_SECS)
            catalogue, target = self._live.catalogue, self._live.config.placement.replica_target
            for adapter in catalogue.adapters.keys() & self._demand.overloaded_since.keys():
                fleet = self._neurons.fleet.snapshot()
                others = attachable(adapter, catalogue, fleet, self._counts.in_flight)
                if others and self._counts.in_flight(others[0]) < target:
                    with contextlib.suppress(AdapterNotLoaded):
                        await self.load(others[0], adapter)

    def in_background(self, work: Coroutine[Any, Any, Result], *, name: str) -> asyncio.Task[Result]:
        """For an operator's work that goes on whether or not its client waits. A failure is logged."""
        return self._tasks.spawn(work, name=name)

    async def close(self) -> None:
        await self._tasks.close()

    @property
    def _timeout_secs(self) -> float:
        return self._live.config.cold_load.timeout_secs

    def _sources_now(self) -> dict[str, str | None]:
        return {name: profile.lora for name, profile in self._live.catalogue.adapters.items()}

    async def _load(self, key: ReplicaKey, adapter: str) -> AdapterNotLoaded | None:
        """Loads the weights that the catalogue names, again if it names others after the load. The error is a value:
        there may be no request to raise it in."""
        loaded = None
        while (profile := self._live.catalogue.adapters.get(adapter)) is not None:
            if profile.lora == loaded:
                return None
            problem = await self._load_from(key, adapter, profile.lora)
            if problem is not None:
                return problem
            loaded = profile.lora
        if loaded is not None:
            await self._drop(key, adapter)
        return AdapterNotLoaded(f"{adapter!r} left the catalogue")

    async def _load_from(self, key: ReplicaKey, adapter: str, source: str | None) -> AdapterNotLoaded | None:
        command = AdapterCommand(
            model_id=key.model_id,
            instance=key.instance or None,
            adapter=adapter,
            source=source,
            displaceable=self._displaceable(key, adapter),
        )
        try:
            client = self._neurons.client(key.node)
            await self._told(key, client.load_adapter(command, timeout_secs=self._timeout_secs))
        except NeuronRefused as error:
            full = error.code == ErrorCode.ADAPTERS_FULL
            if not full:
                log.warning("loading the adapter %s on %s failed: %s", adapter, key.name, error.message)
            return AdapterNotLoaded(f"{key.name}: {error.message}", full=full)
        except NeuronUnreachable as error:
            return AdapterNotLoaded(str(error))
        except (CommandAbandoned, NodeRemoved):
            return AdapterNotLoaded(f"{key.node} was removed from the configuration")
        self._demand.record_use(adapter_key(adapter, key))  # until its first request is counted
        log.info("loaded the adapter %s on %s", adapter, key.name)
        return None

    async def _told(self, key: ReplicaKey, command: Coroutine[Any, Any, None]) -> None:
        """Sends a command to the engine's neuron, and reads what has come of it."""
        try:
            await unless_down(self._neurons.fleet, key.node, command)
        finally:
            await self._neurons.refresh(key.node)

    @contextlib.contextmanager
    def _claimed(self, key: ReplicaKey, adapter: str) -> Iterator[None]:
        """A request needs the adapter at this engine: no other one displaces it there inside the body."""
        name = adapter_key(adapter, key)
        self._claims[name] += 1
        try:
            yield
        finally:
            self._claims[name] -= 1
            if not self._claims[name]:
                del self._claims[name]

    def _displaceable(self, key: ReplicaKey, adapter: str) -> list[str]:
        """The adapters of the engine that no request uses, least recently used first."""
        engine = self._neurons.fleet.snapshot().engine(key)
        there = () if engine is None else engine.view.adapters
        names = [adapter_key(each, key) for each in there if each != adapter]
        idle = [name for name in names if not self._counts.in_flight(name) and name not in self._claims]
        return [name.model_id for name in self._demand.least_recent_first(idle)]
