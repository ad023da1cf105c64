"""The bookings of GPU memory and RAM: how much of which device is promised to which engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from neuron.gpu.topology import Topology
from neuron.memory.capacity import MIG_REASON, Booking, GpuCapacity, InsufficientVram, gpu_capacities
from neuron.memory.requirement import MemoryRequirement
from neuron.memory.selection import (
    COMBINED_REASON,
    DeviceSelection,
    check_devices,
    combines_devices,
    select_devices,
    select_ram,
    without_mig_instances,
)
from neuron.spec import EngineSpec, InstanceKey
from shared.protocol import RAM, Device, DeviceHealth


@dataclass(frozen=True)
class EnginePlacement:
    """The devices of an engine, the MiB booked on each of them under `number`, and why these devices. `share_mb` is
    what the engine is told to use on each device; None: its default. `ram_mb` is booked in the host's RAM; None: no RAM
    is counted for it. `cores` are those that an engine without devices gets."""

    number: int
    devices: tuple[Device, ...] = ()
    booked_mb: tuple[int, ...] = ()
    share_mb: int | None = None
    why: str = ""
    ram_mb: int | None = None
    cores: tuple[int, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(device.index for device in self.devices)


class Ledger:
    """Single owner of the bookings, by booking number. No method awaits anything between its decision and the booking,
    so two loads cannot get the same memory. MiB everywhere.
    """

    def __init__(self) -> None:
        self._bookings: dict[int, Booking] = {}

    def capacities(self, topology: Topology, health: Sequence[DeviceHealth]) -> tuple[GpuCapacity, ...]:
        """The capacity of every device, given what the driver just measured."""
        return gpu_capacities(topology, health, self._bookings.values())

    def book(
        self,
        number: int,
        spec: EngineSpec,
        requirement: MemoryRequirement,
        topology: Topology,
        health: Sequence[DeviceHealth],
        *,
        grows: bool = True,
    ) -> DeviceSelection:
        """Books `requirement` on the devices it selects, under `number`, until `release`. For an engine without devices
        that is the host's RAM, where it is counted. `grows`: as of `Booking`.

        Raises:
            InsufficientVram: no devices, or not those that the spec names, have enough memory.
            InvalidRequest: as `check_devices`; a device may have been lost since the spec was checked.
        """
        check_devices(spec, topology)
        bookings = list(self._bookings.values())
        capacities, selection = _select(spec, requirement, topology, health, bookings)
        if selection is None:
            if _is_in_ram(spec, topology):
                capacities = capacities[-1:]
            elif spec.devices is not None:
                capacities = tuple(device for device in capacities if device.index in spec.devices)
            else:
                capacities = tuple(device for device in capacities if device.index != RAM)
            needed = [requirement.on_device(device, device.total_mb) for device in capacities]
            large_enough = [
                mb <= device.total_mb and device.unusable not in (MIG_REASON, COMBINED_REASON)
                for device, mb in zip(capacities, needed, strict=True)
            ]
            where, count = _devices_of(spec), spec.device_count
            if _is_in_ram(spec, topology):
                where, count, needed = "in this host's RAM", 1, [mb * spec.device_count for mb in needed]
                large_enough = [needed[0] <= capacities[0].total_mb - topology.ram_reserve_mb]
            raise InsufficientVram(
                f"{str(spec.key)!r} needs {requirement} {where}",
                capacities,
                needed,
                permanent=large_enough.count(True) < count,
            )
        promised = dict(zip((device.index for device in selection.devices), selection.booked_mb, strict=True))
        if selection.ram_mb is not None:
            promised[RAM] = selection.ram_mb
        foreign = {device.index: device.foreign_mb for device in capacities}
        self._bookings[number] = Booking(
            spec.key,
            promised,
            foreign_mb=foreign,
            alone=spec.devices is None,
            grows=grows,
        )
        return selection

    def adopt(
        self,
        number: int,
        key: InstanceKey,
        devices: Sequence[int],
        share_mb: int | None,
        *,
        ram_mb: int | None = None,
        grows: bool = True,
    ) -> None:
        """Books for a running engine of an earlier neuron, without a check: it has its memory. With `share_mb` None it
        books nothing until the engine is measured; until then its memory counts as foreign. `ram_mb` is what it has
        booked in RAM; None: none is counted."""
        promised = dict.fromkeys(devices, share_mb or 0)
        self._bookings[number] = Booking(key, promised if ram_mb is None else {**promised, RAM: ram_mb}, grows=grows)

    def update_held(self, number: int, by_device: Mapping[int, int], *, file_mb: int = 0) -> None:
        """Records what an engine that still allocates (it loads or wakes) holds now; its promise does not change. Call
        it before each booking, so that memory which other processes took meanwhile is not attributed to the engine.

        Here and in the other methods, a device that `by_device` lacks is one whose driver does not report the engine's
        memory. A measurement may arrive after the engine is gone, and is ignored then. `file_mb`: see `Booking`.
        """
        self._measure(number, by_device, file_mb, settled=False)

    def settle(self, number: int, by_device: Mapping[int, int], *, file_mb: int = 0) -> None:
        """Replaces the promise of a loaded or sleeping engine by what it holds; in RAM only a promise that was a guess,
        as an engine may take memory there when it gets requests."""
        self._measure(number, by_device, file_mb, settled=True)

    def shrink_to_sleep(
        self,
        number: int,
        by_device: Mapping[int, int],
        *,
        awake_mb: Mapping[int, int] | None = None,
        slept_mb: int = 0,
    ) -> None:
        """The engine sleeps: keeps booked only what it still holds, and in RAM `slept_mb` for its weights. `awake_mb`
        is what it needs when it wakes, if that is not its present promise: an adopted engine that sleeps may have been
        measured already."""
        booking = self._bookings.get(number)
        if booking is not None:
            awake_mb = awake_mb or booking.awake_mb or booking.promised_mb
            if slept_mb:
                in_ram = {RAM: awake_mb.get(RAM, 0) + slept_mb}
                booking = replace(booking, promised_mb={**booking.promised_mb, **in_ram})
            self._bookings[number] = replace(booking, awake_mb=awake_mb)
            self.settle(number, by_device)

    def book_wake(self, number: int, topology: Topology, health: Sequence[DeviceHealth]) -> None:
        """Books again what the engine had when it fell asleep. Call `update_held` until it is awake, then `settle`.

        Raises:
            InsufficientVram: the memory is booked or used by others; the engine keeps what it has asleep.
        """
        booking = self._bookings.get(number)
        if booking is None or booking.awake_mb is None:
            return
        own = [device for device in self.capacities(topology, health) if device.index in booking.devices]
        more = {index: max(0, mb - booking.claim_mb(index)) for index, mb in booking.awake_mb.items() if index != RAM}
        if not all(device.can_hold(more[device.index]) for device in own):
            needs = ", ".join(f"{mb} MiB more on device {index}" for index, mb in sorted(more.items()))
            raise InsufficientVram(f"{str(booking.key)!r} needs {needs} to wake", own)
        self._bookings[number] = replace(booking, promised_mb=booking.awake_mb, awake_mb=None)

    def to_displace(
        self,
        candidates: Sequence[int],
        spec: EngineSpec,
        requirement: MemoryRequirement,
        topology: Topology,
        health: Sequence[DeviceHealth],
    ) -> list[int]:
        """Those of the bookings `candidates` without which `book` succeeds, the first ones preferred and none of them
        needlessly; empty when it fails without all of them too."""

        def fits_without(numbers: Collection[int]) -> bool:
            kept = [
                replace(booking, stopping=True) if number in numbers else booking
                for number, booking in self._bookings.items()
            ]
            return _select(spec, requirement, topology, health, kept)[1] is not None

        for count in range(1, len(candidates) + 1):
            chosen = list(candidates[:count])
            if fits_without(chosen):
                # Those before the last one may be on other devices.
                for number in candidates[: count - 1]:
                    if fits_without([each for each in chosen if each != number]):
                        chosen.remove(number)
                return chosen
        return []

    def mark_stopping(self, number: int) -> None:
        """The engine is being stopped: others can book its memory, and wait while `counts_on` names it."""
        booking = self._bookings.get(number)
        if booking is not None:
            self._bookings[number] = replace(booking, stopping=True)

    def any_stops(self) -> bool:
        """True while an engine with a booking is being stopped. Without one, `counts_on` is empty for all bookings."""
        return any(each.stopping for each in self._bookings.values())

    def counts_on(self, number: int, topology: Topology, health: Sequence[DeviceHealth]) -> tuple[str, ...]:
        """The engines that are being stopped and without whose memory booking `number` does not fit, or with which it
        may not share a device; empty when its engine may start beside them. Earlier bookings get freed memory first.
        Where memory is not known (neither devices nor RAM are counted) every stopping engine counts: room for two
        cannot be shown."""
        own = self._bookings.get(number)
        if own is None:
            return ()
        stopping = [each for at, each in self._bookings.items() if each.stopping and at != number]
        short = self._missing_mb(number, topology, health).keys()
        return tuple(
            str(each.key)
            for each in stopping
            if not short.isdisjoint(each.promised_mb)
            or not (own.promised_mb or each.promised_mb)
            or (own.alone and own.key.model_id == each.key.model_id and own.devices & each.devices)
        )

    def lacks_memory(self, number: int, topology: Topology, health: Sequence[DeviceHealth]) -> bool:
        """True while booking `number` does not fit into what the driver measures."""
        own = self._bookings.get(number)
        totals = {device.index: device.vram_total_mb for device in topology.devices}
        if topology.ram is not None:
            totals[RAM] = topology.ram.vram_total_mb
        return own is not None and any(totals[index] for index in self._missing_mb(number, topology, health))

    def _missing_mb(self, number: int, topology: Topology, health: Sequence[DeviceHealth]) -> dict[int, int]:
        """MiB by device that booking `number` lacks while stopping engines and earlier bookings keep what they have.
        With a device of unknown size: 0 MiB there."""
        own, order = self._bookings[number], list(self._bookings)
        held = {index: own.held_mb.get(index, 0) for index in own.promised_mb}
        earlier = order[: order.index(number)]
        counted = [replace(own, promised_mb=held)]
        counted += [
            replace(each, stopping=False)
            for at, each in self._bookings.items()
            if at != number and (each.stopping or at in earlier)
        ]
        missing = {}
        for device in gpu_capacities(topology, health, counted):
            if device.index not in own.promised_mb:
                continue
            lacks = own.claim_mb(device.index) - held[device.index] - device.bookable_mb
            if not device.total_mb or lacks > 0:
                missing[device.index] = max(0, lacks)
        return missing

    def promised_mb(self, number: int) -> int:
        """What is promised to booking `number` now, on all its devices together."""
        booking = self._bookings.get(number)
        return 0 if booking is None else sum(mb for index, mb in booking.promised_mb.items() if index != RAM)

    def held_mb(self, number: int) -> Mapping[int, int]:
        """What booking `number` held on each device when it was last measured; without devices whose driver does not
        report that."""
        booking = self._bookings.get(number)
        held = {} if booking is None else booking.held_mb
        return {index: mb for index, mb in held.items() if index != RAM}

    def promised_ram_mb(self, number: int) -> int | None:
        """What is promised to booking `number` in the host's RAM; None where none is counted."""
        booking = self._bookings.get(number)
        return None if booking is None else booking.promised_mb.get(RAM)

    def release(self, number: int) -> None:
        """The engine is gone. Memory of it that the driver still reports as used counts as foreign from now on."""
        self._bookings.pop(number, None)

    def _measure(self, number: int, by_device: Mapping[int, int], file_mb: int = 0, *, settled: bool) -> None:
        booking = self._bookings.get(number)
        if booking is None:
            return
        held = {index: mb for index, mb in by_device.items() if index in booking.promised_mb}
        promised = {**booking.promised_mb, **held} if settled else dict(booking.promised_mb)
        if settled and booking.grows and RAM in promised:
            promised[RAM] = booking.promised_mb[RAM]
        self._bookings[number] = replace(booking, promised_mb=promised, held_mb=held, file_mb=file_mb)


