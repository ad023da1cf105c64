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
    HostShape("middle", (36_000,), "leave_engines"),
    HostShape("twin", (36_000,), "leave_engines"),
    HostShape("small", (12_000,), "stop_engines"),
)


@dataclass(frozen=True)
class ChaosModel:
    """An entry of the catalogue; memory in MiB, summed over devices. `weight` is how often it is requested. `replicas`
    of it stay loaded. `variants` are entries of `[[models.variants]]`. `spans`: its devices are on several hosts."""

    id: str
    vram_mb: int
    weight: int
    load_secs: float
    min_devices: int = 1
    min_device_vram_mb: int | None = None
    replicas: int = 0
    variants: tuple[dict[str, Any], ...] = ()
    spans: bool = False

    def profile(self) -> dict[str, Any]:
        """Its entry in models.toml."""
        more: dict[str, Any] = {}
        if self.min_device_vram_mb is not None:
            more["min_device_vram_mb"] = self.min_device_vram_mb
        if self.replicas:
            more["replicas"] = {"min": self.replicas}
        if self.variants:
            more["variants"] = list(self.variants)
        if self.spans:
            more["span_nodes"] = True
        return {
            "id": self.id,
            "harness": "sim",
            "vram_mb": self.vram_mb,
            "min_devices": self.min_devices,
            "args": ["--load-secs", str(self.load_secs)],
            **more,
        }

    def fits(self, host: HostShape) -> bool:
        """Whether the empty host could hold it, or a part of it, by the catalogue entry and by memory."""
        least = max(self.min_device_vram_mb or 0, -(-self.vram_mb // self.min_devices))
        return sum(mb >= least for mb in host.devices_mb) >= (1 if self.spans else self.min_devices)

    def most_engines(self, host: HostShape) -> int:
        """How many engines of it may run on the host at the same time."""
        return min(max(1, self.replicas), len(host.devices_mb))


WARM_VARIANTS = (
    {"name": "whole", "min_device_vram_mb": 30_000},
    {"name": "half", "vram_mb": 6_000},
)
MODELS = (
    ChaosModel("hot/a", 7_000, 420, 0.3, replicas=3),
    ChaosModel("hot/b", 9_000, 300, 0.3),
    ChaosModel("warm/c", 11_000, 150, 0.4, min_device_vram_mb=12_000, variants=WARM_VARIANTS),
    ChaosModel("warm/d", 14_000, 100, 0.4, min_device_vram_mb=20_000),
    ChaosModel("big/e", 20_000, 12, 0.6, min_device_vram_mb=20_000),
    ChaosModel("wide/f", 30_000, 6, 0.6, min_devices=2, min_device_vram_mb=20_000),
    ChaosModel("rare/g", 10_000, 6, 0.3),
    ChaosModel("rare/h", 17_000, 6, 0.5, min_device_vram_mb=20_000),
    ChaosModel("span/s", 52_000, 6, 0.6, min_devices=2, min_device_vram_mb=26_000, spans=True),
)
"""184,000 MiB, replicas included, for 132,000 MiB of devices."""


def feasible_hosts(model_id: str) -> frozenset[str]:
    """The names of the hosts whose topology can hold the model, or one of the parts of a model that spans hosts."""
    model = model_of(model_id)
    return frozenset(host.name for host in HOSTS if model.fits(host))


def model_of(model_id: str) -> ChaosModel:
    [model] = [model for model in MODELS if model.id == model_id]
    return model
