"""How much memory of each device can be booked, given what the driver measures and what is booked. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from neuron.gpu.topology import Topology
from neuron.spec import InstanceKey
from shared.errors import Conflict
from shared.gpus import DEVICE_MARGIN_MB
from shared.protocol import RAM, Device, DeviceFigures, DeviceHealth, ErrorCode, HostMemoryHealth
from shared.protocol.topology import UNKNOWN_VENDOR

MIG_REASON = "it is in MIG mode, in which only its MIG instances compute; each of them is a device of its own"
SILENT_REASON = "it does not answer"


@dataclass(frozen=True)
class Booking:
    """What is promised to one engine, and what it held when it was last measured, in MiB by device index. The index
    `RAM` stands for the host's RAM.

    A device that `held_mb` lacks is one whose driver does not report what the engine's processes hold. `foreign_mb`,
    what other processes held when the engine was booked, helps to estimate it. `awake_mb` is what a sleeping engine
    needs when it wakes. `alone`: no other engine of its model is to be on its devices, as no load named them.
    `file_mb` of what it holds in RAM are pages of files, which the system counts as available. `grows`: it may use all
    of its promise in RAM some time, so that one stays when it is measured.
    """

    key: InstanceKey
    promised_mb: Mapping[int, int]
    held_mb: Mapping[int, int] = field(default_factory=dict)
    foreign_mb: Mapping[int, int] = field(default_factory=dict)
    stopping: bool = False
    alone: bool = False
    awake_mb: Mapping[int, int] | None = None
    file_mb: int = 0
    grows: bool = True

    @property
    def devices(self) -> frozenset[int]:
        """Without RAM."""
        return frozenset(self.promised_mb) - {RAM}

    def claim_mb(self, index: int) -> int:
        """What this engine holds or may still allocate on a device."""
        return max(self.promised_mb.get(index, 0), self.held_mb.get(index, 0))


@dataclass(frozen=True)
class GpuCapacity:
    """One device, or the host's RAM, in MiB.

    `used_mb` is what all processes use, according to NVML: `held_mb` by this neuron's engines, `foreign_mb` by others.
    `booked_mb` is promised to engines that are not being stopped. `reserve_mb` is the driver's own: neither used nor
    free, and not visible to CUDA. `bookable_mb` can be booked for a new engine; `stopping_mb` is still held by engines
    that are being stopped, and `asleep_mb` is what sleeping engines need when they wake.
    `unusable` says why no engine can be placed here; None when one can. `measured` False: nothing but the bookings is
    known.
    """

    index: int
    name: str
    total_mb: int
    used_mb: int = 0
    booked_mb: int = 0
    held_mb: int = 0
    foreign_mb: int = 0
    reserve_mb: int = 0
    bookable_mb: int = 0
    stopping_mb: int = 0
    asleep_mb: int = 0
    short_mb: int = 0  # by which uses, bookings and what stays free exceed the total
    booked_by: tuple[tuple[str, int], ...] = ()  # engine, MiB promised; without stopping engines
    unusable: str | None = None
    measured: bool = True

    def shortfall_on_wake(self, needed_mb: int) -> int:
        """MiB that the sleeping engines here would lack if `needed_mb` were booked for another."""
        return max(0, self.asleep_mb - max(0, self.bookable_mb - needed_mb))

    def can_hold(self, needed_mb: int) -> bool:
        """True when `needed_mb` can be booked here. Always true for a device of unknown memory (`total_mb` 0)."""
        return self.unusable is None and (self.total_mb == 0 or needed_mb <= self.bookable_mb)

    def __str__(self) -> str:
        label = f"device {self.index} ({self.name})" if self.name else f"device {self.index}"
        if self.index == RAM:
            label = "this host's RAM"
        if self.unusable is not None:
            return f"{label} cannot be used: {self.unusable}"
        uses = [f"{mb} booked for {name!r}" for name, mb in self.booked_by]
        if self.foreign_mb:
            uses.append(f"{self.foreign_mb} used by other processes")
        details = f" ({', '.join(uses)})" if uses else ""
        return f"{label}: {self.bookable_mb} of {self.total_mb} MiB available{details}"


class InsufficientVram(Conflict):
    """Not enough GPU memory, or RAM, for a load; `wanted` says which model needs how much.

    The message and the error's `devices` field contain the figures of each device.
    """

    def __init__(
        self, wanted: str, capacities: Sequence[GpuCapacity], needed_mb: Sequence[int] = (), *, permanent: bool = False
    ) -> None:
        """`needed_mb`: what the load needs on each of `capacities`, in MiB, if known. `permanent`: not even empty
        devices would be large enough."""
        figures = [
            DeviceFigures(
                index=device.index,
                total_mb=device.total_mb,
                booked_mb=device.booked_mb,
                foreign_mb=device.foreign_mb,
                bookable_mb=device.bookable_mb,
                unusable=device.unusable,
                needed_mb=needed,
            ).model_dump()
            for device, needed in zip_longest(capacities, needed_mb)
        ]
        message = "; ".join([wanted, *map(str, capacities)])
        extra = {"devices": figures, **({"permanent": True} if permanent else {})}
        in_ram = all(device.index == RAM for device in capacities) and bool(capacities)
        super().__init__(
            message, code=ErrorCode.INSUFFICIENT_RAM if in_ram else ErrorCode.INSUFFICIENT_VRAM, extra=extra
        )


def unusable_reason(device: Device) -> str | None:
    """Why no engine can ever be placed on a device; None when one can."""
    return MIG_REASON if device.lost is None and device.mig_mode else device.lost


def gpu_capacities(
    topology: Topology, health: Sequence[DeviceHealth], bookings: Collection[Booking]
) -> tuple[GpuCapacity, ...]:
    """The capacity of every device of the host, in the topology's order, and at the end that of its RAM if that is
    counted. Devices that share the RAM have its capacity."""
    live = {figures.index: figures for figures in health}

    def capacity(device: Device) -> GpuCapacity:
        margin = 0 if topology.simulated or device.vendor == UNKNOWN_VENDOR else DEVICE_MARGIN_MB
        there = [each for each in bookings if device.index in each.promised_mb]
        return _capacity(device, live.get(device.index), there, margin)

    if topology.ram is None:
        return tuple(map(capacity, topology.devices))
    pool = frozenset({RAM, *(device.index for device in topology.devices if device.unified)})
    in_ram = [_in_pool(each, pool) for each in bookings if not pool.isdisjoint(each.promised_mb)]
    ram = _capacity(topology.ram, live.get(RAM), in_ram, topology.ram_reserve_mb)
    shared = (
        replace(
            ram,
            index=device.index,
            name=device.name,
            unusable=_unusable_now(device, live.get(device.index)),
        )
        if device.unified
        else capacity(device)
        for device in topology.devices
    )
    return (*shared, ram)


def _in_pool(booking: Booking, pool: frozenset[int]) -> Booking:
    """The booking with all that it has in the host's RAM and on devices that share it under one index."""

    def added(by_index: Mapping[int, int]) -> dict[int, int]:
        return {RAM: sum(mb for index, mb in by_index.items() if index in pool)}

    known = all(index in booking.held_mb for index, mb in booking.promised_mb.items() if mb and index in pool)
    return replace(
        booking,
        promised_mb=added(booking.promised_mb),
        held_mb=added(booking.held_mb) if known and not pool.isdisjoint(booking.held_mb) else {},
        foreign_mb={RAM: booking.foreign_mb.get(RAM, 0)},
        awake_mb=None if booking.awake_mb is None else added(booking.awake_mb),
    )