def _select(
    spec: EngineSpec,
    requirement: MemoryRequirement,
    topology: Topology,
    health: Sequence[DeviceHealth],
    bookings: Sequence[Booking],
) -> tuple[tuple[GpuCapacity, ...], DeviceSelection | None]:
    """The devices for `spec`, and the capacities that they were chosen by. Without named devices none that holds
    another instance of the model: one that holds a stopping instance only if there is no other."""
    capacities = gpu_capacities(topology, health, bookings)
    if _is_in_ram(spec, topology):
        return capacities, select_ram(requirement, spec.device_count, capacities[-1])
    if combines_devices(spec):
        capacities = without_mig_instances(topology, capacities)
    if spec.devices is None:
        others = [each for each in bookings if each.key.model_id == spec.model_id and each.key != spec.key]
        lasting = [each for each in others if not each.stopping]
        if len(lasting) < len(others):
            free = _without_holders(capacities, others)
            selection = select_devices(spec.local_parallel, requirement, topology, free)
            if selection is not None:
                return free, selection
        capacities = _without_holders(capacities, lasting)
    return capacities, select_devices(spec.local_parallel, requirement, topology, capacities, named=spec.devices)


def _without_holders(capacities: tuple[GpuCapacity, ...], bookings: Sequence[Booking]) -> tuple[GpuCapacity, ...]:
    """The capacities, with the devices of the bookings marked unusable."""
    holders = {index: each.key.instance for each in bookings for index in each.devices}
    advice = "of this model: name the device in the load to share it"
    return tuple(
        replace(device, unusable=f"it holds instance {holders[device.index]} {advice}")
        if device.unusable is None and device.index in holders
        else device
        for device in capacities
    )


def _is_in_ram(spec: EngineSpec, topology: Topology) -> bool:
    """True if the engine gets no devices and its memory is counted."""
    return topology.ram is not None and (spec.without_devices or not topology.devices)


def _devices_of(spec: EngineSpec) -> str:
    """The devices that a spec asks for, in words."""
    if spec.devices is not None:
        listed = ", ".join(map(str, spec.devices))
        return f"on device {listed}" if len(spec.devices) == 1 else f"on each of the devices {listed}"
    return "on one device" if spec.device_count == 1 else f"on each of {spec.device_count} devices"
