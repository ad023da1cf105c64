"""Models on the CPU: placed in the RAM of hosts, which sleeping models and some GPUs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from cortex.control.explain import explain
from cortex.fleet.snapshot import NodeSnapshot, Reservation, by_instance
from cortex.placement.feasibility import FeasibilityCache, infeasible_reason, is_feasible
from cortex.placement.inputs import PlanningView
from cortex.placement.load_plan import Fit, load_command
from cortex.placement.planner import evaluate_node
from cortex.placement.refusal import placement_error
from shared.protocol import RAM, Device, DeviceHealth, HostMemoryHealth, HostResources, ModelView
from shared.settings import SettingsError, validate_settings
from tests.cortex.fleets import fleet, host, node
from tests.cortex.views import NOW, evicted, plan_for, planned, profile, used, view

TOTAL, RESERVE = 64_000, 4_000


@dataclass(frozen=True)
class In:
    """A model on a host: what it has booked in RAM and on its devices, all together."""

    ram_mb: int | None = None
    vram_mb: int = 0
    devices: tuple[int, ...] = ()
    status: str = "loaded"


def cpu_host(
    name: str = "box", *gpus: int, models: Mapping[str, In] | None = None, foreign_mb: int = 0, unified: bool = False
) -> NodeSnapshot:
    """A host that tells of its RAM, with these GPUs; with `unified` they share it."""
    there = dict(models or {})
    bare = host(name, *gpus, instances=True)
    assert bare.discovery is not None
    assert bare.health is not None
    pooled = sum((each.ram_mb or 0) + (each.vram_mb if unified else 0) for each in there.values())
    bookable = TOTAL - RESERVE - foreign_mb - pooled
    memory = HostMemoryHealth(
        ram_total_mb=TOTAL,
        ram_used_mb=pooled + foreign_mb,
        ram_free_mb=TOTAL - pooled - foreign_mb,
        ram_booked_mb=pooled,
        ram_foreign_mb=foreign_mb,
        ram_bookable_mb=bookable,
    )
    devices = [
        Device(index=index, name="GPU", vram_total_mb=TOTAL if unified else mb, unified=unified)
        for index, mb in enumerate(gpus)
    ]
    live = []
    for index, mb in enumerate(gpus):
        held = sum(each.vram_mb for each in there.values() if index in each.devices)
        free = bookable if unified else mb - held
        live.append(DeviceHealth(index=index, vram_used_mb=held, vram_free_mb=free, vram_bookable_mb=free))
    return replace(
        bare,
        discovery=bare.discovery.model_copy(
            update={"host": HostResources(ram_total_mb=TOTAL, cores=16), "devices": devices}
        ),
        health=bare.health.model_copy(update={"host": memory, "devices": live}),
        models=by_instance(
            ModelView(
                id=model_id,
                instance="0",
                status=each.status,
                devices=list(each.devices),
                vram_booked_mb=each.vram_mb,
                ram_booked_mb=each.ram_mb,
            )
            for model_id, each in there.items()
        ),
    )


def cpu_model(model_id: str = "m", mb: int | None = 10_000, **fields: Any) -> ModelProfile:
    return profile(id=model_id, devices=0, vram_mb=mb, **fields)


def told(moment: PlanningView, model_id: str = "m") -> str:
    return str(explain(model_id, moment, lambda _: 0))


@pytest.mark.parametrize(
    ("where", "feasible"),
    [
        (cpu_host(), True),
        (cpu_host("both", 24_000), True),
        (node("v1"), True),  # no devices, and it tells nothing of its RAM
        (node("v1-gpu", 24_000), False),
    ],
)
def test_hosts_that_can_hold_a_model_on_the_cpu(where: NodeSnapshot, feasible: bool) -> None:
    assert is_feasible(cpu_model(), where) is feasible
    assert FeasibilityCache().nodes(cpu_model(), fleet(where)) == ((where.name,) if feasible else ())


def test_a_host_without_gpus_holds_no_model_for_gpus() -> None:
    assert infeasible_reason(profile(), cpu_host()) == "needs a GPU, has none: only models with devices = 0 run here"


def test_more_than_the_whole_ram_is_infeasible() -> None:
    """On every host that tells how much it has, and with the reason; a variant that fits is used instead."""
    large = cpu_model(mb=TOTAL + 1)
    reason = f"needs {TOTAL + 1} MiB of RAM, more than the {TOTAL} MiB in total"
    for where in (cpu_host(), cpu_host("both", 24_000)):
        assert infeasible_reason(large, where) == reason
        assert FeasibilityCache().nodes(large, fleet(where)) == ()
        assert reason in told(view(fleet(where), large))
    feasibility = FeasibilityCache()  # one answer does not become another's
    box = fleet(cpu_host())
    assert [len(feasibility.nodes(each, box)) for each in (cpu_model(mb=TOTAL), large, cpu_model(mb=None))] == [1, 0, 1]
    assert is_feasible(large, node("v1"))
    both = cpu_model(mb=TOTAL + 1, variants=[{"quant": "large"}, {"quant": "small", "vram_mb": 10_000}])
    assert plan_for(view(fleet(cpu_host()), both)).variant == "small"


def test_the_load_command_lists_no_devices() -> None:
    """A neuron that tells nothing of RAM is not told of a list that it may read otherwise."""
    for where, devices in ((cpu_host("both", 24_000), []), (node("v1"), None)):
        moment = view(fleet(where), cpu_model())
        plan = plan_for(moment)
        assert plan.devices == (RAM,)
        command = load_command(plan, moment.catalogue.models[0], where)
        assert (command.devices, command.vram_mb) == (devices, 10_000)


def test_the_tightest_fit_and_the_figures() -> None:
    """RAM is named, and what is left of it."""
    small, large = cpu_host("a-large"), cpu_host("small", foreign_mb=40_000)
    moment = view(fleet(small, large), cpu_model())
    plan = plan_for(moment)
    assert (plan.node, plan.fit, plan.spare_mb) == ("small", Fit.NOW, 10_000)
    assert plan.fit_reason == "fits now with 10000 MiB of RAM to spare"
    text = told(moment)
    assert "RAM has 20000 MiB free" in text
    assert "'free_ram_mb': 60000" in text
    assert "'devices': [-1]" not in text


def test_idle_models_are_evicted_for_it() -> None:
    """Only as many as are needed, and none of a higher priority."""
    models = {"a": In(25_000), "b": In(30_000)}
    catalogue = (cpu_model(), cpu_model("a", 25_000), cpu_model("b", 30_000, residency_priority=500))
    usages = {("a", "box", "0"): used(), ("b", "box", "0"): used()}
    plan = plan_for(view(fleet(cpu_host(models=models)), *catalogue, usages=usages))
    assert (plan.fit, evicted(plan)) == (Fit.AFTER_EVICTION, {"a"})


def test_models_on_gpus_are_not_evicted_for_it() -> None:
    """They hold nothing in RAM, unless they sleep: their weights do."""
    full = {"on-cpu": In(55_000), "on-gpu": In(None, 20_000, (0,))}
    catalogue = (cpu_model(), cpu_model("on-cpu", 55_000, pinned_on=["box"]), profile(id="on-gpu", vram_mb=20_000))
    moment = view(fleet(cpu_host("box", 24_000, models=full)), *catalogue)
    assert planned(moment) is None
    error = placement_error(moment, "m", [evaluate_node(moment, catalogue[0], moment.fleet.nodes["box"])])
    assert "needs 10000 MiB, 5000 MiB of RAM free" in error.message
    assert "on-cpu stays (pinned on box)" in error.message
    asleep = {"on-cpu": In(45_000), "on-gpu": In(12_000, 500, (0,), status="sleeping")}
    plan = plan_for(view(fleet(cpu_host("box", 24_000, models=asleep)), *catalogue))
    assert (plan.fit, evicted(plan)) == (Fit.AFTER_EVICTION, {"on-gpu"})


def test_unified_memory_is_one_capacity() -> None:
    """A model on the CPU and one on the GPU that shares the RAM make room for each other."""
    there = {"on-gpu": In(3_000, 30_000, (0,)), "on-cpu": In(20_000)}
    box = cpu_host("spark", 0, models=there, unified=True)
    catalogue = (profile(vram_mb=50_000), cpu_model("on-cpu", 20_000), profile(id="on-gpu", vram_mb=30_000))
    assert evicted(plan_for(view(fleet(box), *catalogue))) == {"on-gpu", "on-cpu"}
    small = view(fleet(box), profile(vram_mb=25_000), *catalogue[1:], cpu_model("c", 25_000))
    for wanted in ("m", "c"):
        plan = plan_for(small, wanted)
        assert plan.fit is Fit.AFTER_EVICTION
        assert len(evicted(plan)) == 1


def test_loads_in_progress_count() -> None:
    """Reserved memory on the GPU is taken from RAM too, and a starting engine before the next poll."""
    box = cpu_host("spark", 0, unified=True)
    ours = Reservation("other", "spark", (0,), 55_000, "0")
    moment = view(fleet(box, reservations=(ours,)), cpu_model(), profile(id="other", vram_mb=55_000))
    assert planned(moment) is None
    starting = ModelView(id="new", instance="0", status="loading", ram_booked_mb=55_000)
    later = view(fleet(replace(cpu_host("spark"), models=by_instance([starting]))), cpu_model())
    assert planned(later) is None


def test_a_second_instance_needs_another_host() -> None:
    there = {"m": In(10_000)}
    one = view(fleet(cpu_host("a", models=there), cpu_host("b")), cpu_model())
    first = evaluate_node(one, one.catalogue.models[0], one.fleet.nodes["a"])
    assert (first.plan, first.reason) == (None, "already serves it")
    many = cpu_model(replicas={"min": 2, "per_node": 2})
    moment = view(fleet(cpu_host("a", models=there)), many)
    assert plan_for(moment).instance == "1"


def test_memory_that_is_not_known_is_not_told_as_a_number() -> None:
    """A protocol v1 neuron with a device that reports no memory, or without devices."""
    for where, wanted in ((node("v1", 0), profile(vram_mb=8_000)), (node("v1"), cpu_model())):
        moment = view(fleet(where), wanted)
        plan = plan_for(moment)
        assert plan.fit is Fit.NOW
        text = told(moment)
        assert "the neuron does not tell how much memory is free" in text
        for number in ("1073741824", "10737", "1073733"):
            assert number not in text
            assert number not in str(plan.reservation)


def test_variants_on_gpus_and_on_the_cpu() -> None:
    """The GPU goes before the CPU as the catalogue says, and a host without GPUs gets the variant for the CPU."""
    wanted = profile(
        vram_mb=20_000,
        min_device_vram_mb=20_000,
        variants=[{"name": "gpu"}, {"name": "cpu", "devices": 0, "vram_mb": 9_000}],
    )
    for where, variant in ((cpu_host("big", 24_000), "gpu"), (cpu_host("small", 12_000), "cpu"), (cpu_host(), "cpu")):
        assert plan_for(view(fleet(where), wanted)).variant == variant


def test_a_large_fleet_is_narrowed_by_free_ram() -> None:
    nodes = [cpu_host(f"n{number:03}", foreign_mb=58_000 if number else 0) for number in reversed(range(100))]
    assert plan_for(view(fleet(*nodes), cpu_model(), now=NOW)).node == "n000"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"devices": 1}, "must be 0"),
        ({"devices": 0, "min_devices": 1}, "remove min_devices"),
        ({"devices": 0, "parallel": {"tensor": 2}}, "remove min_devices and parallel"),
        ({"devices": 0, "min_device_vram_mb": 5}, "remove min_device_vram_mb"),
        ({"variants": [{"devices": 0, "min_devices": 2}]}, "remove min_devices"),
        ({"devices": 0, "span_nodes": True}, "span_nodes"),
    ],
)
def test_keys_that_contradict_each_other(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        validate_settings(Catalogue, {"models": [{"id": "m", **fields}]}, source="models.toml")