def _capacity(device: Device, live: DeviceHealth | None, bookings: Sequence[Booking], margin_mb: int) -> GpuCapacity:
    index, total = device.index, device.vram_total_mb
    used, free = (0, 0) if live is None else (live.vram_used_mb, live.vram_free_mb)
    if index == RAM:
        used += sum(booking.file_mb for booking in bookings)
    held, foreign = _attributed(index, used, bookings)
    lasting = [booking for booking in bookings if not booking.stopping]
    reserve = max(0, total - used - free) if (used or free) and index != RAM else 0
    claimed = sum(booking.claim_mb(index) for booking in lasting)
    left = total - reserve - foreign - claimed - margin_mb
    return GpuCapacity(
        index=index,
        name=device.name,
        total_mb=total,
        used_mb=used,
        booked_mb=sum(booking.promised_mb[index] for booking in lasting),
        held_mb=sum(mb for _, mb in held),
        foreign_mb=foreign,
        reserve_mb=reserve,
        bookable_mb=max(0, left),
        short_mb=max(0, -left),
        stopping_mb=sum(mb for booking, mb in held if booking.stopping),
        asleep_mb=sum(
            max(0, booking.awake_mb.get(index, 0) - booking.claim_mb(index)) for booking in lasting if booking.awake_mb
        ),
        booked_by=tuple((str(booking.key), booking.claim_mb(index)) for booking in lasting),
        measured=device.vendor != UNKNOWN_VENDOR,
        unusable=_unusable_now(device, live),
    )


