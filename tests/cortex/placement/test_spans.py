"""Models that may span several nodes: how they are split, and which nodes the planner takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from cortex.config.neurons import HostNetwork
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.fair_queue import after_start, schedule_loads
from cortex.placement.feasibility import FeasibilityCache
from cortex.placement.inputs import Backoff
from cortex.placement.load_plan import Fit, LoadPlan, part_command
from cortex.placement.planner import all_verdicts, best_plan
from cortex.placement.refusal import placement_error
from cortex.placement.replicas import reconcile_replicas
from cortex.placement.spans import spans_of
from shared.protocol import GroupPart, ModelView, Parallelism
from tests.cortex.fleets import On, fleet, host, with_entry
from tests.cortex.views import NOW, plan_for, planned, profile, view


def wide(**fields: Any) -> ModelProfile:
    return profile(span_nodes=True, **{"min_devices": 4, "vram_mb": 80000, **fields})


def able(name: str, *total_mb: int, card: str = "GPU", groups: bool = True, **fields: Any) -> NodeSnapshot:
    """A node that can run parts of groups."""
    node = host(name, *total_mb, **fields)
    assert node.discovery is not None
    devices = [device.model_copy(update={"name": card}) for device in node.discovery.devices]
    told = {"devices": devices, "instances": True, "groups": groups}
    return replace(node, discovery=node.discovery.model_copy(update=told))


def pair(**fields: Any) -> FleetSnapshot:
    return fleet(able("a", 24000, 24000, **fields), able("b", 24000, 24000, **fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"min_devices": 4}, [(2, 2, 2, 2), (4, 1, 4, 1)]),
        ({"parallel": {"tensor": 4, "pipeline": 2}}, [(2, 4, 2, 4), (4, 4, 2, 2), (8, 4, 2, 1)]),
        ({"parallel": {"tensor": 2}}, [(2, 2, 1, 1)]),
        ({"parallel": {"tensor": 2, "pipeline": 3}}, [(3, 2, 3, 2), (2, 2, 3, None), (6, 2, 3, 1)]),
    ],
)
def test_how_a_model_is_spread(fields: dict[str, Any], expected: list[tuple[int, int, int, int | None]]) -> None:
    """Tensor groups within a host first, then fewer hosts: hosts, tensor, pipeline, and the tensor size of a part.
    `min_devices` alone becomes a pipeline across the hosts."""
    found = [
        (span.hosts, span.whole.tensor, span.whole.pipeline, span.part.parallelism.tensor)
        for span in spans_of(profile(span_nodes=True, **fields))
    ]
    assert found == [each for each in expected if each[3] is not None]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({}, "on one device has nothing to spread"), ({"parallel": {"tensor": 2, "data": 2}}, "has no copies")],
)
def test_what_cannot_be_spread_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        profile(span_nodes=True, **fields)


def test_a_model_too_large_for_each_node_takes_two() -> None:
    """Both parts with their devices, as one plan whose memory is reserved together."""
    plan = plan_for(view(pair(), wide()))
    assert (plan.nodes, plan.fit) == (("a", "b"), Fit.NOW)
    assert [part.devices for part in (plan, *plan.parts)] == [(0, 1), (0, 1)]
    assert plan.whole == Parallelism(tensor=2, pipeline=2)
    assert [(each.node, each.device_share_mb, each.serves) for each in plan.reservations] == [
        ("a", 20000, True),
        ("b", 20000, False),
    ]
    assert "a + b: spans 2 neurons (tensor 2 x pipeline 2 x data 1)" in plan.reason


def test_without_the_switch_nothing_spans() -> None:
    moment = view(pair(), profile(min_devices=4, vram_mb=80000))
    assert planned(moment) is None


def test_one_node_that_has_room_goes_before_two() -> None:
    """Fewest hosts; but free memory on two goes before an eviction on one."""
    large = able("c", 24000, 24000, 24000, 24000)
    assert plan_for(view(fleet(*pair().nodes.values(), large), wide())).nodes == ("c",)
    busy = able("c", 24000, 24000, 24000, 24000, models={"other": On(20000, (0, 1, 2, 3))})
    assert plan_for(view(fleet(*pair().nodes.values(), busy), wide(), profile(id="other"))).nodes == ("a", "b")


def test_cards_are_equal() -> None:
    nodes = [
        able("a", 24000, 24000, card="4090"),
        able("b", 24000, 24000, card="A5000"),
        able("c", 24000, 24000, card="4090"),
    ]
    assert plan_for(view(fleet(*nodes), wide())).nodes == ("a", "c")
    assert planned(view(fleet(*nodes[:2]), wide())) is None


@pytest.mark.parametrize(
    ("networks", "expected", "shown"),
    [
        ({}, "a b", ""),
        ({"c": (None, 100), "d": (None, 100)}, "c d", "100 Gbit/s"),
        ({"a": (None, 10), "b": (None, 25), "c": (None, 25), "d": (None, 10)}, "b c", "25 Gbit/s"),
        ({"a": (None, 10), "b": (None, 10), "c": (None, 10), "d": (None, 100)}, "a b", "10 Gbit/s"),
        ({"b": ("rack1", None), "d": ("rack1", None)}, "b d", "network rack1"),
        ({"a": ("rack1", 100), "b": ("rack2", 100), "c": ("rack2", 100), "d": ("rack3", 200)}, "b c",
         "network rack2, 100 Gbit/s"),
        ({"a": ("rack1", 25), "b": ("rack1", 25), "c": ("rack2", 100), "d": ("rack2", 100)}, "c d",
         "network rack2, 100 Gbit/s"),
        ({"a": ("x", 10), "b": ("y", 10), "c": ("z", 10), "d": (None, 10)}, "a b", "between x and y, speed unknown"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parallel", [None, {"tensor": 4}])
def test_which_nodes_are_well_connected(
    networks: dict[str, tuple[str | None, float | None]], expected: str, shown: str, parallel: dict[str, int] | None
) -> None:
    """One network before several, then the fastest link of the slowest node, whether the network carries a pipeline or
    tensor groups. Where nothing is configured the order is that of the names."""
    nodes = fleet(*(able(name, 24000, 24000) for name in "abcd"))
    configured = {name: HostNetwork(*each) for name, each in networks.items()}
    model = wide() if parallel is None else wide(min_devices=4, parallel=parallel)
    plan = plan_for(view(nodes, model, networks=configured))
    assert (" ".join(plan.nodes), plan.network) == (expected, shown)
    assert plan.whole is not None
    assert f"({plan.whole}){f' over {shown}' if shown else ''}, fits now" in plan.reason


def test_a_fast_network_goes_before_free_memory() -> None:
    """An eviction takes seconds, and the network is slow for as long as the engine runs. On equal networks what has to
    be evicted decides."""
    on = {"a": {}, "b": {}, "c": {"x": On(20000, (0,))}, "d": {"x": On(20000, (0,))}}
    nodes = fleet(*(able(name, 24000, 24000, models=models) for name, models in on.items()))
    fast = {"c": HostNetwork(gbps=100), "d": HostNetwork(gbps=100)}
    assert plan_for(view(nodes, wide(), profile(id="x"), networks=fast)).nodes == ("c", "d")
    equal = {name: HostNetwork(gbps=100) for name in "abcd"}
    assert plan_for(view(nodes, wide(), profile(id="x"), networks=equal)).nodes == ("a", "b")


def test_nodes_of_one_network_follow_one_another() -> None:
    """If no network has enough nodes: as few networks as possible, and few stages of the pipeline apart."""
    nodes = fleet(*(able(name, 24000) for name in "abcdef"))
    names = {"a": "x", "b": "y", "c": "z", "d": "y", "e": "x", "f": "x"}
    configured = {name: HostNetwork(network) for name, network in names.items()}
    assert plan_for(view(nodes, wide(), networks=configured)).nodes == ("a", "e", "f", "b")


def test_a_reported_speed_counts_where_none_is_configured() -> None:
    def reporting(name: str, mbps: int | None) -> NodeSnapshot:
        node = able(name, 24000, 24000)
        assert node.discovery is not None
        return replace(node, discovery=node.discovery.model_copy(update={"network_mbps": mbps}))

    nodes = fleet(reporting("a", 1000), reporting("b", None), reporting("c", 25000), reporting("d", 25000))
    plan = plan_for(view(nodes, wide()))
    assert (plan.nodes, plan.network) == (("c", "d"), "25 Gbit/s")
    configured = {"a": HostNetwork(gbps=100), "b": HostNetwork(gbps=100)}
    assert plan_for(view(nodes, wide(), networks=configured)).nodes == ("a", "b")


def test_a_node_that_cannot_take_a_part_is_left_out() -> None:
    """An older neuron, one that is down, one after a failure."""
    nodes = [
        able("old", 24000, 24000, groups=False),
        able("down", 24000, 24000, healthy=False),
        able("a", 24000, 24000),
        able("b", 24000, 24000),
        able("c", 24000, 24000),
    ]
    assert plan_for(view(fleet(*nodes), wide())).nodes == ("a", "b")
    failed = {("m", "a"): Backoff(NOW + 10, "it failed")}
    assert plan_for(view(fleet(*nodes), wide(), backoffs=failed)).nodes == ("b", "c")
    assert plan_for(view(fleet(*nodes), wide(pinned_on=["a", "c"]))).nodes == ("a", "c")


def test_evictions_on_all_nodes_are_one_plan() -> None:
    nodes = fleet(
        able("a", 24000, 24000, models={"x": On(20000, (0,))}), able("b", 24000, 24000, models={"y": On(20000, (1,))})
    )
    plan = plan_for(view(nodes, wide(), profile(id="x"), profile(id="y")))
    assert plan.fit is Fit.AFTER_EVICTION
    assert {(each.resident.key.model_id, each.resident.key.node) for each in plan.eviction_plan.evictions} == {
        ("x", "a"),
        ("y", "b"),
    }


def starting_part(model_id: str, rank: int) -> ModelView:
    told = {"id": "g", "rank": rank, "size": 2, "master_addr": "10.0.0.1", "master_port": 21000}
    return ModelView.model_validate({"id": model_id, "status": "loading", "devices": [0], "group": told})


def test_two_groups_do_not_start_on_the_same_devices() -> None:
    """Their parts could wait for each other. The second waits, or takes other nodes."""
    other = wide(id="other", vram_mb=8000)
    moment = view(pair(), other, wide(vram_mb=8000), waiting={"m": 1})
    after = after_start(moment, plan_for(moment, "other"))
    assert planned(after) is None
    assert "a waits until other has started there" in schedule_loads(after).wait_reasons["m"]
    more = fleet(*pair().nodes.values(), *(able(name, 24000, 24000) for name in "cd"))
    moment = view(more, other, wide(vram_mb=8000))
    assert plan_for(after_start(moment, plan_for(moment, "other"))).nodes == ("c", "d")
    theirs = fleet(*(with_entry(able(name, 24000, 24000), starting_part("x", rank)) for rank, name in enumerate("ab")))
    assert planned(view(theirs, wide(vram_mb=8000))) is None


def test_a_group_starts_beside_another_and_after_a_single_engine() -> None:
    """On other devices it waits for nothing; an engine on one node starts in any case."""
    nodes = [able(name, 24000, 24000, 24000) for name in "ab"]
    beside = fleet(*(with_entry(node, starting_part("x", rank)) for rank, node in enumerate(nodes)))
    plan = plan_for(view(beside, wide()))
    assert [part.devices for part in (plan, *plan.parts)] == [(1, 2), (1, 2)]
    alone = ModelView(id="x", status="loading", devices=[0])
    after = plan_for(view(fleet(*(with_entry(able(name, 24000, 24000), alone) for name in "ab")), wide()))
    assert after.starts.models == ("x",)


def test_a_group_counts_as_one_replica() -> None:
    """Four nodes hold two groups, and no node twice."""
    nodes = fleet(*(able(name, 24000, 24000) for name in "abcd"))
    steps = reconcile_replicas(view(nodes, wide(replicas={"min": 3})), [wide(replicas={"min": 3})])
    assert [plan.nodes for plan, _ in steps.loads] == [("a", "b"), ("c", "d")]
    started = after_start(view(nodes, wide(replicas={"min": 2})), steps.loads[0][0])
    [(second, _)] = reconcile_replicas(started, [wide(replicas={"min": 2})]).loads
    assert second.nodes == ("c", "d")


def test_why_a_model_does_not_span() -> None:
    """The client learns what is missing."""
    moment = view(
        fleet(able("a", 24000, 24000), able("b", 12000, 12000)), wide(min_device_vram_mb=16000), waiting={"m": 1}
    )
    error = schedule_loads(moment).rejected["m"]
    assert error.code == "no_feasible_neuron"
    full = On(23000, (0, 1))
    taken = fleet(able("a", 24000, 24000), able("b", 24000, 24000, models={"pinned": full}))
    moment = view(taken, wide(), profile(id="pinned", pinned_on=["b"]))
    error = placement_error(moment, "m", all_verdicts(moment, wide()))
    assert error.code == "insufficient_vram"
    assert "2 neurons with equal cards are needed for tensor 2 x pipeline 2 x data 1: b " in error.message


def test_the_list_of_models_knows_where_it_could_run() -> None:
    cache = FeasibilityCache()
    assert cache.nodes(wide(), pair()) == ("a", "b")
    assert cache.nodes(wide(), fleet(able("a", 24000, 24000))) == ()
    assert cache.nodes(profile(min_devices=4, vram_mb=80000), pair()) == ()


def test_the_command_of_a_part() -> None:
    """The whole split, and this part's devices and memory."""
    moment = view(pair(), wide(args=["--max-model-len", "4096"]))
    plan = plan_for(moment)
    assert plan.whole is not None
    told = GroupPart(id="g", rank=1, size=2, master_addr="10.0.0.1", master_port=21000)
    [other] = plan.parts
    command = part_command(other, plan.whole, wide(args=["--max-model-len", "4096"]), moment.fleet.nodes["b"], told)
    assert (command.group, command.devices, command.vram_mb) == (told, [0, 1], 40000)
    assert (command.tensor_parallel, command.parallel) == (2, Parallelism(tensor=2, pipeline=2))
    assert command.args == ["--max-model-len", "4096"]


