"""Chooses the devices of a node for a model. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.capacity import DeviceCapacity
from shared.protocol import Device, Link, LinkKind

MAX_DEVICE_SETS = 20_000
"""Limit on the sets compared on one node where the model fits; a host with more than 16 GPUs is cut to its best
ones."""
MAX_DEVICE_PAIRS = 400_000
"""Limit on the device pairs examined across all these sets: large sets mean fewer of them."""
MAX_EVICTION_SETS = 70
"""Limit on the sets compared when models must be evicted: enough for every set on a host with eight GPUs."""

_DISTANCE = {kind: rank for rank, kind in enumerate(LinkKind)}


def eligible_devices(profile: ModelProfile, node: NodeSnapshot) -> list[Device]:
    """Devices with at least the profile's minimum memory and compute capability; on a feasible node there are enough
    of them."""
    floor, capability = profile.min_device_vram_mb or 0, as_version(profile.min_compute_capability)
    large = [device for device in node.devices if device.vram_total_mb >= floor]
    return [device for device in large if as_version(device.compute_capability) >= capability] if capability else large


def as_version(capability: str | None) -> tuple[int, ...]:
    """A compute capability such as "8.9", for comparison. One that is absent or does not read so is the lowest."""
    parts = (capability or "").split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def device_sets(devices: Sequence[int], size: int, *, at_most: int = MAX_DEVICE_SETS) -> Iterator[tuple[int, ...]]:
    """Every set of `size` devices, each in ascending order. Trailing devices are dropped until there are at most
    `at_most` sets with at most `MAX_DEVICE_PAIRS` device pairs in total."""
    count = len(devices)
    at_most = min(at_most, MAX_DEVICE_PAIRS // max(1, _binomial(size, 2)))
    while count > size and _binomial(count, size) > at_most:
        count -= 1
    return combinations(sorted(devices[:count]), size)


def disjoint_groups(
    devices: Sequence[int],
    size: int,
    count: int,
    rank: Callable[[tuple[int, ...], tuple[int, ...]], tuple[object, ...]],
) -> tuple[int, ...] | None:
    """`count` groups of `size` of the devices, in ascending order; None if there are too few. One group after another
    is chosen, the one with the smallest `rank` of those still possible; `rank` also gets the devices chosen before."""
    if len(devices) < size * count:
        return None
    left = list(devices)
    groups: list[tuple[int, ...]] = []
    for _ in range(count):
        before = tuple(chain.from_iterable(groups))
        groups.append(min(device_sets(left, size), key=partial(rank, before)))
        left = [index for index in left if index not in groups[-1]]
    return tuple(chain.from_iterable(sorted(groups)))


def interconnect_rank(node: NodeSnapshot, indices: tuple[int, ...], tensor: int) -> tuple[int, int]:
    """How well the devices are connected; smaller is better. First the worst path within a tensor group, which are
    `tensor` devices in a row, then `size_spread_mb`."""
    worst = max((worst_path(node, group) for group in tensor_groups(indices, tensor)), default=0)
    return worst, size_spread_mb(node, indices)


def worst_path(node: NodeSnapshot, indices: tuple[int, ...]) -> int:
    """The worst path between two of the devices: 0 for NVLink, higher for each level of the PCIe tree, unknown is
    worst."""
    links = node.links
    return max((_distance(links, a, b) for a, b in combinations(indices, 2)), default=0)


def size_spread_mb(node: NodeSnapshot, indices: tuple[int, ...]) -> int:
    """The spread of the devices' sizes."""
    totals = [device.vram_total_mb for device in node.devices if device.index in indices]
    return max(totals) - min(totals)


def tensor_groups(indices: tuple[int, ...], tensor: int) -> list[tuple[int, ...]]:
    """The devices of an engine, in the order of its ranks, as groups of `tensor`."""
    return [indices[start : start + tensor] for start in range(0, len(indices), tensor)]


def best_fit_rank(indices: tuple[int, ...], memory: Mapping[int, DeviceCapacity], device_share_mb: int) -> int:
    """Free memory on the devices, smaller is better, so that large gaps stay free. For a model of unknown size, more
    free memory is better."""
    free = sum(memory[index].free_mb - memory[index].sleeping_mb for index in indices)
    return free if device_share_mb else -free


def _distance(links: Mapping[tuple[int, int], Link], a: int, b: int) -> int:
    link = links.get((a, b) if a < b else (b, a))
    return len(LinkKind) if link is None else _DISTANCE[link.kind]


def _binomial(n: int, k: int) -> int:
    result = 1
    for i in range(min(k, n - k)):
        result = result * (n - i) // (i + 1)
    return result
