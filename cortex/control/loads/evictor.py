"""Drains and evicts engines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Literal, TypeAlias

from cortex.config.live import LiveConfig
from cortex.control.loads.neurons import NeuronAccess
from cortex.fleet.groups import group_with
from cortex.fleet.neuron_client import NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.unless_down import unless_down
from cortex.metrics.worker_counts import CountTotals
from cortex.placement.replicas import RemovalKind
from cortex.routing.replica import ReplicaKey
from shared.protocol import MAX_DRAIN_SECS, ErrorCode, ModelStatus
from shared.tasks import cancel_all, first_of

log = logging.getLogger(__name__)

DRAIN_POLL_SECS = 0.05

EvictionMethod: TypeAlias = Literal["unload", "sleep", "sleep_if_idle"]
"""What happens to an evicted model. `sleep`: it is unloaded if it cannot sleep. `sleep_if_idle`: the same, but it stays
if its neuron will not put it to sleep while other clients use it."""

EvictionReason: TypeAlias = Literal["operator", "swap"] | RemovalKind
"""`swap`: another model gets the memory."""


class NoLongerNeeded(Exception):
    """The load or the eviction is no longer needed, and has not changed anything yet."""


class Evictor:
    """Owns the evictions of this cortex: for its loads, as removals of replicas, and for operators."""

    def __init__(
        self,
        neurons: NeuronAccess,
        *,
        live: LiveConfig,
        counts: CountTotals,
        settle_routes: Callable[[], Awaitable[None]],
        displaced: Callable[[ReplicaKey, str], None],
    ) -> None:
        """`settle_routes` returns when every worker has the current route table. `displaced` counts the evictions, with
        their reasons."""
        self._neurons = neurons
        self._fleet = neurons.fleet
        self._live = live
        self._counts = counts
        self._settle_routes = settle_routes
        self._displaced = displaced

    @property
    def _timeout_secs(self) -> float:
        return self._live.config.cold_load.timeout_secs

    async def evict(
        self,
        key: ReplicaKey,
        *,
        method: EvictionMethod,
        still_needed: Callable[[], bool] = lambda: True,
        patient: Callable[[], bool] = lambda: True,
        reason: EvictionReason = "operator",
    ) -> None:
        """Drains an engine, as long as `patient`, and unloads it or puts it to sleep. Only the scheduler and
        its loads call this. The caller marks it as `evicting` before and clears that afterwards.

        All parts of an engine that spans several neurons go together, once the one that takes the requests is drained.

        Raises:
            NoLongerNeeded: the model stays. NeuronRefused, NeuronUnreachable: the neuron did not evict it. NodeRemoved,
            CommandAbandoned: not known whether it is gone.
        """
        first, *others = self._parts(key)
        if first == key:
            await self._evict(key, method="unload" if others else method, still_needed=still_needed, patient=patient)
        else:
            with self.no_new_requests(first):
                await self._evict(first, method="unload", still_needed=still_needed, patient=patient)
        # Rank 0 has no requests any more, and the others have none of their own.
        await asyncio.gather(*(self._unload(part, drain_secs=0) for part in others))
        self._displaced(key, reason)

    async def sleep(self, key: ReplicaKey, *, patient: Callable[[], bool]) -> None:
        """Drains an engine, as long as `patient`, and puts it to sleep. The caller marks it as `evicting` before and
        clears that afterwards. Raises as `evict`; NeuronRefused also if it cannot sleep there."""
        await self._drained(key, lambda: True, patient)
        await self._sleep(key)
        self._displaced(key, "operator")

    @contextlib.contextmanager
    def no_new_requests(self, key: ReplicaKey) -> Iterator[None]:
        """Marks the engine as `evicting` inside the body."""
        if key in self._fleet.snapshot().evicting:
            yield
            return
        self._fleet.begin_eviction(key)
        try:
            yield
        finally:
            self._fleet.end_eviction(key)

    def _parts(self, key: ReplicaKey) -> list[ReplicaKey]:
        """The running parts of the engine on healthy neurons, the one that takes the requests first; the engine alone
        if it has no other."""
        fleet = self._fleet.snapshot()
        engine = fleet.engine(key)
        group = None if engine is None else group_with(fleet, engine)
        parts = [] if group is None else [part.key for part in group.reachable]
        return parts or [key]

    async def _evict(
        self,
        key: ReplicaKey,
        *,
        method: EvictionMethod,
        still_needed: Callable[[], bool],
        patient: Callable[[], bool],
    ) -> None:
        node = key.node
        await self._drained(key, still_needed, patient)
        if method != "unload" and await self._put_to_sleep(key, if_idle=method == "sleep_if_idle"):
            return
        drain = min(self._timeout_secs, MAX_DRAIN_SECS) if self._neurons.has_extensions(node) and patient() else 0
        await self._unload(key, drain_secs=drain)

    async def _drained(self, key: ReplicaKey, still_needed: Callable[[], bool], patient: Callable[[], bool]) -> None:
        """Waits for its requests in flight, as long as `patient`. Raises as `evict`."""
        node = key.node
        await self._settle_routes()
        while self._counts.in_flight(key) and patient():
            if not still_needed():
                raise NoLongerNeeded
            snapshot = self._neurons.node(node)
            if not snapshot.healthy:  # its requests may hang indefinitely, and nothing can be loaded there
                raise NeuronUnreachable(f"{node} is down: {snapshot.last_error}")
            await asyncio.sleep(DRAIN_POLL_SECS)
        if not still_needed():
            raise NoLongerNeeded

    async def _unload(self, key: ReplicaKey, *, drain_secs: float) -> None:
        model_id, node, instance = key
        try:
            secs = self._timeout_secs
            unload = self._neurons.client(node).unload(model_id, instance, timeout_secs=secs, drain_secs=drain_secs)
            await unless_down(self._fleet, node, unload)
        except NeuronRefused as refused:
            if refused.status != 404:  # already gone
                raise
        finally:
            await self._neurons.refresh(node)

    async def _put_to_sleep(self, key: ReplicaKey, *, if_idle: bool) -> bool:
        """False if the model cannot sleep there. Raises NoLongerNeeded as `evict`."""
        try:
            await self._sleep(key)
        except NeuronRefused as refused:
            if if_idle and refused.code == ErrorCode.MODEL_BUSY:
                raise NoLongerNeeded from refused
            log.info("unloading %s on %s, because it cannot sleep: %s", key.model_id, key.node, refused)
            return False
        return True

    async def _sleep(self, key: ReplicaKey) -> None:
        model_id, node, instance = key
        try:
            sleep = self._neurons.client(node).sleep(model_id, instance, timeout_secs=self._timeout_secs)
            await unless_down(self._fleet, node, sleep)
        finally:
            await self._neurons.refresh(node)

    @contextlib.asynccontextmanager
    async def evicting(
        self, evicting: Mapping[ReplicaKey, bool], still_needed: Callable[[], bool]
    ) -> AsyncIterator[None]:
        """Evicts these models, given with whether they sleep now. Inside the body the load can book their memory:
        each model is gone, or its neuron is stopping it and has promised its memory to this load (a later load, for
        example from another cortex, does not get that memory). After the body all evictions have ended. If a neuron
        refuses one, the remaining evictions are skipped.

        Raises, before the body: as `evict`.
        """
        cancelled = False
        evictions = {
            key: asyncio.create_task(
                self._evict_one(
                    key,
                    method="sleep" if self._sleeps_when_idle(key.model_id) and not asleep else "unload",
                    still_needed=lambda: not cancelled and still_needed(),
                ),
                name=f"evict {key.model_id} from {key.name}",
            )
            for key, asleep in evicting.items()
        }
        try:
            await asyncio.gather(*(self._until_memory_promised(key, task) for key, task in evictions.items()))
            yield
        except asyncio.CancelledError:
            await cancel_all(list(evictions.values()))
            raise
        finally:
            cancelled = True
            outcomes = await asyncio.gather(*evictions.values(), return_exceptions=True)
        for key, outcome in zip(evictions, outcomes, strict=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, NoLongerNeeded):
                log.warning("evicting %s from %s failed: %s", key.model_id, key.name, outcome)

    async def _evict_one(self, key: ReplicaKey, *, method: EvictionMethod, still_needed: Callable[[], bool]) -> None:
        await self.evict(key, method=method, still_needed=still_needed, reason="swap")
        self._fleet.end_eviction(key)  # it may be loaded again at once if both fit

    async def _until_memory_promised(self, key: ReplicaKey, sending: asyncio.Task[None]) -> None:
        model_id, name, instance = key

        def ending(node: NodeSnapshot) -> bool:
            # A protocol v1 neuron books no memory in advance: the model must be gone.
            view = node.view(model_id, instance)
            return self._neurons.has_extensions(name) and (view is None or view.known_status is ModelStatus.UNLOADED)

        await first_of({"sent": asyncio.shield(sending), "promised": self._fleet.until(name, ending)})

    def _sleeps_when_idle(self, model_id: str) -> bool:
        profile = self._live.catalogue.profile(model_id)
        return profile is not None and profile.when_idle == "sleep"
