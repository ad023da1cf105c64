"""What a view says about one model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex.config.profile import DEFAULT_PRIORITY
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, by_instance
from cortex.placement.inputs import Backoff
from cortex.placement.load_plan import Fit
from cortex.placement.planner import evaluate_node
from tests.cortex.fleets import On, fleet, host
from tests.cortex.views import NOW, plan_for, profile, view

HERE = host("a", 24000, 24000, models={"own": On(0, (0, 1), status="unloaded")})


def test_a_model_outside_the_catalogue_is_loaded_where_it_was() -> None:
    """It gets the same number of devices, and only nodes that know its spec load it."""
    plan = plan_for(view(fleet(host("b", 90000), HERE)), "own")
    assert (plan.node, plan.devices) == ("a", (0, 1))
    assert view(fleet(HERE)).priority("own") == DEFAULT_PRIORITY


@pytest.mark.parametrize(("name", "devices"), [("my model", 1), ("", 1), ("x" * 600, 1), ("wide", 72)])
def test_a_name_that_is_invalid_in_a_catalogue_is_accepted_from_a_neuron(name: str, devices: int) -> None:
    """Neurons choose their own model names and hardware: an unusual one must not break all planning."""
    there = host("a", *[24000] * devices, models={name: On(0, tuple(range(devices)), status="unloaded")})
    assert len(plan_for(view(fleet(there)), name).devices) == devices


@pytest.mark.parametrize(
    ("where", "known"),
    [
        (fleet(HERE), True),
        (fleet(host("a", 24000, models={"own": On(500, status="sleeping")})), True),
        (fleet(host("a", 24000, models={"own": On(9000)}), evicting=(("own", "a"),)), True),  # reloadable later
        (fleet(host("a", 24000, models={"own": On(9000, status="failed")})), False),
        (fleet(host("a", 24000, models={"own": On(9000, status="what?")})), False),
        (fleet(host("a", 24000)), False),
    ],
)
def test_models_outside_the_catalogue_that_can_be_loaded(where: FleetSnapshot, known: bool) -> None:
    """These are models that a neuron lists and can load again."""
    assert (view(where).profile("own") is not None) is known


def test_a_request_for_a_model_that_is_being_evicted_waits() -> None:
    """This also holds for a model that only its neuron knows."""
    where = fleet(host("a", 24000, models={"own": On(9000)}), evicting=(("own", "a"),))
    moment = view(where)
    own = moment.profile("own")
    assert own is not None
    assert evaluate_node(moment, own, where.nodes["a"]).temporary


def test_the_catalogue_overrides_observed_sizes() -> None:
    """The catalogue's size counts before the observed one, and its priority applies."""
    moment = view(fleet(HERE), profile(vram_mb=3000, residency_priority=7), observed_share_mb={"m": 9000, "n": 9000})
    assert moment.device_share_mb(profile(vram_mb=3000)) == 3000
    assert moment.device_share_mb(profile(id="n")) == 9000
    assert moment.device_share_mb(profile(id="o")) == 0
    assert moment.priority("m") == 7


def test_load_backoffs_end() -> None:
    """A backoff for all nodes outranks one for a node; an expired one does not count."""
    backoffs = {
        ("m", "*"): Backoff(NOW + 1, "every"),
        ("m", "a"): Backoff(NOW + 9, "a"),
        ("n", "a"): Backoff(NOW, "over"),
    }
    moment = view(fleet(HERE), backoffs=backoffs)
    found = moment.backoff("m", "a"), moment.backoff("m", "b"), moment.backoff("n", "a")
    assert [backoff and backoff.reason for backoff in found] == ["every", "every", None]


def unmeasured(*, used_mb: int | None, **models: On) -> NodeSnapshot:
    """A protocol v1 neuron whose driver reports no memory, and whose models may tell what they use."""
    there = host("n", 24000, models=models, protocol_v1=True)
    assert there.health is not None
    silent = [live.model_copy(update={"vram_used_mb": 0, "vram_free_mb": 0}) for live in there.health.devices]
    told = by_instance(entry.model_copy(update={"vram_used_mb": used_mb}) for entry in there.views)
    return replace(there, health=there.health.model_copy(update={"devices": silent}), models=told)


@pytest.mark.parametrize("used_mb", [14000, None])
def test_models_count_where_no_memory_is_measured(used_mb: int | None) -> None:
    """The model there is evicted first: without a figure the card does not look empty."""
    models = [profile(vram_mb=14000), profile(id="x", vram_mb=14000), profile(id="small", vram_mb=9000)]
    plan = plan_for(view(fleet(unmeasured(used_mb=used_mb, x=On(14000))), *models))
    assert [each.resident.key[0] for each in plan.eviction_plan.evictions] == ["x"]
    beside = plan_for(view(fleet(unmeasured(used_mb=used_mb, x=On(14000))), *models), "small")
    assert not beside.eviction_plan.evictions
    assert plan_for(view(fleet(unmeasured(used_mb=used_mb)), *models)).fit is Fit.NOW
