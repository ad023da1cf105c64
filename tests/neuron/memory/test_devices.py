"""Which GPUs an engine gets: cases by hand, and every set of small hosts against the documented order."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from neuron.gpu.topology import Topology
from neuron.memory.capacity import Booking, GpuCapacity, gpu_capacities
from neuron.memory.ledger import Ledger
from neuron.memory.requirement import MemoryRequirement as Need
from neuron.memory.selection import DeviceSelection, check_devices, select_devices
from neuron.spec import InstanceKey
from shared.errors import InvalidRequest
from shared.protocol import GroupPart, Link, LinkKind, Parallelism
from tests.neuron.hosts import ISLANDS, MESH, MIXED, PAIRS, SWITCHES, host, linked, measured, spec

HALF = Need(fraction=0.5)
_LINKED = host(*["H100"] * 4, links=linked([(0, 1), (2, 3)], LinkKind.XGMI))
XGMI_PAIRS = replace(_LINKED, devices=tuple(each.model_copy(update={"vendor": "amd"}) for each in _LINKED.devices))


def booked(*devices: int, mb: int = 8000) -> Booking:
    return Booking(InstanceKey("org/other"), dict.fromkeys(devices, mb))


def chosen(
    topology: Topology, count: int, need: Need, *bookings: Booking, used: Mapping[int, int] | None = None, **named: Any
) -> DeviceSelection | None:
    everything = {index: mb for booking in bookings for index, mb in booking.promised_mb.items()}
    health = measured(topology, {**everything, **(used or {})})
    return select_devices(
        Parallelism(tensor=count), need, topology, gpu_capacities(topology, health, bookings), **named
    )


def indices(selection: DeviceSelection | None) -> list[int] | None:
    return None if selection is None else [device.index for device in selection.devices]


@pytest.mark.parametrize(
    ("topology", "count", "need", "bookings", "expected"),
    [
        # In a mesh all devices and all pairs are equal.
        (MESH, 1, Need(8000), [], [0]),
        (MESH, 4, Need(8000), [booked(1, mb=75_000)], [0, 2, 3, 4]),
        (MESH, 8, Need(8000), [], list(range(8))),
        # Islands: an incomplete one is used before a complete one; a set spans both only if it has to.
        (ISLANDS, 1, Need(60_000), [booked(5, mb=60_000)], [4]),
        (ISLANDS, 2, Need(60_000), [booked(0, mb=60_000), booked(1, mb=60_000)], [2, 3]),
        (ISLANDS, 4, Need(60_000), [booked(1, mb=60_000)], [4, 5, 6, 7]),
        (ISLANDS, 3, Need(60_000), [booked(0, 1, 4, mb=60_000)], [5, 6, 7]),
        (ISLANDS, 4, Need(60_000), [booked(0, 4, mb=60_000)], [1, 2, 3, 5]),
        # Pairs: one device is taken outside the pairs or from a broken pair; two devices come from one pair.
        (PAIRS, 1, Need(60_000), [], [2]),
        (PAIRS, 1, Need(60_000), [booked(2, mb=60_000)], [3]),
        (PAIRS, 1, Need(60_000), [booked(2, 3, mb=60_000)], [0]),
        (PAIRS, 1, Need(60_000), [booked(2, 3, 5, mb=60_000)], [4]),
        (PAIRS, 2, Need(60_000), [], [0, 1]),
        (PAIRS, 2, Need(60_000), [booked(0, mb=60_000)], [4, 5]),
        (
            PAIRS,
            2,
            Need(60_000),
            [booked(0, 5, mb=60_000)],
            [1, 2],
        ),  # broken pairs and single cards are equal: lowest indices
        # Switches before NUMA nodes, one switch before several.
        (SWITCHES, 2, Need(8000), [], [2, 3]),
        (SWITCHES, 2, Need(20_000), [booked(2, mb=8000)], [0, 1]),
        (SWITCHES, 2, Need(20_000), [booked(1, 2, mb=8000)], [0, 3]),
        # Mixed cards: equal ones first; the smallest that fits; for unknown size the most free memory.
        (MIXED, 2, Need(8000), [], [1, 3]),
        (MIXED, 1, Need(8000), [], [0]),
        (MIXED, 1, Need(14_000), [], [2]),
        (MIXED, 1, Need(30_000), [], [1]),
        (MIXED, 1, HALF, [], [1]),
        (MIXED, 3, Need(14_000), [], [1, 2, 3]),
        (MIXED, 3, Need(14_000, one_fraction=True), [], [1, 2, 3]),
        # Sharing a card with an engine keeps the other card free.
        (host("5090", "5090"), 1, Need(8000), [booked(1)], [1]),
        # Nothing fits.
        (MIXED, 1, Need(32_608), [], None),
        (MIXED, 2, Need(30_000), [booked(3)], None),
        (MIXED, 5, Need(1), [], None),
    ],
)
def test_selection(
    topology: Topology, count: int, need: Need, bookings: list[Booking], expected: list[int] | None
) -> None:
    """The cases can be checked by hand."""
    assert indices(chosen(topology, count, need, *bookings)) == expected


def test_a_few_mib_do_not_break_a_pair() -> None:
    """Idle cards differ by the driver's own memory, which does not count as a closer fit."""
    assert indices(chosen(PAIRS, 1, Need(60_000), used={0: 12, 1: 480, 4: 3})) == [2]


