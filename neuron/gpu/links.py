"""Derives one link per pair of devices from NVML's facts about NVLink and PCIe. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from shared.protocol import Link, LinkKind

Pair = tuple[int, int]

# nvmlGpuTopologyLevel_t (nvml.h), and the legend of `nvidia-smi topo -m`.
_KIND_OF_LEVEL = {
    0: LinkKind.PIX,  # INTERNAL: two GPUs of one board
    10: LinkKind.PIX,  # SINGLE: one PCIe switch
    20: LinkKind.PXB,  # MULTIPLE: several PCIe switches, no host bridge
    30: LinkKind.PHB,  # HOSTBRIDGE
    40: LinkKind.NODE,  # NODE: host bridges of one NUMA node
    50: LinkKind.SYS,  # SYSTEM: between NUMA nodes
}


@dataclass(frozen=True)
class NvLinks:
    """The active NVLinks of one device: how many end at an NVSwitch, and how many at each peer's PCI bus id."""

    to_switch: int = 0
    to_peer: Mapping[str, int] | None = None


@dataclass(frozen=True)
class LinkFacts:
    """The driver's facts, by device index.

    `ancestors` has NVML's topology level of each pair (a < b) that the driver reports; a lost device and most virtual
    machines have none. `switch_refused` has the pairs that cannot reach each other by NVLink although both are
    connected to a switch (another partition, or the fabric manager is not running).
    """

    pci_bus_ids: Mapping[int, str]
    nvlinks: Mapping[int, NvLinks]
    ancestors: Mapping[Pair, int]
    switch_refused: frozenset[Pair] = frozenset()


def links_between(indices: Sequence[int], facts: LinkFacts) -> tuple[Link, ...]:
    """One link for each known pair, ordered by (a, b). The path of a missing pair is unknown."""
    links = (_link(a, b, facts) for a, b in combinations(sorted(indices), 2))
    return tuple(link for link in links if link is not None)


def _link(a: int, b: int, facts: LinkFacts) -> Link | None:
    count = nvlink_count(a, b, facts)
    if count:
        return Link(a=a, b=b, kind=LinkKind.NVLINK, nvlinks=count)
    kind = _KIND_OF_LEVEL.get(facts.ancestors.get((a, b), -1))
    return None if kind is None else Link(a=a, b=b, kind=kind)


def nvlink_count(a: int, b: int, facts: LinkFacts) -> int:
    """Active NVLinks between two devices: direct ones, or the smaller number of links to switches.

    Both ends report a direct link. The larger number counts, because one end may be unreadable.
    """
    first, second = facts.nvlinks.get(a, NvLinks()), facts.nvlinks.get(b, NvLinks())
    direct = max(_towards(first, facts.pci_bus_ids.get(b)), _towards(second, facts.pci_bus_ids.get(a)))
    if direct or (a, b) in facts.switch_refused:
        return direct
    return min(first.to_switch, second.to_switch)


def _towards(ends: NvLinks, pci_bus_id: str | None) -> int:
    return 0 if pci_bus_id is None or ends.to_peer is None else ends.to_peer.get(pci_bus_id, 0)
