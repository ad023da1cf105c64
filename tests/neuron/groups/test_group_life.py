"""The life of the parts of an engine that spans two neurons: real neurons, simulated engines, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from blockbuster import blockbuster_ctx

from tests.neuron.groups.groups import MODEL, begin_part, checked_group, load_parts
from tests.neuron.neurons import Client, Neuron, config_of, marked_engines, marked_processes, neuron_here, until


@contextlib.asynccontextmanager
async def neurons_here(directory: Path) -> AsyncIterator[list[Neuron]]:
    with blockbuster_ctx(["neuron", "shared"]):
        async with (
            neuron_here(config_of(directory / "a", sim={"port_range": [28100, 28499]})) as first,
            neuron_here(config_of(directory / "b", sim={"port_range": [28500, 28899]})) as second,
        ):
            yield [first, second]


@pytest.fixture
async def pair(mark: str, tmp_path: Path) -> AsyncIterator[list[Neuron]]:
    async with neurons_here(tmp_path) as neurons:
        yield neurons


async def ask(url: str, key: str) -> int:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 3}
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{url}/v1/completions", json=body) as it,
    ):
        return it.status


async def test_two_neurons_run_one_engine(pair: list[Neuron], mark: str) -> None:
    """Rank 0 answers; the other part books its memory and has no endpoint. Each unload ends its part."""
    answers = await load_parts("g1", list(pair))
    assert [answer.status for answer in answers] == [200, 200]
    assert [answer.body["url"] is None for answer in answers] == [False, True]
    assert await ask(answers[0].body["url"], answers[0].body["api_key"]) == 200
    entries = [await neuron.model(MODEL) for neuron in pair]
    assert [entry["status"] for entry in entries] == ["loaded", "loaded"]
    assert [(entry["group"]["id"], entry["group"]["rank"]) for entry in entries] == [("g1", 0), ("g1", 1)]
    assert [len(entry["devices"]) for entry in entries] == [1, 1]
    assert [entry["vram_booked_mb"] >= 4000 for entry in entries] == [True, True]
    assert entries[1]["endpoint"] is None
    refused = await pair[1].endpoint(MODEL)
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")
    assert "this is part 1 of 2 of group g1, ask the neuron of part 0" in refused.error["message"]
    for neuron in pair:
        assert (await neuron.unload(MODEL)).status == 200
    assert not marked_engines(mark)
    assert (await pair[1].model(MODEL))["group"] is None


async def test_the_same_load_joins(pair: list[Neuron], mark: str) -> None:
    """A repeated load of a part starts nothing, and one of another group is refused."""
    await load_parts("g1", list(pair))
    engines = set(marked_engines(mark))
    again = await pair[1].call("POST", "/models/load", json={"model_id": MODEL})
    assert again.status == 200
    at = await checked_group("g2", list(pair))
    told = {"id": "g2", "rank": 1, "size": 2, **at}
    refused = await pair[1].load(MODEL, group=told, parallel={"tensor": 2}, vram_mb=4000)
    assert (refused.status, refused.error["code"]) == (409, "already_loaded")
    assert set(marked_engines(mark)) == engines


async def test_two_groups_do_not_wait_for_each_other(pair: list[Neuron], mark: str) -> None:
    """They start on the same devices in opposite order, and each of the parts that came first would hold its device
    until the other part of its group starts. The group whose name sorts first starts."""
    other = "org/other"
    both: list[Client] = list(pair)
    at = {"g1": await checked_group("g1", both), "g2": await checked_group("g2", both[::-1])}
    assert (await begin_part(pair[0], MODEL, "g1", 0, at["g1"])).status == 202
    assert (await begin_part(pair[1], other, "g2", 0, at["g2"])).status == 202
    assert (await begin_part(pair[1], MODEL, "g1", 1, at["g1"])).status == 202
    refused = await begin_part(pair[0], other, "g2", 1, at["g2"])
    assert (refused.status, refused.error["code"]) == (503, "group_starting")
    assert "org/wide starts, which spans several neurons too" in refused.error["message"]
    assert refused.headers["Retry-After"] == "5"
    assert (await pair[0].model(other)) == {}
    assert (await pair[1].unload(other)).status == 200
    for neuron in pair:
        await neuron.until_status(MODEL, "loaded")
    again = await checked_group("g3", both[::-1])
    assert [(await begin_part(pair[1 - rank], other, "g3", rank, again)).status for rank in (0, 1)] == [202, 202]
    for neuron in pair:
        await neuron.until_status(other, "loaded")


async def test_a_ring_of_starting_groups_ends(pair: list[Neuron], mark: str, tmp_path: Path) -> None:
    """Each of three groups has begun on one host and would wait on the next for the group there. Whatever the order in
    which their other parts come, the one that would close the ring is refused, and the others start."""
    async with neuron_here(config_of(tmp_path / "c", sim={"port_range": [28900, 29299]})) as third:
        ring: list[Client] = [*pair, third]
        names = ["org/x", "org/y", "org/z"]
        at = [await checked_group(f"g{i}", [ring[i], ring[(i + 1) % 3]]) for i in range(3)]
        for i in range(3):
            assert (await begin_part(ring[i], names[i], f"g{i}", 0, at[i])).status == 202
        others = {i: await begin_part(ring[(i + 1) % 3], names[i], f"g{i}", 1, at[i]) for i in (2, 0, 1)}
        assert {i: answer.status for i, answer in others.items()} == {0: 202, 1: 202, 2: 503}
        assert (await ring[2].unload(names[2])).status == 200
        for i in (0, 1):
            for neuron in (ring[i], ring[i + 1]):
                await neuron.until_status(names[i], "loaded")


async def test_a_part_beside_another_group_is_accepted(pair: list[Neuron], mark: str) -> None:
    """It does not wait for anything if no engine starts on its devices."""
    both: list[Client] = list(pair)
    at = {"g1": await checked_group("g1", both), "g2": await checked_group("g2", both)}
    assert (await begin_part(pair[0], MODEL, "g1", 0, at["g1"])).status == 202
    told = {"group": {"id": "g2", "rank": 0, "size": 2, **at["g2"]}, "parallel": {"tensor": 2}, "vram_mb": 4000}
    assert (await pair[0].load("org/other", wait=False, devices=[1], **told)).status == 202


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_killed_part_fails_and_stays_down(pair: list[Neuron], mark: str, lost: int) -> None:
    """Its neuron does not start it alone. After an unload of the other, a new group starts in its place."""
    await load_parts("g1", list(pair))
    os.killpg((await pair[lost].model(MODEL))["pid"], signal.SIGKILL)
    entry = await pair[lost].until_status(MODEL, "failed")
    assert entry["reason"] == f"part {lost} of 2 of group g1 ended"
    assert "killed by signal 9" in entry["error"]
    assert (entry["group"]["id"], entry["devices"], entry["permanent"]) == ("g1", [], None)
    assert (await pair[1 - lost].model(MODEL))["status"] == "loaded"  # nor does vLLM notice
    assert (await pair[1 - lost].unload(MODEL)).status == 200
    assert not marked_processes(mark)
    answers = await load_parts("g2", list(pair))
    assert await ask(answers[0].body["url"], answers[0].body["api_key"]) == 200


async def test_a_part_that_fails_to_load(pair: list[Neuron], mark: str) -> None:
    """The engine of one part ends during the load: the other part's load fails with its engine."""
    loading = asyncio.create_task(load_parts("g1", list(pair), "--load-secs", "30"))
    entry = await pair[1].until_status(MODEL, "loading")
    while not entry.get("progress") or entry["progress"]["phase"] == "starting":
        entry = await pair[1].model(MODEL)
        await asyncio.sleep(0.02)
    os.killpg(entry["pid"], signal.SIGKILL)
    answers = await loading
    assert [answer.status for answer in answers] == [500, 500]
    assert "Connection closed by peer" in answers[0].error["message"]
    assert not marked_processes(mark)


