"""Which GPUs an engine gets. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from math import comb

from neuron.gpu.topology import Topology
from neuron.memory.capacity import GpuCapacity, unusable_reason
from neuron.memory.requirement import MemoryRequirement
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.gpus import in_memory_steps
from shared.protocol import RAM, Device, Parallelism
from shared.protocol.interconnect import SINGLE_DEVICE, DevicePath, Pair, nvlink_islands
from shared.protocol.topology import AMD

MAX_SETS = 20_000
"""How many sets of devices are compared one by one: all sets of any size up to 16 devices. With more devices, see
`_greedy_sets`."""

COMBINED_REASON = "it is a MIG instance, which an engine cannot use together with other devices"

Group = tuple[int, ...]
"""Device indices, ascending."""
Groups = tuple[Group, ...]
"""The tensor groups of an engine."""


@dataclass(frozen=True)
class DeviceSelection:
    """The devices of an engine, the MiB it gets on each of them, and why these, for an operator. `ram_mb` is what it
    gets in the host's RAM; None: that is not counted for it."""

    devices: tuple[Device, ...]
    booked_mb: tuple[int, ...]
    why: str
    ram_mb: int | None = None


def select_ram(requirement: MemoryRequirement, ranks: int, ram: GpuCapacity) -> DeviceSelection | None:
    """Memory in the host's RAM for an engine on the CPU with this many ranks; None if there is not enough."""
    needed = ranks * requirement.on_device(ram, ram.total_mb)
    if not ram.can_hold(needed):
        return None
    return DeviceSelection((), (), f"{needed} of {ram.bookable_mb} MiB in this host's RAM", ram_mb=needed)


def check_devices(spec: EngineSpec, topology: Topology) -> None:
    """Refuses a spec that this host's devices can never serve.

    Raises:
        InvalidRequest: a device does not exist, is lost or in MIG mode, is a MIG instance although the spec needs
            several devices, or there are fewer than the spec needs.
    """
    by_index = {device.index: device for device in topology.devices}
    reasons = {device.index: _never_reason(spec, device) for device in topology.devices}
    for index in spec.devices or ():
        if index not in by_index:
            existing = ", ".join(map(str, sorted(by_index))) or "none"
            raise InvalidRequest(f"devices: no device {index} on this host (devices: {existing})", param="devices")
        if reasons[index] is not None:
            raise InvalidRequest(f"devices: device {index} cannot be used: {reasons[index]}", param="devices")
    usable = list(reasons.values()).count(None)
    if topology.devices and usable < spec.device_count and not spec.without_devices:
        field, split = ("tensor_parallel", "") if spec.parallel.tensor_only else ("parallel", f" for {spec.parallel}")
        needed = f"{spec.device_count} devices are needed{split}, {usable} can be used here"
        raise InvalidRequest(f"{field}: {'; '.join([needed, *_by_reason(reasons)])}", param=field)


def _by_reason(reasons: Mapping[int, str | None]) -> Iterator[str]:
    """Such as "device 0: it does not answer", with the devices that share a reason together."""
    for reason in dict.fromkeys(reason for reason in reasons.values() if reason is not None):
        indices = [index for index, each in reasons.items() if each == reason]
        yield f"device{'s' if len(indices) > 1 else ''} {_listed(indices)}: {reason}"


def combines_devices(spec: EngineSpec) -> bool:
    """Whether its engine uses several devices together, those of other hosts included."""
    return spec.parallel.devices > 1


def _never_reason(spec: EngineSpec, device: Device) -> str | None:
    if device.is_mig_instance and combines_devices(spec):
        return COMBINED_REASON
    return unusable_reason(device)


def without_mig_instances(topology: Topology, capacities: Sequence[GpuCapacity]) -> tuple[GpuCapacity, ...]:
    """The capacities, with the MIG instances marked unusable: CUDA shows a process only one of them, and NCCL does not
    connect them."""
    instances = {device.index for device in topology.devices if device.is_mig_instance}
    return tuple(
        replace(each, unusable=each.unusable or COMBINED_REASON) if each.index in instances else each
        for each in capacities
    )


