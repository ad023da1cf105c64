"""Which GPUs an engine gets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from neuron.spec import EngineSpec
from neuron.topology import Topology
from shared.errors import InvalidRequest
from shared.protocol import Device, LinkKind

_LINK_RANK = {kind: rank for rank, kind in enumerate(LinkKind)}  # LinkKind lists the best first
_MAX_SETS = 20_000  # of devices, looked at for one choice


def check_devices(spec: EngineSpec, topology: Topology) -> None:
    """Refuses a spec that this host's devices can never serve.

    Raises:
        InvalidRequest: a device does not exist or is lost, or there are fewer than `tensor_parallel`.
    """
    by_index = {device.index: device for device in topology.devices}
    for index in spec.devices or ():
        if index not in by_index:
            there = ", ".join(map(str, sorted(by_index))) or "none"
            raise InvalidRequest(f"devices: there is no device {index} (there is: {there})", param="devices")
        lost = by_index[index].lost
        if lost is not None:
            raise InvalidRequest(f"devices: device {index} cannot be used: {lost}", param="devices")
    usable = [device for device in topology.devices if device.lost is None]
    if topology.devices and len(usable) < spec.tensor_parallel:
        raise InvalidRequest(
            f"tensor_parallel: {spec.tensor_parallel} devices are needed, {len(usable)} can be used here",
            param="tensor_parallel",
        )


def choose(
    spec: EngineSpec, topology: Topology, *, free_mb: Mapping[int, float], engines: Mapping[int, int]
) -> tuple[Device, ...]:
    """The devices for `spec`: those it names, else the best set of `tensor_parallel`.

    Better is, in this order: every device has room for its share of `vram_mb`; all are the same card; the slowest
    link between two of them is faster; fewer engines; more free memory on the fullest; lower indices. `free_mb` (MiB)
    and `engines` are by device index. A host without devices gives none.
    """
    by_index = {device.index: device for device in topology.devices}
    if spec.devices is not None:
        return tuple(by_index[index] for index in spec.devices)
    usable = [device for device in topology.devices if device.lost is None]
    if not usable:
        return ()
    links = {frozenset((link.a, link.b)): _LINK_RANK[link.kind] for link in topology.links}
    share = (spec.vram_mb or 0) / spec.tensor_parallel

    def badness(group: Sequence[Device]) -> tuple[object, ...]:
        free = min(free_mb.get(device.index, 0) for device in group)
        pairs = (frozenset((a.index, b.index)) for a, b in combinations(group, 2))
        slowest = max((links.get(pair, len(_LINK_RANK)) for pair in pairs), default=0)
        cards = {(device.name, device.vram_total_mb) for device in group}
        busy = sum(engines.get(device.index, 0) for device in group)
        return free < share, len(cards), slowest, busy, -free, [device.index for device in group]

    groups = (group for group, _ in zip(combinations(usable, spec.tensor_parallel), range(_MAX_SETS), strict=False))
    return min(groups, key=badness, default=())
