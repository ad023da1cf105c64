"""The fleet's hosts and models, and how often each model is requested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HostShape:
    """A simulated GPU host. `on_stop`: what happens to its engines on SIGTERM."""

    name: str
    devices_mb: tuple[int, ...]
    on_stop: str


HOSTS = (
    HostShape("large", (24_000, 24_000), "leave_engines"),
    HostShape("middle", (24_000,), "leave_engines"),
    HostShape("small", (12_000,), "stop_engines"),
)


@dataclass(frozen=True)
class ChaosModel:
    """An entry of the catalogue; memory in MiB, summed over devices. `weight` is how often it is requested."""

    id: str
    vram_mb: int
    weight: int
    load_secs: float
    min_devices: int = 1
    min_device_vram_mb: int | None = None

    def profile(self) -> dict[str, Any]:
        """Its entry in models.toml."""
        more = {} if self.min_device_vram_mb is None else {"min_device_vram_mb": self.min_device_vram_mb}
        return {
            "id": self.id,
            "harness": "sim",
            "vram_mb": self.vram_mb,
            "min_devices": self.min_devices,
            "args": ["--load-secs", str(self.load_secs)],
            **more,
        }

    def fits(self, host: HostShape) -> bool:
        """Whether the empty host could hold it, by the catalogue entry and by memory."""
        least = max(self.min_device_vram_mb or 0, -(-self.vram_mb // self.min_devices))
        return sum(mb >= least for mb in host.devices_mb) >= self.min_devices


MODELS = (
    ChaosModel("hot/a", 7_000, 420, 0.3),
    ChaosModel("hot/b", 9_000, 300, 0.3),
    ChaosModel("warm/c", 11_000, 150, 0.4, min_device_vram_mb=12_000),
    ChaosModel("warm/d", 14_000, 100, 0.4, min_device_vram_mb=20_000),
    ChaosModel("big/e", 20_000, 12, 0.6, min_device_vram_mb=20_000),
    ChaosModel("wide/f", 30_000, 6, 0.6, min_devices=2, min_device_vram_mb=20_000),
    ChaosModel("rare/g", 10_000, 6, 0.3),
    ChaosModel("rare/h", 17_000, 6, 0.5, min_device_vram_mb=20_000),
)
"""118,000 MiB for 84,000 MiB of devices."""


def feasible_hosts(model_id: str) -> frozenset[str]:
    """The names of the hosts whose topology can hold the model."""
    [model] = [model for model in MODELS if model.id == model_id]
    return frozenset(host.name for host in HOSTS if model.fits(host))
