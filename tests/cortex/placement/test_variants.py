"""Which variant of a model a node gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from cortex.control.explain import explain
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.candidates import candidate_nodes
from cortex.placement.fair_queue import schedule_loads
from cortex.placement.feasibility import infeasible_reason, inferred_variant, oversize_reason
from cortex.placement.inputs import Backoff, PlanningView
from cortex.placement.load_plan import Fit, LoadPlan, load_command
from cortex.placement.node_plan import plan_on_node
from cortex.placement.planner import NodeVerdict, all_verdicts, best_plan, plan_variant
from cortex.placement.refusal import unknown_model_error
from cortex.placement.replicas import reconcile_replicas
from tests.cortex.fleets import On, fleet, host
from tests.cortex.views import NOW, profile, used, view

FP8 = {"quant": "fp8", "vram_mb": 14000, "min_compute_capability": "8.9", "args": ["--kv-cache-dtype", "fp8"]}
AWQ = {"quant": "awq", "vram_mb": 8000, "source": "org/m-awq"}
MODEL = profile(variants=[FP8, AWQ])


def with_capability(entry: NodeSnapshot, capability: str | None, *, instances: bool = True) -> NodeSnapshot:
    """The node with GPUs of this compute capability, and by default one that reports variants."""
    assert entry.discovery is not None
    devices = [device.model_copy(update={"compute_capability": capability}) for device in entry.discovery.devices]
    return replace(entry, discovery=entry.discovery.model_copy(update={"devices": devices, "instances": instances}))


def beast(models: Mapping[str, On] | None = None, **fields: Any) -> NodeSnapshot:
    """2x RTX 5090."""
    return with_capability(host("beast", 32607, 32607, models=models), "12.0", **fields)


def quadbrat(models: Mapping[str, On] | None = None, **fields: Any) -> NodeSnapshot:
    """An RTX 3060."""
    return with_capability(host("quadbrat", 12288, models=models), "8.6", **fields)


def verdicts(moment: PlanningView, model: ModelProfile = MODEL) -> dict[str, NodeVerdict]:
    return {each.node: each for each in all_verdicts(moment, model)}


def labelled(entry: NodeSnapshot, variant: str | None, model_id: str = "m") -> NodeSnapshot:
    """The node, reporting this variant of the model."""
    [told] = entry.models[model_id].values()
    told = told.model_copy(update={"variant": variant, "instance": "0"})
    return replace(entry, models={**entry.models, model_id: {"0": told}})


def plan_of(verdict: NodeVerdict) -> LoadPlan:
    assert verdict.plan is not None, verdict.reason
    return verdict.plan


def test_each_node_gets_the_first_variant_that_it_can_hold() -> None:
    """FP8 on the 5090s, AWQ on the 3060. The verdict says why not the better one."""
    found = verdicts(view(fleet(beast(), quadbrat()), MODEL))
    assert (plan_of(found["beast"]).variant, found["beast"].passed_over) == ("fp8", ())
    assert plan_of(found["quadbrat"]).variant == "awq"
    assert found["quadbrat"].passed_over == (("fp8", "needs 1 device with compute capability 8.9, 0 of 1 have that"),)
    assert [plan_of(found[name]).device_share_mb for name in ("beast", "quadbrat")] == [14000, 8000]


def test_a_variant_too_large_for_the_empty_node_is_passed_over() -> None:
    """`vram_mb` rules no host out, so without a smaller variant it is tried anyway."""
    model = profile(variants=[{**FP8, "min_compute_capability": "8.0"}, AWQ])
    [found] = all_verdicts(view(fleet(quadbrat()), model), model)
    assert (plan_of(found).variant, plan_of(found).fit) == ("awq", Fit.NOW)
    assert found.passed_over == (("fp8", "needs 14000 MiB on each device, more than the 12288 MiB in total"),)
    large = profile(variants=[{"name": "a", "vram_mb": 20000}, {"name": "b", "vram_mb": 15000}])
    [found] = all_verdicts(view(fleet(quadbrat()), large), large)
    assert (plan_of(found).variant, plan_of(found).fit) == ("a", Fit.TOO_LARGE)


def test_a_busy_node_gets_its_best_variant() -> None:
    """An idle model is evicted for FP8, although AWQ would fit without that."""
    there = {"old": On(22000, (0,)), "other": On(20000, (1,))}
    moment = view(fleet(beast(there)), MODEL, profile(id="old", vram_mb=22000), profile(id="other", vram_mb=20000))
    plan = plan_of(verdicts(moment)["beast"])
    assert (plan.variant, plan.fit) == ("fp8", Fit.AFTER_EVICTION)


def test_a_later_variant_is_used_where_protected_models_leave_no_memory_for_the_first() -> None:
    there = {"old": On(22000, (0,)), "other": On(20000, (1,))}
    kept = [profile(id=name, vram_mb=22000, residency_priority=900) for name in there]
    found = verdicts(view(fleet(beast(there)), MODEL, *kept))["beast"]
    assert (plan_of(found).variant, plan_of(found).fit) == ("awq", Fit.NOW)
    [(passed, reason)] = found.passed_over
    assert passed == "fp8"
    assert "old stays (priority 900 is above 100)" in reason
    too_full = {"old": On(30000, (0,)), "other": On(30000, (1,))}
    found = verdicts(view(fleet(beast(too_full)), MODEL, *kept))["beast"]
    assert found.plan is None
    assert found.reason.startswith("fp8 needs 14000 MiB, ")
    assert "; awq needs 8000 MiB, " in found.reason


def test_a_backoff_is_of_one_variant() -> None:
    """FP8 has failed there, or everywhere: AWQ is loaded meanwhile. After a temporary cause FP8 is waited for."""
    for node in ("beast", "*"):
        moment = view(fleet(beast()), MODEL, backoffs={("m@fp8", node): Backoff(NOW + 5, "no kernel")})
        found = verdicts(moment)["beast"]
        assert plan_of(found).variant == "awq"
        assert found.passed_over == (("fp8", "not tried again for 5.0 s: no kernel"),)
    moment = view(fleet(beast()), MODEL, backoffs={("m@fp8", "beast"): Backoff(NOW + 1, "restarts", temporary=True)})
    found = verdicts(moment)["beast"]
    assert (found.plan, found.temporary) == (None, True)
    moment = view(fleet(beast()), MODEL, backoffs={("m", "beast"): Backoff(NOW + 5, "of all")})
    assert verdicts(moment)["beast"].reason == "not tried again for 5.0 s: of all"


def test_between_nodes_effort_counts_before_the_variant_and_the_variant_before_tightness() -> None:
    """With memory free on both, the better variant is loaded, although the small card would be the tighter fit. No
    model is evicted for a better variant."""
    plan = best_plan(all_verdicts(view(fleet(quadbrat(), beast()), MODEL), MODEL))
    assert plan is not None
    assert (plan.node, plan.variant) == ("beast", "fp8")
    there = {"old": On(22000, (0,)), "other": On(22000, (1,))}
    moment = view(fleet(quadbrat(), beast(there)), MODEL, *(profile(id=name, vram_mb=22000) for name in there))
    plan = best_plan(all_verdicts(moment, MODEL))
    assert plan is not None
    assert (plan.node, plan.variant, plan.fit) == ("quadbrat", "awq", Fit.NOW)


def test_a_request_for_one_variant_gets_no_other() -> None:
    """Nodes that cannot hold it are infeasible for it; a node with another variant of the model does not count."""
    moment = view(fleet(quadbrat(), beast()), MODEL)
    fp8, awq = MODEL.choices
    assert verdicts(moment, fp8)["quadbrat"].plan is None
    assert {plan_of(each).variant for each in verdicts(moment, awq).values()} == {"awq"}
    plan = best_plan(all_verdicts(moment, awq))
    assert plan is not None
    assert (plan.node, plan.requested.name) == ("quadbrat", "m@awq")


def test_a_sleeping_variant_is_woken() -> None:
    """Waking takes a second: it is preferred to loading the better one. Another variant does not wake in its place."""
    asleep = {"m": On(500, (0,), status="sleeping", wants_mb=7500)}
    moment = view(fleet(labelled(beast(asleep), "awq")), MODEL)
    plan = plan_of(verdicts(moment)["beast"])
    assert (plan.variant, plan.wakes, plan.fit) == ("awq", True, Fit.AWAKE)
    plan = plan_of(verdicts(moment, MODEL.choices[0])["beast"])
    assert (plan.variant, plan.wakes) == ("fp8", False)
    gone = labelled(beast(asleep), "gptq")
    plan = plan_of(verdicts(view(fleet(gone), MODEL))["beast"])
    assert (plan.variant, plan.wakes) == ("fp8", False)


def test_a_node_that_does_not_report_variants_gets_the_first_that_it_can_hold() -> None:
    """So that cortex knows which one it runs."""
    old = beast(instances=False)
    moment = view(fleet(old), MODEL)
    assert plan_of(verdicts(moment)["beast"]).variant == inferred_variant(MODEL, old) == "fp8"
    found = verdicts(moment, MODEL.choices[1])["beast"]
    assert found.plan is None
    assert "does not report variants, so it gets fp8 only" in found.reason
    assert inferred_variant(MODEL, quadbrat(instances=False)) == "awq"
    assert inferred_variant(profile(), old) is None
    assert inferred_variant(profile(variants=[{"harness": "sim"}]), old) is None


def test_the_load_command_has_the_fields_of_the_variant() -> None:
    """And its name as a label."""
    node = quadbrat()
    plan = plan_of(verdicts(view(fleet(node), MODEL))["quadbrat"])
    command = load_command(plan, MODEL.choice(plan.variant), node)
    assert (command.model_id, command.variant, command.quant) == ("m", "awq", "awq")
    assert (command.source, command.vram_mb, command.args, command.devices) == ("org/m-awq", 8000, [], [0])
    assert plan.reservation.variant == "awq"


def test_sizes_and_load_times_are_those_of_the_variant() -> None:
    """What was measured of one says nothing of the other, and a resident has the size of its own variant."""
    model = profile(variants=[{"quant": "fp8", "min_compute_capability": "8.9"}, {"quant": "awq"}])
    moment = view(
        fleet(beast(), quadbrat()),
        model,
        observed_share_mb={"m": 1, "m@fp8": 15000, "m@awq": 9000},
        load_secs={"m": {"beast": 1.0}, "m@fp8": {"beast": 40.0}, "m@awq": {"quadbrat": 20.0}},
    )
    found = {name: plan_of(each) for name, each in verdicts(moment, model).items()}
    assert [found[name].device_share_mb for name in ("beast", "quadbrat")] == [15000, 9000]
    assert [found[name].expected_secs for name in ("beast", "quadbrat")] == [40.0, 20.0]
    there = labelled(quadbrat({"m": On(8000, (0,), known=False)}), "awq")
    newcomer = profile(id="n", vram_mb=12000)
    plan = plan_of(all_verdicts(view(fleet(there), MODEL, newcomer), newcomer)[0])
    assert [each.resident.frees_mb for each in plan.eviction_plan.evictions] == [8000]


def test_a_variant_pinned_to_a_node_is_not_evicted_there() -> None:
    """The other variants are."""
    model = profile(variants=[{**FP8, "pinned_on": ["beast"]}, AWQ])
    newcomer = profile(id="n", vram_mb=32000)
    for variant, evicted in (("fp8", False), ("awq", True)):
        node = labelled(with_capability(host("beast", 32607, models={"m": On(14000)}), "12.0"), variant)
        [found] = all_verdicts(view(fleet(node), model, newcomer), newcomer)
        assert (found.plan is not None) == evicted, found.reason


def test_large_fleets_consider_nodes_for_every_variant() -> None:
    """Each variant gets its share of the candidates, so that a full fleet of one kind does not hide the other."""
    wide = [with_capability(host(f"w{i:03}", 24000), "8.9") for i in range(200)]
    small = [with_capability(host(f"s{i:03}", 12000), "8.6") for i in range(200)]
    found = candidate_nodes(view(fleet(*wide, *small), MODEL), MODEL)
    assert {node.name[0] for node in found} == {"w", "s"}
    assert len(found) <= 64


@pytest.mark.parametrize("seed", range(300))
def test_the_variant_is_what_a_plain_loop_finds(seed: int) -> None:
    """The first that fits the empty node and can be loaded now, else the first that can be loaded now, else the first
    that can be tried."""
    random = Random(seed)
    model = profile(
        variants=[
            {
                "name": f"v{number}",
                "vram_mb": random.choice((None, 4000, 9000, 20000, 40000)),
                "min_devices": random.choice((1, 1, 2)),
                "min_compute_capability": random.choice((None, "8.6", "8.9", "12.0")),
                "pinned_on": random.choice(([], [], ["a"])),
            }
            for number in range(random.randint(1, 4))
        ]
    )
    other = profile(id="o", vram_mb=9000, residency_priority=random.choice((50, 500)))
    totals = [random.choice((12000, 24000, 32000))] * random.choice((1, 2))
    there = {"o": On(9000)} if random.random() < 0.5 else {}
    node = with_capability(host(random.choice("ab"), *totals, models=there), random.choice((None, "8.6", "12.0")))
    moment = view(fleet(node), model, other, usages={("o", node.name): used(0, idle=500, age=1000)} if there else {})
    suitable = [each for each in model.choices if infeasible_reason(each, node) is None]
    order = [each for each in suitable if oversize_reason(each, node) is None]
    order += [each for each in suitable if each not in order]
    plans = [(each, plan_on_node(moment, each, node)) for each in order]
    fitting = [each.variant for each, plan in plans if isinstance(plan, LoadPlan) and plan.fit is not Fit.TOO_LARGE]
    possible = [each.variant for each, plan in plans if isinstance(plan, LoadPlan)]
    expected = next(iter([*fitting, *possible]), None)
    found = plan_variant(moment, model, node)
    assert (None if found.plan is None else found.plan.variant) == expected
    if found.plan is not None:
        place = next(each.place for each in model.choices if each.variant == expected)
        assert [name for name, _ in found.passed_over] == [f"v{number}" for number in range(place)]
        assert all(reason for _, reason in found.passed_over)


def test_a_variant_is_loaded_beside_another_one_or_in_its_place() -> None:
    """On a node with several instances, for a request that insists on it. Not for a request for the model."""
    fp8, awq = MODEL.choices
    node = labelled(with_capability(host("n", 24000, models={"m": On(14000)}), "12.0"), "fp8")
    moment = view(fleet(node), MODEL, usages={("m", "n", "0"): used(0, idle=500, age=1000)})
    plan = plan_of(verdicts(moment, awq)["n"])
    assert (plan.variant, plan.instance, plan.fit, plan.devices) == ("awq", "1", Fit.NOW, (0,))
    assert verdicts(moment, fp8)["n"].reason == verdicts(moment)["n"].reason == "already serves it"
    full = labelled(with_capability(host("n", 16000, models={"m": On(14000)}), "12.0"), "fp8")
    moment = view(fleet(full), MODEL, usages={("m", "n", "0"): used(0, idle=500, age=1000)})
    plan = plan_of(verdicts(moment, awq)["n"])
    assert (plan.variant, plan.fit) == ("awq", Fit.AFTER_EVICTION)
    assert [each.resident.key for each in plan.eviction_plan.evictions] == [("m", "n", "0")]
    pinned = profile(variants=[{**FP8, "pinned_on": ["n"]}, AWQ])
    refused = verdicts(view(fleet(full), pinned), pinned.choices[1])["n"]
    assert refused.plan is None
    assert "m stays (pinned on n)" in refused.reason


def test_requests_for_a_model_and_for_its_variants_share_loads() -> None:
    """A request for the model waits for any load of it, one for a variant only for that variant's."""
    where = fleet(beast(), quadbrat())
    both = schedule_loads(view(where, MODEL, waiting={"m@awq": 2.0, "m": 1.0}))
    assert [plan.requested.name for plan in both.loads] == ["m@awq"]
    apart = schedule_loads(view(where, MODEL, waiting={"m@awq": 1.0, "m": 2.0}))
    assert [(plan.requested.name, plan.node) for plan in apart.loads] == [("m@fp8", "beast"), ("m@awq", "quadbrat")]
    serving = labelled(quadbrat({"m": On(8000)}), "awq")
    moment = view(fleet(beast(), serving), MODEL, waiting={"m": 1.0, "m@awq": 1.0, "m@fp8": 1.0})
    assert [(plan.requested.name, plan.node) for plan in schedule_loads(moment).loads] == [("m@fp8", "beast")]
    assert moment.fleet.serving("m@fp8") == []
    assert [engine.node.name for engine in moment.fleet.serving("m@awq")] == ["quadbrat"]


