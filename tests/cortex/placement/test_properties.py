"""Properties of every plan, over random fleets from fixed seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest

from cortex.placement.capacity import books, rooms
from cortex.placement.eviction import Eviction
from cortex.placement.fair_queue import next_turn
from cortex.placement.inputs import View
from cortex.placement.planner import Fit, Plan, verdicts
from cortex.placement.replicas import upkeep
from shared.protocol import ModelStatus
from tests.cortex.placement.random_views import random_view, shuffled

SEEDS = 1000
BATCHES = [range(start, start + SEEDS // 5) for start in range(0, SEEDS, SEEDS // 5)]


def _plans(moment: View) -> list[Plan]:
    """The plans of every node for every model of the catalogue."""
    found = (verdicts(moment, profile) for profile in moment.catalogue.models)
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


def _keeps_the_rules(moment: View, plan: Plan, seed: int) -> None:
    node, profile = moment.fleet.nodes[plan.node], moment.catalogue.profile(plan.model_id)
    assert profile is not None
    assert node.healthy, seed
    assert not node.draining, seed
    assert not profile.pinned_on or node.name in profile.pinned_on, seed
    assert len(set(plan.devices)) == profile.min_devices, seed
    for each in plan.displacement.evictions:
        model_id, where = each.resident.key
        shielded = moment.catalogue.profile(model_id)
        assert where == node.name, seed
        assert (model_id, where) not in moment.fleet.leaving, seed
        assert node.status_of(model_id) in (ModelStatus.LOADED, ModelStatus.SLEEPING), seed
        if model_id != profile.id and shielded is not None:
            assert node.name not in shielded.pinned_on, seed
            assert shielded.residency_priority <= profile.residency_priority, seed
        use = moment.use(model_id, where)
        assert each.ready_at > moment.now or not use.in_flight or moment.waiting.get(plan.model_id) is not None, seed
    keys = [each.resident.key for each in plan.displacement.evictions]
    assert len(set(keys)) == len(keys), seed
    room = rooms(moment, node)
    if _by_the_figures(moment, plan) and not plan.wakes:
        for index in plan.devices:
            freed = _frees(plan.displacement.evictions, index)
            assert room[index].free_mb + freed >= plan.share_mb, seed
        # every eviction is needed
        for gone in plan.displacement.evictions:
            rest = [each for each in plan.displacement.evictions if each is not gone]
            have = {
                i: room[i].free_mb + sum(e.resident.frees_mb for e in rest if i in e.resident.devices) for i in room
            }
            assert any(have[i] < max(plan.share_mb, plan.takes_mb) for i in plan.devices), seed
    rules = moment.rules
    assert plan.ready_at <= moment.now + max(rules.min_residency_secs, rules.patience_secs), seed


def _by_the_figures(moment: View, plan: Plan) -> bool:
    """Except when a neuron that books memory is asked for a model of unknown size."""
    return plan.fit is not Fit.TOO_LARGE and (plan.share_mb > 0 or not books(moment.fleet.nodes[plan.node]))


def _frees(evictions: Iterable[Eviction], index: int) -> int:
    return sum(each.resident.frees_mb for each in evictions if index in each.resident.devices)


@pytest.mark.parametrize("seeds", BATCHES)
def test_the_same_moment_gives_the_same_steps(seeds: Iterable[int]) -> None:
    """The order of the nodes does not matter."""
    for seed in seeds:
        moment = random_view(seed)
        other = replace(moment, fleet=shuffled(moment, seed))
        first, again, mixed = next_turn(moment), next_turn(moment), next_turn(other)
        assert first.loads == again.loads == mixed.loads, seed
        assert first.notes.keys() == mixed.notes.keys(), seed
        assert first.refused.keys() == mixed.refused.keys(), seed
        assert first.wake_at == mixed.wake_at, seed
        kept = moment.catalogue.models
        assert upkeep(moment, kept).loads == upkeep(other, kept).loads, seed


@pytest.mark.parametrize("seeds", BATCHES)
def test_ranks_are_a_total_order(seeds: Iterable[int]) -> None:
    """Any two plans for one model are comparable, and never tie."""
    for seed in seeds:
        moment = random_view(seed)
        for profile in moment.catalogue.models:
            plans = [each.plan for each in verdicts(moment, profile) if each.plan is not None]
            for one, two in combinations(plans, 2):
                assert (one.rank < two.rank) is not (two.rank < one.rank), seed


@pytest.mark.parametrize("seeds", BATCHES)
def test_the_loads_of_one_turn_never_over_book_a_device(seeds: Iterable[int]) -> None:
    """All together, with loads under way: no model is evicted for two others, and every waiting model gets an
    answer."""
    for seed in seeds:
        moment = random_view(seed)
        turn = next_turn(moment)
        displaced = [each.resident.key for plan in turn.loads for each in plan.displacement.evictions]
        assert len(set(displaced)) == len(displaced), seed
        for node in moment.fleet.nodes.values():
            room = rooms(moment, node)
            there = [plan for plan in turn.loads if plan.node == node.name and _by_the_figures(moment, plan)]
            for index in room:
                taken = sum(plan.reservation.share_mb for plan in there if index in plan.devices)
                freed = _frees((each for plan in there for each in plan.displacement.evictions), index)
                assert taken <= max(0, room[index].free_mb) + freed, (seed, node.name, index)
        for model_id in moment.waiting:
            served = moment.fleet.serving(model_id) or moment.fleet.coming(model_id)
            under_way = any(each.model_id == model_id for each in moment.fleet.reservations)
            begun = any(plan.model_id == model_id for plan in turn.loads)
            assert served or under_way or begun or model_id in turn.notes or model_id in turn.refused, seed


@pytest.mark.parametrize("seeds", BATCHES)
def test_upkeep_hurts_nobody(seeds: Iterable[int]) -> None:
    """A replica beyond the minimum evicts nothing; busy or young models are never evicted for upkeep; nothing is
    over-booked."""
    for seed in seeds:
        moment = random_view(seed)
        moment = replace(moment, waiting={}, pressed={each.id: moment.now - 60 for each in moment.catalogue.models})
        for plan, _ in upkeep(moment, moment.catalogue.models).loads:
            assert plan.fit is not Fit.TOO_LARGE, seed
            for each in plan.displacement.evictions:
                assert not each.resident.in_flight, seed
                assert each.ready_at <= moment.now, seed
