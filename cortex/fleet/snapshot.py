"""An immutable snapshot of the fleet, the input of every decision. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from cortex.config.catalogue import NO_MODELS, Catalogue
from cortex.routing.replica import ReplicaKey
from shared.protocol import (
    RAM,
    Device,
    DeviceHealth,
    Discovery,
    Link,
    ModelActivity,
    ModelStatus,
    ModelView,
    NeuronHealth,
)

EngineName: TypeAlias = tuple[str, str]
"""Names an engine on its node: (model id, instance)."""

Instances: TypeAlias = Mapping[str, ModelView]
"""The engines of one model on one node, by instance."""

_NONE: Instances = MappingProxyType({})
_ROUTED_BY = attrgetter("status", "servable", "variant", "adapters")


def instance_of(entry: ModelView | ModelActivity) -> str:
    """The instance that an entry of a neuron is about: "" if its neuron has one engine for each model."""
    return entry.instance or ""


def by_instance(views: Iterable[ModelView]) -> dict[str, dict[str, ModelView]]:
    """A neuron's list of models as `NodeSnapshot.models`."""
    found: dict[str, dict[str, ModelView]] = {}
    for view in views:
        found.setdefault(view.id, {})[instance_of(view)] = view
    return found


@dataclass(frozen=True)
class Reservation:
    """Memory reserved for a load in progress, of this variant if the model has any: `device_share_mb` MiB on each of
    the devices; the host's RAM has the index `RAM`. `serves` False: it is a part of an engine that spans several nodes,
    and takes no requests."""

    model_id: str
    node: str
    devices: tuple[int, ...]
    device_share_mb: int
    instance: str = ""
    variant: str | None = None
    serves: bool = True

    @property
    def key(self) -> ReplicaKey:
        """Of the engine that is being loaded."""
        return ReplicaKey(self.model_id, self.node, self.instance)


