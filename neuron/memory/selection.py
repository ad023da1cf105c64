"""Which GPUs an engine gets. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from neuron.gpu.topology import Topology
from neuron.memory import interconnect as paths
from neuron.memory.capacity import DeviceRoom, unusable_reason
from neuron.memory.interconnect import Pair, Path
from neuron.memory.requirement import MemoryNeed
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import Device

MAX_SETS = 20_000
"""Sets of devices that are compared one by one: any number of up to 16 devices. With more, see `_grown`."""
_STEP_MB = 1024
"""What is taken on a device counts in whole GiB when sets are compared, so that the few MiB in which two idle cards
differ do not decide."""

Group = tuple[int, ...]
"""Device indices, the lowest first."""


@dataclass(frozen=True)
class Choice:
    """The devices of an engine, the MiB it gets on each of them, and why these, for an operator."""

    devices: tuple[Device, ...]
    booked_mb: tuple[int, ...]
    why: str


def check_devices(spec: EngineSpec, topology: Topology) -> None:
    """Refuses a spec that this host's devices can never serve.

    Raises:
        InvalidRequest: a device does not exist, is lost or in MIG mode, or there are fewer than `tensor_parallel`.
    """
    by_index = {device.index: device for device in topology.devices}
    for index in spec.devices or ():
        if index not in by_index:
            there = ", ".join(map(str, sorted(by_index))) or "none"
            raise InvalidRequest(f"devices: there is no device {index} (there is: {there})", param="devices")
        reason = unusable_reason(by_index[index])
        if reason is not None:
            raise InvalidRequest(f"devices: device {index} cannot be used: {reason}", param="devices")
    reasons = {device.index: reason for device in topology.devices if (reason := unusable_reason(device)) is not None}
    usable = len(topology.devices) - len(reasons)
    if topology.devices and usable < spec.tensor_parallel:
        why = "".join(f"; device {index}: {reason}" for index, reason in reasons.items())
        raise InvalidRequest(
            f"tensor_parallel: {spec.tensor_parallel} devices are needed, {usable} can be used here{why}",
            param="tensor_parallel",
        )


def choose(
    count: int,
    need: MemoryNeed,
    topology: Topology,
    rooms: Sequence[DeviceRoom],
    *,
    named: Sequence[int] | None = None,
) -> Choice | None:
    """The devices `named` if they have room; without names the best set of `count` that has. None: no set has.

    Never a lost device, nor one in MIG mode. Of the sets in which every device has room, better is, in this order:

    1. the worse of its paths is of a better kind: NVLink (the more links the better), one PCIe switch, one NUMA node,
       anything: every layer of a tensor-parallel model waits for all of them;
    2. fewer different cards: the slowest sets the pace, the smallest the cache;
    3. the path within its kind: as `nvidia-smi topo -m` lists them;
    4. less is taken of the memory that sleeping engines want when they wake;
    5. less memory is left over on them, in whole GiB, so that large cards stay free for large models. A model of
       unknown size gets the roomiest instead;
    6. fewer other engines;
    7. less of their memory is still held by engines that are being stopped;
    8. fewer paths are cut between idle devices, one of which is taken and the other not, NVLink before switches before
       NUMA nodes: so the best-connected sets stay whole, and an island that is broken already goes first;
    9. lower indices.

    Memory comes before whole sets because a card too large for its model costs every later model, and a cut pair only
    those that want a pair.
    """
    by_room = {room.index: room for room in rooms}
    by_index = {device.index: device for device in topology.devices}
    if not topology.devices:
        return Choice((), (), "this host has no GPUs")
    if named is not None:
        group = tuple(by_index[index] for index in named)
        shares = need.shares([by_room[index] for index in named])
        fits = all(by_room[index].has(mb) for index, mb in zip(named, shares, strict=True))
        return Choice(group, shares, f"{_listed(named)}, as the load names them") if fits else None
    judge = _judge(need, topology, rooms)
    best = min(_sets_with_room(count, judge), key=judge.badness, default=None)
    if best is None:
        return None
    group = tuple(by_index[index] for index in best)
    return Choice(group, judge.shares(best), _why(best, judge, topology, rooms))


@dataclass(frozen=True)
class _Judge:
    """Compares sets for one need. Everything by device index; what does not depend on the set is worked out once,
    since there may be ten thousand of them."""

    need: MemoryNeed
    rooms: Mapping[int, DeviceRoom]
    cards: Mapping[int, tuple[str, int]]
    left_over: Mapping[int, int]  # MiB to be had, in whole steps below the total
    paths: Mapping[Pair, Path]
    pulls: Mapping[int, int]  # of idle devices: the weight of all paths to other idle ones
    weights: Mapping[Pair, int]  # of paths between idle devices

    def badness(self, group: Group) -> tuple[object, ...]:
        """As `choose` says; the smallest is the best. No two sets have the same."""
        pairs = tuple(combinations(group, 2))
        worst = max(map(self.paths.__getitem__, pairs), default=paths.ITSELF)
        shares = self.shares(group)
        left = sum(map(self.left_over.__getitem__, group)) - sum(shares)
        asleep = sum(self.rooms[index].missing_to_wake(mb) for index, mb in zip(group, shares, strict=True))
        cut = sum(self.pulls.get(index, 0) for index in group) - 2 * sum(self.weights.get(pair, 0) for pair in pairs)
        return (
            (worst.joint, worst.fewer),
            len({self.cards[index] for index in group}),
            worst.rank,
            asleep,
            left if self.need.size_known else -left,
            sum(len(self.rooms[index].booked_by) for index in group),
            sum(self.rooms[index].coming_back_mb for index in group),
            cut,
            group,
        )

    def shares(self, group: Group) -> tuple[int, ...]:
        return self.need.shares([self.rooms[index] for index in group])

    def pools(self) -> Iterator[list[int]]:
        """Devices any of which may be combined. Every set with room is within one of the pools: the one of its
        smallest device, which is what the need of the others can depend on."""
        totals = sorted({room.total_mb for room in self.rooms.values()}) if self.need.one_fraction else [0]
        for smallest in totals:
            yield [
                room.index
                for room in self.rooms.values()
                if room.total_mb >= smallest and room.has(self.need.on(room, smallest))
            ]


def _judge(need: MemoryNeed, topology: Topology, rooms: Sequence[DeviceRoom]) -> _Judge:
    every, idle = paths.between(topology), _idle(rooms)
    weights = {pair: path.weight for pair, path in every.items() if idle.issuperset(pair)}
    pulls: Counter[int] = Counter()
    for (a, _), weight in weights.items():  # each path is there from either end
        pulls[a] += weight
    return _Judge(
        need=need,
        rooms={room.index: room for room in rooms},
        cards={device.index: (device.name, device.vram_total_mb) for device in topology.devices},
        left_over={
            room.index: room.total_mb - _STEP_MB * round((room.total_mb - room.bookable_mb) / _STEP_MB)
            for room in rooms
        },
        paths=every,
        pulls=pulls,
        weights=weights,
    )


def _idle(rooms: Iterable[DeviceRoom]) -> frozenset[int]:
    """Devices that a set worth keeping whole is made of: no engine there, and most of the memory to be had."""
    return frozenset(
        room.index
        for room in rooms
        if room.unusable is None and not room.booked_by and 2 * room.bookable_mb >= room.total_mb
    )


def _sets_with_room(count: int, judge: _Judge) -> Iterator[Group]:
    for pool in judge.pools():
        if comb(len(pool), count) <= MAX_SETS:
            yield from combinations(pool, count)
        else:
            yield from _grown(pool, count, judge)


def _grown(pool: Sequence[int], count: int, judge: _Judge) -> Iterator[Group]:
    """One set around each device, grown by whatever makes it the best: for hosts with too many sets to look at each.
    Any `count` of a pool have room, so that none is refused for want of looking."""
    for seed in pool:
        group: Group = (seed,)
        while len(group) < count:
            wider = (tuple(sorted((*group, index))) for index in pool if index not in group)
            group = min(wider, key=judge.badness)
        yield group


def _why(group: Group, judge: _Judge, topology: Topology, rooms: Sequence[DeviceRoom]) -> str:
    with_room = len({index for pool in judge.pools() for index in pool})
    said = [f"{len(group)} of {with_room} devices with room: {_listed(group)}"]
    if len(group) > 1:
        said[0] += f", {max(judge.paths[pair] for pair in combinations(group, 2)).described(len(group))}"
        cards = dict.fromkeys(judge.cards[index][0] or f"{judge.cards[index][1]} MiB" for index in group)
        if len(cards) > 1:
            said.append(f"cards differ ({', '.join(cards)})")
    if with_room > len(group):
        left = sum(judge.rooms[index].bookable_mb for index in group) - sum(judge.shares(group))
        fit = "closest fit" if judge.need.size_known else "roomiest, as the model's size is not known"
        said.append(f"{fit}, {left} MiB left over")
        whole = [island for island in paths.islands(topology, _idle(rooms)) if island.isdisjoint(group)]
        names = ["+".join(map(str, sorted(island))) for island in whole]
        if names:
            said.append(f"leaves NVLinked {', '.join(names)} whole")
    return "; ".join(said)


def _listed(indices: Sequence[int]) -> str:
    *head, last = map(str, indices)
    return f"{', '.join(head)} and {last}" if head else last
