"""Where an engine is placed on this host."""

from __future__ import annotations

from dataclasses import dataclass

from shared.protocol import Device


@dataclass(frozen=True)
class EnginePlacement:
    """The devices of an engine, the MiB booked on each of them under `number`, and why these devices. `share_mb`: what
    the engine is told to take on each device, None for its default."""

    number: int
    devices: tuple[Device, ...] = ()
    booked_mb: tuple[int, ...] = ()
    share_mb: int | None = None
    why: str = ""

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(device.index for device in self.devices)
