"""The bookings of GPU memory: which engine was promised how much of which device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from neuron.gpu.topology import Topology
from neuron.memory.capacity import Booking, DeviceRoom, InsufficientVram, rooms_of
from neuron.memory.requirement import MemoryNeed
from neuron.memory.selection import Choice, check_devices, choose
from neuron.spec import EngineSpec
from shared.protocol import DeviceHealth


class Ledger:
    """Single owner of the bookings, by engine number. Every method decides and books before it returns, with nothing
    awaited in between: two loads can never be promised the same memory. MiB everywhere.
    """

    def __init__(self) -> None:
        self._bookings: dict[int, Booking] = {}

    def rooms(self, topology: Topology, health: Sequence[DeviceHealth]) -> tuple[DeviceRoom, ...]:
        """Every device and what it has to give, given what the driver just measured."""
        return rooms_of(topology, health, self._bookings.values())

    def book(
        self,
        number: int,
        spec: EngineSpec,
        need: MemoryNeed,
        topology: Topology,
        health: Sequence[DeviceHealth],
    ) -> Choice:
        """Books devices for engine `number`, and `need` on each of them, until `release`. On a host without devices
        the choice is empty.

        Raises:
            InsufficientVram: no devices, or not the ones the spec names, have that much to give.
            InvalidRequest: as `check_devices`; a device may have been lost since a spec was checked.
        """
        check_devices(spec, topology)
        rooms = self.rooms(topology, health)
        choice = choose(spec.tensor_parallel, need, topology, rooms, named=spec.devices)
        if choice is None:
            wanted = f"{spec.model_id!r} needs {need} on {_places(spec)}"
            if spec.devices is not None:
                rooms = tuple(room for room in rooms if room.index in spec.devices)
            raise InsufficientVram(wanted, rooms, [need.on(room, room.total_mb) for room in rooms])
        promised = dict(zip((device.index for device in choice.devices), choice.booked_mb, strict=True))
        foreign = {room.index: room.foreign_mb for room in rooms}
        self._bookings[number] = Booking(spec.model_id, promised, foreign_mb=foreign)
        return choice

    def adopt(self, number: int, model_id: str, devices: Sequence[int], share_mb: int | None) -> None:
        """Books for an engine that was found running, without a check: it has its memory. `share_mb` None books
        nothing until it is measured; what it holds counts as a stranger's until then."""
        self._bookings[number] = Booking(model_id, dict.fromkeys(devices, share_mb or 0))

    def holding(self, number: int, by_device: Mapping[int, int]) -> None:
        """What an engine that still fills its memory (it loads, it wakes) holds by now; its promise stands. Told before
        each booking, it keeps what strangers took meanwhile from being mistaken for the engine's.

        As in all of these, a device that `by_device` lacks is one whose driver does not say, and an engine that is
        gone meanwhile is ignored: a measurement may come late.
        """
        self._measure(number, by_device, settled=False)

    def measured(self, number: int, by_device: Mapping[int, int]) -> None:
        """The footprint of an engine that is loaded, or sleeps: from now on this is what it is promised."""
        self._measure(number, by_device, settled=True)

    def shrink(self, number: int, by_device: Mapping[int, int], *, awake_mb: Mapping[int, int] | None = None) -> None:
        """The engine sleeps: it keeps only what it still holds, and others may have the rest. `awake_mb` is what it
        needs when it wakes, where that is not what it was promised until now: of an engine that was found asleep, and
        may have been measured since."""
        booking = self._bookings.get(number)
        if booking is not None:
            awake_mb = awake_mb or booking.awake_mb or booking.promised_mb
            self._bookings[number] = replace(booking, awake_mb=awake_mb)
            self.measured(number, by_device)

    def regrow(self, number: int, topology: Topology, health: Sequence[DeviceHealth]) -> None:
        """The engine is to wake: it is promised again what it had when it fell asleep. Until it is awake and
        `measured`, tell what it holds with `holding`.

        Raises:
            InsufficientVram: others have been given that memory, or taken it; the engine keeps what it has asleep.
        """
        booking = self._bookings.get(number)
        if booking is None or booking.awake_mb is None:
            return
        mine = [room for room in self.rooms(topology, health) if room.index in booking.promised_mb]
        more = {index: max(0, mb - booking.claim_mb(index)) for index, mb in booking.awake_mb.items()}
        if not all(room.has(more[room.index]) for room in mine):
            needs = ", ".join(f"{mb} MiB more on device {index}" for index, mb in sorted(more.items()))
            raise InsufficientVram(f"{booking.model_id!r} needs {needs} to wake", mine)
        self._bookings[number] = replace(booking, promised_mb=booking.awake_mb, awake_mb=None)

    def leaving(self, number: int) -> None:
        """The engine is being stopped: what it has can be promised to another, who waits while it is `awaited`."""
        booking = self._bookings.get(number)
        if booking is not None:
            self._bookings[number] = replace(booking, leaving=True)

    def awaited(self, number: int, topology: Topology, health: Sequence[DeviceHealth]) -> dict[int, int]:
        """MiB by device that engines being stopped still hold of what engine `number` was promised; empty when it may
        start. Who was promised memory earlier has it earlier."""
        mine = self._bookings.get(number)
        if mine is None:
            return {}
        order = list(self._bookings)
        earlier = order[: order.index(number) + 1]
        counted = [booking for each, booking in self._bookings.items() if booking.leaving or each in earlier]
        rooms = [room for room in rooms_of(topology, health, counted) if room.index in mine.promised_mb]
        return {room.index: short for room in rooms if (short := room.coming_back_mb - room.bookable_mb) > 0}

    def promised_mb(self, number: int) -> int:
        """What engine `number` is promised at present, on all its devices together."""
        booking = self._bookings.get(number)
        return 0 if booking is None else sum(booking.promised_mb.values())

    def release(self, number: int) -> None:
        """The engine is gone. Memory that the driver still counts as in use is a stranger's from now on."""
        self._bookings.pop(number, None)

    def _measure(self, number: int, by_device: Mapping[int, int], *, settled: bool) -> None:
        booking = self._bookings.get(number)
        if booking is None:
            return
        held = {index: mb for index, mb in by_device.items() if index in booking.promised_mb}
        promised = {**booking.promised_mb, **held} if settled else booking.promised_mb
        self._bookings[number] = replace(booking, promised_mb=promised, held_mb=held)


def _places(spec: EngineSpec) -> str:
    """Where a spec wants its memory, in words."""
    if spec.devices is not None:
        listed = ", ".join(map(str, spec.devices))
        return f"device {listed}" if len(spec.devices) == 1 else f"each of the devices {listed}"
    return "one device" if spec.tensor_parallel == 1 else f"each of {spec.tensor_parallel} devices"
