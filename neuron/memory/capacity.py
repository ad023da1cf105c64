"""What each device still has to give, from what the driver measures and what engines were promised. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from neuron.gpu.topology import Topology
from shared.errors import Conflict
from shared.gpus import DEVICE_MARGIN_MB
from shared.protocol import Device, DeviceFigures, DeviceHealth, ErrorCode

MIG_REASON = "it is in MIG mode: its memory belongs to MIG instances, and neuron serves whole GPUs only"
SILENT_REASON = "it does not answer"


@dataclass(frozen=True)
class Booking:
    """What one engine was promised, and what it was last seen to hold, in MiB by device index.

    A device that `held_mb` lacks is one whose driver does not say what the engine's processes hold: `foreign_mb`, which
    others held when the engine was booked, helps to guess. `awake_mb` is what a sleeping engine needs when it wakes.
    """

    model_id: str
    promised_mb: Mapping[int, int]
    held_mb: Mapping[int, int] = field(default_factory=dict)
    foreign_mb: Mapping[int, int] = field(default_factory=dict)
    leaving: bool = False
    awake_mb: Mapping[int, int] | None = None

    def claim_mb(self, index: int) -> int:
        """What this engine has or may still take on a device."""
        return max(self.promised_mb.get(index, 0), self.held_mb.get(index, 0))


@dataclass(frozen=True)
class DeviceRoom:
    """One device, in MiB.

    `used_mb` is NVML's, the use of all processes; `booked_mb` what engines that stay were promised; `held_mb` what all
    our engines hold of `used_mb`, and `foreign_mb` the rest of it; `reserve_mb` is the driver's own, neither used nor
    free nor seen by CUDA. `bookable_mb` is what a new engine may be promised; `coming_back_mb` of that is still held by
    engines that are being stopped, and `asleep_mb` is what those that sleep want when they wake.
    `unusable` says why nothing may be placed here, None when it may.
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
    coming_back_mb: int = 0
    asleep_mb: int = 0
    booked_by: tuple[tuple[str, int], ...] = ()  # model id, MiB promised; engines that stay
    unusable: str | None = None

    def missing_to_wake(self, need_mb: int) -> int:
        """MiB that engines that sleep here would lack, if `need_mb` were promised to another."""
        return max(0, self.asleep_mb - max(0, self.bookable_mb - need_mb))

    def has(self, need_mb: int) -> bool:
        """True when an engine may be promised `need_mb` here. A device that shares the host's memory, and so has none
        of its own to count (`total_mb` 0), never refuses."""
        return self.unusable is None and (self.total_mb == 0 or need_mb <= self.bookable_mb)

    def __str__(self) -> str:
        label = f"device {self.index} ({self.name})" if self.name else f"device {self.index}"
        if self.unusable is not None:
            return f"{label} cannot be used: {self.unusable}"
        takers = [f"{mb} booked by {model_id!r}" for model_id, mb in self.booked_by]
        if self.foreign_mb:
            takers.append(f"{self.foreign_mb} held by processes that are not neuron's")
        taken = f" ({', '.join(takers)})" if takers else ""
        return f"{label}: {self.bookable_mb} of {self.total_mb} MiB can be had{taken}"


class InsufficientVram(Conflict):
    """Not enough GPU memory for a load; `wanted` says which model needs how much.

    The message has the figures of each device, and so has the `devices` field of the error.
    """

    def __init__(self, wanted: str, rooms: Sequence[DeviceRoom], needed_mb: Sequence[int] = ()) -> None:
        """`needed_mb`: what the load needs on each of `rooms`, in MiB, if known."""
        figures = [
            DeviceFigures(
                index=room.index,
                total_mb=room.total_mb,
                booked_mb=room.booked_mb,
                foreign_mb=room.foreign_mb,
                bookable_mb=room.bookable_mb,
                unusable=room.unusable,
                needed_mb=needed,
            ).model_dump()
            for room, needed in zip_longest(rooms, needed_mb)
        ]
        message = "; ".join([wanted, *map(str, rooms)])
        super().__init__(message, code=ErrorCode.INSUFFICIENT_VRAM, extra={"devices": figures})