def select_devices(
    parallel: Parallelism,
    requirement: MemoryRequirement,
    topology: Topology,
    capacities: Sequence[GpuCapacity],
    *,
    named: Sequence[int] | None = None,
) -> DeviceSelection | None:
    """The devices `named`, or the best set of `parallel.devices` devices, in the order of the ranks; None when they
    have not enough memory, or no set has.

    Never selects a lost device or one in MIG mode, nor a MIG instance as one of several. Of the sets in which every
    device has enough memory, the best is the one with, in this order:

    1. the better class of its worst path: NVLink (more links are better), PCIe switch, NUMA node, anything else. Every
       layer of a tensor-parallel model waits for all devices of a tensor group. Only paths within one count: pipeline
       stages and copies exchange little;
    2. fewer different cards: the slowest sets the pace, the smallest the cache;
    3. the better worst path within its class, in the order of `nvidia-smi topo -m`;
    4. less memory taken that sleeping engines need when they wake;
    5. less memory left over, in whole GiB, so that large cards stay free for large models; for a model of unknown size,
       more memory left over;
    6. fewer other engines;
    7. less memory still held by stopping engines;
    8. fewer paths cut between an idle device in the set and an idle one outside, NVLink before switches before NUMA
       nodes, so that well connected sets stay complete and an incomplete one is used first;
    9. lower indices.

    With more than one tensor group, one after another is chosen in this way, with those before it in the set.

    Memory comes before complete sets: a card too large for its model costs every later model, a cut pair only those
    that need a pair.
    """
    capacities = [device for device in capacities if device.index != RAM]
    if parallel.devices > 1:
        capacities = without_mig_instances(topology, capacities)
    capacity_of = {device.index: device for device in capacities}
    by_index = {device.index: device for device in topology.devices}
    if not topology.devices:
        return DeviceSelection((), (), "this host has no GPUs")
    if named is not None and not named:
        return DeviceSelection((), (), "on the CPU, as the load command says")
    if named is not None:
        group = tuple(by_index[index] for index in named)
        shares = requirement.per_device([capacity_of[index] for index in named])
        fits = all(capacity_of[index].can_hold(mb) for index, mb in zip(named, shares, strict=True))
        return DeviceSelection(group, shares, f"{_listed(named)}, as the load command says") if fits else None
    scorer = _scorer(requirement, topology, capacities)
    best = min(_candidates(parallel, scorer), key=scorer.cost, default=None)
    if best is None:
        return None
    ranks = tuple(chain.from_iterable(sorted(best)))
    devices = tuple(by_index[index] for index in ranks)
    return DeviceSelection(devices, scorer.shares(ranks), _why(sorted(best), scorer, topology, capacities))


@dataclass(frozen=True)
class _Scorer:
    """Compares sets for one requirement. All mappings are by device index. What does not depend on the set is
    calculated once, since there may be thousands of sets."""

    requirement: MemoryRequirement
    capacities: Mapping[int, GpuCapacity]
    cards: Mapping[int, tuple[str, int]]  # name and total MiB
    left_over: Mapping[int, int]  # bookable MiB, rounded to whole steps below the total
    paths: Mapping[Pair, DevicePath]
    idle_weights: Mapping[int, int]  # of idle devices: the weights of all paths to other idle devices, added up
    weights: Mapping[Pair, int]  # of paths between idle devices

    def cost(self, groups: Groups) -> tuple[object, ...]:
        """In the order of `select_devices`; the lowest is the best. No two sets have the same."""
        group = groups[0] if len(groups) == 1 else tuple(sorted(chain.from_iterable(groups)))
        pairs = tuple(combinations(group, 2))
        within = pairs if len(groups) == 1 else [pair for each in groups for pair in combinations(each, 2)]
        worst = max(map(self.paths.__getitem__, within), default=SINGLE_DEVICE)
        shares = self.shares(group)
        left = sum(map(self.left_over.__getitem__, group)) - sum(shares)
        asleep = sum(self.capacities[index].shortfall_on_wake(mb) for index, mb in zip(group, shares, strict=True))
        cut = sum(self.idle_weights.get(index, 0) for index in group)
        cut -= 2 * sum(self.weights.get(pair, 0) for pair in pairs)
        return (
            (worst.link_class, worst.negated_nvlinks),
            len({self.cards[index] for index in group}),
            worst.rank,
            asleep,
            left if self.requirement.size_known else -left,
            sum(len(self.capacities[index].booked_by) for index in group),
            sum(self.capacities[index].stopping_mb for index in group),
            cut,
            groups,
        )

    def shares(self, group: Group) -> tuple[int, ...]:
        return self.requirement.per_device([self.capacities[index] for index in group])

    def pools(self) -> Iterator[list[int]]:
        """Devices of which any combination has enough memory. Each possible set is part of one pool: that of its
        smallest device, on which the requirement of the others can depend."""
        devices = self.capacities.values()
        totals = sorted({device.total_mb for device in devices}) if self.requirement.one_fraction else [0]
        for smallest in totals:
            yield [
                device.index
                for device in devices
                if device.total_mb >= smallest and device.can_hold(self.requirement.on_device(device, smallest))
            ]