@dataclass(frozen=True)
class NodeSnapshot:
    """What is known about one neuron. `discovery` is None until it has answered once."""

    name: str
    endpoint: str
    healthy: bool = False
    draining: bool = False
    misses: int = 0
    last_error: str | None = None
    silent_since: float | None = None
    """Unix time of the first of the `misses`; None if the last poll was answered."""
    discovery: Discovery | None = None
    health: NeuronHealth | None = None
    health_at: float = 0.0
    """When `health` became known, in the fleet's time. Kept while only the uptime changes."""
    models: Mapping[str, Instances] = field(default_factory=lambda: MappingProxyType({}))
    """Model id to the engines of it that the neuron lists, at least one."""
    ignored_fields: tuple[str, ...] = ()
    """Fields of its answers that were left out because they do not read as expected, as "/health: models.id"."""

    @property
    def instance_id(self) -> str | None:
        """Identifies the neuron's process; None if the neuron does not report it."""
        return None if self.discovery is None else self.discovery.instance_id

    @property
    def has_instances(self) -> bool:
        """Whether it can run several engines of one model."""
        return self.discovery is not None and self.discovery.instances

    @cached_property
    def devices(self) -> list[Device]:
        """Usable devices: not lost and not in MIG mode."""
        every = [] if self.discovery is None else self.discovery.devices
        return [device for device in every if device.usable]

    @cached_property
    def ram(self) -> Device | None:
        """The host's RAM as a device, for models on the CPU. None if the neuron does not tell of it and has devices; if
        it has none, RAM of unknown size."""
        if self.discovery is None:
            return None
        host = self.discovery.host
        if host is not None and host.ram_total_mb:
            return Device(index=RAM, name="RAM", vram_total_mb=host.ram_total_mb)
        return None if self.discovery.devices else Device(index=RAM, name="RAM")

    @cached_property
    def in_ram(self) -> frozenset[int]:
        """The indices of the devices that share the host's RAM, and its own; none if it is not counted."""
        if self.ram is None:
            return frozenset()
        return frozenset({RAM, *(device.index for device in self.devices if device.unified)})

    @cached_property
    def device_health(self) -> dict[int, DeviceHealth]:
        return {} if self.health is None else {device.index: device for device in self.health.devices}

    @cached_property
    def sick_devices(self) -> Mapping[int, str]:
        """Why devices cannot be used now, by index: lost ones, and those with a fault."""
        every = [] if self.discovery is None else self.discovery.devices
        lost = {device.index: device.lost for device in every if device.lost is not None}
        return lost | {index: live.fault for index, live in self.device_health.items() if live.fault is not None}

    @cached_property
    def _free_mb_ascending(self) -> tuple[int, ...]:
        return self._free_mb_of(self.devices)

    @cached_property
    def _free_mb_of_gpus(self) -> tuple[int, ...]:
        """As `_free_mb_ascending`, without MIG instances, which no engine uses together with other devices."""
        gpus = [device for device in self.devices if not device.is_mig_instance]
        return self._free_mb_of(gpus) if len(gpus) < len(self.devices) else self._free_mb_ascending

    def _free_mb_of(self, devices: Iterable[Device]) -> tuple[int, ...]:
        live = self.device_health
        return tuple(sorted(_free_mb(device, live.get(device.index)) for device in devices))

    def free_mb_on_each_of(self, devices: int) -> int | None:
        """MiB available on each of the `devices` devices with the most free memory; None if there are fewer that work
        together. 0: in the host's RAM. Does not subtract what loads in progress and sleeping models will need."""
        if not devices:
            live = None if self.health is None else self.health.host
            return None if self.ram is None else self.ram.vram_total_mb if live is None else live.ram_bookable_mb
        free = self._free_mb_of_gpus if devices > 1 else self._free_mb_ascending
        return free[-devices] if devices <= len(free) else None

    def tightest_fit_mb(self, devices: int, share_mb: int) -> int | None:
        """MiB available on the `devices` devices with the least free memory that have `share_mb` each, on all together;
        None if there are fewer. As `free_mb_on_each_of`."""
        if not devices:
            free_ram = self.free_mb_on_each_of(0)
            return free_ram if free_ram is not None and free_ram >= share_mb else None
        free = self._free_mb_of_gpus if devices > 1 else self._free_mb_ascending
        first = bisect_left(free, share_mb)
        return sum(free[first : first + devices]) if first + devices <= len(free) else None

    @cached_property
    def links(self) -> dict[tuple[int, int], Link]:
        return {} if self.discovery is None else {(link.a, link.b): link for link in self.discovery.links}

    @cached_property
    def activity(self) -> dict[EngineName, ModelActivity]:
        return {} if self.health is None else {(entry.id, instance_of(entry)): entry for entry in self.health.models}

    @cached_property
    def views(self) -> tuple[ModelView, ...]:
        """Every engine that the neuron lists."""
        return tuple(view for instances in self.models.values() for view in instances.values())

    @cached_property
    def loaded(self) -> frozenset[EngineName]:
        """The engines that are loaded here."""
        return frozenset((view.id, instance_of(view)) for view in self.views if view.loaded)

    @cached_property
    def listed(self) -> tuple[tuple[ReplicaKey, ModelView], ...]:
        """Every engine that the neuron lists, with its key."""
        return tuple((ReplicaKey(view.id, self.name, instance_of(view)), view) for view in self.views)

    def every_engine(self) -> Iterator[EngineSnapshot]:
        """Every engine that the neuron lists, in any status."""
        return (EngineSnapshot(self, view, key) for key, view in self.listed)

    def instances(self, model_id: str) -> Instances:
        """The engines of the model that the neuron lists, in any status."""
        return self.models.get(model_id, _NONE)

    def view(self, model_id: str, instance: str) -> ModelView | None:
        """What the neuron says of one engine; None if it does not list it."""
        return self.instances(model_id).get(instance)

    def engines(self, model_id: str) -> list[EngineSnapshot]:
        """The engines of the model here, in any status."""
        there = self.instances(model_id).items()
        return [EngineSnapshot(self, view, ReplicaKey(model_id, self.name, instance)) for instance, view in there]

    def engine_version(self, model_id: str, instance: str) -> object:
        """Differs for another engine of this name; None if it is not listed. An entry without `since` (protocol v1) may
        look alike after a reload, so what else is loaded counts too: the port may be another model's now."""
        view = self.view(model_id, instance)
        if view is None:
            return None
        if view.since is not None:
            return view.since, self.instance_id
        return view.status, view.harness, view.devices, view.vram_used_mb, self.loaded

    def is_loaded(self, model_id: str) -> bool:
        """Whether an engine of the model is loaded here."""
        return any(view.loaded for view in self.instances(model_id).values())

    def has_status(self, model_id: str, *statuses: ModelStatus) -> bool:
        """Whether an engine of the model here has one of these statuses."""
        return any(view.known_status in statuses for view in self.instances(model_id).values())


