"""A model of the catalogue that spans two neurons: cold load, failures, restarts, eviction."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from cortex.config.profile import ModelProfile
from cortex.control.load_backoff import BackoffCause
from cortex.control.load_failure import LoadFailure
from cortex.control.loads.group_loads import GroupLoads
from cortex.control.loads.neurons import NeuronAccess
from cortex.fleet.load_leases import LoadedElsewhere
from cortex.placement.load_plan import LoadPlan
from cortex.placement.planner import all_verdicts, best_plan
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.e2e.groups.conftest import Host, running_host
from tests.neuron.groups.groups import begin_part, checked_group, load_parts
from tests.neuron.neurons import marked_engines, marked_processes, until

WIDE = {"id": "org/wide", "harness": "sim", "span_nodes": True, "min_devices": 4, "vram_mb": 40000}
SMALL = {"id": "org/small", "harness": "sim", "vram_mb": 30000, "pinned_on": ["b"]}
ARGS = ["--load-secs", "0.2"]
RULES = {"placement": {"min_residency_secs": 0, "pause_secs": 0.2}}


def models(*entries: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return [{"args": ARGS, **entry, **changes} for entry in entries or (WIDE,)]


async def chat(cortex: RunningCortex, model: str = "org/wide", **fields: Any) -> tuple[int, str | None]:
    """The status, and the node that answered or the error."""
    async with cortex.chat(model, **{"max_tokens": 2, **fields}) as answer:
        body = await answer.json()
        return answer.status, answer.headers["x-cortex-node"] if answer.status == 200 else body["error"]["message"]


async def unloaded(cortex: RunningCortex, **where: str) -> None:
    async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": "org/wide", **where}) as answer:
        assert answer.status == 200, await answer.text()


async def test_a_chat_loads_the_model_over_two_neurons(start_cortex: StartCortex, hosts: list[Host], mark: str) -> None:
    """Tensor groups inside a host, the pipeline across, one booking on each; afterwards nothing is left."""
    cortex = await start_cortex(hosts, models())
    async with cortex.http.get(f"{cortex.url}/v1/models") as answer:
        [entry] = (await answer.json())["data"]
    assert (entry["id"], entry["feasible_on"], entry["loaded"]) == ("org/wide", ["a", "b"], False)
    async with cortex.http.get(f"{cortex.url}/fleet/explain?model=org/wide") as answer:
        decision = (await answer.json())["decision"]
    assert decision["action"] == "load"
    assert decision["parts"] == [{"node": "a", "devices": [0, 1]}, {"node": "b", "devices": [0, 1]}]
    assert decision["network"] is None
    assert decision["parallel"] == {"tensor": 2, "pipeline": 2, "data": 1, "expert": False}
    assert await chat(cortex) == (200, "a")
    assert [await chat(cortex) for _ in range(3)] == [(200, "a")] * 3
    async with cortex.http.get(f"{cortex.url}/v1/models") as answer:
        [entry] = (await answer.json())["data"]
    assert {each["node"]: each["group"]["rank"] for each in entry["locations"]} == {"a": 0, "b": 1}
    for rank, host in enumerate(hosts):
        entry = await host.neuron.model("org/wide")
        assert (entry["status"], entry["group"]["rank"], entry["devices"]) == ("loaded", rank, [0, 1])
        assert entry["vram_booked_mb"] == 20000
    await unloaded(cortex)
    assert not marked_processes(mark)


async def test_a_killed_part_is_planned_again(start_cortex: StartCortex, hosts: list[Host], mark: str) -> None:
    """The rest goes within seconds, and the next request gets a new engine on both neurons."""
    cortex = await start_cortex(hosts, models())
    for lost in (1, 0):
        assert (await chat(cortex))[0] == 200
        os.killpg((await hosts[lost].neuron.model("org/wide"))["pid"], signal.SIGKILL)
        await until(lambda: not marked_engines(mark))
    assert (await chat(cortex))[0] == 200


async def listed(hosts: list[Host], *statuses: str) -> bool:
    return [(await host.neuron.model("org/wide")).get("status") for host in hosts] == list(statuses)


async def plan_of(cortex: RunningCortex) -> tuple[LoadPlan, ModelProfile]:
    view = cortex.parts.scheduler.view()
    profile = view.profile("org/wide")
    assert profile is not None
    plan = best_plan(all_verdicts(view, profile))
    assert plan is not None
    return plan, profile


@pytest.mark.parametrize("loads", ["loading", "loaded"])
async def test_a_refused_load_leaves_the_engine_of_another_cortex(
    start_cortex: StartCortex, hosts: list[Host], loads: str
) -> None:
    """Both chose the same name for it. The one that comes second must not unload what the first loads or has loaded."""
    cortex = await start_cortex(hosts, models())
    plan, profile = await plan_of(cortex)
    theirs = asyncio.create_task(load_parts("g1", [host.neuron for host in hosts], "--load-secs", "1"))
    await until(lambda: listed(hosts, loads, loads))
    parts = cortex.parts
    groups = GroupLoads(NeuronAccess(parts.fleet, parts.clients, parts.pollers), parts.live)
    with pytest.raises(LoadedElsewhere):
        await groups.load(plan, profile, parts.loader.until_loaded)
    assert [answer.status for answer in await theirs] == [200, 200]


async def test_a_load_that_meets_that_of_another_cortex_waits_for_it(
    start_cortex: StartCortex, hosts: list[Host], mark: str
) -> None:
    """It is not a failure: there is no backoff on a neuron, and requests get the other's engine."""
    cortex = await start_cortex(hosts, models())
    plan, _ = await plan_of(cortex)
    theirs = asyncio.create_task(load_parts("g1", [host.neuron for host in hosts], "--load-secs", "1"))
    await until(lambda: listed(hosts, "loading", "loading"))
    job = cortex.parts.loader.start(plan, "a test", still_needed=lambda: True, done=lambda *_: None)
    asking = asyncio.create_task(chat(cortex))
    assert job.task is not None
    assert await job.task is None
    assert job.elsewhere == "a"
    assert await asking == (200, "a")
    assert [answer.status for answer in await theirs] == [200, 200]
    assert len(marked_engines(mark)) == 2


