"""How much memory each device of a node can give, and its RAM, and how much evicting a model frees. Pure. All sizes in
MiB; RAM has the index `RAM`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median

from cortex.accounts.caller import Caller
from cortex.config.profile import ModelProfile
from cortex.fleet.groups import serving_engine
from cortex.fleet.snapshot import EngineSnapshot, NodeSnapshot, Reservation
from cortex.placement.inputs import NO_ARRIVALS, PlanningView
from cortex.routing.replica import ReplicaKey
from shared.gpus import in_memory_steps
from shared.protocol import RAM, Device, DeviceHealth, ModelStatus, ModelView

UNCOUNTED_MEMORY_MB = 1 << 30
"""Assumed where a neuron does not tell how much memory there is: never a reason to reject."""

LOAD_SECS_BASE = 5.0
LOAD_SECS_PER_MB = 0.002
"""Estimated cost of a load that was never measured: roughly reading the weights from disk."""

PAUSE_LOADS = 0.25
SOON_LOADS = 0.5
"""In units of the time its reload takes: a model that has been idle for t is requested again within `SOON_LOADS` with
probability SOON_LOADS / (SOON_LOADS + PAUSE_LOADS + t): the longer a pause has lasted, the longer it will."""

_HOLDING = (ModelStatus.LOADED, ModelStatus.SLEEPING)


@dataclass(frozen=True)
class DeviceCapacity:
    """One device's memory. `free_mb` is available now; models sleeping there need `sleeping_mb` of it to
    wake."""

    total_mb: int
    free_mb: int
    sleeping_mb: int = 0

    @property
    def counted(self) -> bool:
        return self.total_mb < UNCOUNTED_MEMORY_MB

    @property
    def told_mb(self) -> int | None:
        """`free_mb` for people; None if it is not known."""
        return self.free_mb if self.counted else None

    @property
    def free_text(self) -> str:
        """As `20000 MiB`, for people."""
        return f"{self.free_mb} MiB" if self.counted else "an unknown amount of memory"

    @property
    def in_steps(self) -> int:
        """MiB available beside sleeping models, for comparisons: what is taken counts in whole GiB."""
        return in_memory_steps(self.free_mb - self.sleeping_mb, self.total_mb)

    @property
    def mostly_free(self) -> bool:
        return 2 * self.free_mb >= self.total_mb


@dataclass(frozen=True)
class ResidentModel:
    """A model that may be evicted from a node. It frees `frees_mb` on each of its `devices`, and `ram_mb` of the host's
    RAM in addition. Of devices that share the RAM it has all, and RAM itself.

    `protected` says why no model may evict it; None when some may. `cost` is what evicting it is expected to
    cost, in seconds that requests will wait.
    """

    key: ReplicaKey
    devices: frozenset[int]
    frees_mb: int
    priority: int
    in_flight: int
    last_used: float
    loaded_at: float
    reload_secs: float
    cost: float
    asleep: bool = False
    variant: str | None = None
    spare_replicas: int | None = None
    """How many replicas of the model a model of the same priority may evict together, because of its `replicas.min`.
    None: any number."""
    protected: str | None = None
    ram_mb: int = 0
    callers: frozenset[Caller] = frozenset()
    """Those that use it now, or did a moment ago."""
    neighbours: frozenset[Caller] = frozenset()
    """Those that use it or another model on its devices."""

    def frees_on(self, index: int) -> int:
        """MiB that evicting it frees there."""
        return (self.frees_mb if index in self.devices else 0) + (self.ram_mb if index == RAM else 0)

    @property
    def freed_mb(self) -> int:
        """MiB that evicting it frees, all together. What it has in RAM counts once."""
        return self.frees_mb * max(1, len(self.devices - {RAM})) + self.ram_mb

    @property
    def held_by_min_replicas(self) -> bool:
        """Whether only a model with a higher priority may evict it."""
        return self.spare_replicas is not None and self.spare_replicas <= 0


def device_memory(view: PlanningView, node: NodeSnapshot) -> dict[int, DeviceCapacity]:
    """By device index. Free memory is what the node reports as bookable, or else what it measures, or else what the
    models there leave, minus what our loads in progress will take beyond those figures."""
    ours = [(each, unreported_mb(node, each)) for each in view.fleet.reservations if each.node == node.name]
    memory = {device.index: _memory_of(node, device, ours) for device in node.devices}
    if node.ram is not None:
        memory |= dict.fromkeys(node.in_ram, _memory_of_ram(node, node.ram, ours))
    unmeasured = [device for device in node.devices if not _is_measured(node, device)]
    if unmeasured:
        reserved = {each.key for each, _ in ours}
        for engine in node.every_engine():
            if engine.key not in reserved and engine.view.holds_devices:
                held = _resident(view, engine)
                for device in unmeasured:
                    if device.index in held.devices:
                        known = memory[device.index]
                        memory[device.index] = replace(known, free_mb=known.free_mb - held.frees_mb)
    return memory


def _is_measured(node: NodeSnapshot, device: Device) -> bool:
    """Whether the node's figures of a device include what the models there hold."""
    live = node.device_health.get(device.index)
    if not device.vram_total_mb:
        return True  # nothing is counted
    return live is not None and bool(live.vram_bookable_mb is not None or live.vram_used_mb or live.vram_free_mb)