def test_free_memory_comes_before_memory_of_stopping_engines() -> None:
    """Of two equal cards, the one without a wait is selected."""
    topology = host("5090", "5090")
    stopping = replace(booked(0), stopping=True)
    assert indices(chosen(topology, 1, Need(8000), stopping)) == [1]
    assert indices(chosen(topology, 2, Need(30_000), stopping)) == [0, 1]


@pytest.mark.parametrize(("needed_mb", "expected"), [(20_000, [1]), (4000, [0])])
def test_sleeping_engines_can_wake(needed_mb: int, expected: list[int]) -> None:
    """The memory that they need to wake is used only if no other card fits; the rest is used normally."""
    asleep = replace(booked(0, mb=1500), held_mb={0: 1500}, awake_mb={0: 20_000})
    topology = host("4090", "4090")
    assert indices(chosen(topology, 1, Need(needed_mb), asleep)) == expected
    assert indices(chosen(topology, 2, Need(needed_mb), asleep)) == [0, 1]
    (first, second) = gpu_capacities(topology, measured(topology, {0: 1500}), [asleep])
    assert (first.asleep_mb, second.asleep_mb) == (18_500, 0)


def test_numa_nodes_count_where_no_link_is_known() -> None:
    """A virtual machine reports NUMA nodes but no paths."""
    topology = host("4090", "4090", "4090", d0={"numa_node": 0}, d1={"numa_node": 1}, d2={"numa_node": 1})
    assert indices(chosen(topology, 2, Need(8000))) == [1, 2]


def test_more_nvlinks_are_better() -> None:
    """A hybrid cube mesh has pairs with one link and pairs with two."""
    topology = host(
        *["H100"] * 3,
        links=[*linked([(0, 1)], LinkKind.NVLINK, 1), *linked([(1, 2)], LinkKind.NVLINK, 2)],
    )
    assert indices(chosen(topology, 2, Need(8000))) == [1, 2]


def test_lost_and_mig_devices_are_skipped() -> None:
    """A GPU that fell off the bus, one in MIG mode and one without figures are skipped, even if well connected."""
    topology = host(
        *["H100"] * 5,
        links=linked([range(4)], LinkKind.NVLINK, 18),
        d0={"lost": "fell off the bus"},
        d2={"mig_mode": True},
        d3={"mig_mode": False},
    )
    assert indices(chosen(topology, 2, Need(8000))) == [1, 3]
    assert indices(chosen(topology, 3, Need(8000))) == [1, 3, 4]
    assert chosen(topology, 4, Need(8000)) is None
    silent = [figures for figures in measured(topology) if figures.index != 1]
    assert indices(
        select_devices(Parallelism(tensor=2), Need(8000), topology, gpu_capacities(topology, silent, []))
    ) == [3, 4]


