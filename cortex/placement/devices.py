"""Chooses the devices of a node for a model. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, combinations

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.capacity import DeviceCapacity
from shared.protocol import Device
from shared.protocol.interconnect import SINGLE_DEVICE, DevicePath, Pair

MAX_DEVICE_SETS = 20_000
"""Limit on the sets compared on one node where the model fits; a host with more than 16 GPUs is cut to its best
ones."""
MAX_DEVICE_PAIRS = 400_000
"""Limit on the device pairs examined across all these sets: large sets mean fewer of them."""
MAX_EVICTION_SETS = 70
"""Limit on the sets compared when models must be evicted: enough for every set on a host with eight GPUs."""


def eligible_devices(profile: ModelProfile, node: NodeSnapshot) -> list[Device]:
    """Devices with at least the profile's minimum memory and compute capability, without MIG instances if the engine
    uses several devices together; on a feasible node there are enough of them. For a model on the CPU that is the
    host's RAM."""
    if profile.on_cpu:
        return [] if node.ram is None else [node.ram]
    return eligible(profile, node.devices)


def fit_devices(profile: ModelProfile, node: NodeSnapshot) -> list[Device]:
    """The eligible devices that can be used now."""
    found = eligible_devices(profile, node)
    return [device for device in found if device.index not in node.sick_devices] if node.sick_devices else found


def eligible(profile: ModelProfile, devices: list[Device]) -> list[Device]:
    """As `eligible_devices`, of these devices."""
    floor, capability = profile.min_device_vram_mb, profile.min_compute_capability
    found = [device for device in devices if not device.is_mig_instance] if profile.combines_devices else devices
    if floor is not None:
        found = [device for device in found if device.vram_total_mb >= floor]
    if capability is not None:
        lowest = as_version(capability)
        found = [device for device in found if as_version(device.compute_capability) >= lowest]
    return found


def as_version(capability: str | None) -> tuple[int, ...]:
    """A compute capability such as "8.9", for comparison. One that is absent or does not read so is the lowest."""
    parts = (capability or "").split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def device_sets(devices: Sequence[int], size: int, *, at_most: int = MAX_DEVICE_SETS) -> Iterator[tuple[int, ...]]:
    """Every set of `size` devices, each in ascending order. Trailing devices are dropped until there are at most
    `at_most` sets with at most `MAX_DEVICE_PAIRS` device pairs in total."""
    return combinations(sorted(devices[: comparable_devices(len(devices), size, at_most=at_most)]), size)


def comparable_devices(count: int, size: int, *, at_most: int = MAX_DEVICE_SETS) -> int:
    """How many of `count` devices `device_sets` combines."""
    at_most = min(at_most, MAX_DEVICE_PAIRS // max(1, _binomial(size, 2)))
    while count > size and _binomial(count, size) > at_most:
        count -= 1
    return count


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


def tensor_groups(indices: tuple[int, ...], tensor: int) -> list[tuple[int, ...]]:
    """The devices of an engine, in the order of its ranks, as groups of `tensor`."""
    return [indices[start : start + tensor] for start in range(0, len(indices), tensor)]


_SINGLE = (SINGLE_DEVICE.link_class, SINGLE_DEVICE.negated_nvlinks, 1, SINGLE_DEVICE.rank)


@dataclass(frozen=True)
class DeviceLayout:
    """How the devices of a node are connected, and how many engines are on each. By device index."""

    cards: Mapping[int, tuple[str, int]]  # name and total MiB
    paths: Mapping[Pair, DevicePath]
    path_weights: Mapping[int, Mapping[int, int]]
    memory: Mapping[int, DeviceCapacity]
    engines: Mapping[int, int]

    def connection(self, groups: Iterable[tuple[int, ...]], others: tuple[int, ...] = ()) -> tuple[object, ...]:
        """How well tensor groups are connected; smaller is better: the class of the worst path within a group, then the
        number of different cards in these groups and `others`, then the worst path within its class."""
        listed = list(groups)
        if not others and len(listed) == 1 and len(listed[0]) == 1:
            return _SINGLE
        paths = (self.paths[pair] for group in listed for pair in combinations(group, 2))
        worst = max(paths, default=SINGLE_DEVICE)
        cards = {self.cards[index] for index in chain(others, *listed)}
        return worst.link_class, worst.negated_nvlinks, len(cards), worst.rank

    def best_single(
        self, devices: Iterable[int], waits: Mapping[int, int], device_share_mb: int
    ) -> tuple[int, ...] | None:
        """The best set of one device, by wait, fit and packing. For itself, because it is the usual case and many nodes
        are looked at."""
        sign, engines, cut = 1 if device_share_mb else -1, self.engines, self._total_weights
        ranks = (
            (waits.get(i, 0), sign * self.memory[i].in_steps, engines.get(i, 0), cut.get(i, 0), i) for i in devices
        )
        best = min(ranks, default=None)
        return None if best is None else best[-1:]

    def packing(self, indices: tuple[int, ...]) -> tuple[int, int]:
        """How well the devices fill up a node; smaller is better: first the engines on them, then the weights of the
        paths between an idle one of them and an idle other one. So a device whose NVLinked neighbours are in use goes
        before one of a complete island, and one NUMA node is filled before the next."""
        engines = sum(self.engines.get(index, 0) for index in indices) if self.engines else 0
        return engines, self._cut(indices)

    @cached_property
    def _idle_weights(self) -> Mapping[int, Mapping[int, int]]:
        """Of the paths between idle devices."""
        idle = {
            index
            for index in self.path_weights
            if (known := self.memory.get(index)) and not self.engines.get(index) and known.mostly_free
        }
        return {a: {b: mb for b, mb in self.path_weights[a].items() if b in idle} for a in idle}

    @cached_property
    def _total_weights(self) -> Mapping[int, int]:
        return {index: sum(weights.values()) for index, weights in self._idle_weights.items()}

    def _cut(self, indices: tuple[int, ...]) -> int:
        weights = self._idle_weights
        if not weights or len(indices) == 1:
            return self._total_weights.get(indices[0], 0)
        inside = sum(weights[a].get(b, 0) for a, b in combinations(indices, 2) if a in weights)
        return sum(self._total_weights.get(index, 0) for index in indices) - 2 * inside


def device_layout(node: NodeSnapshot, memory: Mapping[int, DeviceCapacity], engines: Mapping[int, int]) -> DeviceLayout:
    """The layout of a node's usable devices; `engines` counts those on each."""
    discovery = node.discovery
    return DeviceLayout(
        cards={device.index: (device.name, device.vram_total_mb) for device in node.devices},
        paths={} if discovery is None else discovery.paths,
        path_weights={} if discovery is None else discovery.path_weights,
        memory=memory,
        engines=engines,
    )


def best_fit_rank(indices: tuple[int, ...], memory: Mapping[int, DeviceCapacity], device_share_mb: int) -> int:
    """Free memory on the devices, smaller is better, so that large gaps stay free. For a model of unknown size, more
    free memory is better."""
    free = sum(memory[index].in_steps for index in indices)
    return free if device_share_mb else -free


def _binomial(n: int, k: int) -> int:
    result = 1
    for i in range(min(k, n - k)):
        result = result * (n - i) // (i + 1)
    return result