def test_explain_hints_at_tools_for_any_variant() -> None:
    """One that vLLM would refuse tools in is enough."""
    able = ["--enable-auto-tool-choice"]
    for second, hinted in (({"args": able}, False), ({"args": []}, True)):
        model = profile(variants=[{"args": able}, second])
        assert bool(explain("m", view(fleet(beast()), model), lambda _: 0)["hints"]) == hinted


def test_an_engine_without_a_variant_serves_the_plain_id_only() -> None:
    """It was loaded by hand, or before the catalogue had variants."""
    moment = view(fleet(labelled(beast({"m": On(14000)}), None)), MODEL)
    assert [engine.node.name for engine in moment.fleet.serving("m")] == ["beast"]
    assert moment.fleet.serving("m@fp8") == []
    plan = plan_of(verdicts(moment, MODEL.choices[0])["beast"])
    assert (plan.instance, plan.devices) == ("1", (1,))


def test_a_refusal_names_the_variant() -> None:
    """Why no node can hold it, and what a failed load of one variant means for a request."""
    only = fleet(quadbrat())
    error = schedule_loads(view(only, MODEL, waiting={"m@fp8": 1.0})).rejected["m@fp8"]
    assert (error.status, error.code) == (404, "no_feasible_neuron")
    assert "no neuron can hold the model 'm@fp8'" in error.message
    for permanent in (True, False):
        failed = {("m@awq", "quadbrat"): Backoff(NOW + 5, "bad weights", permanent=permanent)}
        rejected = schedule_loads(view(only, MODEL, waiting={"m": 1.0, "m@awq": 1.0}, backoffs=failed)).rejected
        for name in ("m", "m@awq"):
            assert (rejected[name].code, rejected[name].message) == ("cold_load_failed", "bad weights")
            assert rejected[name].permanent == permanent
    held = view(only, MODEL, waiting={"m@awq": 1.0}, holds={("m", "*"): NOW + 60})
    assert "an operator has unloaded" in schedule_loads(held).rejected["m@awq"].message
    catalogue = held.catalogue
    error = unknown_model_error("m@int4", catalogue, only)
    assert (error.status, error.code) == (404, "model_not_found")
    assert "'m@int4' does not exist: 'm' has the variants fp8, awq." in error.message
    assert "'n' has no variants." in unknown_model_error("n@x", Catalogue(models=(profile(id="n"),)), only).message


def test_a_replica_under_pressure_is_a_smaller_variant_if_only_that_fits() -> None:
    """Where the better one would have to evict something, which a further replica never does."""
    model = profile(variants=[{**FP8, "vram_mb": 24000}, AWQ], replicas={"min": 0, "max": 3})
    serving = labelled(with_capability(host("first", 32607, models={"m": On(24000)}), "12.0"), "fp8")
    other = with_capability(host("other", 32607, models={"idle": On(20000)}), "12.0")
    moment = view(fleet(serving, other), model, profile(id="idle", vram_mb=20000), overloaded_secs={"m": 60})
    [(plan, _)] = reconcile_replicas(moment, [model]).loads
    assert (plan.node, plan.variant, plan.fit) == ("other", "awq", Fit.NOW)
    full = with_capability(host("other", 32607, models={"idle": On(30000)}), "12.0")
    moment = view(fleet(serving, full), model, profile(id="idle", vram_mb=30000), overloaded_secs={"m": 60})
    assert not reconcile_replicas(moment, [model]).loads
