"""The inputs of a plan, all taken at one moment."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, count

from cortex.accounts.caller import Caller
from cortex.accounts.fairness.claims import Claim, claim_of, contend
from cortex.config.catalogue import Catalogue
from cortex.config.neurons import HostNetwork
from cortex.config.profile import DEFAULT_PRIORITY, ModelProfile, RequestedModel
from cortex.config.settings import Rules
from cortex.fleet.groups import serving_engine, sick_because
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot, NodeSnapshot
from cortex.routing.replica import ANY_NODE, ModelOnNode, ReplicaKey
from shared.protocol import ModelStatus
from shared.protocol.parallel import ParallelSettings


@dataclass(frozen=True)
class ReplicaUsage:
    """How one replica is used. Times are on the clock of `PlanningView.now`.

    `in_flight` counts our own requests there, `peak` the most that a report of the engine may still show.
    `last_used` and `loaded_at` are 0 when unknown. `callers` use it now or did a moment ago, as far as known.
    """

    in_flight: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0
    peak: int = 0
    callers: frozenset[Caller] = frozenset()


DRAINING = "draining"
"""`ModelView.state` of an engine that accepts no new requests and exits after its current ones. Its status is
`unloaded`."""

UNUSED = ReplicaUsage()
DEFAULT_RULES = Rules()
_UNKNOWN_NETWORK = HostNetwork()


MAX_ARRIVALS = 32
"""How many of a model's last arrivals are kept."""


@dataclass(frozen=True)
class Arrivals:
    """When the last requests for a model arrived, at most `MAX_ARRIVALS`, in order, on the clock of
    `PlanningView.now`; and how often, per second, one arrives after a pause: it begins a session."""

    times: tuple[float, ...] = ()
    sessions_per_sec: float = 0.0

    @property
    def last(self) -> float:
        """-inf without any."""
        return self.times[-1] if self.times else -math.inf

    def cold_start_wait(self, now: float, load_secs: float) -> float:
        """How long requests would wait for a load of `load_secs`, all together, in seconds: the first one for all of
        it, those that follow for the rest. From what followed earlier arrivals; more when requests arrive fast now."""
        complete = bisect_right(self.times, now - load_secs)
        recent = len(self.times) - complete
        return max(_mean_cold_start_wait(self.times, complete, load_secs), load_secs * (recent + 1) / 2)

    def wait_rate(self, now: float, load_secs: float) -> float:
        """How long requests will wait, in seconds for each second that the model is not loaded: what its sessions would
        cost if each began with a load."""
        return self.sessions_per_sec * self.cold_start_wait(now, load_secs) if self.sessions_per_sec else 0.0


@lru_cache(maxsize=4096)
def _mean_cold_start_wait(times: tuple[float, ...], complete: int, load_secs: float) -> float:
    """Over loads that started at each of the first `complete` arrivals, and two without other requests."""
    total, end, until = 2 * load_secs, 0, list(accumulate(times, initial=0.0))
    for index in range(complete):
        loaded_at = times[index] + load_secs
        while end < len(times) and times[end] < loaded_at:
            end += 1
        total += (end - index) * loaded_at - (until[end] - until[index])
    return total / (complete + 2)


NO_ARRIVALS = Arrivals()


@dataclass(frozen=True)
class WaitingRequests:
    """Requests waiting for a model: how many, when the first one arrived, and whose they are. `served_at` is when the
    caller that has been without for longest last got a request through, of any model; `admitted_at` when one of these
    did that waited for this model."""

    count: int
    since: float
    callers: frozenset[Caller] = frozenset()
    served_at: float = -math.inf
    admitted_at: float = -math.inf

    def waited_secs(self, now: float) -> float:
        """How long they have waited, all together, as if they had arrived evenly."""
        return (now - self.since) * (self.count + 1) / 2


