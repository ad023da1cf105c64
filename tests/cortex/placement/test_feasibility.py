"""The feasibility cache gives the same answers as checking each node."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

from cortex.config.profile import ModelProfile
from cortex.control.explain import explain
from cortex.fleet.snapshot import FleetSnapshot
from cortex.placement.feasibility import FeasibilityCache, infeasible_reason, is_feasible
from shared.protocol import Discovery
from tests.cortex.fleets import fleet, host, node
from tests.cortex.views import view

PROFILES = [
    ModelProfile(id="m", harness=harness, min_devices=devices, min_device_vram_mb=floor, pinned_on=pinned)
    for harness, devices, floor, pinned in product(
        ("vllm", "sim"), (1, 2, 3), (None, 12000, 24000, 48000), ((), ("a",), ("c", "a", "unlisted"))
    )
]
PROFILES += [
    ModelProfile.model_validate({"id": "m", "parallel": split})
    for split in ({"tensor": 2}, {"pipeline": 2}, {"data": 3}, {"expert": True}, {"tensor": 2, "pipeline": 2})
]
PROFILES += [ModelProfile(id="m", min_compute_capability=lowest) for lowest in ("8.6", "8.9", "12.0")]
VARIANTS: tuple[dict[str, object], ...] = (
    {"quant": "fp8", "min_compute_capability": "8.9"},
    {"quant": "fp4", "min_compute_capability": "12.0", "min_devices": 2},
    {"quant": "awq", "min_device_vram_mb": 12000, "pinned_on": ["c", "a", "unlisted"]},
    {"name": "wide", "parallel": {"data": 3}},
    {"name": "other", "harness": "sim", "pinned_on": ["twin"]},
)
PROFILES += [
    ModelProfile.model_validate({"id": "m", "variants": order, "pinned_on": pinned})
    for count in (1, 2, 3)
    for order in permutations(VARIANTS, count)
    for pinned in ([], ["a", "twin"])
]


def asked_one_by_one(profile: ModelProfile, snapshot: FleetSnapshot) -> tuple[str, ...]:
    """A plain loop over neurons and variants."""
    return tuple(
        entry.name for entry in snapshot.nodes.values() if any(is_feasible(choice, entry) for choice in profile.choices)
    )


def test_cached_answers_match_the_rule() -> None:
    """One cache for every requirement and every kind of neuron, while neurons come and go."""
    nodes = [
        node("c", 24000, 24000),
        node("a", 12000, 24000, harnesses=("vllm", "sim")),
        node("twin", 24000, 12000, harnesses=("sim", "vllm")),
        node("lost", 24000, 48000, lost=(1,)),
        node("mig", 24000, 24000, 24000, mig=(0,)),
        node("sliced", 24000, 12000, 12000, 12000, mig=(0,), slices=(1, 2, 3)),
        node("whole", 12000, 12000, 12000),
        node("unknown", 24000, discovered=False),
        node("away", 48000, healthy=False),
        node("none"),
        host("ours", 24000, 24000),
        host("wide", *[24000] * 4),
        node("ada", 24000, 24000, capability="8.9"),
        node("blackwell", 32000, 32000, capability="12.0"),
        node("odd", 24000, capability="?"),
    ]
    feasibility = FeasibilityCache()
    for snapshot in (fleet(*nodes), fleet(*nodes[:3]), fleet(*reversed(nodes)), fleet(), fleet(*nodes[2:])):
        for profile in PROFILES:
            found = asked_one_by_one(profile, snapshot)
            assert feasibility.nodes(profile, snapshot) == found
            assert tuple(name for name, entry in snapshot.nodes.items() if is_feasible(profile, entry)) == found


def test_a_neuron_that_starts_again_with_the_same_devices_changes_no_list() -> None:
    """The same object is returned, so that callers can cache what they derive from it."""
    first, second = node("a", 24000), node("b", 24000)
    feasibility, profile = FeasibilityCache(), ModelProfile(id="m")
    found = feasibility.nodes(profile, fleet(first, second))
    assert first.discovery is not None
    again = replace(first, discovery=first.discovery.model_copy(update={"instance_id": "two"}))
    assert feasibility.nodes(profile, fleet(again, second)) is found
    bigger = replace(first, discovery=node("a", 48000).discovery)
    assert feasibility.nodes(profile, fleet(bigger, second)) is found
    assert feasibility.nodes(profile, fleet(replace(first, discovery=Discovery()), second)) == ("b",)


def test_neurons_are_evaluated_again_only_when_a_topology_changes() -> None:
    """An unchanged topology object is trusted: thousands of lookups happen between two changes."""
    topology = object()
    feasibility, profile = FeasibilityCache(), ModelProfile(id="m")
    found = feasibility.nodes(profile, replace(fleet(node("a", 24000)), topology=topology))
    unseen = replace(fleet(node("a", 24000), node("b", 24000)), topology=topology)
    assert feasibility.nodes(profile, unseen) is found
    assert feasibility.nodes(profile, replace(unseen, topology=object())) == ("a", "b")


def test_protocol_v1_neurons_take_tensor_parallel_models_only() -> None:
    """They would ignore `parallel` and load the model in another way. The reason says so."""
    old, new = (host("n", *[24000] * 4, protocol_v1=v1) for v1 in (True, False))
    for split, fits in (({"tensor": 4}, True), ({"tensor": 2, "data": 2}, False), ({"expert": True}, False)):
        profile = ModelProfile.model_validate({"id": "m", "parallel": split})
        assert (is_feasible(profile, old), is_feasible(profile, new)) == (fits, True)
        if not fits:
            because = f"protocol v1 neurons can only split a model by tensor parallelism, not as {profile.parallelism}"
            assert infeasible_reason(profile, old) == because


def test_a_neuron_that_can_hold_no_variant_says_why_for_each() -> None:
    """One reason is enough where it is the same for all."""
    profile = ModelProfile.model_validate({"id": "m", "variants": VARIANTS[:2]})
    assert infeasible_reason(profile, node("n", 24000, capability="8.9")) is None
    assert infeasible_reason(profile, node("n", 24000, capability="8.6")) == (
        "fp8 needs 1 device with compute capability 8.9, 0 of 1 have that; fp4 needs 2 devices, has 1"
    )
    assert infeasible_reason(profile, node("n", 24000, harnesses=("sim",))) == (
        "harness 'vllm' is not offered (offered: sim)"
    )


def test_explain_says_why_a_protocol_v1_neuron_gets_no_split_model() -> None:
    """For a fleet of such neurons the refusal of a request has the reason too."""
    split = ModelProfile.model_validate({"id": "m", "vram_mb": 8000, "parallel": {"pipeline": 2}})
    told = explain("m", view(fleet(host("old", 24000, 24000, protocol_v1=True)), split), lambda *_: 0)
    [node_told] = told["nodes"]
    assert not node_told["feasible"]
    for text in (node_told["reason"], told["decision"]["reason"]):
        assert "protocol v1 neurons can only split a model by tensor parallelism" in text
    both = fleet(host("old", 24000, 24000, protocol_v1=True), host("new", 24000, 24000))
    assert explain("m", view(both, split), lambda *_: 0)["decision"]["node"] == "new"