class EngineSnapshot(NamedTuple):
    """One engine on a node, as the node lists it."""

    node: NodeSnapshot
    view: ModelView
    key: ReplicaKey

    @property
    def instance(self) -> str:
        return self.key.instance

    @property
    def sick_because(self) -> str | None:
        """Which of its devices cannot be used, and why; None if all can."""
        sick = self.node.sick_devices
        found = (f"device {index}: {sick[index]}" for index in self.view.devices if index in sick) if sick else ()
        return next(iter(found), None)

    @property
    def leaving(self) -> bool:
        """Whether it is on a neuron that is drained or on a sick device: it serves while no other engine can."""
        return self.node.draining or self.sick_because is not None

    @property
    def activity(self) -> ModelActivity | None:
        """Its requests by the node's last report."""
        model_id, _, instance = self.key
        return self.node.activity.get((model_id, instance))

    @property
    def requests(self) -> int:
        """Requests there by the node's last report, from all clients."""
        activity = self.activity
        return 0 if activity is None else activity.in_flight + activity.queue_depth

    @property
    def limit(self) -> int | None:
        """How many requests the node allows there at a time; None: any number."""
        activity = self.activity
        return None if activity is None else activity.limit


def _free_mb(device: Device, live: DeviceHealth | None) -> int:
    if live is None:
        return device.vram_total_mb
    return live.vram_free_mb if live.vram_bookable_mb is None else live.vram_bookable_mb


def with_different_routes(before: NodeSnapshot, after: NodeSnapshot) -> set[str]:
    """Models whose routing is affected by the change from `before` to `after`. Usually none."""
    if before.healthy != after.healthy or before.draining != after.draining or before.instance_id != after.instance_id:
        return {*before.models, *after.models}
    if before.health is not after.health and before.sick_devices != after.sick_devices:
        return {*before.models, *after.models}
    changed: set[str] = set()
    if before.models is not after.models:
        changed |= before.models.keys() ^ after.models.keys()
        changed.update(m for m in before.models.keys() & after.models.keys() if _moved(m, before, after))
    if before.health is not after.health and before.activity != after.activity:
        names = before.activity.keys() | after.activity.keys()
        changed |= {name[0] for name in names if before.activity.get(name) != after.activity.get(name)}
    return changed


def _moved(model_id: str, before: NodeSnapshot, after: NodeSnapshot) -> bool:
    """Whether an engine of the model has come, gone, or changed in a way that matters to its requests."""
    older, newer = before.models[model_id], after.models[model_id]
    if older.keys() != newer.keys():
        return True
    for instance, new in newer.items():
        old = older[instance]
        if old is new and new.since is not None:
            continue
        if _ROUTED_BY(old) != _ROUTED_BY(new):
            return True
        if before.engine_version(model_id, instance) != after.engine_version(model_id, instance):
            return True
    return False


