"""Demand: when each model was last used, when its last requests arrived, and the device time that callers have used."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.fairness.device_time import Charge, DeviceTime, EngineUse
from cortex.config.catalogue import Catalogue
from cortex.fleet.groups import serving_engine
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, instance_of
from cortex.metrics.in_flight import CallerCount
from cortex.metrics.worker_counts import CountTotals
from cortex.placement.inputs import MAX_ARRIVALS, Arrivals, ReplicaUsage, WaitingRequests
from cortex.routing.replica import ReplicaKey

SAMPLE_SECS = 1.0
REPORT_AGE_SECS = 5.0
"""How long an engine's report may still show, or lack, a request of ours that has ended: a poll of the neuron, which
looks at its engines every second."""

SESSION_PAUSE_SECS = 60.0
"""A request that comes at least this long after the last one for the model begins a session."""
SESSION_MEMORY_SECS = 2 * 3600.0
"""Sessions count less and less: after this time, 1/e."""
SESSION_PRIOR_SECS = 300.0
"""Added to the time in which sessions were counted, so that one session at the start does not seem a high rate."""

LOAD_AHEAD_SECS = 10.0
"""How often displaced models are considered for a load ahead of their requests."""


@dataclass
class _Sessions:
    """Sessions of one model: the faded count as of the beginning of the last one."""

    count: float = 0.0
    began_at: float = 0.0
    last_request: float = float("-inf")

    def record_request(self, now: float) -> None:
        if now - self.last_request >= SESSION_PAUSE_SECS:
            self.count, self.began_at = 1 + self.faded(now), now
        self.last_request = now

    def faded(self, now: float) -> float:
        return self.count * math.exp((self.began_at - now) / SESSION_MEMORY_SECS)


@dataclass
class _OwnRequests:
    """Ours at one replica, as far as they may explain what its engine reports. `used_at` is when there were any."""

    in_flight: int = 0
    peak: int = 0  # in flight at once
    peak_at: float = float("-inf")
    unended: int = 0  # begun, and not yet among those that the engine reports as ended
    used_at: float = float("-inf")

    @property
    def at_rest(self) -> bool:
        """Nothing in flight, and nothing that a report may still show or lack: `begin` with zeros changes nothing."""
        return not (self.in_flight or self.peak or self.unended)

    def begin(self, more: int, in_flight: int, now: float) -> None:
        """`more` have begun since the last call, and `in_flight` are in flight now."""
        if now - self.used_at > REPORT_AGE_SECS:
            self.unended = 0  # the engine does not count requests that it refuses
        at_most = self.in_flight + more
        if at_most >= self.peak or now - self.peak_at > REPORT_AGE_SECS:
            self.peak, self.peak_at = at_most, now
        self.in_flight = in_flight
        self.unended += more
        if more or in_flight:
            self.used_at = now

    def end(self, count: int) -> bool:
        """The engine reports `count` more ended requests. True if some were not ours."""
        others = count > self.unended
        self.unended -= min(count, self.unended)
        return others


class Demand:
    """Workers count requests; `sample` turns their counts into what planning needs. Times are those of `clock`."""

    def __init__(
        self,
        counts: CountTotals,
        clock: Callable[[], float] = time.monotonic,
        *,
        device_time: DeviceTime | None = None,
    ) -> None:
        """Without `device_time` it keeps no accounts of the callers."""
        self._counts = counts
        self._device_time = device_time or DeviceTime(lambda: 0.0)
        self._clock = clock
        self._begun: Mapping[ReplicaKey, int] = {}
        self._ended: dict[ReplicaKey, int] = {}  # as last reported by the engines
        self._own: dict[ReplicaKey, _OwnRequests] = {}
        self._last_used: dict[ReplicaKey, float] = {}
        self._loaded_at: dict[str, dict[ReplicaKey, float]] = {}  # by model
        self._arrivals: dict[str, deque[float]] = {}  # by model
        self._sessions: defaultdict[str, _Sessions] = defaultdict(_Sessions)
        self._since = clock()
        self._displaced: dict[str, ReplicaKey] = {}
        self._load_ahead_at = 0.0
        self._admitted: Counter[str] = Counter()  # recorded when they began to wait, and not begun yet
        self._overloaded_since: dict[str, float] = {}

    def record_waiting(self, model_id: str, caller: Caller) -> None:
        """A request of this caller for a model arrived, and waits."""
        self._device_time.waits(caller, model_id, self._clock())
        self.record_request(model_id)

    def record_request(self, model_id: str, count: int = 1) -> None:
        """A request for a model arrived, whether or not it could be served at once."""
        now, times = self._clock(), self._arrivals.setdefault(model_id, deque(maxlen=MAX_ARRIVALS))
        times.extend([now] * min(count, MAX_ARRIVALS))
        if count:
            self._sessions[model_id].record_request(now)

    def record_admission(self, model_id: str) -> None:
        """A recorded request has waited and begins now: its beginning is not another arrival."""
        self._admitted[model_id] += 1

    def sample(self, fleet: FleetSnapshot, *, replica_target: int) -> None:
        """Adds what the workers and the engines have counted since the last sample."""
        now = self._clock()
        in_flight = self._collect(now)
        ended: dict[ReplicaKey, int] = {}
        for node in fleet.nodes.values():
            for activity in () if node.health is None else node.health.models:
                key, count = ReplicaKey(activity.id, node.name, instance_of(activity)), activity.ended or 0
                ended[key] = count
                own = self._own.setdefault(key, _OwnRequests())
                running = activity.in_flight + activity.queue_depth
                # Another cortex's requests may all be so short that no poll sees one running.
                if own.end(max(0, count - self._ended.get(key, count))) or running > own.peak:
                    self._last_used[key] = now
                    self._sessions[key.model_id].record_request(now)
        self._ended = ended
        self._update_overload(fleet, in_flight, replica_target, now)

    def routes_changed(self, models: Iterable[str], fleet: FleetSnapshot) -> None:
        """Records when the engines of these models became loaded, or came back with a node that was down."""
        now = self._clock()
        for model_id in models:
            before = self._loaded_at.pop(model_id, {})
            loaded = [each.key for each in fleet.engines(model_id) if each.node.healthy and each.view.loaded]
            if loaded:
                self._loaded_at[model_id] = {key: before.get(key, now) for key in loaded}
            if any(key not in before for key in loaded):
                self._displaced.pop(model_id, None)

    def record_displaced(
        self, models: Iterable[str], newcomer: ReplicaKey, waiting: Iterable[WaitingRequests] = ()
    ) -> None:
        """Engines of these models are evicted for another engine, which these requests wait for. If that one was itself
        displaced, its displacer is theirs."""
        displaced = list(models)
        displacer = self._displaced.get(newcomer.model_id, newcomer)
        self._displaced.update((model_id, displacer) for model_id in displaced)
        self._device_time.evicted(displaced, [caller for each in waiting for caller in each.callers])

    def record_removed(self, model_id: str) -> None:
        """An engine of the model is removed for its own sake, by an operator or because it was idle for too long."""
        self._displaced.pop(model_id, None)

    def displaced_if_due(self, catalogue: Catalogue) -> frozenset[str]:
        """Models of the catalogue that were evicted for others and have not been loaded since, every `LOAD_AHEAD_SECS`.
        In between none: they are not urgent, and planning for all of them takes time."""
        if self._clock() < self._load_ahead_at:
            return frozenset()
        self._load_ahead_at = self._clock() + LOAD_AHEAD_SECS
        self._displaced = {name: key for name, key in self._displaced.items() if catalogue.profile(name) is not None}
        return frozenset(self._displaced)

    @property
    def displaced_by(self) -> Mapping[str, ReplicaKey]:
        """The engines that models were evicted for that have not been loaded since, by model."""
        return dict(self._displaced)

    def record_use(self, key: ReplicaKey) -> None:
        """A request will be sent there in a moment."""
        self._last_used[key] = self._clock()

    def last_uses(self) -> dict[str, float]:
        """When each model was last used, in Unix seconds, as far as `sample` has seen it."""
        offset, found = time.time() - self._clock(), dict[str, float]()
        for key, at in self._last_used.items():
            found[key.model_id] = max(found.get(key.model_id, 0.0), at + offset)
        return found

    def least_recent_first(self, keys: Iterable[ReplicaKey]) -> list[ReplicaKey]:
        """In the order of their last use as far as `sample` has seen it, those never used first."""
        _ = self._collect(self._clock())
        return sorted(keys, key=lambda key: (self._last_used.get(key, 0.0), key))

    @property
    def several_callers(self) -> bool:
        """Whether more than one caller has used this cortex."""
        return self._device_time.several_callers

    @property
    def charged(self) -> Mapping[Charge, float]:
        """As of `DeviceTime`."""
        return self._device_time.charged

    def keep_callers(self, names: AbstractSet[str]) -> None:
        """As `DeviceTime.keep_callers`."""
        self._device_time.keep_callers(names)

    @property
    def accounts(self) -> Mapping[str, float]:
        """The device time of each API key."""
        return self._device_time.accounts

    def charge(self, fleet: FleetSnapshot, waiting: Mapping[str, WaitingRequests]) -> None:
        """Charges the devices of every engine to the callers that have used it since the last call. `waiting` is by
        name of the model."""
        by_engine: dict[ReplicaKey, dict[str, CallerCount]] = {}
        for (key, key_id), count in self._counts.take_callers().items():
            by_engine.setdefault(key, {})[key_id] = count
        queued: dict[str, set[Caller]] = {}
        for name, requests in waiting.items():
            queued.setdefault(fleet.catalogue.requested(name).model_id, set()).update(requests.callers)
        if not self._device_time.accounts and not by_engine and not any(map(_has_key, queued.values())):
            return
        engines: list[EngineUse] = []
        for node in fleet.healthy:
            held = _devices_held(node)
            for engine in node.every_engine():
                if engine.view.loaded or engine.view.coming:
                    serving = serving_engine(fleet, engine).key
                    callers, total = by_engine.get(serving, {}), self._counts.in_flight(serving)
                    now = {key_id: count.now for key_id, count in callers.items()}
                    now[ANONYMOUS.key_id] = total - sum(now.values())
                    begun = {key_id: count.begun for key_id, count in callers.items()}
                    loading = not engine.view.loaded
                    engines.append(EngineUse(engine.key, serving.model_id, held[engine.key], loading, now, begun))
        self._device_time.sample(engines, queued, self._clock())

    def usages(self) -> dict[ReplicaKey, ReplicaUsage]:
        """How each replica is used. Requests that came and went since the last sample count too: a model
        used a moment ago is not idle."""
        now = self._clock()
        in_flight = self._collect(now)
        loaded_at = {key: at for replicas in self._loaded_at.values() for key, at in replicas.items()}
        return {
            key: ReplicaUsage(
                in_flight.get(key, 0),
                self._last_used.get(key, 0.0),
                loaded_at.get(key, 0.0),
                peak=0 if (own := self._own.get(key)) is None else own.peak,
                callers=self._device_time.users(key, key.model_id, now),
            )
            for key in loaded_at.keys() | in_flight.keys()
        }

    def arrivals(self) -> dict[str, Arrivals]:
        """When the last requests for each model arrived, and how often sessions begin."""
        now, memory = self._clock(), SESSION_MEMORY_SECS
        counted_secs = memory * (1 - math.exp((self._since - now) / memory)) + SESSION_PRIOR_SECS
        return {
            model_id: Arrivals(tuple(times), self._sessions[model_id].faded(now) / counted_secs)
            for model_id, times in self._arrivals.items()
        }

    @property
    def overloaded_since(self) -> Mapping[str, float]:
        """Models whose replicas are over the load target, and since when."""
        return dict(self._overloaded_since)

    def _collect(self, now: float) -> dict[ReplicaKey, int]:
        """Marks what the workers have begun as used, and returns what is in flight now."""
        begun, more = self._counts.begun(), {}
        for key, count in begun.items():
            if count > (before := self._begun.get(key, 0)):
                more[key] = count - before
                self._last_used[key] = now
                waited = min(more[key], self._admitted[key.model_id])
                self._admitted[key.model_id] -= waited
                self.record_request(key.model_id, more[key] - waited)
        in_flight = self._counts.all_in_flight()
        moving = more.keys() | in_flight.keys()
        for key in moving.union(key for key, own in self._own.items() if not own.at_rest):
            self._own.setdefault(key, _OwnRequests()).begin(more.get(key, 0), in_flight.get(key, 0), now)
        self._begun = begun
        self._last_used.update(dict.fromkeys(in_flight, now))
        return in_flight

    def _update_overload(
        self, fleet: FleetSnapshot, in_flight: Mapping[ReplicaKey, int], target: int, now: float
    ) -> None:
        for model_id in {key.model_id for key in in_flight} | self._overloaded_since.keys():
            engines = fleet.serving(model_id)
            working = sum(max(in_flight.get(engine.key, 0), engine.requests) for engine in engines)
            if engines and working > target * len(engines):
                self._overloaded_since.setdefault(model_id, now)
            else:
                self._overloaded_since.pop(model_id, None)


def _devices_held(node: NodeSnapshot) -> dict[ReplicaKey, float]:
    """How many devices each engine on the node holds. Those on one device share it by what they have booked there,
    equally if one of them has booked nothing; the host's RAM counts as one device for each engine."""
    engines = [each for each in node.every_engine() if each.view.loaded or each.view.coming]
    on_device: defaultdict[int, dict[ReplicaKey, float]] = defaultdict(dict)
    for each in engines:
        devices = each.view.devices
        for index in devices:
            on_device[index][each.key] = (each.view.vram_booked_mb or 0) / len(devices)
    held = {each.key: 0.0 if each.view.devices else 1.0 for each in engines}
    for booked in on_device.values():
        counted, whole = all(booked.values()), sum(booked.values())
        for key, mb in booked.items():
            held[key] += mb / whole if counted else 1 / len(booked)
    return held


def _has_key(callers: Iterable[Caller]) -> bool:
    return any(caller.key_id for caller in callers)