def unusable_reason(device: Device) -> str | None:
    """Why no engine can be placed on a device at all, None when one can."""
    if device.lost is not None:
        return device.lost
    return MIG_REASON if device.mig_mode else None


def rooms_of(
    topology: Topology, health: Sequence[DeviceHealth], bookings: Collection[Booking]
) -> tuple[DeviceRoom, ...]:
    """The room on every device of the host, in the topology's order."""
    live = {figures.index: figures for figures in health}
    margin = 0 if topology.simulated else DEVICE_MARGIN_MB
    return tuple(
        _room(device, live.get(device.index), [each for each in bookings if device.index in each.promised_mb], margin)
        for device in topology.devices
    )


def _room(device: Device, live: DeviceHealth | None, bookings: Sequence[Booking], margin_mb: int) -> DeviceRoom:
    index, total = device.index, device.vram_total_mb
    used, free = (0, 0) if live is None else (live.vram_used_mb, live.vram_free_mb)
    held, foreign = _attributed(index, used, bookings)
    staying = [booking for booking in bookings if not booking.leaving]
    reserve = max(0, total - used - free) if used or free else 0
    claimed = sum(booking.claim_mb(index) for booking in staying)
    return DeviceRoom(
        index=index,
        name=device.name,
        total_mb=total,
        used_mb=used,
        booked_mb=sum(booking.promised_mb[index] for booking in staying),
        held_mb=sum(mb for _, mb in held),
        foreign_mb=foreign,
        reserve_mb=reserve,
        bookable_mb=max(0, total - reserve - foreign - claimed - margin_mb),
        coming_back_mb=sum(mb for booking, mb in held if booking.leaving),
        asleep_mb=sum(
            max(0, booking.awake_mb.get(index, 0) - booking.claim_mb(index)) for booking in staying if booking.awake_mb
        ),
        booked_by=tuple((booking.model_id, booking.claim_mb(index)) for booking in staying),
        unusable=unusable_reason(device) or (SILENT_REASON if live is None else None),
    )


def _attributed(index: int, used_mb: int, bookings: Sequence[Booking]) -> tuple[list[tuple[Booking, int]], int]:
    """Who holds what of `used_mb` on a device: each of the engines, and all processes that are none of theirs.

    An engine whose processes the driver does not name (they are not that far yet, or neuron is in a container of its
    own) is taken to hold what came into use since it was booked, up to its promise: counted as a stranger's, the same
    memory would be taken off twice.
    """
    held = [(booking, booking.held_mb[index]) for booking in bookings if index in booking.held_mb]
    rest = max(0, used_mb - sum(mb for _, mb in held))
    unknown = [booking for booking in bookings if index not in booking.held_mb]
    strangers = min(rest, unknown[-1].foreign_mb.get(index, 0)) if unknown else 0  # as of the last booking
    rest -= strangers
    for booking in sorted(unknown, key=lambda each: not each.leaving):
        share = min(rest, booking.promised_mb[index])
        held.append((booking, share))
        rest -= share
    return held, strangers + rest


def with_rooms(health: Sequence[DeviceHealth], rooms: Sequence[DeviceRoom]) -> list[DeviceHealth]:
    """Live figures, with what is booked, foreign and bookable on each device filled in."""
    by_index = {room.index: room for room in rooms}
    return [
        figures
        if (room := by_index.get(figures.index)) is None
        else figures.model_copy(
            update={
                "vram_booked_mb": room.booked_mb,
                "vram_foreign_mb": room.foreign_mb,
                "vram_asleep_mb": room.asleep_mb,
                "vram_bookable_mb": room.bookable_mb if room.unusable is None else 0,
            }
        )
        for figures in health
    ]


def held_by(pids: Collection[int], usage: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """MiB that the processes hold by device index, from `TopologySource.process_memory_mb`; without the devices that
    know none of them."""
    found: dict[int, int] = {}
    for index, by_pid in usage.items():
        held = [mb for pid, mb in by_pid.items() if pid in pids]
        if held:
            found[index] = sum(held)
    return found