SLICED = host(
    *["H100"] * 4,
    d0={"mig_mode": True},
    d1={"kind": "mig", "parent": 0, "vram_total_mb": 10_000},
    d2={"kind": "mig", "parent": 0, "vram_total_mb": 20_000},
)
"""One GPU split into two MIG instances, 1 and 2, and one whole, 3."""


def test_a_mig_instance_is_a_device() -> None:
    """The smallest that is large enough is chosen, before a whole GPU."""
    assert indices(chosen(SLICED, 1, Need(8000))) == [1]
    assert indices(chosen(SLICED, 1, Need(15_000))) == [2]
    assert indices(chosen(SLICED, 1, Need(30_000))) == [3]
    check_devices(spec(devices=(1,)), SLICED)


def test_mig_instances_are_never_combined() -> None:
    """Neither chosen nor accepted as devices of an engine that uses several, on this host or with other hosts."""
    assert chosen(SLICED, 2, Need(1000)) is None
    with pytest.raises(InvalidRequest, match=r"device 1 cannot be used: it is a MIG instance, .* together with other"):
        check_devices(spec(2, devices=(1, 2)), SLICED)
    with pytest.raises(InvalidRequest, match=r"1 can be used here; device 0: .*MIG mode.*; devices 1 and 2: it is a"):
        check_devices(spec(2), SLICED)
    part = spec(2, group=GroupPart(id="g", rank=1, size=2, master_addr="10.0.0.1", master_port=29000), devices=(2,))
    with pytest.raises(InvalidRequest, match="device 2 cannot be used: it is a MIG instance"):
        check_devices(part, SLICED)
    on_its_own = replace(part, devices=None)
    selection = Ledger().book(1, on_its_own, Need(1000), SLICED, measured(SLICED))
    assert [device.index for device in selection.devices] == [3]


def test_named_devices() -> None:
    """They are used in the order named, regardless of links, if each has enough memory."""
    assert indices(chosen(MIXED, 2, Need(8000), named=(2, 0))) == [2, 0]
    assert chosen(MIXED, 2, Need(14_000), named=(2, 0)) is None


def test_host_without_devices() -> None:
    """A CPU host accepts every load and selects no device."""
    selection = chosen(Topology(), 2, Need(8000))
    assert selection is not None
    assert (selection.devices, selection.booked_mb) == ((), ())
    check_devices(spec(8), Topology())


def test_memory_that_cannot_be_counted_never_refuses() -> None:
    """A GPU that shares the host's memory reports no total."""
    topology = host("GB10", d0={"vram_total_mb": 0})
    assert indices(chosen(topology, 1, Need(90_000))) == [0]


def test_one_fraction_for_unequal_cards() -> None:
    """vLLM takes the same fraction of each card, calculated from the smallest."""
    need = Need(18_000, one_fraction=True)
    topology = host("4090", "5090")
    assert need.per_device(gpu_capacities(topology, measured(topology), [])) == (18_000, 23_894)
    assert indices(chosen(topology, 2, need, booked(1, mb=8700))) == [0, 1]
    assert chosen(topology, 2, need, booked(1, mb=8800)) is None


