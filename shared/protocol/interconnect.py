"""How well the devices of a host are connected, for the choice of devices that work together. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum, IntEnum
from itertools import combinations
from typing import NamedTuple

from shared.protocol.base import WireModel

Pair = tuple[int, int]
_CLASS_FACTOR = 100_000  # more than the paths of any host: one path of a better class weighs more than all of a worse


class LinkKind(str, Enum):
    """How two devices reach each other, best first (the legend of `nvidia-smi topo -m`)."""

    NVLINK = "nvlink"  # direct NVLink
    XGMI = "xgmi"  # direct XGMI, between AMD's GPUs
    PIX = "pix"  # same board or at most one PCIe switch
    PXB = "pxb"  # several PCIe switches, no host bridge
    PHB = "phb"  # through a PCIe host bridge
    NODE = "node"  # through host bridges of one NUMA node
    SYS = "sys"  # between NUMA nodes


class Link(WireModel):
    """The path between the devices with the indices `a` < `b`; `nvlinks` is the number of active NVLinks."""

    a: int
    b: int
    kind: LinkKind
    nvlinks: int = 0


class LinkClass(IntEnum):
    """How two devices are connected, best first."""

    NVLINK = 0  # or XGMI
    PCIE_SWITCH = 1  # PCIe switches, no host bridge
    NUMA_NODE = 2  # a host bridge or a NUMA node
    UNKNOWN = 3  # across NUMA nodes, or unknown


class DevicePath(NamedTuple):
    """The path between two devices; smaller is better. `negated_nvlinks` is -`nvlinks`; `rank` orders paths within a
    class."""

    link_class: LinkClass
    negated_nvlinks: int
    rank: int

    @property
    def nvlinks(self) -> int:
        return -self.negated_nvlinks

    @property
    def weight(self) -> int:
        """The cost of using only one of the two devices: an NVLink costs more than all paths over switches, and each of
        those more than all paths within a NUMA node."""
        if self.link_class is LinkClass.UNKNOWN:
            return 0
        scale: int = _CLASS_FACTOR ** (LinkClass.NUMA_NODE - self.link_class)
        return max(1, self.nvlinks) * scale

    def described(self, devices: int) -> str:
        """The connection of a set of `devices` devices, in words, if this is its worst path."""
        if self.link_class is LinkClass.NVLINK and self.rank == _XGMI:
            return "connected by XGMI"
        if self.link_class is LinkClass.NVLINK:
            least = "at least " if devices > 2 else ""
            return f"connected by NVLink ({least}{self.nvlinks} link{'s' if self.nvlinks != 1 else ''})"
        return {
            LinkClass.PCIE_SWITCH: "connected by PCIe switches without a host bridge",
            LinkClass.NUMA_NODE: "on one NUMA node",
            LinkClass.UNKNOWN: "no fast path between them known",
        }[self.link_class]


SINGLE_DEVICE = DevicePath(LinkClass.NVLINK, 0, 0)
"""The path of a set with one device: none is better."""

_KINDS = list(LinkKind)  # best first
_UNKNOWN = len(_KINDS)
_XGMI = _KINDS.index(LinkKind.XGMI)
_CLASSES = {
    LinkKind.NVLINK: LinkClass.NVLINK,
    LinkKind.XGMI: LinkClass.NVLINK,
    LinkKind.PIX: LinkClass.PCIE_SWITCH,
    LinkKind.PXB: LinkClass.PCIE_SWITCH,
    LinkKind.PHB: LinkClass.NUMA_NODE,
    LinkKind.NODE: LinkClass.NUMA_NODE,
}


def paths_between(numa_nodes: Mapping[int, int | None], links: Iterable[Link]) -> Mapping[Pair, DevicePath]:
    """The path of each pair of devices by their indices, in both orders. `numa_nodes` is by device index; None:
    unknown."""
    known = {(link.a, link.b): link for link in links}
    found: dict[Pair, DevicePath] = {}
    for a, b in combinations(numa_nodes, 2):
        path = _path_of(known.get((min(a, b), max(a, b))))
        if path.link_class is LinkClass.UNKNOWN and numa_nodes[a] is not None and numa_nodes[a] == numa_nodes[b]:
            path = path._replace(link_class=LinkClass.NUMA_NODE)
        found[a, b] = found[b, a] = path
    return found


def _path_of(link: Link | None) -> DevicePath:
    if link is None:
        return DevicePath(LinkClass.UNKNOWN, 0, _UNKNOWN)
    return DevicePath(_CLASSES.get(link.kind, LinkClass.UNKNOWN), -link.nvlinks, _KINDS.index(link.kind))


def nvlink_islands(paths: Mapping[Pair, DevicePath], among: Collection[int]) -> list[frozenset[int]]:
    """The sets of two or more devices of `among` that are connected by NVLink or XGMI, directly or through others of
    them."""
    found = [frozenset((index,)) for index in sorted(among)]
    for pair, path in paths.items():
        if path.link_class is LinkClass.NVLINK and set(among).issuperset(pair):
            joined = [island for island in found if not island.isdisjoint(pair)]
            found = [*(island for island in found if island not in joined), frozenset().union(*joined)]
    return sorted((island for island in found if len(island) > 1), key=min)