async def test_an_unload_cancels_the_wait_for_the_others(pair: list[Neuron], mark: str) -> None:
    """Rank 0 waits for the other parts, which never come."""
    at = await checked_group("g1", list(pair))
    told = {"id": "g1", "rank": 0, "size": 2, **at}
    assert (await pair[0].load(MODEL, wait=False, group=told, parallel={"tensor": 2})).status == 202
    await until(lambda: marked_engines(mark))
    assert (await pair[0].unload(MODEL)).status == 200
    assert not marked_processes(mark)


async def test_a_part_does_not_sleep_or_load_alone(pair: list[Neuron]) -> None:
    await load_parts("g1", list(pair))
    asleep = await pair[0].call("POST", "/models/sleep", json={"model_id": MODEL})
    assert (asleep.status, asleep.error["code"]) == (409, "sleep_unsupported")
    assert "it spans several neurons" in asleep.error["message"]
    for neuron in pair:
        await neuron.unload(MODEL)
    alone = await pair[0].call("POST", "/models/load", json={"model_id": MODEL})
    assert alone.status == 404
    assert "is not loaded, and spans several neurons" in alone.error["message"]


async def test_a_caller_of_protocol_v1_sees_only_the_part_that_serves(pair: list[Neuron]) -> None:
    """It would send requests to every neuron that lists the model as loaded. Before it has asked for an endpoint, it
    may be an operator, who sees every part. No part is started again without its key: that would end the others."""
    await load_parts("g1", list(pair))

    async def listed(neuron: Neuron) -> list[str]:
        async with session.get(f"{neuron.base}/models") as answer:
            return [entry["id"] for entry in await answer.json()]

    async with aiohttp.ClientSession() as session:
        assert [await listed(neuron) for neuron in pair] == [[MODEL], [MODEL]]
        answers = []
        for neuron in pair:
            async with session.get(f"{neuron.base}/models/{MODEL}/endpoint") as answer:
                answers.append((answer.status, (await answer.json())["error"]["code"]))
        assert answers == [(409, "engine_key_required"), (404, "model_not_found")]
        assert [await listed(neuron) for neuron in pair] == [[MODEL], []]