@pytest.mark.parametrize(
    ("topology", "count", "need", "why"),
    [
        (PAIRS, 2, Need(60_000), "2 of 6 devices with enough memory: 0 and 1, connected by NVLink (4 links); closest"
         " fit, 43118 MiB left over; keeps NVLinked 4+5 free"),
        (PAIRS, 1, Need(60_000), "1 of 6 devices with enough memory: 2; closest fit, 21559 MiB left over; keeps"
         " NVLinked 0+1, 4+5 free"),
        (MESH, 8, Need(1), "8 of 8 devices with enough memory: 0, 1, 2, 3, 4, 5, 6 and 7, connected by NVLink"
         " (at least 18 links)"),
        (SWITCHES, 2, Need(24_564), "2 of 4 devices with enough memory: 2 and 3, connected by PCIe switches without"
         " a host bridge; closest fit, 0 MiB left over"),
        (MIXED, 1, HALF, "1 of 4 devices with enough memory: 1; most free memory, as the model's size is unknown,"
         " 16303 MiB left over"),
        (MIXED, 4, Need(1), "4 of 4 devices with enough memory: 0, 1, 2 and 3, on one NUMA node;"
         " cards differ (3060, 5090, 4090)"),
        (XGMI_PAIRS, 2, Need(1), "2 of 4 devices with enough memory: 0 and 1, connected by XGMI; closest fit, 163116"
         " MiB left over; keeps XGMI-linked 2+3 free"),
        (host("4090", "4090"), 2, Need(1), "2 of 2 devices with enough memory: 0 and 1, no fast path between them"
         " known"),
    ],
)  # fmt: skip
def test_selection_says_why(topology: Topology, count: int, need: Need, why: str) -> None:
    """The reason is a sentence for an operator."""
    selection = chosen(topology, count, need)
    assert selection is not None
    assert selection.why == why


def test_impossible_devices_are_refused() -> None:
    """A spec that names an unknown, lost or MIG device, or that needs one, is refused with the reason."""
    topology = host("A", "A", "A", d0={"lost": "fell off the bus"}, d2={"mig_mode": True})
    with pytest.raises(InvalidRequest, match="fell off the bus"):
        check_devices(spec(devices=(0,)), topology)
    with pytest.raises(InvalidRequest, match="no device 7"):
        check_devices(spec(devices=(7,)), topology)
    with pytest.raises(InvalidRequest, match="MIG mode"):
        check_devices(spec(devices=(2,)), topology)
    with pytest.raises(InvalidRequest, match=r"1 can be used here; device 0: fell off the bus; device 2: .*MIG mode"):
        check_devices(spec(2), topology)
    check_devices(spec(), topology)


# --- every set of small hosts

_KINDS = [*LinkKind, None]


def random_host(source: random.Random) -> Topology:
    """Up to six cards of up to three kinds with any links, some lost, some in MIG mode, some on NUMA nodes."""
    names = [source.choice(["5090", "4090", "3060"][: source.randint(1, 3)]) for _ in range(source.randint(1, 6))]
    changed: dict[str, Any] = {}
    for index in range(len(names)):
        odds = source.random()
        changed[f"d{index}"] = {"numa_node": source.choice([None, 0, 1])}
        if odds < 0.1:
            changed[f"d{index}"]["lost"] = "gone"
        elif odds < 0.2:
            changed[f"d{index}"]["mig_mode"] = True
    links = []
    for a, b in combinations(range(len(names)), 2):
        kind = source.choice(_KINDS)
        if kind is not None:
            links.append(Link(a=a, b=b, kind=kind, nvlinks=source.choice([1, 4]) if kind is LinkKind.NVLINK else 0))
    return host(*names, links=links, **changed)


def grade_of(topology: Topology, a: int, b: int) -> tuple[int, int, int]:
    """The documented grade of a pair, calculated independently: class of the path, negated number of NVLinks, position
    in nvidia-smi's list."""
    link = next((link for link in topology.links if (link.a, link.b) == (min(a, b), max(a, b))), None)
    kinds = {"nvlink": 0, "xgmi": 0, "pix": 1, "pxb": 1, "phb": 2, "node": 2, "sys": 3}
    grade = 3 if link is None else kinds[link.kind.value]
    nodes = {device.index: device.numa_node for device in topology.devices}
    if grade == 3 and nodes[a] is not None and nodes[a] == nodes[b]:
        grade = 2
    return grade, 0 if link is None else -link.nvlinks, len(kinds) if link is None else list(LinkKind).index(link.kind)


