"""How well devices are connected, for the choice of devices that work together. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum
from itertools import combinations
from typing import NamedTuple

from neuron.gpu.topology import Topology
from shared.protocol import Link, LinkKind

Pair = tuple[int, int]
_CLASS_FACTOR = 100_000  # more than the paths of any host: one path of a better class weighs more than all of a worse


class LinkClass(IntEnum):
    """How two devices are connected, best first."""

    NVLINK = 0
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
_CLASSES = {
    LinkKind.NVLINK: LinkClass.NVLINK,
    LinkKind.PIX: LinkClass.PCIE_SWITCH,
    LinkKind.PXB: LinkClass.PCIE_SWITCH,
    LinkKind.PHB: LinkClass.NUMA_NODE,
    LinkKind.NODE: LinkClass.NUMA_NODE,
}


def paths_between(topology: Topology) -> Mapping[Pair, DevicePath]:
    """The path of each pair of devices by their indices, in both orders."""
    links = {(link.a, link.b): link for link in topology.links}
    found: dict[Pair, DevicePath] = {}
    for a, b in combinations(topology.devices, 2):
        path = _path_of(links.get((min(a.index, b.index), max(a.index, b.index))))
        if path.link_class is LinkClass.UNKNOWN and a.numa_node is not None and a.numa_node == b.numa_node:
            path = path._replace(link_class=LinkClass.NUMA_NODE)
        found[a.index, b.index] = found[b.index, a.index] = path
    return found


def _path_of(link: Link | None) -> DevicePath:
    if link is None:
        return DevicePath(LinkClass.UNKNOWN, 0, _UNKNOWN)
    return DevicePath(_CLASSES.get(link.kind, LinkClass.UNKNOWN), -link.nvlinks, _KINDS.index(link.kind))


def nvlink_islands(topology: Topology, among: Collection[int]) -> list[frozenset[int]]:
    """The sets of two or more devices of `among` that are connected by NVLink, directly or through other devices of the
    set."""
    found = [frozenset((index,)) for index in sorted(among)]
    for pair, path in paths_between(topology).items():
        if path.link_class is LinkClass.NVLINK and set(among).issuperset(pair):
            joined = [island for island in found if not island.isdisjoint(pair)]
            found = [*(island for island in found if island not in joined), frozenset().union(*joined)]
    return sorted((island for island in found if len(island) > 1), key=min)