def unreported_mb(node: NodeSnapshot, reservation: Reservation) -> int:
    """What one of our loads will still take on each of its devices, beyond what the node's figures already include."""
    entry = node.view(reservation.model_id, reservation.instance)
    if entry is None or not (entry.loaded or entry.coming):
        return reservation.device_share_mb
    if entry.vram_booked_mb or entry.ram_booked_mb:
        return 0
    return max(0, reservation.device_share_mb - (entry.vram_used_mb or 0) // len(reservation.devices))


def engines_by_device(view: PlanningView, node: NodeSnapshot) -> dict[int, int]:
    """How many engines are on each device: loaded, asleep, starting, or about to be started by us."""
    there = {key: view.devices for key, view in node.listed if view.holds_devices}
    ours = [each.devices for each in view.fleet.reservations if each.node == node.name and each.key not in there]
    return Counter(index for devices in (*there.values(), *ours) for index in devices)


def reports_bookable_memory(node: NodeSnapshot) -> bool:
    """Whether the node reports bookable memory. Such a node refuses a load that does not fit at once; on others the
    engine fails later, when it runs out of memory."""
    if node.health is not None and node.health.host is not None:
        return True
    return any(live.vram_bookable_mb is not None for live in node.device_health.values())


def wake_mb(
    node: NodeSnapshot,
    entry: ModelView | None,
    share: int,
    memory: Mapping[int, DeviceCapacity],
    needed_mb: Mapping[int, int],
) -> dict[int, int]:
    """By device, what a sleeping engine needs on top of what it holds, capped at what all sleeping models there
    need."""
    if entry is None or not memory.keys() >= set(entry.devices):
        return {}
    if reports_bookable_memory(node) and not share:
        return {index: memory[index].sleeping_mb for index in entry.devices}
    held = (entry.vram_booked_mb or entry.vram_used_mb or 0) // max(1, len(entry.devices))
    wanted = {index: max(0, needed_mb[index] - held) for index in entry.devices}
    return {i: min(mb, memory[i].sleeping_mb) if memory[i].sleeping_mb else mb for i, mb in wanted.items()}


def _memory_of(node: NodeSnapshot, device: Device, ours: Sequence[tuple[Reservation, int]]) -> DeviceCapacity:
    if not device.vram_total_mb:
        return DeviceCapacity(UNCOUNTED_MEMORY_MB, UNCOUNTED_MEMORY_MB)
    reserved = sum(mb for reservation, mb in ours if device.index in reservation.devices) if ours else 0
    live = node.device_health.get(device.index)
    if live is None:
        return DeviceCapacity(device.vram_total_mb, device.vram_total_mb - reserved)
    if live.vram_bookable_mb is not None:
        bookable = live.vram_bookable_mb - _booked_since_poll_mb(node, device, live)
        return DeviceCapacity(device.vram_total_mb, bookable - reserved, live.vram_asleep_mb or 0)
    measured = live.vram_used_mb or live.vram_free_mb  # both 0: the driver does not report memory
    return DeviceCapacity(device.vram_total_mb, (live.vram_free_mb if measured else device.vram_total_mb) - reserved)


def _memory_of_ram(node: NodeSnapshot, ram: Device, ours: Sequence[tuple[Reservation, int]]) -> DeviceCapacity:
    """Of the host's RAM, which devices may share."""
    if not ram.vram_total_mb:
        return DeviceCapacity(UNCOUNTED_MEMORY_MB, UNCOUNTED_MEMORY_MB)
    pool = node.in_ram
    reserved = sum(mb * len(pool.intersection(reservation.devices)) for reservation, mb in ours)
    live = None if node.health is None else node.health.host
    if live is None:
        return DeviceCapacity(ram.vram_total_mb, ram.vram_total_mb - reserved)
    there = [entry for entry in node.views if _booked_ram_mb(node, entry)]
    coming = sum(_booked_ram_mb(node, entry) for entry in there if not entry.loaded)
    booked = sum(_booked_ram_mb(node, entry) for entry in there)
    since_poll = min(coming, max(0, booked - live.ram_booked_mb)) if coming else 0
    asleep = max(
        (figures.vram_asleep_mb or 0 for index, figures in node.device_health.items() if index in pool), default=0
    )
    return DeviceCapacity(ram.vram_total_mb, live.ram_bookable_mb - since_poll - reserved, asleep)


def _booked_ram_mb(node: NodeSnapshot, entry: ModelView) -> int:
    """What a loaded or loading model has booked in the host's RAM and on devices that share it."""
    if not (entry.loaded or entry.coming):
        return 0
    on_devices = _booked_share_mb(entry) * len(node.in_ram.intersection(entry.devices))
    return on_devices + (entry.ram_booked_mb or 0)


def _booked_since_poll_mb(node: NodeSnapshot, device: Device, live: DeviceHealth) -> int:
    """Memory on a device that loading models have booked since its figures were polled: a starting load is reported
    at once, device figures only with the next poll."""
    there = [entry for entry in node.views if device.index in (entry.devices or ())]
    coming = sum(_booked_share_mb(entry) for entry in there if not entry.loaded)
    if not coming or live.vram_booked_mb is None:
        return 0
    return min(coming, max(0, sum(map(_booked_share_mb, there)) - live.vram_booked_mb))


def _booked_share_mb(entry: ModelView) -> int:
    """What a loaded or loading model has booked on each of its devices."""
    return (entry.vram_booked_mb or 0) // max(1, len(entry.devices)) if entry.loaded or entry.coming else 0


def resident_models(view: PlanningView, node: NodeSnapshot) -> list[ResidentModel]:
    """Every model on the node that holds memory and is neither being loaded nor being evicted."""
    found = [
        _resident(view, engine)
        for engine in node.every_engine()
        if engine.view.known_status in _HOLDING and engine.key not in view.fleet.evicting
    ]
    return _with_neighbours(found, view.displaced_callers(node.name)) if any(each.callers for each in found) else found


def _with_neighbours(residents: Sequence[ResidentModel], displaced: frozenset[Caller]) -> list[ResidentModel]:
    """`displaced` wait for models that were evicted there."""
    users: defaultdict[int, set[Caller]] = defaultdict(set)
    for each in residents:
        for index in each.devices:
            users[index] |= each.callers
    return [
        replace(each, neighbours=frozenset(chain(displaced, each.callers, *(users[index] for index in each.devices))))
        for each in residents
    ]


def models_in_transition(view: PlanningView, node: NodeSnapshot) -> list[ResidentModel]:
    """Models being loaded or evicted on the node: their memory is unavailable now but may free up later."""
    changing = [
        _resident(view, engine)
        for engine in node.every_engine()
        if engine.view.coming or engine.key in view.fleet.evicting
    ]
    requested = [
        ResidentModel(each.key, frozenset(each.devices), unreported_mb(node, each), 0, 0, 0.0, 0.0, 0.0, 0.0)
        for each in view.fleet.reservations
        if each.node == node.name
    ]
    return [*changing, *requested]


def estimated_load_secs(view: PlanningView, model_id: str, node: str, size_mb: int) -> float:
    """Expected duration of a load of a model, or of `id@variant`: measured there or on another node, else the median of
    all loads, else estimated from the size."""
    known = view.expected_load_secs(model_id, node)
    if known is None and view.load_secs:
        known = median(secs for by_node in view.load_secs.values() for secs in by_node.values())
    return LOAD_SECS_BASE + LOAD_SECS_PER_MB * size_mb if known is None else known


def _resident(view: PlanningView, engine: EngineSnapshot) -> ResidentModel:
    node, entry, key = engine.node, engine.view, engine.key
    profile = view.catalogue.profile(entry.id)
    choice = None if profile is None else profile.choice(entry.variant if profile.variants else None)
    serving = serving_engine(view.fleet, engine).key  # of a group the parts count as one
    use = view.usage(serving)
    totals = {device.index: device.vram_total_mb for device in node.devices}
    devices, ram_mb = _places(node, entry, totals)
    asleep = entry.known_status is ModelStatus.SLEEPING
    declared = 0 if choice is None else choice.vram_mb or 0
    holds = entry.vram_booked_mb or entry.vram_used_mb or (0 if asleep else declared)
    share = holds // max(1, len(devices))
    if RAM in devices:
        share, ram_mb = (holds + ram_mb if entry.devices else ram_mb or holds), 0
    if not share and not asleep:  # size unknown: assume the whole device
        share = max((totals.get(index, 0) for index in devices), default=0)
    size = max(holds, declared) or share * len(devices)
    secs = estimated_load_secs(view, entry.id if choice is None else choice.requested.name, node.name, size)
    pinned = choice or profile
    return ResidentModel(
        key=key,
        devices=devices,
        frees_mb=share,
        priority=view.priority(entry.id),
        in_flight=view.requests_on(engine),
        last_used=use.last_used,
        loaded_at=use.loaded_at,
        reload_secs=secs,
        cost=_eviction_cost(view, engine, secs),
        asleep=asleep,
        callers=use.callers,
        variant=entry.variant,
        spare_replicas=None if profile is None else _spare_replicas(view, profile, serving),
        protected=f"pinned on {node.name}" if pinned is not None and node.name in pinned.pinned_on else None,
        ram_mb=ram_mb,
    )


def _places(node: NodeSnapshot, entry: ModelView, totals: Mapping[int, int]) -> tuple[frozenset[int], int]:
    """Where an engine holds memory, and what it has booked of the host's RAM, in MiB."""
    devices, in_ram = frozenset(entry.devices), entry.ram_booked_mb or 0
    if not devices and node.ram is not None and (in_ram or not totals):
        return node.in_ram, in_ram
    if devices & node.in_ram:
        return devices | node.in_ram, in_ram
    return devices or frozenset(totals), in_ram


def _eviction_cost(view: PlanningView, engine: EngineSnapshot, reload_secs: float) -> float:
    """The request-seconds of waiting to expect from evicting it: how likely it is to be requested again soon, times how
    long requests would then wait. A replica among several costs its share."""
    model_id, arrivals = engine.key.model_id, view.arrivals.get(engine.key.model_id, NO_ARRIVALS)
    likely = 1.0
    if reload_secs and not view.requests_on(engine):
        idle_secs = max(0.0, view.now - max(view.usage(engine.key).last_used, arrivals.last))
        likely = SOON_LOADS * reload_secs / ((SOON_LOADS + PAUSE_LOADS) * reload_secs + idle_secs)
    return likely * arrivals.cold_start_wait(view.now, reload_secs) / max(1, len(view.replicas(model_id)))


def _spare_replicas(view: PlanningView, profile: ModelProfile, key: ReplicaKey) -> int | None:
    """How many replicas of the model may go, this one being one of them."""
    if not profile.replicas.min:
        return None
    return len(view.replicas(profile.id) | {key}) - profile.replicas.min