@dataclass(frozen=True)
class FleetSnapshot:
    """All neurons by name, in configuration order; loads in progress, and evictions for them."""

    nodes: Mapping[str, NodeSnapshot] = field(default_factory=dict)
    reservations: tuple[Reservation, ...] = ()
    evicting: frozenset[ReplicaKey] = frozenset()  # being evicted, no new requests
    index: Mapping[str, tuple[str, ...]] | None = None  # model id -> names of its holders; None: found when asked for
    topology: object = None
    """A new object whenever the list of neurons or a discovery changes; None: not tracked."""
    catalogue: Catalogue = field(default=NO_MODELS, compare=False)
    """Says what `id@variant` and adapters stand for. Where a method takes the name of a model, that is an id or such a
    name, which means the engines of that variant, or of the adapter's base."""

    @cached_property
    def healthy(self) -> tuple[NodeSnapshot, ...]:
        return tuple(node for node in self.nodes.values() if node.healthy)

    @cached_property
    def _holders(self) -> Mapping[str, tuple[str, ...]]:
        if self.index is not None:
            return self.index
        holders: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for model_id in node.models:
                holders.setdefault(model_id, []).append(node.name)
        return {model_id: tuple(names) for model_id, names in holders.items()}

    def holders(self, model_id: str) -> tuple[NodeSnapshot, ...]:
        """The neurons that list the model, in any status."""
        return tuple(self.nodes[name] for name in self._holders.get(model_id, ()))

    def engines(self, name: str, node: NodeSnapshot | None = None) -> Iterator[EngineSnapshot]:
        """The engines of the model on this neuron, by default on every one, in any status."""
        model_id, variant = self.catalogue.requested(name)
        nodes = self.holders(model_id) if node is None else (node,)
        engines = (engine for each in nodes for engine in each.engines(model_id))
        return engines if variant is None else (engine for engine in engines if engine.view.variant == variant)

    def names_for(self, key: ReplicaKey) -> tuple[str, ...]:
        """The names of models that this engine serves requests for."""
        engine = self.engine(key)
        return self.catalogue.running(key.model_id, None if engine is None else engine.view.variant).names

    def engine(self, key: ReplicaKey) -> EngineSnapshot | None:
        """This engine; None if its neuron does not list it."""
        node = self.nodes.get(key.node)
        view = None if node is None else node.view(key.model_id, key.instance)
        return None if node is None or view is None else EngineSnapshot(node, view, key)

    def serving(self, name: str) -> list[EngineSnapshot]:
        """The engines that may get a request for the model now, for an adapter those that have it. Those that are
        leaving get none while another can serve; otherwise they still answer. One that is being evicted gets none."""
        model_id, variant = self.catalogue.requested(name)
        loaded = [
            EngineSnapshot(node, view, key)
            for node in self.holders(model_id)
            if node.healthy
            for instance, view in node.instances(model_id).items()
            if view.servable_now and variant in (None, view.variant)
            if (key := ReplicaKey(model_id, node.name, instance)) not in self.evicting
        ]
        usable = [engine for engine in loaded if not engine.leaving] or loaded
        return [each for each in usable if name in each.view.adapters] if name in self.catalogue.adapters else usable

    def loading_on(self, name: str) -> EngineSnapshot | None:
        """An engine of the model that a healthy neuron is loading."""
        for engine in self.engines(name):
            if engine.node.healthy and engine.view.coming:
                return engine
        return None

    def reservation_of(self, name: str) -> Reservation | None:
        """The reservation of the load of the model in progress, if any."""
        if not self.reservations:
            return None
        model_id, variant = self.catalogue.requested(name)
        ours = (
            each
            for each in self.reservations
            if each.serves and each.model_id == model_id and variant in (None, each.variant)
        )
        return next(ours, None)

    @property
    def listed_models(self) -> list[str]:
        """Every model that some neuron lists."""
        return list(self._holders)

    def with_load(self, reservations: Iterable[Reservation], evicting: Iterable[ReplicaKey]) -> FleetSnapshot:
        """The fleet after this load and its evictions have started."""
        return replace(self, reservations=(*self.reservations, *reservations), evicting=self.evicting.union(evicting))
