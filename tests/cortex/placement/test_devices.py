"""Which devices of a node a model gets, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.devices import MAX_DEVICE_SETS, device_sets
from cortex.placement.load_plan import Fit
from shared.protocol import LinkKind
from tests.cortex.fleets import BEAST, On, fleet, host, node
from tests.cortex.views import asked, evicted, plan_for, profile, view

QUAD = {(0, 1): LinkKind.SYS, (0, 3): LinkKind.NVLINK, (1, 2): LinkKind.PHB}


@pytest.mark.parametrize(
    ("fields", "where", "devices"),
    [
        ({"min_devices": 2, "vram_mb": 20000}, BEAST, (0, 1)),
        ({"vram_mb": 20000}, node("n", 24000, 24000, free_mb=(3000, 24000)), (1,)),
        ({"vram_mb": 8000}, node("n", 24000, 12000), (1,)),  # the small card, not the large one
        ({}, node("n", 12000, 24000), (1,)),  # unknown size: most free memory
        ({"min_device_vram_mb": 20000, "vram_mb": 8000}, node("n", 24000, 12000), (0,)),
        ({"min_devices": 2, "vram_mb": 20000}, node("n", *[24000] * 4, links=QUAD), (0, 3)),
        (
            {"min_devices": 2, "vram_mb": 20000},
            node("n", *[24000] * 4, free_mb=(24000, 24000, 24000, 9000), links=QUAD),
            (1, 2),  # one of the NVLink pair is full: next best
        ),
        ({"min_devices": 2, "vram_mb": 20000}, node("n", 24000, 48000, 24000), (0, 2)),  # equal cards together
        ({"vram_mb": 8000}, node("n", 24000, 24000, lost=(0,)), (1,)),
        ({"vram_mb": 8000}, node("n", 24000, 24000, mig=(0,)), (1,)),
        ({"vram_mb": 8000}, node("n", 24000, 24000), (0,)),  # ties: the first
        # a split model leaves the emptier pair to larger ones
        ({"min_devices": 2, "vram_mb": 8000}, node("n", *[24000] * 4, free_mb=(24000, 9000, 24000, 9000)), (1, 3)),
    ],
)
def test_choice_of_devices(fields: dict[str, Any], where: NodeSnapshot, devices: tuple[int, ...]) -> None:
    """DeviceCapacity, then NVLink, then equal cards, then the tightest fit, then the lowest index."""
    plan = plan_for(view(fleet(where), profile(**fields)))
    assert (plan.devices, plan.fit) == (devices, Fit.NOW)


@pytest.mark.parametrize(
    ("free_mb", "fits"),
    [((10000, 10000), True), ((19999, 1), False), ((10001, 9999), False), ((24000, 9999), False)],
)
def test_need_is_per_device(free_mb: tuple[int, int], fits: bool) -> None:
    """A split model needs its share on every device; free memory elsewhere does not help."""
    where = node("n", 24000, 24000, free_mb=free_mb)
    plan = plan_for(view(fleet(where), profile(vram_mb=20000, min_devices=2)))
    assert plan.device_share_mb == 10000
    assert (plan.fit is Fit.NOW) is fits


def test_shares_are_rounded_up() -> None:
    """The two halves of an odd number add up to at least the whole."""
    assert (
        plan_for(view(fleet(node("n", 24000, 24000)), profile(vram_mb=20001, min_devices=2))).device_share_mb == 10001
    )


def test_only_models_on_the_needed_devices_are_evicted() -> None:
    """Only models on the chosen device are evicted."""
    where = host("n", *[24000] * 3, models={"a": On(20000), "b": On(20000, (1,)), "c": On(20000, (2,))})
    plan = plan_for(view(fleet(where), profile(vram_mb=20000), arrivals={"a": asked(9), "c": asked(9)}))
    assert (plan.devices, evicted(plan)) == ((1,), {"b"})


def test_topology_decides_between_evictions_that_cost_the_same() -> None:
    """One model spans all four cards: the best connected pair is taken."""
    links = {(0, 1): LinkKind.SYS, (2, 3): LinkKind.NVLINK}
    where = host("n", *[24000] * 4, models={"a": On(20000, (0, 1, 2, 3))}, links=links)
    plan = plan_for(view(fleet(where), profile(vram_mb=40000, min_devices=2)))
    assert (plan.devices, evicted(plan)) == ((2, 3), {"a"})


def test_large_hosts_are_compared_within_bounds() -> None:
    """64 GPUs choose 32 has 10**18 sets: the choice is still immediate and complete."""
    where = node("n", *[80000] * 64)
    plan = plan_for(view(fleet(where), profile(min_devices=32, vram_mb=32 * 40000)))
    assert len(set(plan.devices)) == 32
    assert plan.fit is Fit.NOW


def test_large_hosts_are_compared_within_bounds_when_full() -> None:
    """The number of compared sets is bounded also when models must be evicted."""
    where = host("n", *[80000] * 64, models={f"x{i}": On(70000, (i,)) for i in range(64)})
    plan = plan_for(view(fleet(where), profile(min_devices=32, vram_mb=32 * 40000)))
    assert len(evicted(plan)) == 32


@pytest.mark.parametrize(("count", "size"), [(4, 2), (8, 4), (16, 8), (64, 32), (1, 1), (2, 3)])
def test_device_sets(count: int, size: int) -> None:
    """Every set is ascending and unique, within the bound; the last devices are cut."""
    sets = list(device_sets(list(range(count)), size))
    assert len(set(sets)) == len(sets) <= MAX_DEVICE_SETS
    assert all(list(each) == sorted(set(each)) and len(each) == size for each in sets)
    assert not sets or sets[0] == tuple(range(size))


def test_memory_shared_with_the_host_never_refuses() -> None:
    """A device without memory of its own accepts every model."""
    plan = plan_for(view(fleet(host("n", 0, models={"a": On(0)})), profile(vram_mb=90000)))
    assert (plan.fit, plan.devices) == (Fit.NOW, (0,))


def test_devices_that_do_not_report_memory() -> None:
    """If neither the driver nor the neuron reports memory, the neuron decides."""
    where = node("n", 24000)
    assert where.health is not None
    silent = where.health.devices[0].model_copy(update={"vram_used_mb": 0, "vram_free_mb": 0})
    where = replace(where, health=where.health.model_copy(update={"devices": [silent]}))
    assert plan_for(view(fleet(where), profile(vram_mb=20000))).fit is Fit.NOW


@pytest.mark.parametrize(
    ("parallel", "links", "free_mb", "devices"),
    [
        ({"tensor": 2, "pipeline": 2, "data": 2}, {}, None, tuple(range(8))),
        # Tensor groups are the NVLink pairs, whatever connects them.
        ({"tensor": 2, "data": 4}, {(a, a + 4): LinkKind.NVLINK for a in range(4)}, None, (0, 4, 1, 5, 2, 6, 3, 7)),
        ({"tensor": 2, "pipeline": 2}, {(6, 7): LinkKind.NVLINK, (1, 4): LinkKind.PIX}, None, (1, 4, 6, 7)),
        # A device without enough memory breaks its pair.
        (
            {"tensor": 2, "pipeline": 2},
            {(a, a + 1): LinkKind.NVLINK for a in (0, 2, 4, 6)},
            (9000, *[24000] * 7),
            (2, 3, 4, 5),
        ),
        # Stages without tensor parallelism need no pair: the tightest fit decides.
        ({"pipeline": 2}, {(0, 1): LinkKind.NVLINK}, (*[24000] * 4, 12000, 24000, 12000, 24000), (4, 6)),
    ],
)
def test_tensor_groups(
    parallel: dict[str, int], links: Any, free_mb: tuple[int, ...] | None, devices: tuple[int, ...]
) -> None:
    """Only the devices of a tensor group need fast paths; the plan has one group after another."""
    wanted = profile(vram_mb=10000 * len(devices), parallel=parallel)
    where = host("n", *[24000] * 8, links=links, foreign_mb=tuple(24000 - mb for mb in free_mb or ()))
    plan = plan_for(view(fleet(where), wanted))
    assert (plan.devices, plan.fit, plan.device_share_mb) == (devices, Fit.NOW, 10000)


def test_evicting_for_tensor_groups() -> None:
    """What is evicted is chosen for all devices; they are then grouped as without an eviction."""
    links = {(0, 2): LinkKind.NVLINK, (1, 3): LinkKind.NVLINK}
    there = {f"m{index}": On(20000, (index,)) for index in range(4)}
    plan = plan_for(
        view(
            fleet(host("n", *[24000] * 4, links=links, models=there)),
            profile(vram_mb=40000, parallel={"tensor": 2, "data": 2}),
            *(profile(id=name, vram_mb=20000) for name in there),
        )
    )
    assert (plan.devices, plan.fit, evicted(plan)) == ((0, 2, 1, 3), Fit.AFTER_EVICTION, set(there))
