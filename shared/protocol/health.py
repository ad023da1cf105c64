"""What a host is doing right now."""

from __future__ import annotations

from pydantic import Field

from shared.protocol.base import Mib, WireModel


class DeviceHealth(WireModel):
    """Live figures of one GPU. Memory in MiB including processes that are not neuron's; power in watts.

    A figure that the driver does not give is None. So is what a neuron of the seed protocol does not tell: what it has
    promised to its engines (`vram_booked_mb`), what processes hold that are not its own (`vram_foreign_mb`), and what
    it would promise to another engine now (`vram_bookable_mb`), and what engines that sleep want when they wake
    (`vram_asleep_mb`).
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


class Activation(WireModel):
    """Progress of the `default_models` that a neuron loads at its start."""

    state: str = "idle"  # idle, activating, done
    pending: list[str] = Field(default_factory=list)
    in_progress: str | None = None
    completed: list[str] = Field(default_factory=list)
    failed: dict[str, str] = Field(default_factory=dict)  # model id -> why


class ModelActivity(WireModel):
    """Requests of one engine: running now, waiting inside the engine, and ended since it started; None: not told."""

    id: str
    in_flight: int = 0
    queue_depth: int = 0
    ended: int | None = None


class NeuronHealth(WireModel):
    """Answer of `GET /health`."""

    uptime_secs: float = 0
    devices: list[DeviceHealth] = Field(default_factory=list)
    instance_id: str | None = None
    activation: Activation | None = None
    models: list[ModelActivity] = Field(default_factory=list)
