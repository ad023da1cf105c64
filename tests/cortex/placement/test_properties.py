"""Properties of every plan, over random fleets from fixed seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest

from cortex.placement.capacity import device_memory, reports_bookable_memory
from cortex.placement.eviction import Eviction, EvictionClass
from cortex.placement.fair_queue import schedule_loads
from cortex.placement.inputs import PlanningView
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.planner import all_verdicts
from cortex.placement.replicas import reconcile_replicas
from shared.protocol import ModelStatus
from tests.cortex.placement.random_views import random_view, shuffled

SEEDS = 1000
BATCHES = [range(start, start + SEEDS // 5) for start in range(0, SEEDS, SEEDS // 5)]


def _plans(moment: PlanningView) -> list[LoadPlan]:
    """The plans of every node for every model of the catalogue."""
    found = (all_verdicts(moment, profile) for profile in moment.catalogue.models)
    return [each.plan for listed in found for each in listed if each.plan is not None]


@pytest.mark.parametrize("seeds", BATCHES)
def test_every_plan_keeps_the_rules(seeds: Iterable[int]) -> None:
    """Never evicts a protected model, nor one twice. The plan fits by the figures unless it says otherwise, and
    never makes a model wait longer than the rules allow."""
    fits: Counter[Fit] = Counter()
    for seed in seeds:
        moment = random_view(seed)
        for plan in _plans(moment):
            _keeps_the_rules(moment, plan, seed)
            fits[plan.fit] += 1
    assert all(fits[fit] for fit in Fit), fits  # the random fleets must cover every case


def _keeps_the_rules(moment: PlanningView, plan: LoadPlan, seed: int) -> None:
    node, profile = moment.fleet.nodes[plan.node], moment.catalogue.profile(plan.model_id)
    assert profile is not None
    assert node.healthy, seed
    assert not node.draining, seed
    assert not profile.pinned_on or node.name in profile.pinned_on, seed
    assert len(set(plan.devices)) == profile.min_devices, seed
    for each in plan.eviction_plan.evictions:
        model_id, where, _ = key = each.resident.key
        shielded = moment.catalogue.profile(model_id)
        assert where == node.name, seed
        assert key not in moment.fleet.evicting, seed
        assert node.has_status(model_id, ModelStatus.LOADED, ModelStatus.SLEEPING), seed
        if model_id != profile.id and shielded is not None:
            assert node.name not in shielded.pinned_on, seed
            assert shielded.residency_priority <= profile.residency_priority, seed
        use = moment.usage(key)
        assert each.eviction_class is not EvictionClass.IDLE or not use.in_flight, seed
    keys = [each.resident.key for each in plan.eviction_plan.evictions]
    assert len(set(keys)) == len(keys), seed
    _keeps_instances_apart(moment, plan, seed)
    room = device_memory(moment, node)
    if _by_the_figures(moment, plan) and not plan.wakes:
        for index in plan.devices:
            freed = _frees(plan.eviction_plan.evictions, index)
            assert room[index].free_mb + freed >= plan.device_share_mb, seed
        # every eviction is needed
        for gone in plan.eviction_plan.evictions:
            rest = [each for each in plan.eviction_plan.evictions if each is not gone]
            have = {
                i: room[i].free_mb + sum(e.resident.frees_mb for e in rest if i in e.resident.devices) for i in room
            }
            assert any(have[i] < max(plan.device_share_mb, plan.reserve_mb) for i in plan.devices), seed
    rules = moment.rules
    assert plan.ready_at <= moment.now + max(rules.min_residency_secs, rules.patience_secs), seed


def _keeps_instances_apart(moment: PlanningView, plan: LoadPlan, seed: int) -> None:
    """Each has a name and devices of its own, and evictions leave models of the same priority their minimum."""
    node, profile = moment.fleet.nodes[plan.node], moment.catalogue.profile(plan.model_id)
    assert profile is not None
    active = {each.key: each.view.devices for each in node.engines(profile.id) if each.view.loaded or each.view.coming}
    assert plan.key not in active, seed
    assert not active or node.has_instances, seed
    assert all(set(devices).isdisjoint(plan.devices) for devices in active.values()), seed
    assert profile.replicas.per_node is None or len(active) < profile.replicas.per_node, seed
    gone = [each.resident.key for each in plan.eviction_plan.evictions if not each.resident.asleep]
    for model_id in {key.model_id for key in gone} - {plan.model_id}:
        other = moment.catalogue.profile(model_id)
        if other is not None and other.replicas.min and other.residency_priority == profile.residency_priority:
            assert len(moment.replicas(model_id) - set(gone)) >= other.replicas.min, seed


def _by_the_figures(moment: PlanningView, plan: LoadPlan) -> bool:
    """Except when a neuron that books memory is asked for a model of unknown size."""
    return plan.fit is not Fit.TOO_LARGE and (
        plan.device_share_mb > 0 or not reports_bookable_memory(moment.fleet.nodes[plan.node])
    )


def _frees(evictions: Iterable[Eviction], index: int) -> int:
    return sum(each.resident.frees_mb for each in evictions if index in each.resident.devices)


@pytest.mark.parametrize("seeds", BATCHES)
def test_the_same_view_gives_the_same_plans(seeds: Iterable[int]) -> None:
    """The order of the nodes does not matter."""
    for seed in seeds:
        moment = random_view(seed)
        other = replace(moment, fleet=shuffled(moment, seed))
        first, again, mixed = schedule_loads(moment), schedule_loads(moment), schedule_loads(other)
        assert first.loads == again.loads == mixed.loads, seed
        assert first.wait_reasons.keys() == mixed.wait_reasons.keys(), seed
        assert first.rejected.keys() == mixed.rejected.keys(), seed
        assert first.recheck_at == mixed.recheck_at, seed
        kept = moment.catalogue.models
        assert reconcile_replicas(moment, kept).loads == reconcile_replicas(other, kept).loads, seed


@pytest.mark.parametrize("seeds", BATCHES)
def test_ranks_are_a_total_order(seeds: Iterable[int]) -> None:
    """Any two plans for one model are comparable, and never tie."""
    for seed in seeds:
        moment = random_view(seed)
        for profile in moment.catalogue.models:
            plans = [each.plan for each in all_verdicts(moment, profile) if each.plan is not None]
            for one, two in combinations(plans, 2):
                assert (one.rank < two.rank) is not (two.rank < one.rank), seed


@pytest.mark.parametrize("seeds", BATCHES)
def test_loads_of_one_decision_never_over_book_a_device(seeds: Iterable[int]) -> None:
    """All together, with loads under way: no model is evicted for two others, and every waiting model gets an
    answer."""
    for seed in seeds:
        moment = random_view(seed)
        schedule = schedule_loads(moment)
        evicted_models = [each.resident.key for plan in schedule.loads for each in plan.eviction_plan.evictions]
        assert len(set(evicted_models)) == len(evicted_models), seed
        for node in moment.fleet.nodes.values():
            room = device_memory(moment, node)
            there = [plan for plan in schedule.loads if plan.node == node.name and _by_the_figures(moment, plan)]
            for index in room:
                taken = sum(plan.reservation.device_share_mb for plan in there if index in plan.devices)
                freed = _frees((each for plan in there for each in plan.eviction_plan.evictions), index)
                assert taken <= max(0, room[index].free_mb) + freed, (seed, node.name, index)
        for model_id in moment.waiting:
            served = moment.fleet.serving(model_id) or moment.fleet.loading_on(model_id)
            under_way = any(each.model_id == model_id for each in moment.fleet.reservations)
            begun = any(plan.model_id == model_id for plan in schedule.loads)
            assert served or under_way or begun or model_id in schedule.wait_reasons or model_id in schedule.rejected, (
                seed
            )


@pytest.mark.parametrize("seeds", BATCHES)
def test_reconciliation_disturbs_no_model_in_use(seeds: Iterable[int]) -> None:
    """A replica beyond the minimum evicts nothing; busy or young models are never evicted for replicas; nothing is
    over-booked."""
    for seed in seeds:
        moment = random_view(seed)
        moment = replace(
            moment, waiting={}, overloaded_since={each.id: moment.now - 60 for each in moment.catalogue.models}
        )
        for plan, _ in reconcile_replicas(moment, moment.catalogue.models).loads:
            assert plan.fit is not Fit.TOO_LARGE, seed
            for each in plan.eviction_plan.evictions:
                assert not each.resident.in_flight, seed
                assert each.ready_at <= moment.now, seed