@dataclass(frozen=True)
class Backoff:
    """After a failure, the model is not loaded on a node before `until`. `temporary`: the cause passes by
    itself, so requests wait instead of failing. `permanent`: the next load would fail too."""

    until: float
    reason: str
    temporary: bool = False
    permanent: bool = False


@dataclass(frozen=True)
class PlanningView:
    """The state at one moment, as the planner's input. `now` is in seconds, on the clock that all times here share.

    `arrivals` are by model. `load_secs` is how long loads took, by model and node. `observed_share_mb`
    is what neurons booked per device for models without a size in the catalogue. In both a variant of a model counts
    as a model of its own, named `id@variant`; in `backoffs` and `waiting` it may. `overloaded_since` is when a model's
    replicas began to exceed `Rules.replica_target` requests each. `holds` is until when operators hold models back. A
    backoff or a hold of ANY_NODE applies to every node. `displaced` are models that were evicted for others and
    have not been loaded since.
    """

    now: float
    catalogue: Catalogue
    fleet: FleetSnapshot
    rules: Rules = DEFAULT_RULES
    usages: Mapping[ReplicaKey, ReplicaUsage] = field(default_factory=dict)
    waiting: Mapping[str, WaitingRequests] = field(default_factory=dict)
    arrivals: Mapping[str, Arrivals] = field(default_factory=dict)
    load_secs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    observed_share_mb: Mapping[str, int] = field(default_factory=dict)
    backoffs: Mapping[ModelOnNode, Backoff] = field(default_factory=dict)
    overloaded_since: Mapping[str, float] = field(default_factory=dict)
    holds: Mapping[ModelOnNode, float] = field(default_factory=dict)
    named_instances: Mapping[ModelOnNode, str] = field(default_factory=dict)
    """The instances that an operator has named for the next load."""
    displaced: frozenset[str] = frozenset()
    displaced_by: Mapping[str, ReplicaKey] = field(default_factory=dict)
    """The engines that models were evicted for that have not been loaded since, by model."""
    networks: Mapping[str, HostNetwork] = field(default_factory=dict)
    """Of the nodes for which something is configured."""
    accounts: Mapping[str, float] = field(default_factory=dict)
    """The device time of each API key (`cortex.accounts.fairness.device_time`)."""

    def network_of(self, node: str) -> HostNetwork:
        """As configured; a speed that is not configured is the one that the neuron reports."""
        found = self.networks.get(node, _UNKNOWN_NETWORK)
        discovery = self.fleet.nodes[node].discovery
        if found.gbps is not None or discovery is None or not discovery.network_mbps:
            return found
        return replace(found, gbps=discovery.network_mbps / 1000)

    def waiting_for(self, requested: RequestedModel) -> WaitingRequests | None:
        """The requests that wait for the model, or for this variant of it; None if none does."""
        if not self.waiting:
            return None
        names = {requested.model_id, requested.name}
        found = [waiting for name in names if (waiting := self.waiting.get(name)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        callers = frozenset[Caller]().union(*(each.callers for each in found))
        count, since = sum(each.count for each in found), min(each.since for each in found)
        served_at, admitted_at = min(each.served_at for each in found), max(each.admitted_at for each in found)
        return WaitingRequests(count, since, callers, served_at, admitted_at)

    def waited_secs(self, waiting: WaitingRequests) -> float:
        """How long these requests have waited, all together. Among several callers since the model last served one, and
        all of one key count as one."""
        if self._several_callers:
            since = max(waiting.since, waiting.admitted_at)
            waiting = replace(waiting, count=len(waiting.callers), since=since)
        return waiting.waited_secs(self.now)

    def unserved_since(self, waiting: WaitingRequests) -> float:
        """Since when these requests wait; among several callers not while theirs for other models were served, or while
        one of those loads. One that keeps several models busy does not starve for another."""
        if not self._several_callers:
            return waiting.since
        if waiting.callers and waiting.callers <= self._callers_of_loads:
            return self.now
        return max(waiting.since, waiting.served_at)

    @cached_property
    def _callers_of_loads(self) -> frozenset[Caller]:
        """Those with a request for a model that is being loaded, or has been since and has not served it yet."""
        waits = (requests.callers for name, requests in self.waiting.items() if self._comes(name, requests))
        return frozenset(chain.from_iterable(waits))

    def _comes(self, name: str, requests: WaitingRequests) -> bool:
        if self.fleet.reservation_of(name) is not None or self.fleet.loading_on(name) is not None:
            return True
        since = max(requests.since, requests.admitted_at)
        return any(self.usage(each.key).loaded_at > since for each in self.fleet.serving(name))

    def displacer_of(self, model_id: str) -> ReplicaKey | None:
        """The engine that the model was evicted for, while other keys than those that wait for the model have it."""
        key = self.displaced_by.get(model_id)
        if key is None or key.model_id == model_id or not self._holds_memory(key):
            return None
        return key if contend(self._callers_waiting_for(model_id), self.users_of(key)) else None

    def displaced_callers(self, node: str, displacer: ReplicaKey | None = None) -> frozenset[Caller]:
        """Those that wait for models that were evicted for an engine on this node; with `displacer` for that one."""
        waits = (
            self._callers_waiting_for(model_id)
            for model_id, key in self.displaced_by.items()
            if key.node == node and displacer in (None, key)
        )
        return frozenset(chain.from_iterable(waits))

    def users_of(self, key: ReplicaKey) -> frozenset[Caller]:
        """Those that use the engine, or wait for its model."""
        return self.usage(key).callers | self._callers_waiting_for(key.model_id)

    def _callers_waiting_for(self, model_id: str) -> frozenset[Caller]:
        names = self.catalogue.names_of(model_id)
        found = (self.waiting[name].callers for name in names if name in self.waiting)
        return frozenset(chain.from_iterable(found))

    def _holds_memory(self, key: ReplicaKey) -> bool:
        """Whether the engine is on its node, or on its way there or away."""
        fleet, engine = self.fleet, self.fleet.engine(key)
        if key in fleet.evicting or any(each.key == key for each in fleet.reservations):
            return True
        return engine is not None and (engine.view.loaded or engine.view.coming or engine.view.drains)

    @cached_property
    def _several_callers(self) -> bool:
        users = (use.callers for use in self.usages.values())
        waiting = (requests.callers for requests in self.waiting.values())
        return len({caller.key_id for callers in chain(users, waiting) for caller in callers}) > 1

    def claim(self, model_id: str) -> Claim:
        """What the most deserving of the callers that wait for the model deserves."""
        return claim_of(self.waiting[model_id].callers, self.accounts)

    @cached_property
    def _replicas(self) -> dict[str, frozenset[ReplicaKey]]:
        return {}

    def replicas(self, model_id: str) -> frozenset[ReplicaKey]:
        """The model's replicas that serve, without those that are leaving: their node is draining, or a device sick."""
        found = self._replicas.get(model_id)
        if found is None:
            serving = self.fleet.serving(model_id)
            found = self._replicas[model_id] = frozenset(
                each.key
                for each in serving
                if not each.leaving and (each.view.group is None or sick_because(self.fleet, each) is None)
            )
        return found

    def usage(self, key: ReplicaKey) -> ReplicaUsage:
        return self.usages.get(key, UNUSED)

    def requests_on(self, engine: EngineSnapshot) -> int:
        """Requests on the engine from all clients: ours, and those in its node's last report that were not ours."""
        engine = serving_engine(self.fleet, engine)
        usage = self.usage(engine.key)
        return usage.in_flight + max(0, engine.requests - max(usage.in_flight, usage.peak))

    def instance_to_load(self, model_id: str, node: NodeSnapshot, variant: str | None = None) -> str:
        """How the next load of the model, in this variant if it has any, names its engine on the node: as one that
        sleeps there, else the lowest number that no engine there uses; "" on a node that has one engine for each
        model."""
        if not node.has_instances:
            return ""
        named = self.named_instances.get((model_id, node.name))
        if named is not None:
            return named
        there = node.instances(model_id)
        taken = {
            each.instance for each in self.fleet.reservations if (each.model_id, each.node) == (model_id, node.name)
        }
        taken |= {name for name, entry in there.items() if entry.loaded or entry.coming or entry.state == DRAINING}
        taken |= {key.instance for key in self.fleet.evicting if key[:2] == (model_id, node.name)}
        asleep = [name for name, entry in there.items() if entry.known_status is ModelStatus.SLEEPING]
        if variant is not None:  # another variant keeps its name
            taken |= {name for name in asleep if there[name].variant != variant}
        return next(name for name in chain(asleep, map(str, count())) if name not in taken)

    def backoff(self, model_id: str, node: str) -> Backoff | None:
        """The backoff that currently forbids loading the model there, if any."""
        for key in ((model_id, ANY_NODE), (model_id, node)):
            backoff = self.backoffs.get(key)
            if backoff is not None and backoff.until > self.now:
                return backoff
        return None

    def backoffs_of(self, name: str) -> list[Backoff]:
        """The backoffs that currently forbid loading the model, or a variant that a request for this name may get."""
        profile = self.catalogue.profile(name)
        names = {name} if profile is None else {profile.id, *(each.requested.name for each in profile.choices)}
        return [each for (model, _), each in self.backoffs.items() if model in names and each.until > self.now]

    def held_until(self, model_id: str, node: str) -> float | None:
        """When the operator's hold that currently forbids loading the model there ends, if there is one."""
        until = max(self.holds.get((model_id, name), -math.inf) for name in (ANY_NODE, node))
        return until if until > self.now else None

    def device_share_mb(self, profile: ModelProfile) -> int:
        """MiB needed on each device, or in RAM: from the catalogue, else as observed, else 0."""
        return profile.device_share_mb or self.observed_share_mb.get(profile.requested.name, 0)

    def expected_load_secs(self, model_id: str, node: str) -> float | None:
        """How long a load took there, else the longest on any other node; None when it was never loaded."""
        known = self.load_secs.get(model_id)
        return known.get(node, max(known.values())) if known else None

    def profile(self, model_id: str) -> ModelProfile | None:
        """The catalogue's profile; for a model that only neurons know, one that loads it where it was. None when no
        node has it in a state it can be loaded from."""
        profile = self.catalogue.profile(model_id)
        if profile is not None:
            return profile
        known = [
            node
            for node in self.fleet.holders(model_id)
            if node.has_status(model_id, ModelStatus.UNLOADED, ModelStatus.SLEEPING)
            or any(engine.key in self.fleet.evicting for engine in node.engines(model_id))
        ]
        return self.profile_from_nodes(model_id, known)

    def profile_from_nodes(self, model_id: str, nodes: Sequence[NodeSnapshot]) -> ModelProfile | None:
        """A profile built from the nodes that list the model, to load it on one of them again; None without nodes."""
        if not nodes:
            return None
        entry = next(iter(nodes[0].models[model_id].values()))
        on_cpu = not entry.devices and (bool(entry.ram_booked_mb) or not nodes[0].devices)
        devices = max(1, len(entry.devices))
        given = entry.parallel
        parallel = None
        if given is not None and given.devices == devices:
            parallel = ParallelSettings.model_validate(given.model_dump())
        # Not validated: neurons may use model names that a catalogue may not.
        return ModelProfile.model_construct(
            id=model_id,
            harness=entry.harness or "vllm",
            devices=0 if on_cpu else None,
            min_devices=devices if parallel is None else parallel.tensor,
            parallel=parallel,
            pinned_on=tuple(node.name for node in nodes),
            residency_priority=self.priority(model_id),
        )

    def priority(self, model_id: str) -> int:
        """The model's residency priority; the catalogue's default for models outside it."""
        profile = self.catalogue.profile(model_id)
        return DEFAULT_PRIORITY if profile is None else profile.residency_priority
