"""MIG instances are devices of their own, which no engine uses together with others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex.config.profile import ModelProfile
from cortex.control.explain import explain
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.feasibility import feasible_choices, infeasible_reason
from cortex.placement.load_plan import LoadPlan
from cortex.placement.node_plan import plan_on_node
from cortex.placement.spans import spans_of
from tests.cortex.fleets import fleet, node
from tests.cortex.views import view


def host_of(name: str, *total_mb: int, slices: tuple[int, ...]) -> NodeSnapshot:
    """A neuron whose first GPU is in MIG mode."""
    found = node(name, *total_mb, mig=(0,), slices=slices)
    assert found.discovery is not None
    return replace(found, discovery=found.discovery.model_copy(update={"instance_id": "x"}))


SLICED = host_of("sliced", 80000, 10000, 20000, 10000, slices=(1, 2, 3))
MIXED = host_of("mixed", 80000, 10000, 20000, 80000, 80000, slices=(1, 2))


@pytest.mark.parametrize(
    ("wants", "devices"),
    [
        ({"vram_mb": 8000}, (1,)),
        ({"vram_mb": 12000}, (2,)),
        ({"min_device_vram_mb": 15000, "vram_mb": 5000}, (2,)),
        ({"vram_mb": 30000}, (3,)),
        ({"vram_mb": 16000, "min_devices": 2}, (3, 4)),
        ({"vram_mb": 16000, "parallel": {"data": 2}}, (3, 4)),
    ],
)
def test_the_tightest_device_is_chosen(wants: dict[str, object], devices: tuple[int, ...]) -> None:
    """A slice before a whole GPU; several devices are always whole GPUs, however they are split."""
    profile = ModelProfile.model_validate({"id": "m", **wants})
    plan = plan_on_node(view(fleet(MIXED), profile), profile, MIXED)
    assert isinstance(plan, LoadPlan)
    assert plan.devices == devices


@pytest.mark.parametrize("wants", [{"min_devices": 2}, {"parallel": {"pipeline": 2}}, {"parallel": {"data": 3}}])
def test_slices_are_never_combined(wants: dict[str, object]) -> None:
    """A host of slices cannot hold a model that needs several devices; explain says why."""
    profile = ModelProfile.model_validate({"id": "m", **wants})
    reason = f"needs {profile.device_count} devices that can work with others, has 0: 3 of 3 are MIG instances"
    assert infeasible_reason(profile, SLICED) == reason
    (told,) = explain("m", view(fleet(SLICED), profile), lambda _: 0)["nodes"]
    assert reason in str(told)


def test_a_slice_is_not_part_of_a_spanning_engine() -> None:
    """One device of each of two hosts: only whole GPUs count."""
    part = ModelProfile.model_validate({"id": "m", "min_devices": 2, "span_nodes": True})
    (span,) = [span.part for span in spans_of(part)]
    assert span.device_count == 1
    assert "needs 1 device that can work with others, has 0" in str(infeasible_reason(span, SLICED))
    assert infeasible_reason(span, MIXED) is None


def test_variants_by_slice() -> None:
    """Each slice gets the variant that it can hold."""
    profile = ModelProfile.model_validate(
        {
            "id": "m",
            "variants": [
                {"name": "large", "min_device_vram_mb": 70000, "vram_mb": 60000},
                {"name": "small", "min_device_vram_mb": 15000, "vram_mb": 12000},
            ],
        }
    )
    assert [choice.variant for choice in feasible_choices(profile, SLICED)] == ["small"]
    assert [choice.variant for choice in feasible_choices(profile, MIXED)] == ["large", "small"]
