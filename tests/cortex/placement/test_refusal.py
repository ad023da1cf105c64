"""The errors that clients get when no node takes a model, case by case."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cortex.config.catalogue import Catalogue
from cortex.fleet.snapshot import FleetSnapshot
from cortex.placement.fair_queue import schedule_loads
from cortex.placement.inputs import Backoff
from cortex.placement.planner import all_verdicts, plan_variant
from cortex.placement.refusal import placement_error, unknown_model_error
from cortex.routing.replica import ModelOnNode
from shared.errors import ServiceError, render
from tests.cortex.fleets import On, fleet, host, node
from tests.cortex.views import NOW, profile, view

M = profile(vram_mb=14000)
PINNED = profile(id="pinned", vram_mb=14000, pinned_on=["a"])
TOP = profile(id="top", vram_mb=20000, residency_priority=500)
FULL = host("a", 24000, models={"top": On(20000)})


def _refused(model_id: str, where: FleetSnapshot, backoffs: Mapping[ModelOnNode, Backoff]) -> ServiceError:
    moment = view(where, M, PINNED, TOP, backoffs=backoffs)
    wanted = moment.profile(model_id)
    return placement_error(moment, model_id, [] if wanted is None else all_verdicts(moment, wanted))


def test_free_memory_beside_another_instance_does_not_count() -> None:
    """Two instances share no device: the reason says where they are instead of what is free there."""
    models = {"m": On(14000, (0,)), "m#1": On(14000, (2,)), "top": On(20000, (1,))}
    where = fleet(host("a", 40000, 24000, 40000, models=models, instances=True))
    wanted = profile(vram_mb=14000, replicas={"min": 3})
    verdicts = all_verdicts(view(where, wanted, TOP), wanted)
    expected = "needs 14000 MiB, 4000 MiB free on device 1; another instance is on devices 0, 2; top stays"
    assert expected in str(verdicts)


def test_no_free_memory_is_told_where_instances_are_on_all_devices() -> None:
    where = fleet(host("a", 24000, models={"m": On(14000, (0,))}, instances=True))
    moment = view(where, M, named_instances={("m", "a"): "1"})
    verdict = plan_variant(moment, M, where.nodes["a"])
    assert verdict.reason == "needs 14000 MiB; another instance is on device 0"


@pytest.mark.parametrize(
    ("model_id", "where", "backoffs", "code"),
    [
        ("m", fleet(), {}, "no_healthy_neurons"),
        ("m", fleet(host("a", 24000, healthy=False)), {}, "no_healthy_neurons"),
        ("pinned", fleet(host("a", 24000, healthy=False), host("b", 24000)), {}, "neuron_unavailable"),
        ("pinned", fleet(host("a", 24000, draining=True), host("b", 24000)), {}, "neuron_unavailable"),
        ("pinned", fleet(node("a", discovered=False), host("b", 24000)), {}, "neuron_unavailable"),
        ("pinned", fleet(host("b", 24000)), {}, "no_feasible_neuron"),
        ("m", fleet(FULL), {}, "insufficient_vram"),
        ("m", fleet(FULL), {("m", "a"): Backoff(NOW + 7, "no")}, "cold_load_failed"),
        ("m", fleet(host("a", 24000)), {("m", "*"): Backoff(NOW + 7, "no")}, "cold_load_failed"),
        ("m", fleet(host("a", 24000, healthy=False)), {("m", "a"): Backoff(NOW + 7, "no")}, "no_healthy_neurons"),
        ("own", fleet(host("a", 24000)), {}, "model_not_found"),
        ("own", fleet(host("a", 24000)), {("own", "a"): Backoff(NOW + 7, "no")}, "cold_load_failed"),
    ],
)
def test_refusals(model_id: str, where: FleetSnapshot, backoffs: Mapping[ModelOnNode, Backoff], code: str) -> None:
    """Each has its own code; temporary ones say when to retry."""
    error = _refused(model_id, where, backoffs)
    assert error.code == code
    assert (error.retry_after is not None) is (error.status == 503)


@pytest.mark.parametrize(
    ("backoffs", "permanent"),
    [
        ({("m", "*"): Backoff(NOW + 7, "bad flag", permanent=True)}, True),
        ({("m", "*"): Backoff(NOW + 7, "failed on two nodes")}, False),
        ({("m", "a"): Backoff(NOW + 7, "no such path", permanent=True)}, False),  # b may be tried
        ({("m", name): Backoff(NOW + 7, "no such path", permanent=True) for name in "ab"}, True),
        (
            {("m", "a"): Backoff(NOW + 7, "no such path", permanent=True), ("m", "b"): Backoff(NOW + 7, "disk full")},
            False,
        ),
    ],
)
def test_a_model_that_cannot_load_anywhere_is_refused_permanently(
    backoffs: Mapping[ModelOnNode, Backoff], permanent: bool
) -> None:
    """Client libraries then report the failure at once."""
    error = _refused("m", fleet(host("a", 24000), host("b", 24000)), backoffs)
    assert error.permanent is permanent
    assert (render(error, "r", anthropic=False).headers.get("x-should-retry") == "false") is permanent


def test_a_failed_load_says_when_to_retry() -> None:
    """The error has the time and the reason of the first backoff to end."""
    backoffs = {("m", "a"): Backoff(NOW + 40, "on a"), ("m", "b"): Backoff(NOW + 7, "on b")}
    error = _refused("m", fleet(host("a", 24000), host("b", 24000)), backoffs)
    assert (error.retry_after, error.message) == (7, "on b")


def test_the_error_names_the_models_that_hold_the_memory() -> None:
    """The error has their figures and why they stay."""
    error = _refused("m", fleet(FULL, node("b", 24000, draining=True)), {})
    assert "a: needs 14000 MiB, 4000 MiB free on device 0; top stays (priority 500 is above 100)" in error.message
    assert "b: draining" in error.message


@pytest.mark.parametrize(
    ("where", "code"),
    [
        (fleet(host("a", 24000)), "model_not_found"),
        (fleet(host("a", 24000, models={"own": On(9000)}, healthy=False), host("b", 24000)), "neuron_unavailable"),
        (fleet(host("a", 24000, models={"own": On(status="failed")})), "cold_load_failed"),
        (fleet(host("a", 24000, models={"own": On(status="what?")})), "neuron_unavailable"),
        (fleet(node("a", healthy=False, discovered=False)), "no_healthy_neurons"),
        (fleet(host("a", 24000, healthy=False)), "model_not_found"),
    ],
)
def test_models_outside_the_catalogue(where: FleetSnapshot, code: str) -> None:
    """The error says where they are and why they cannot serve now."""
    assert unknown_model_error("own", Catalogue(), where).code == code


@pytest.mark.parametrize(
    ("backoff", "where", "outcome"),
    [
        (("m", "a"), fleet(host("a", 24000), host("b", 40000)), "b"),  # the node failed: try elsewhere
        (("m", "a"), fleet(host("a", 24000)), "refused"),
        (("m", "*"), fleet(host("a", 24000), host("b", 40000)), "refused"),  # the model failed: try nowhere
    ],
)
def test_a_backoff_decides_where_the_load_is_retried(backoff: ModelOnNode, where: FleetSnapshot, outcome: str) -> None:
    """After a fault of one node the load is retried on another; after a fault of the model the request is refused."""
    schedule = schedule_loads(view(where, M, waiting={"m": 1}, backoffs={backoff: Backoff(NOW + 7, "no")}))
    assert [plan.node for plan in schedule.loads] == ([outcome] if outcome != "refused" else [])
    if outcome == "refused":
        assert (schedule.rejected["m"].code, schedule.rejected["m"].retry_after) == ("cold_load_failed", 7)


def test_a_request_waits_for_a_temporary_cause_to_pass() -> None:
    """Requests are not refused; the model is looked at again when the backoff ends."""
    backoffs = {("m", "a"): Backoff(NOW + 1, "restarts", temporary=True)}
    schedule = schedule_loads(view(fleet(host("a", 24000)), M, waiting={"m": 1}, backoffs=backoffs))
    assert (schedule.loads, schedule.rejected, schedule.recheck_at) == ((), {}, NOW + 1)
    assert "restarts" in schedule.wait_reasons["m"]
