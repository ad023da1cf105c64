"""Hosts for the placement tests: devices, links and measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from neuron.gpu.topology import Topology
from neuron.spec import EngineSpec
from shared.protocol import Device, DeviceHealth, Link, LinkKind

TOTALS = {"5090": 32607, "4090": 24564, "3060": 12288, "H100": 81559}


def gpu(index: int, name: str = "H100", **fields: Any) -> Device:
    """A card by a short name; `fields` override its values."""
    known = {"name": name, "vram_total_mb": TOTALS.get(name, 32000), "uuid": f"GPU-{index}"}
    return Device(index=index, **{**known, **fields})


def linked(groups: Iterable[Sequence[int]], kind: LinkKind, nvlinks: int = 0) -> list[Link]:
    """A link of this kind between every two devices of each group."""
    return [Link(a=a, b=b, kind=kind, nvlinks=nvlinks) for group in groups for a, b in combinations(sorted(group), 2)]


def host(*names: str, links: Iterable[Link] = (), simulated: bool = True, **changed: Mapping[str, Any]) -> Topology:
    """Cards in the given order; `changed` overrides fields of single cards, as `d2={"lost": "…"}`."""
    devices = tuple(gpu(index, name, **changed.get(f"d{index}", {})) for index, name in enumerate(names))
    return Topology(devices=devices, links=tuple(links), simulated=simulated)


def measured(topology: Topology, used: Mapping[int, int] | None = None, *, reserve: int = 0) -> list[DeviceHealth]:
    """What the driver reports when these MiB are in use; nothing for a lost device. `reserve` is the driver's own."""
    taken = used or {}
    return [
        DeviceHealth(
            index=device.index,
            vram_used_mb=taken.get(device.index, 0),
            vram_free_mb=max(0, device.vram_total_mb - reserve - taken.get(device.index, 0)),
        )
        for device in topology.devices
        if device.lost is None
    ]


def spec(tensor_parallel: int = 1, model_id: str = "org/m", harness: str = "sim", **fields: Any) -> EngineSpec:
    return EngineSpec(model_id, harness, model_id, tensor_parallel=tensor_parallel, **fields)


MESH = host(*["H100"] * 8, links=linked([range(8)], LinkKind.NVLINK, 18))
"""Eight cards on an NVSwitch."""
ISLANDS = host(
    *["H100"] * 8,
    links=[
        *linked([range(4), range(4, 8)], LinkKind.NVLINK, 4),
        *(Link(a=a, b=b, kind=LinkKind.SYS) for a in range(4) for b in range(4, 8)),
    ],
)
"""Two NVLink islands of four."""
_PAIRED = [*linked([(0, 1), (4, 5)], LinkKind.NVLINK, 4)]
PAIRS = host(
    *["H100"] * 6,
    links=[*_PAIRED, *(link for link in linked([range(6)], LinkKind.PHB) if (link.a, link.b) not in ((0, 1), (4, 5)))],
)
"""Two NVLink pairs, 0+1 and 4+5, and two cards without NVLink, 2 and 3."""
SWITCHES = host(
    *["4090"] * 4,
    links=[
        Link(a=0, b=1, kind=LinkKind.PXB),
        Link(a=0, b=2, kind=LinkKind.PHB),
        Link(a=0, b=3, kind=LinkKind.SYS),
        Link(a=1, b=2, kind=LinkKind.SYS),
        Link(a=1, b=3, kind=LinkKind.NODE),
        Link(a=2, b=3, kind=LinkKind.PIX),
    ],
)
MIXED = host("3060", "5090", "4090", "5090", links=linked([range(4)], LinkKind.PHB))
