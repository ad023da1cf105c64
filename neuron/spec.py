"""What an engine is to serve, and how. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

EXTENSIONS = frozenset({"source", "args", "vram_mb", "served_names"})
"""Fields of a load command that protocol v1 does not have."""


@dataclass(frozen=True)
class EngineSpec:
    """A load command, checked and completed. `devices` None: neuron chooses; `vram_mb`: MiB on all devices together."""

    model_id: str
    harness: str
    source: str
    quant: str | None = None
    tensor_parallel: int = 1
    devices: tuple[int, ...] | None = None
    args: tuple[str, ...] = ()
    vram_mb: int | None = None
    served_names: tuple[str, ...] = ()
    said: frozenset[str] = field(default=EXTENSIONS, compare=False)
    """The fields beyond protocol v1 that the command set."""

    @property
    def share_mb(self) -> int | None:
        """`vram_mb` per device, rounded up; None when it is not given."""
        return None if self.vram_mb is None else -(-self.vram_mb // self.tensor_parallel)

    def difference(self, wanted: EngineSpec) -> str | None:
        """The first difference between this spec and `wanted`, in words; None when an engine of this spec will do.

        Devices count only if `wanted` names them, and extensions only if its command set them.
        """
        if wanted.devices is None:
            wanted = replace(wanted, devices=self.devices)
        for name in ("harness", "source", "quant", "tensor_parallel", "devices", "args", "vram_mb", "served_names"):
            if name in EXTENSIONS and name not in wanted.said:
                continue
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if mine != theirs:
                return f"{name} is {mine!r}, asked for {theirs!r}"
        return None