def test_the_best_variant_that_fits_spans() -> None:
    variants = [{"name": "big", "min_devices": 8}, {"name": "small", "min_devices": 4}]
    plan = best_plan(all_verdicts(view(pair(), wide(variants=variants)), wide(variants=variants)))
    assert isinstance(plan, LoadPlan)
    assert (plan.variant, plan.nodes) == ("small", ("a", "b"))


def test_a_minimum_protects_every_part() -> None:
    """Also on the node of a part that takes no requests."""

    def part(rank: int) -> ModelView:
        told = {"id": "g", "rank": rank, "size": 2, "master_addr": "10.0.0.1", "master_port": 21000}
        fields = {"status": "loaded", "devices": [0, 1], "vram_used_mb": 40000, "vram_booked_mb": 40000}
        return ModelView.model_validate({"id": "m", "instance": "0", "group": told, **fields})

    nodes = [
        with_entry(able(name, 24000, 24000, foreign_mb=(20000, 20000)), part(rank)) for rank, name in enumerate("ab")
    ]
    other = profile(id="other", vram_mb=20000, pinned_on=["b"], residency_priority=100)
    kept = view(fleet(*nodes), wide(replicas={"min": 1}), other)
    assert planned(kept, "other") is None
    evicting = plan_for(view(fleet(*nodes), wide(), other), "other")
    assert evicting.fit is Fit.AFTER_EVICTION


def test_a_host_that_dials_holds_no_part() -> None:
    """Other hosts cannot connect to it. `explain` says so."""
    whole = pair()
    both = replace(whole, nodes={**whole.nodes, "a": replace(whole.nodes["a"], endpoint="dial://a")})
    assert FeasibilityCache().nodes(wide(), whole) == ("a", "b")
    assert FeasibilityCache().nodes(wide(), both) == ()
    [reason] = [each.reason for each in all_verdicts(view(both), wide()) if each.node == "a"]
    assert 'with dial = "out" it shares no engine with other hosts' in str(reason)