def order(
    topology: Topology, capacities: Mapping[int, GpuCapacity], need: Need, group: tuple[int, ...]
) -> tuple[object, ...]:
    """The documented order, calculated independently."""
    cards = {device.index: (device.name, device.vram_total_mb) for device in topology.devices}
    pairs = [grade_of(topology, a, b) for a, b in combinations(group, 2)]
    worst = max(pairs, default=(0, 0, 0))
    left = sum(
        capacities[i].total_mb - 1024 * round((capacities[i].total_mb - capacities[i].bookable_mb) / 1024) - mb
        for i, mb in zip(group, wanted(topology, need, group), strict=True)
    )
    idle = {
        device.index
        for device in capacities.values()
        if device.unusable is None and not device.booked_by and device.bookable_mb >= device.total_mb / 2
    }
    cut = [0, 0, 0]
    for a in idle & set(group):
        for b in idle - set(group):
            grade, negated_nvlinks, _ = grade_of(topology, a, b)
            if grade < 3:
                cut[grade] += max(1, -negated_nvlinks)
    return (
        worst[:2],
        len({cards[index] for index in group}),
        worst[2],
        sum(
            max(0, capacities[i].asleep_mb - (capacities[i].bookable_mb - mb))
            for i, mb in zip(group, wanted(topology, need, group), strict=True)
        ),
        left if need.fraction is None else -left,
        sum(len(capacities[index].booked_by) for index in group),
        sum(capacities[index].stopping_mb for index in group),
        cut,
        group,
    )


def wanted(topology: Topology, need: Need, group: tuple[int, ...]) -> list[int]:
    totals = [topology.devices[index].vram_total_mb for index in group]
    if need.fraction is not None:
        return [math.ceil(need.fraction * total) for total in totals]
    return [math.ceil(need.mb * total / min(totals)) if need.one_fraction else need.mb for total in totals]


@pytest.mark.parametrize("seed", range(300))
def test_no_set_is_better(seed: int) -> None:
    """On any host with any bookings the selected set has enough memory and no other such set comes before it in the
    documented order; none is selected only if no set has enough memory. The result is repeatable."""
    source = random.Random(seed)
    topology = random_host(source)
    everywhere = [device.index for device in topology.devices]
    bookings = [
        replace(
            booked(*source.sample(everywhere, source.randint(1, len(everywhere))), mb=source.randint(500, 14_000)),
            stopping=source.random() < 0.3,
            awake_mb=dict.fromkeys(everywhere, 20_000) if source.random() < 0.3 else None,
        )
        for _ in range(source.randint(0, 3))
    ]
    used = {index: source.choice([0, 3, 700, 9000]) for index in everywhere}
    for booking in bookings:
        for index, mb in booking.promised_mb.items():
            used[index] += mb
    capacities = {device.index: device for device in gpu_capacities(topology, measured(topology, used), bookings)}
    size = source.choice([1000, 8000, 14_000, 23_000])
    for need in (Need(size), Need(size, one_fraction=True), Need(fraction=0.6)):
        for count in range(1, len(everywhere) + 1):
            selection = select_devices(Parallelism(tensor=count), need, topology, tuple(capacities.values()))
            assert selection == select_devices(Parallelism(tensor=count), need, topology, tuple(capacities.values()))
            possible = [
                group
                for group in combinations(everywhere, count)
                if all(capacities[i].can_hold(mb) for i, mb in zip(group, wanted(topology, need, group), strict=True))
            ]
            if selection is None:
                assert not possible
                continue
            group = tuple(device.index for device in selection.devices)
            assert group in possible
            assert not any(device.lost or device.mig_mode for device in selection.devices)
            assert list(selection.booked_mb) == wanted(topology, need, group)
            best = order(topology, capacities, need, group)
            assert all(best <= order(topology, capacities, need, other) for other in possible)


