"""How devices reach each other, as far as it matters for which of them work together. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum
from itertools import combinations
from typing import NamedTuple

from neuron.gpu.topology import Topology
from shared.protocol import Link, LinkKind

Pair = tuple[int, int]
_OUTWEIGHS = 100_000  # of a worse joint, more paths than any host has weigh less than one of a better


class Joint(IntEnum):
    """What two devices share, best first."""

    NVLINK = 0
    SWITCH = 1  # PCIe switches, without a host bridge between
    NODE = 2  # a host bridge or a NUMA node
    ANYHOW = 3  # nothing, or nothing that is known


class Path(NamedTuple):
    """Between two devices; the smaller is the better. `fewer` is -`nvlinks`; `rank` orders within a joint."""

    joint: Joint
    fewer: int
    rank: int

    @property
    def nvlinks(self) -> int:
        return -self.fewer

    @property
    def weight(self) -> int:
        """What cutting it costs: an NVLink more than all paths over switches, one of those more than all in a node."""
        if self.joint is Joint.ANYHOW:
            return 0
        scale: int = _OUTWEIGHS ** (Joint.NODE - self.joint)
        return max(1, self.nvlinks) * scale

    def described(self, devices: int) -> str:
        """Of a set of so many devices with no worse path than this."""
        if self.joint is Joint.NVLINK:
            least = "at least " if devices > 2 else ""
            return f"joined by NVLink ({least}{self.nvlinks} link{'s' if self.nvlinks != 1 else ''})"
        return {
            Joint.SWITCH: "joined by PCIe switches, without a host bridge between",
            Joint.NODE: "of one NUMA node",
            Joint.ANYHOW: "with no fast path between them known",
        }[self.joint]


ITSELF = Path(Joint.NVLINK, 0, 0)
"""Of a device alone: no path can be better."""

_KINDS = list(LinkKind)  # best first
_UNKNOWN = len(_KINDS)
_JOINTS = {
    LinkKind.NVLINK: Joint.NVLINK,
    LinkKind.PIX: Joint.SWITCH,
    LinkKind.PXB: Joint.SWITCH,
    LinkKind.PHB: Joint.NODE,
    LinkKind.NODE: Joint.NODE,
}


def between(topology: Topology) -> Mapping[Pair, Path]:
    """The path of every two devices by their indices, from either end."""
    links = {(link.a, link.b): link for link in topology.links}
    found: dict[Pair, Path] = {}
    for a, b in combinations(topology.devices, 2):
        path = _path_of(links.get((min(a.index, b.index), max(a.index, b.index))))
        if path.joint is Joint.ANYHOW and a.numa_node is not None and a.numa_node == b.numa_node:
            path = path._replace(joint=Joint.NODE)
        found[a.index, b.index] = found[b.index, a.index] = path
    return found


def _path_of(link: Link | None) -> Path:
    if link is None:
        return Path(Joint.ANYHOW, 0, _UNKNOWN)
    return Path(_JOINTS.get(link.kind, Joint.ANYHOW), -link.nvlinks, _KINDS.index(link.kind))


def islands(topology: Topology, among: Collection[int]) -> list[frozenset[int]]:
    """The sets of two and more devices of `among` that are connected by NVLink, directly or through each other."""
    found = [frozenset((index,)) for index in sorted(among)]
    for pair, path in between(topology).items():
        if path.joint is Joint.NVLINK and set(among).issuperset(pair):
            joined = [island for island in found if not island.isdisjoint(pair)]
            found = [*(island for island in found if island not in joined), frozenset().union(*joined)]
    return sorted((island for island in found if len(island) > 1), key=min)
