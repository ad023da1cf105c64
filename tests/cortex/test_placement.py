"""Where models go, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex.catalogue import ModelProfile
from cortex.placement import Fit, candidate_on, infeasible_reason, is_feasible, place
from cortex.snapshot import FleetSnapshot, NodeSnapshot, Reservation
from shared.protocol import LinkKind
from tests.cortex.fleets import BEAST, BENJY, QUADBRAT, SEED_FLEET, fleet, node


def profile(**fields: Any) -> ModelProfile:
    return ModelProfile.model_validate({"id": "m", **fields})


@pytest.mark.parametrize(
    ("fields", "where", "feasible"),
    [
        ({}, QUADBRAT, True),
        ({"pinned_on": ["beast"]}, BEAST, True),
        ({"pinned_on": ["beast"]}, BENJY, False),
        ({"harness": "sim"}, BENJY, False),
        ({"min_devices": 2}, BEAST, True),
        ({"min_devices": 2}, BENJY, False),
        ({"min_devices": 2}, node("n", 32000, 32000, lost=(1,)), False),
        ({"min_devices": 2}, node("n", 32000, 32000, mig=(1,)), False),
        ({"min_device_vram_mb": 16000}, BENJY, True),
        ({"min_device_vram_mb": 16000}, QUADBRAT, False),
        ({"min_devices": 2, "min_device_vram_mb": 20000}, node("n", 24000, 12000), False),
        ({"min_devices": 2, "min_device_vram_mb": 20000}, node("n", 24000, 12000, 24000), True),
        ({"vram_mb": 10**6}, QUADBRAT, True),  # an estimate never rules out
        ({}, node("empty"), False),
    ],
)
def test_feasibility(fields: dict[str, Any], where: NodeSnapshot, feasible: bool) -> None:
    """The contract's rules, each alone; an infeasible node always says why."""
    assert is_feasible(profile(**fields), where) is feasible
    assert (infeasible_reason(profile(**fields), where) is None) is feasible


def test_a_node_never_reached_is_neither_feasible_nor_ruled_out() -> None:
    """It may turn out to hold the model: unknown is not unservable."""
    unknown = node("n", discovered=False)
    assert infeasible_reason(profile(), unknown) is None
    assert not is_feasible(profile(), unknown)


FULL_BENJY = node("benjy", 24564, free_mb=(1000,))


@pytest.mark.parametrize(
    ("fields", "where", "expected"),
    [
        ({"vram_mb": 54000, "min_devices": 2, "min_device_vram_mb": 24000}, SEED_FLEET, "beast"),
        ({"vram_mb": 14000, "min_device_vram_mb": 16000}, SEED_FLEET, "benjy"),  # tightest, not biggest
        ({"vram_mb": 4000}, SEED_FLEET, "quadbrat"),
        ({}, SEED_FLEET, "beast"),  # of unknown size: where most is free
        ({"vram_mb": 14000}, fleet(BEAST, FULL_BENJY), "beast"),  # fits now beats fits after displacement
        ({"vram_mb": 14000}, fleet(FULL_BENJY, QUADBRAT), "benjy"),  # after displacement beats never
        ({"vram_mb": 14000}, fleet(node("a", 16000), node("b", 16000)), "a"),  # ties by name
        ({"vram_mb": 4000}, fleet(node("a", 16000, draining=True), BEAST), "beast"),
        ({"vram_mb": 4000}, fleet(node("a", 16000, healthy=False), BEAST), "beast"),
        ({"min_devices": 8}, SEED_FLEET, None),
    ],
)
def test_choice_of_node(fields: dict[str, Any], where: FleetSnapshot, expected: str | None) -> None:
    """Fits now, fits after displacement, tightest fit, name."""
    found = place(profile(**fields), where)
    assert (found and found.node) == expected


def test_loads_under_way_count() -> None:
    """Two models that each fit alone are not both put where only one fits."""
    reserved = (Reservation("other", "benjy", (0,), 14000),)
    found = place(profile(vram_mb=14000), fleet(BENJY, BEAST, reservations=reserved))
    assert found is not None
    assert found.node == "beast"


@pytest.mark.parametrize(
    ("fields", "where", "devices"),
    [
        ({"min_devices": 2, "vram_mb": 20000}, BEAST, (0, 1)),
        ({"vram_mb": 20000}, node("n", 24000, 24000, free_mb=(3000, 24000)), (1,)),
        ({"vram_mb": 8000}, node("n", 24000, 12000), (1,)),  # the tight card, not the big one
        ({"min_device_vram_mb": 20000, "vram_mb": 8000}, node("n", 24000, 12000), (0,)),
        (
            {"min_devices": 2, "vram_mb": 20000},
            node("n", *[24000] * 4, links={(0, 1): LinkKind.SYS, (0, 3): LinkKind.NVLINK, (1, 2): LinkKind.PHB}),
            (0, 3),
        ),
        ({"min_devices": 2, "vram_mb": 20000}, node("n", 24000, 48000, 24000), (0, 2)),  # equals together
        ({"vram_mb": 8000}, node("n", 24000, 24000, lost=(0,)), (1,)),
        ({"vram_mb": 8000}, node("n", 24000, 24000, mig=(0,)), (1,)),
    ],
)
def test_choice_of_devices(fields: dict[str, Any], where: NodeSnapshot, devices: tuple[int, ...]) -> None:
    """Room, then NVLink, then equal cards, then the tightest."""
    assert candidate_on(profile(**fields), fleet(where), where).devices == devices


def test_large_hosts_are_compared_within_bounds() -> None:
    """64 GPUs choose 32 has 10**18 sets: the choice is still immediate and complete."""
    where = node("n", *[80000] * 64)
    found = candidate_on(profile(min_devices=32, vram_mb=32 * 40000), fleet(where), where)
    assert len(set(found.devices)) == 32
    assert found.fit is Fit.NOW


def test_sleeping_models_keep_what_they_want_to_wake() -> None:
    """As long as it fits elsewhere; it never rules a device out."""
    where = node("n", 24000, 24000, free_mb=(23000, 24000))
    assert where.health is not None
    first, second = where.health.devices
    sleeping = first.model_copy(update={"vram_asleep_mb": 20000})
    where = replace(where, health=where.health.model_copy(update={"devices": [sleeping, second]}))
    small, large = profile(vram_mb=2000), profile(vram_mb=8000)
    assert candidate_on(small, fleet(where), where).devices == (0,)
    assert candidate_on(large, fleet(where), where).devices == (1,)
    both = candidate_on(profile(vram_mb=16000, min_devices=2), fleet(where), where)
    assert (both.devices, both.fit) == ((0, 1), Fit.AFTER_DISPLACEMENT)


def test_what_a_neuron_has_promised_is_not_free() -> None:
    """Its engines may not have taken it yet. What this cortex itself reserves there is not counted twice."""
    where = node("n", 24000, 24000, free_mb=(23000, 24000))
    assert where.health is not None
    first, second = where.health.devices
    promised = first.model_copy(update={"vram_bookable_mb": 4000})
    where = replace(where, health=where.health.model_copy(update={"devices": [promised, second]}))
    ours = Reservation("other", "n", (0,), 19_000)
    for devices, vram_mb in (((0,), 3000), ((1,), 8000)):
        found = candidate_on(profile(vram_mb=vram_mb), fleet(where, reservations=(ours,)), where)
        assert (found.devices, found.fit) == (devices, Fit.NOW)