def test_large_hosts() -> None:
    """All sets of sixteen devices are compared. With more the search is bounded, and still finds an island, and the
    only set with enough memory."""
    sixteen = host(*["H100"] * 16, links=linked([range(8), range(8, 16)], LinkKind.NVLINK, 18))
    assert indices(chosen(sixteen, 8, Need(60_000))) == list(range(8))
    assert indices(chosen(sixteen, 4, Need(60_000), booked(9, mb=60_000))) == [8, 10, 11, 12]
    many = host(*["H100"] * 24, links=linked([(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)], LinkKind.NVLINK, 18))
    assert indices(chosen(many, 12, Need(60_000))) == list(range(1, 24, 2))
    full = booked(*range(12), mb=60_000)
    assert indices(chosen(many, 12, Need(60_000), full)) == list(range(12, 24))
    assert chosen(many, 13, Need(60_000), full) is None


@pytest.mark.parametrize(
    ("topology", "parallel", "bookings", "expected"),
    [
        (MESH, Parallelism(tensor=2, pipeline=2, data=2), [], list(range(8))),
        (MESH, Parallelism(tensor=2, pipeline=2), [booked(1, mb=75_000)], [0, 2, 3, 4]),
        # Pipeline stages may cross between islands, tensor groups do not.
        (ISLANDS, Parallelism(tensor=2, pipeline=2), [booked(0, 1, 4, 6, mb=60_000)], [2, 3, 5, 7]),
        (ISLANDS, Parallelism(tensor=4, data=2), [], list(range(8))),
        (ISLANDS, Parallelism(tensor=2, data=3), [booked(1, 6, mb=60_000)], [0, 2, 3, 7, 4, 5]),
        # Both pairs, before the two devices without NVLink.
        (PAIRS, Parallelism(tensor=2, pipeline=2), [], [0, 1, 4, 5]),
        (PAIRS, Parallelism(tensor=2, data=3), [], [0, 1, 2, 3, 4, 5]),
        (PAIRS, Parallelism(pipeline=2), [], [2, 3]),  # needs no pair, so it takes none
        (SWITCHES, Parallelism(tensor=2, data=2), [], [0, 1, 2, 3]),
        # The first two and the last two are closest here: the order of the ranks is not that of the indices.
        (
            host(*["H100"] * 4, links=linked([(0, 3), (1, 2)], LinkKind.NVLINK, 4)),
            Parallelism(tensor=2, pipeline=2),
            [],
            [0, 3, 1, 2],
        ),
        (MESH, Parallelism(tensor=2, pipeline=2, data=2), [booked(3, mb=75_000)], None),
        (MESH, Parallelism(tensor=4, data=2, expert=True), [], list(range(8))),
    ],
)
def test_tensor_groups_stay_together(
    topology: Topology, parallel: Parallelism, bookings: list[Booking], expected: list[int] | None
) -> None:
    """Devices come in the order of the ranks, tensor group after tensor group, and only these need fast paths."""
    health = measured(topology, {index: mb for each in bookings for index, mb in each.promised_mb.items()})
    selection = select_devices(parallel, Need(24_500), topology, gpu_capacities(topology, health, bookings))
    assert indices(selection) == expected
    if selection is not None:
        assert selection.booked_mb == (24_500,) * parallel.devices
        assert parallel.tensor == 1 or "tensor groups " in selection.why


def test_parallel_that_needs_more_devices_than_there_are() -> None:
    """Refused with the number that the product needs."""
    with pytest.raises(InvalidRequest, match="parallel: 16 devices are needed for tensor 2 x pipeline 4 x data 2, 8 c"):
        check_devices(spec(2, pipeline_parallel=4, data_parallel=2), MESH)