async def test_two_groups_that_start_in_opposite_order(start_cortex: StartCortex, hosts: list[Host], mark: str) -> None:
    """Another cortex begins one on the second neuron. Ours gives way without blaming a neuron, and starts when the
    other has."""
    cortex = await start_cortex(hosts, models())
    parts = cortex.parts
    plan, profile = await plan_of(cortex)
    b_first = [host.neuron for host in reversed(hosts)]
    at = await checked_group("0", list(b_first))
    assert (await begin_part(b_first[0], "org/other", "0", 0, at)).status == 202
    groups = GroupLoads(NeuronAccess(parts.fleet, parts.clients, parts.pollers), parts.live)
    with pytest.raises(LoadFailure, match="org/other starts, which spans several neurons too") as refused:
        await groups.load(plan, profile, parts.loader.until_loaded)
    assert (refused.value.cause, refused.value.node) == (BackoffCause.BUSY, "b")
    assert len(marked_engines(mark)) == 1
    asking = asyncio.create_task(chat(cortex))
    await until(lambda: parts.scheduler.wait_reason("org/wide") is not None)
    assert (await begin_part(b_first[1], "org/other", "0", 1, at)).status == 202
    assert (await asking)[0] == 200


async def test_a_minimum_brings_it_back_by_itself(start_cortex: StartCortex, hosts: list[Host], mark: str) -> None:
    cortex = await start_cortex(hosts, models(replicas={"min": 1}))

    async def loaded() -> bool:
        return all([(await host.neuron.model("org/wide")).get("status") == "loaded" for host in hosts])

    await until(loaded)
    first = set(marked_engines(mark))
    os.killpg((await hosts[1].neuron.model("org/wide"))["pid"], signal.SIGKILL)
    await until(lambda: not first & set(marked_engines(mark)))
    await until(loaded)
    assert await chat(cortex) == (200, "a")


async def test_it_survives_a_restart_of_a_neuron_by_coming_back_whole(
    start_cortex: StartCortex, mark: str, tmp_path: Path
) -> None:
    """The neuron of the part without a server stops, and another starts at its address."""
    async with running_host(tmp_path, "a") as first:
        async with running_host(tmp_path, "b") as second:
            cortex = await start_cortex([first, second], models())
            assert await chat(cortex) == (200, "a")
            port = int(second.url.rpartition(":")[2])
        await until(lambda: not marked_engines(mark))
        async with running_host(tmp_path, "b", port=port) as second:
            await cortex.until(lambda: len(cortex.parts.fleet.snapshot().healthy) == 2)
            assert await chat(cortex) == (200, "a")
            assert (await second.neuron.model("org/wide"))["status"] == "loaded"
    assert not marked_processes(mark)


async def test_another_model_takes_the_place_of_the_whole_engine(
    start_cortex: StartCortex, hosts: list[Host], mark: str
) -> None:
    """It needs memory on one neuron only. A running answer is finished first."""
    cortex = await start_cortex(hosts, models(WIDE, SMALL), **RULES)
    assert await chat(cortex) == (200, "a")
    answering = asyncio.create_task(chat(cortex, max_tokens=1000, ignore_eos=True))
    await until(lambda: hosts[0].neuron.activity().get("org/wide"))
    assert await chat(cortex, "org/small") == (200, "b")
    assert await answering == (200, "a")
    await hosts[0].neuron.until_status("org/wide", "unloaded")
    assert len(marked_engines(mark)) == 1


async def test_a_part_that_fails_to_load_leaves_nothing(
    start_cortex: StartCortex, hosts: list[Host], mark: str
) -> None:
    cortex = await start_cortex(hosts, models(args=[*ARGS, "--fault", "oom-at-load"]))
    status, error = await chat(cortex)
    assert status == 503
    assert error is not None
    assert "loading 'org/wide' on" in error
    await until(lambda: not marked_processes(mark))


async def test_a_network_that_does_not_work_is_an_error_before_the_load(
    start_cortex: StartCortex, mark: str, tmp_path: Path
) -> None:
    """It names the neuron, and where to configure it."""
    group = {"address": "203.0.113.7"}
    async with running_host(tmp_path, "a") as first, running_host(tmp_path, "b", group=group) as second:
        cortex = await start_cortex([first, second], models())
        status, error = await chat(cortex)
        assert status == 503
        assert error is not None
        assert "loading 'org/wide' on b failed: cannot listen on 203.0.113.7" in error
        assert "[group] in neuron.toml" in error
        assert not marked_processes(mark)


async def test_the_client_learns_which_neuron_cannot_reach_which(
    start_cortex: StartCortex, hosts: list[Host], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both neurons answer cortex, but not each other."""
    monkeypatch.setattr("neuron.lifecycle.group_network.LISTEN_SECS", 0.0)  # they stop listening at once
    cortex = await start_cortex(hosts, models())
    status, error = await chat(cortex)
    assert status == 503
    assert error is not None
    there = r"loading .org/wide. on (\w) failed: neuron (\w) cannot reach neuron (\w) at 127.0.0.1 port \d+: "
    found = re.search(there + r"Connection refused; see \[group\] in neuron.toml", error)
    assert found is not None, error
    at, source, target = found.groups()
    assert (at, {source, target}) == (target, {"a", "b"})
    assert not marked_processes(mark)
