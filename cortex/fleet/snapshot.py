"""An immutable snapshot of the fleet, the input of every decision. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from shared.protocol import (
    Device,
    DeviceHealth,
    Discovery,
    Link,
    ModelActivity,
    ModelStatus,
    ModelView,
    NeuronHealth,
)


@dataclass(frozen=True)
class Reservation:
    """VRAM reserved for a load in progress, of this variant if the model has any: `device_share_mb` MiB on each of the
    devices."""

    model_id: str
    node: str
    devices: tuple[int, ...]
    device_share_mb: int
    variant: str | None = None


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
    models: Mapping[str, ModelView] = field(default_factory=lambda: MappingProxyType({}))
    ignored_fields: tuple[str, ...] = ()
    """Fields of its answers that were left out because they do not read as expected, as "/health: models.id"."""

    @property
    def instance(self) -> str | None:
        """Identifies the neuron's process; None if the neuron does not report it."""
        return None if self.discovery is None else self.discovery.instance_id

    @cached_property
    def devices(self) -> list[Device]:
        """Usable devices: not lost and not in MIG mode."""
        every = [] if self.discovery is None else self.discovery.devices
        return [device for device in every if device.lost is None and not device.mig_mode]

    @cached_property
    def device_health(self) -> dict[int, DeviceHealth]:
        return {} if self.health is None else {device.index: device for device in self.health.devices}

    @cached_property
    def _free_mb_descending(self) -> tuple[int, ...]:
        live = self.device_health
        return tuple(sorted((_free_mb(device, live.get(device.index)) for device in self.devices), reverse=True))

    def free_mb_on_each_of(self, devices: int) -> int | None:
        """MiB available on each of the `devices` devices with the most free memory; None if there are fewer devices.
        Does not subtract what loads in progress and sleeping models will need."""
        return self._free_mb_descending[devices - 1] if devices <= len(self._free_mb_descending) else None

    @cached_property
    def links(self) -> dict[tuple[int, int], Link]:
        return {} if self.discovery is None else {(link.a, link.b): link for link in self.discovery.links}

    @cached_property
    def activity(self) -> dict[str, ModelActivity]:
        return {} if self.health is None else {entry.id: entry for entry in self.health.models}

    @cached_property
    def loaded_models(self) -> frozenset[str]:
        """The ids of the models that are loaded here."""
        return frozenset(m for m, view in self.models.items() if view.known_status is ModelStatus.LOADED)

    def engine_version(self, model_id: str) -> object:
        """Differs for another engine of the model; None if the model is not listed. An entry without `since` (protocol
        v1) may look alike after a reload, so what else is loaded counts too: the port may be another model's now."""
        view = self.models.get(model_id)
        if view is None:
            return None
        if view.since is not None:
            return view.since, self.instance
        return view.status, view.harness, view.devices, view.vram_used_mb, self.loaded_models

    def requests_on(self, model_id: str) -> int:
        """Requests in the model's engine by the node's last report, from all clients."""
        activity = self.activity.get(model_id)
        return 0 if activity is None else activity.in_flight + activity.queue_depth

    def request_limit(self, model_id: str) -> int | None:
        """How many requests the node allows at the model's engine at a time; None: any number."""
        activity = self.activity.get(model_id)
        return None if activity is None else activity.limit

    def is_loading(self, model_id: str) -> bool:
        """Whether the model is being loaded here."""
        status = self.status_of(model_id)
        return status is not None and status.coming

    def can_serve(self, model_id: str) -> bool:
        """Whether the model is loaded here, and the neuron does not say that it cannot answer now."""
        view = self.models.get(model_id)
        return view is not None and view.known_status is ModelStatus.LOADED and view.unservable_because is None

    def status_of(self, model_id: str) -> ModelStatus | None:
        """The model's status here; None when it is not listed, or with a status this version does not know."""
        view = self.models.get(model_id)
        return None if view is None else view.known_status


def _free_mb(device: Device, live: DeviceHealth | None) -> int:
    if live is None:
        return device.vram_total_mb
    return live.vram_free_mb if live.vram_bookable_mb is None else live.vram_bookable_mb


def with_different_routes(before: NodeSnapshot, after: NodeSnapshot) -> set[str]:
    """Models whose routing is affected by the change from `before` to `after`. Usually none."""
    if before.healthy != after.healthy or before.draining != after.draining or before.instance != after.instance:
        return {*before.models, *after.models}
    changed: set[str] = set()
    if before.models is not after.models:
        changed |= before.models.keys() ^ after.models.keys()
        for model_id in before.models.keys() & after.models.keys():
            old, new = before.models[model_id], after.models[model_id]
            if old is new and new.since is not None:
                continue
            if (old.status, old.servable) != (new.status, new.servable) or before.engine_version(
                model_id
            ) != after.engine_version(model_id):
                changed.add(model_id)
    if before.health is not after.health and before.activity != after.activity:
        ids = before.activity.keys() | after.activity.keys()
        changed |= {model_id for model_id in ids if before.activity.get(model_id) != after.activity.get(model_id)}
    return changed


@dataclass(frozen=True)
class FleetSnapshot:
    """All neurons by name, in configuration order; loads in progress, and evictions for them."""

    nodes: Mapping[str, NodeSnapshot] = field(default_factory=dict)
    reservations: tuple[Reservation, ...] = ()
    evicting: frozenset[tuple[str, str]] = frozenset()  # (model id, node): being evicted, no new requests
    index: Mapping[str, tuple[str, ...]] | None = None  # model id -> names of its holders; None: found when asked for
    topology: object = None
    """A new object whenever the list of neurons or a discovery changes; None: not tracked."""

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

    def serving(self, model_id: str) -> list[NodeSnapshot]:
        """The neurons whose engine may get a request for the model now. A draining node gets none while another can
        serve; otherwise it still answers. A model that is being evicted gets none."""
        loaded = [
            node
            for node in self.holders(model_id)
            if node.healthy and node.can_serve(model_id) and (model_id, node.name) not in self.evicting
        ]
        return [node for node in loaded if not node.draining] or loaded

    def loading_on(self, model_id: str) -> NodeSnapshot | None:
        """A healthy neuron that is loading the model."""
        for node in self.holders(model_id):
            if node.healthy and node.is_loading(model_id):
                return node
        return None

    def reservation_of(self, model_id: str) -> Reservation | None:
        """The reservation of the load of the model in progress, if any."""
        return next((each for each in self.reservations if each.model_id == model_id), None)

    @property
    def listed_models(self) -> list[str]:
        """Every model that some neuron lists."""
        return list(self._holders)

    def with_load(self, reservation: Reservation, evicting: Iterable[tuple[str, str]]) -> FleetSnapshot:
        """The fleet after this load and its evictions have started."""
        return replace(self, reservations=(*self.reservations, reservation), evicting=self.evicting.union(evicting))
