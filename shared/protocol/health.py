"""The current load of a host."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.protocol.base import PROTOCOL_V1, READ_ONLY, WHOLE, Mib, Text, WireModel
from shared.protocol.commands import InstanceName


class DeviceHealth(WireModel):
    """Live figures of one GPU. Memory in MiB, of all processes; power in watts.

    None: unknown to the driver, or not sent by a protocol v1 neuron. Reserved for neuron's engines: `vram_booked_mb`.
    Used by other processes: `vram_foreign_mb`. Free for a new reservation: `vram_bookable_mb`. Needed by sleeping
    engines when they wake: `vram_asleep_mb`.

    `fault`: why nothing may be placed on the GPU now; None if it is fit for use. `warnings`: what an operator should
    know of a GPU that is still used, such as a slowdown. `xids`: how many errors of each number the driver has reported
    since the neuron started.

    `energy_wh`: what it has used since `NeuronHealth.energy_epoch` began, in Wh; None without a meter of its own, as of
    a MIG instance, which has its GPU's. (Within neuron, from the driver: since that was loaded.)
    """

    index: int
    vram_used_mb: Mib = 0
    vram_free_mb: Mib = 0
    vram_booked_mb: Mib | None = None
    vram_foreign_mb: Mib | None = None
    vram_bookable_mb: Mib | None = None
    vram_asleep_mb: Mib | None = None
    utilization_pct: float | None = None
    temp_c: float | None = None
    power_w: float | None = None
    energy_wh: float | None = None
    fault: Text | None = None
    warnings: list[Text] = Field(default_factory=list)
    xids: dict[int, Annotated[int, WHOLE]] = Field(default_factory=dict)


class HostMemoryHealth(WireModel):
    """Live figures of the host's RAM in MiB, of all processes. `ram_free_mb` is what programs can allocate without
    swapping. `ram_booked_mb`, `ram_foreign_mb` and `ram_bookable_mb` as of `DeviceHealth`; on a host whose devices
    share its RAM, engines on these count too."""

    ram_total_mb: Mib = 0
    ram_used_mb: Mib = 0
    ram_free_mb: Mib = 0
    ram_booked_mb: Mib = 0
    ram_foreign_mb: Mib = 0
    ram_bookable_mb: Mib = 0


class Activation(WireModel):
    """Progress of the `default_models` that a neuron loads when it starts."""

    state: str = "idle"  # idle, activating, done
    pending: list[str] = Field(default_factory=list)
    in_progress: str | None = None
    completed: list[str] = Field(default_factory=list)
    failed: dict[str, str] = Field(default_factory=dict)  # model id -> why


class ModelActivity(WireModel):
    """Requests of one engine, `instance` as in `ModelView`: running, queued in the engine, and ended since its start;
    None: unknown.

    A foreign neuron may limit the requests that run at a time: `max_in_flight`, and `anon_max_in_flight` of those
    without an account. 0 says that it does not know, or has no such limit.
    """

    id: Text
    instance: InstanceName | None = None
    in_flight: Annotated[int, WHOLE] = 0
    queue_depth: Annotated[int, WHOLE] = 0
    ended: Annotated[int, WHOLE] | None = None
    max_in_flight: Annotated[int, WHOLE] | None = READ_ONLY
    anon_max_in_flight: Annotated[int, WHOLE] | None = READ_ONLY

    @property
    def limit(self) -> int | None:
        """How many requests may be sent there at a time; None: any number."""
        return min(
            (limit for limit in (self.max_in_flight, self.anon_max_in_flight) if limit and limit > 0), default=None
        )


class InstanceEnergy(WireModel):
    """What one instance has used of one device, in Wh since `NeuronHealth.energy_epoch` began: `active_wh` for its
    requests, and `resident_wh` of what the device draws without any. What is left of the device's energy was used while
    no instance was on it."""

    device: int
    id: Text
    instance: InstanceName | None = None
    active_wh: float = 0
    resident_wh: float = 0


class SpareView(WireModel):
    """A process that has imported what engines of `harness` need, or still does (`importing`, `ready`), and waits to
    become one. `memory_mb`: of the host, in MiB."""

    harness: str
    pid: int | None = None
    state: str = ""
    memory_mb: Mib | None = None


class NeuronHealth(WireModel):
    """Reply to `GET /health`. Within one `energy_epoch` no count of energy falls; another one starts from 0."""

    uptime_secs: float = 0
    devices: Annotated[list[DeviceHealth], PROTOCOL_V1] = Field(default_factory=list)
    instance_id: str | None = None
    activation: Activation | None = None
    models: list[ModelActivity] = Field(default_factory=list)
    spares: list[SpareView] = Field(default_factory=list)
    host: HostMemoryHealth | None = None
    energy_epoch: str | None = None
    energy: list[InstanceEnergy] = Field(default_factory=list)
