"""How engines fill up a host: NVLinked sets stay whole, one NUMA node is filled before the next, the tightest fit."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.load_plan import LoadPlan
from cortex.placement.node_plan import plan_on_node
from neuron.gpu.topology import Topology
from neuron.memory.capacity import Booking, gpu_capacities
from neuron.memory.requirement import MemoryRequirement
from neuron.memory.selection import select_devices
from neuron.spec import InstanceKey
from shared.protocol import Link, LinkKind, Parallelism
from tests.cortex.fleets import On, fleet
from tests.cortex.fleets import host as node_of
from tests.cortex.views import profile, view
from tests.neuron.hosts import ISLANDS, MESH, MIXED, PAIRS, SWITCHES, gpu, host, linked, measured

FOUR_PAIRS = host(*["H100"] * 8, links=linked([(0, 1), (2, 3), (4, 5), (6, 7)], LinkKind.NVLINK, 4))
TWO_SOCKETS = Topology(devices=tuple(gpu(index, numa_node=index % 2) for index in range(8)), simulated=True)
NO_LINKS = host("5090", "4090", "3060", "3060")
HOSTS = [MESH, ISLANDS, PAIRS, SWITCHES, MIXED, FOUR_PAIRS, TWO_SOCKETS, NO_LINKS]


def snapshot(topology: Topology, engines: dict[str, On]) -> NodeSnapshot:
    """The host as cortex sees it, with these engines."""
    bare = node_of("n", *(device.vram_total_mb for device in topology.devices), models=engines)
    assert bare.discovery is not None
    update = {"devices": list(topology.devices), "links": list(topology.links)}
    return replace(bare, discovery=bare.discovery.model_copy(update=update))


def placed(topology: Topology, engines: dict[str, On], size: int, mb: int) -> tuple[int, ...] | None:
    """The devices that cortex names for another engine, on free memory."""
    where = snapshot(topology, engines)
    wanted = profile(min_devices=size, vram_mb=mb * size)
    plan = plan_on_node(view(fleet(where), wanted), wanted, where)
    return plan.devices if isinstance(plan, LoadPlan) and plan.fit.name == "NOW" else None


def engines_on(*sets: Iterable[int], mb: int = 9000) -> dict[str, On]:
    return {f"x{number}": On(mb, tuple(devices)) for number, devices in enumerate(sets)}


@pytest.mark.parametrize(
    ("topology", "taken", "size", "expected"),
    [
        (FOUR_PAIRS, [], 1, (0,)),
        (FOUR_PAIRS, [(0,)], 1, (1,)),
        (FOUR_PAIRS, [(5,)], 1, (4,)),
        (FOUR_PAIRS, [(0,), (3,), (6,)], 2, (4, 5)),
        (ISLANDS, [(5,)], 1, (4,)),
        (ISLANDS, [(5,)], 2, (4, 6)),
        (PAIRS, [], 1, (2,)),  # 2 and 3 have no NVLink
        (TWO_SOCKETS, [(1,)], 1, (3,)),
        (TWO_SOCKETS, [(1,), (3,), (5,)], 1, (7,)),
        (TWO_SOCKETS, [(1,)], 4, (0, 2, 4, 6)),
        (TWO_SOCKETS, [(0, 2, 4, 6)], 2, (1, 3)),
    ],
)
def test_sets_stay_whole(topology: Topology, taken: list[Iterable[int]], size: int, expected: tuple[int, ...]) -> None:
    """A device of an incomplete set goes before one of a complete set."""
    assert placed(topology, engines_on(*taken, mb=70_000), size, 60_000) == expected


def test_a_few_mib_do_not_break_a_pair() -> None:
    """Idle cards differ by what the driver holds; that does not count as a tighter fit."""
    where = snapshot(FOUR_PAIRS, engines_on((0,), mb=70_000))
    assert where.health is not None
    figures = [
        each.model_copy(update={"vram_bookable_mb": (each.vram_bookable_mb or 0) - 17 * each.index})
        for each in where.health.devices
    ]
    where = replace(where, health=where.health.model_copy(update={"devices": figures}))
    wanted = profile(vram_mb=60_000)
    plan = plan_on_node(view(fleet(where), wanted), wanted, where)
    assert isinstance(plan, LoadPlan)
    assert plan.devices == (1,)


@pytest.mark.parametrize("seed", range(60))
def test_no_complete_set_is_broken_while_a_single_card_is_free(seed: int) -> None:
    """Engines of one device each, one after another, on hosts with random NVLinked sets."""
    source = random.Random(seed)
    indices = list(range(8))
    source.shuffle(indices)
    sets: list[list[int]] = []
    while indices:
        size = min(source.choice((1, 2, 2, 4)), len(indices))
        sets.append(sorted(indices[:size]))
        indices = indices[size:]
    topology = host(*["H100"] * 8, links=linked(sets, LinkKind.NVLINK, source.choice((1, 4))))
    taken: list[tuple[int, ...]] = []
    while (found := placed(topology, engines_on(*taken, mb=70_000), 1, 60_000)) is not None:
        used = {index for each in taken for index in each}
        (own,) = (each for each in sets if found[0] in each)
        if len(own) > 1 and used.isdisjoint(own):
            assert all(len(each) > 1 for each in sets if used.isdisjoint(each)), taken
            assert not [each for each in sets if not used.isdisjoint(each) and not used.issuperset(each)], taken
        assert used.isdisjoint(found)
        taken.append(found)
    assert len(taken) == 8


@pytest.mark.parametrize("seed", range(150))
def test_cortex_and_neuron_choose_the_same_devices(seed: int) -> None:
    """cortex names the devices; neuron chooses for callers that do not. Both by the same order."""
    source = random.Random(seed)
    topology = source.choice(HOSTS)
    devices = [device.index for device in topology.devices]
    taken: list[tuple[int, ...]] = []
    for index in devices:
        taken += [(index,)] * source.choice((0, 0, 1, 2))
    if source.random() < 0.3:
        taken.append(tuple(source.sample(devices, 2)))
    mb, size = source.choice((2000, 4000)), source.choice((1, 1, 2, 3))
    bookings = [Booking(InstanceKey(f"x{i}"), dict.fromkeys(each, 3000)) for i, each in enumerate(taken)]
    used = {index: sum(3000 for each in taken if index in each) for index in devices}
    theirs = select_devices(
        Parallelism(tensor=size),
        MemoryRequirement(mb),
        topology,
        gpu_capacities(topology, measured(topology, used), bookings),
    )
    ours = placed(topology, engines_on(*taken, mb=3000), size, mb)
    assert ours == (None if theirs is None else tuple(device.index for device in theirs.devices))


def test_links_of_unknown_devices_are_ignored() -> None:
    """A neuron may list a link of a device that it does not list."""
    topology = replace(FOUR_PAIRS, links=(*FOUR_PAIRS.links, Link(a=7, b=8, kind=LinkKind.NVLINK)))
    assert placed(topology, {}, 1, 60_000) == (0,)