async def test_a_restarted_neuron_adopts_its_part(mark: str, tmp_path: Path) -> None:
    """The engine keeps answering. A part that ends while its neuron is down is failed, not started again."""
    configs = [
        config_of(tmp_path / name, on_stop="leave_engines", sim={"port_range": ports})
        for name, ports in (("a", [28100, 28499]), ("b", [28500, 28899]))
    ]
    async with neuron_here(configs[0]) as first:
        async with neuron_here(configs[1]) as second:
            answers = await load_parts("g1", [first, second])
        async with neuron_here(configs[1]) as second:
            entry = await second.until_status(MODEL, "loaded")
            assert (entry["group"]["id"], entry["group"]["rank"]) == ("g1", 1)
            assert await ask(answers[0].body["url"], answers[0].body["api_key"]) == 200
            pid = entry["pid"]
        os.killpg(pid, signal.SIGKILL)
        async with neuron_here(configs[1]) as second:
            await second.until_status(MODEL, "failed")
        await first.unload(MODEL)
    assert not marked_processes(mark)


async def test_a_stopped_neuron_ends_its_part(mark: str, tmp_path: Path) -> None:
    async with neuron_here(config_of(tmp_path / "a", sim={"port_range": [28100, 28499]})) as first:
        async with neuron_here(config_of(tmp_path / "b", sim={"port_range": [28500, 28899]})) as second:
            await load_parts("g1", [first, second])
        assert len(marked_engines(mark)) == 1
    assert not marked_processes(mark)


async def test_a_neuron_that_cannot_be_reached_is_named(pair: list[Neuron]) -> None:
    at = (await pair[0].call("POST", "/groups/listen", json={"group": "g1"})).body
    told = {"peers": [{"node": "first", **at}, {"node": "gone", "address": "127.0.0.1", "port": 1}], "group": "g1"}
    assert (await pair[1].call("POST", "/groups/reach", json=told)).body == {
        "unreachable": {"gone": "Connection refused"}
    }


async def test_an_engine_with_ray(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each neuron runs one Ray node of a cluster that only this engine uses, and rank 0 the engine beside it. All of it
    ends with the parts. `ray` is a stand-in."""
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("fake_ray.py")}" "$@"\n')
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ray.parent}:{os.environ['PATH']}")
    async with neurons_here(tmp_path) as pair:
        answers = await load_parts("g1", list(pair), "--distributed-executor-backend", "ray")
        assert [answer.status for answer in answers] == [200, 200], answers
        assert await ask(answers[0].body["url"], answers[0].body["api_key"]) == 200
        for neuron in pair:
            assert (await neuron.unload(MODEL)).status == 200
        assert not marked_processes(mark)
        await load_parts("g2", list(pair), "--distributed-executor-backend", "ray")
        [head] = [pid for pid in marked_processes(mark) if "--head" in psutil.Process(pid).cmdline()]
        os.kill(head, signal.SIGKILL)
        await pair[0].until_status(MODEL, "failed")
        assert "the Ray node exited with status -9" in (await pair[0].model(MODEL))["error"]
        assert (await pair[1].unload(MODEL)).status == 200
        await until(lambda: not marked_processes(mark))