def _unusable_now(device: Device, live: DeviceHealth | None) -> str | None:
    return unusable_reason(device) or (SILENT_REASON if live is None else live.fault)


def _attributed(index: int, used_mb: int, bookings: Sequence[Booking]) -> tuple[list[tuple[Booking, int]], int]:
    """Attributes `used_mb` of a device: what each of the engines holds, and what all other processes hold.

    If the driver does not list an engine's processes (they have not allocated yet, or neuron runs in its own
    container), the engine is assumed to hold what came into use since it was booked, up to its promise. Otherwise the
    same memory would be subtracted twice, as promised and as foreign.
    """
    held = [(booking, booking.held_mb[index]) for booking in bookings if index in booking.held_mb]
    rest = max(0, used_mb - sum(mb for _, mb in held))
    unknown = [booking for booking in bookings if index not in booking.held_mb]
    foreign = min(rest, unknown[-1].foreign_mb.get(index, 0)) if unknown else 0  # as of the last booking
    rest -= foreign
    for booking in sorted(unknown, key=lambda each: not each.stopping):
        share = min(rest, booking.promised_mb[index])
        held.append((booking, share))
        rest -= share
    return held, foreign + rest


def with_capacities(health: Sequence[DeviceHealth], capacities: Sequence[GpuCapacity]) -> list[DeviceHealth]:
    """Adds to live figures what is booked, foreign and bookable on each device. On a device that is not measured, what
    is booked is in use."""
    by_index = {device.index: device for device in capacities}
    return [
        figures
        if (device := by_index.get(figures.index)) is None
        else figures.model_copy(
            update={
                "vram_booked_mb": device.booked_mb,
                "vram_foreign_mb": device.foreign_mb,
                "vram_asleep_mb": device.asleep_mb,
                "vram_bookable_mb": device.bookable_mb if device.unusable is None else 0,
                **({} if device.measured else _as_booked(device)),
            }
        )
        for figures in health
        if figures.index != RAM
    ]


def host_memory_health(health: Sequence[DeviceHealth], capacities: Sequence[GpuCapacity]) -> HostMemoryHealth | None:
    """The figures of the host's RAM; None where it is not counted."""
    live = next((figures for figures in health if figures.index == RAM), None)
    ram = next((device for device in capacities if device.index == RAM), None)
    if live is None or ram is None:
        return None
    return HostMemoryHealth(
        ram_total_mb=ram.total_mb,
        ram_used_mb=live.vram_used_mb,
        ram_free_mb=live.vram_free_mb,
        ram_booked_mb=ram.booked_mb,
        ram_foreign_mb=ram.foreign_mb,
        ram_bookable_mb=ram.bookable_mb,
    )


def _as_booked(device: GpuCapacity) -> dict[str, int]:
    return {"vram_used_mb": device.booked_mb, "vram_free_mb": max(0, device.total_mb - device.booked_mb)}


def held_by(pids: Collection[int], usage: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """MiB that the processes hold by device index, from `TopologySource.process_memory_mb`. Lacks devices that list
    none of them."""
    found: dict[int, int] = {}
    for index, by_pid in usage.items():
        held = [mb for pid, mb in by_pid.items() if pid in pids]
        if held:
            found[index] = sum(held)
    return found