def _scorer(requirement: MemoryRequirement, topology: Topology, capacities: Sequence[GpuCapacity]) -> _Scorer:
    paths, idle = topology.paths, _idle(capacities)
    weights = {pair: path.weight for pair, path in paths.items() if idle.issuperset(pair)}
    idle_weights: Counter[int] = Counter()
    for (a, _), weight in weights.items():  # each pair is in the mapping in both orders
        idle_weights[a] += weight
    return _Scorer(
        requirement=requirement,
        capacities={device.index: device for device in capacities},
        cards={device.index: (device.name, device.vram_total_mb) for device in topology.devices},
        left_over={device.index: in_memory_steps(device.bookable_mb, device.total_mb) for device in capacities},
        paths=paths,
        idle_weights=idle_weights,
        weights=weights,
    )


def _idle(capacities: Iterable[GpuCapacity]) -> frozenset[int]:
    """Devices without an engine and with most of their memory bookable."""
    return frozenset(
        device.index
        for device in capacities
        if device.unusable is None and not device.booked_by and 2 * device.bookable_mb >= device.total_mb
    )


def _candidates(parallel: Parallelism, scorer: _Scorer) -> Iterator[Groups]:
    for pool in scorer.pools():
        if len(pool) < parallel.devices:
            continue
        if parallel.tensor_groups == 1:
            yield from ((group,) for group in _sets(pool, parallel.tensor, scorer))
            continue
        groups: Groups = ()
        for _ in range(parallel.tensor_groups):
            left = [index for index in pool if not any(index in group for group in groups)]
            larger = ((*groups, group) for group in _sets(left, parallel.tensor, scorer))
            groups = min(larger, key=scorer.cost)
        yield groups


def _sets(pool: Sequence[int], count: int, scorer: _Scorer) -> Iterator[Group]:
    if comb(len(pool), count) <= MAX_SETS:
        yield from combinations(pool, count)
    else:
        yield from _greedy_sets(pool, count, scorer)


def _greedy_sets(pool: Sequence[int], count: int, scorer: _Scorer) -> Iterator[Group]:
    """One set around each device, each time extended by the best device: for hosts with too many sets to compare all.
    Any `count` devices of a pool have enough memory, so this never misses a possible load."""
    for seed in pool:
        group: Group = (seed,)
        while len(group) < count:
            extended = ((tuple(sorted((*group, index))),) for index in pool if index not in group)
            (group,) = min(extended, key=scorer.cost)
        yield group


def _why(groups: Sequence[Group], scorer: _Scorer, topology: Topology, capacities: Sequence[GpuCapacity]) -> str:
    possible = len({index for pool in scorer.pools() for index in pool})
    group = tuple(chain.from_iterable(groups))
    reasons = [f"{len(group)} of {possible} devices with enough memory: {_listed(group)}"]
    if len(group) > 1:
        paths = [scorer.paths[pair] for each in groups for pair in combinations(each, 2)]
        if len(groups) > 1 and paths:
            reasons[0] += f", tensor groups {_listed(['+'.join(map(str, each)) for each in groups])}, each"
        if paths:
            reasons[0] += f"{'' if len(groups) > 1 else ','} {max(paths).described(len(groups[0]))}"
        cards = dict.fromkeys(scorer.cards[index][0] or f"{scorer.cards[index][1]} MiB" for index in group)
        if len(cards) > 1:
            reasons.append(f"cards differ ({', '.join(cards)})")
    if possible > len(group):
        left = sum(scorer.capacities[index].bookable_mb for index in group) - sum(scorer.shares(group))
        fit = "closest fit" if scorer.requirement.size_known else "most free memory, as the model's size is unknown"
        reasons.append(f"{fit}, {left} MiB left over")
        complete = [island for island in nvlink_islands(topology.paths, _idle(capacities)) if island.isdisjoint(group)]
        names = ["+".join(map(str, sorted(island))) for island in complete]
        if names:
            linked = "XGMI-linked" if topology.devices[0].vendor == AMD else "NVLinked"
            reasons.append(f"keeps {linked} {', '.join(names)} free")
    return "; ".join(reasons)


def _listed(indices: Sequence[int | str]) -> str:
    *head, last = map(str, indices)
    return f"{', '.join(head)} and {last}" if head else last
