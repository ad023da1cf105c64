"""Large fleets: which nodes are evaluated, and that the best one is among them."""

from __future__ import annotations

from random import Random

import pytest

from cortex.placement.candidates import MAX_CANDIDATES, candidate_nodes
from cortex.placement.planner import MAX_GOOD_NODES, all_verdicts, best_plan, candidate_verdicts
from cortex.placement.replicas import reconcile_replicas
from cortex.routing.replica import ReplicaKey
from tests.cortex.fleets import On, fleet, host
from tests.cortex.views import profile, used, view


def test_a_small_fleet_is_evaluated_in_full() -> None:
    """Every node of a small fleet is evaluated, whatever it holds."""
    nodes = [host(f"n{i}", 24000) for i in range(MAX_CANDIDATES)]
    assert len(candidate_nodes(view(fleet(*nodes), profile(vram_mb=4000)), profile(vram_mb=4000))) == MAX_CANDIDATES


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_node_is_a_candidate(seed: int, size: int) -> None:
    """The best of 300 nodes of many kinds is found, while one third of them are full."""
    random = Random(seed)
    wanted = profile(vram_mb=9000 * size, min_devices=size, min_device_vram_mb=random.choice((None, 20000)))
    nodes = []
    for number in range(300):
        total = random.choice((12000, 24000, 32000))
        held = random.choice((0, 4000, 8000, total - 100))
        models = {f"other{number}": On(held)} if held else {}
        nodes.append(host(f"n{number}", *[total] * random.choice((1, 2)), models=models))
    moment = view(fleet(*nodes), wanted)
    assert len(candidate_nodes(moment, wanted)) == MAX_CANDIDATES
    found, best = best_plan(candidate_verdicts(moment, wanted)), best_plan(all_verdicts(moment, wanted))
    assert found is not None
    assert best is not None
    assert (found.fit, found.spare_mb // 1024) == (best.fit, best.spare_mb // 1024)


def test_a_node_that_lists_the_model_is_a_candidate() -> None:
    """A node that holds the model comes first if it fits, however much memory others have."""
    wanted = profile(vram_mb=4000)
    knows = host("knows", 32000, models={"m": On(0, status="unloaded")})
    moment = view(fleet(*[host(f"n{i}", 12000) for i in range(100)], knows), wanted)
    plan = best_plan(candidate_verdicts(moment, wanted))
    assert plan is not None
    assert plan.node == "knows"


def test_all_nodes_are_evaluated_when_no_candidate_can_load_it() -> None:
    """Only one of 200 nodes can hold it, and an idle model fills that one."""
    wanted = profile(vram_mb=30000)
    full = host("full", 32000, models={"old": On(31000)})
    moment = view(fleet(*[host(f"n{i}", 24000) for i in range(199)], full), wanted, profile(id="old", vram_mb=31000))
    plan = best_plan(candidate_verdicts(moment, wanted))
    assert plan is not None
    assert plan.node == "full"


def test_nodes_without_an_instance_are_candidates_first() -> None:
    """However many nodes have one, and however tight it would be there."""
    there = [host(f"n{i:03}", 16000, 16000, models={"m": On(4000)}, instances=True) for i in range(150)]
    empty = [host(f"z{i}", 32000, instances=True) for i in range(3)]
    wanted = profile(vram_mb=4000, replicas={"min": 155})
    found = candidate_nodes(view(fleet(*there, *empty), wanted), wanted)
    assert [node.name for node in found[:3]] == ["z0", "z1", "z2"]
    assert len(found) == MAX_CANDIDATES
    added = reconcile_replicas(view(fleet(*there, *empty), wanted), [wanted]).loads
    assert [plan.node for plan, _ in added] == ["z0", "z1", "z2", "n000", "n001"]


def test_a_large_full_fleet_looks_beyond_nodes_that_are_in_use() -> None:
    """The first nodes would have to stop busy models; an idle one far behind them is found."""
    wanted = profile(vram_mb=30000)
    nodes = [host(f"n{i:03}", 32000, models={f"m{i}": On(31000)}) for i in range(200)]
    busy = {ReplicaKey(f"m{i}", f"n{i:03}", ""): used(1, idle=0) for i in range(200) if i != 60}
    moment = view(fleet(*nodes), wanted, *[profile(id=f"m{i}", vram_mb=31000) for i in range(200)], usages=busy)
    plan = best_plan(candidate_verdicts(moment, wanted))
    assert plan is not None
    assert plan.node == "n060"


def test_a_large_empty_fleet_is_not_evaluated_in_full() -> None:
    """One node is as good as another: planning must stay fast."""
    wanted = profile(vram_mb=4000)
    found = candidate_verdicts(view(fleet(*[host(f"n{i}", 24000) for i in range(200)]), wanted), wanted)
    assert len(found) == MAX_GOOD_NODES
