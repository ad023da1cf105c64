"""A small model must not wait for minutes behind a big one that is starting on the same device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex.control.explain import explain
from cortex.control.wait_note import waiting_note
from cortex.fleet.snapshot import NodeSnapshot, Reservation, by_instance
from cortex.placement.load_plan import Fit
from cortex.placement.starts import starts_by_device
from shared.protocol import LinkKind, ModelView, Progress
from tests.cortex.fleets import On, fleet, host, with_entry
from tests.cortex.views import plan_for, profile, view

BIG, SMALL = profile(id="org/big", vram_mb=20_000), profile(id="org/small", vram_mb=4_000)


def starting(*devices: int, mb: int = 10_000, status: str = "loading") -> On:
    return On(mb, devices, status=status)


def with_progress(node: NodeSnapshot, model_id: str, **progress: Any) -> NodeSnapshot:
    return with_entry(node, node.models[model_id][""].model_copy(update={"progress": Progress(**progress)}))


@pytest.mark.parametrize("status", ["loading", "reloading", "recovering"])
def test_a_device_without_a_start_is_preferred(status: str) -> None:
    """The tightest fit would be the device on which the big one starts."""
    four = host("a", 24_000, 24_000, 24_000, 24_000, models={"org/big": starting(0, status=status)})
    plan = plan_for(view(fleet(four), BIG, SMALL), "org/small")
    assert (plan.fit, plan.devices, plan.starts.models) == (Fit.NOW, (1,), ())


def test_a_node_without_a_start_is_preferred() -> None:
    busy = host("a", 24_000, models={"org/big": starting(0)})
    plan = plan_for(view(fleet(busy, host("b", 80_000)), BIG, SMALL), "org/small")
    assert (plan.node, plan.devices) == ("b", (0,))


def test_a_start_that_cortex_has_just_asked_for_counts() -> None:
    """The neuron has not reported it yet."""
    where = fleet(host("a", 24_000, 24_000), reservations=(Reservation("org/big", "a", (0,), 18_000),))
    assert plan_for(view(where, BIG, SMALL), "org/small").devices == (1,)


def test_a_set_of_devices_avoids_starts_before_it_looks_at_links() -> None:
    """A slower path costs percents, a start minutes."""
    links = {(0, 1): LinkKind.NVLINK, (2, 3): LinkKind.PHB}
    four = host("a", 24_000, 24_000, 24_000, 24_000, models={"org/big": starting(1)}, links=links)
    pair = profile(id="org/pair", vram_mb=8_000, min_devices=2)
    assert plan_for(view(fleet(four), BIG, pair), "org/pair").devices == (2, 3)


def test_a_loaded_model_does_not_count_as_a_start() -> None:
    two = host("a", 24_000, 24_000, models={"org/big": On(10_000, (0,))})
    assert plan_for(view(fleet(two), BIG, SMALL), "org/small").devices == (0,)


def busy_everywhere() -> NodeSnapshot:
    """A start on each device, of which the second is nearly over."""
    two = host("a", 24_000, 24_000, models={"org/big": starting(0, mb=12_000), "org/other": starting(1)})
    two = with_progress(two, "org/big", phase="loading weights", fraction=0.2, remaining_secs=380.0)
    return with_progress(two, "org/other", phase="warming up", remaining_secs=14.2)


def test_without_a_free_device_the_shortest_wait_counts() -> None:
    """And the plan and `explain` say what it waits for, and how long."""
    moment = view(fleet(busy_everywhere()), BIG, SMALL)
    plan = plan_for(moment, "org/small")
    assert (plan.devices, plan.starts.models, plan.starts.remaining_secs) == ((1,), ("org/other",), 14.2)
    assert "starts after org/other on the same device, in about 15 s" in plan.reason
    told = explain("org/small", moment, lambda *_: 0)
    assert told["decision"]["begins_in_secs"] == 14.2
    assert "starts after org/other" in told["decision"]["reason"]
    assert "starts after org/other" in told["nodes"][0]["reason"]
    because = told["decision"]["devices_because"]
    assert "device 0 is starting org/big for about 380 s more" in because
    assert "device 1 is starting org/other for about 15 s more" in because


def test_remaining_time_without_progress_comes_from_earlier_loads() -> None:
    """Less what has passed; starts on one device come one after another."""
    models = {"org/big": starting(0), "org/other": starting(0, 1)}
    node = with_progress(host("a", 48_000, 48_000, models=models), "org/big", phase="starting", elapsed_secs=50.0)
    moment = view(fleet(node), BIG, SMALL, load_secs={"org/big": {"a": 200.0}, "org/other": {"a": 30.0}})
    found = starts_by_device(moment, node, "org/small")
    assert {index: each.remaining_secs for index, each in found.items()} == {0: 180.0, 1: 30.0}
    assert found[0].models == ("org/big", "org/other")


def test_small_changes_of_an_estimate_do_not_change_the_plan() -> None:
    """Estimates change with each report; a plan that changed with them would never be carried out."""
    ranks = set()
    for remaining in (381.0, 384.0, 389.0):
        one = with_progress(
            host("a", 24_000, models={"org/big": starting(0)}), "org/big", remaining_secs=remaining, phase="loading"
        )
        ranks.add(plan_for(view(fleet(one), BIG, SMALL), "org/small").rank)
    assert len(ranks) == 1


def test_waiting_clients_are_told_what_goes_first() -> None:
    """The neuron says only that the model waits."""
    node = busy_everywhere()
    waits = ModelView(
        id="org/small", status="loading", devices=[0], progress=Progress(phase="waiting", message="waiting for another")
    )
    node = with_entry(node, waits)
    note = waiting_note("org/small", fleet(node), None, None, 0.0)
    assert note.text == (
        "loading org/small on a: waiting for org/big to start on the same device: "
        "loading weights 20 %, about 380 s left"
    )
    alone = replace(node, models=by_instance([waits]))
    assert (
        waiting_note("org/small", fleet(alone), None, None, 0.0).text == "loading org/small on a: waiting for another"
    )
