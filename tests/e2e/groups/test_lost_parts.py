"""What cortex does with an engine that spans two neurons, also if another one loaded it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.e2e.groups.conftest import Host, running_host
from tests.neuron.groups.groups import MODEL, load_parts
from tests.neuron.neurons import marked_engines, marked_processes, until

TAKEN_DOWN_SECS = 5.0


async def loaded(cortex: RunningCortex, hosts: list[Host], group: str = "g1") -> None:
    """Loads a group with the neurons' own API, and waits until cortex knows it."""
    answers = await load_parts(group, [host.neuron for host in hosts])
    assert [answer.status for answer in answers] == [200, 200]
    await cortex.until(lambda: bool(cortex.parts.fleet.snapshot().serving(MODEL)))


async def chat(cortex: RunningCortex, **fields: object) -> tuple[int, str | None, int]:
    """The status, the node that answered, and the tokens of the answer."""
    async with cortex.chat(MODEL, **fields) as answer:
        body = await answer.json()
        tokens = body["usage"]["completion_tokens"] if answer.status == 200 else 0
        return answer.status, answer.headers.get("x-cortex-node"), tokens


async def test_only_rank_0_gets_requests(start_cortex: StartCortex, hosts: list[Host]) -> None:
    """The other part is loaded too, and has no endpoint."""
    cortex = await start_cortex(hosts, [])
    await loaded(cortex, hosts)
    for _ in range(8):
        assert await chat(cortex, max_tokens=2) == (200, "a", 2)
    async with cortex.http.get(f"{cortex.url}/fleet") as answer:
        nodes = (await answer.json())["nodes"]
    groups = {node["name"]: node["models"][0]["group"] for node in nodes}
    assert {name: (group["id"], group["rank"]) for name, group in groups.items()} == {"a": ("g1", 0), "b": ("g1", 1)}


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_lost_part_takes_the_other_down(
    start_cortex: StartCortex, hosts: list[Host], mark: str, lost: int
) -> None:
    """The rest of the engine holds memory and answers nothing, but does not notice by itself."""
    cortex = await start_cortex(hosts, [])
    await loaded(cortex, hosts)
    os.killpg((await hosts[lost].neuron.model(MODEL))["pid"], signal.SIGKILL)
    began = time.monotonic()
    await until(lambda: not marked_engines(mark))
    assert time.monotonic() - began < TAKEN_DOWN_SECS
    await hosts[lost].neuron.until_status(MODEL, "failed")
    await hosts[1 - lost].neuron.until_status(MODEL, "unloaded")
    await loaded(cortex, hosts, "g2")  # in its place
    assert (await chat(cortex))[0] == 200


async def test_a_neuron_that_goes_down_takes_the_rest_down(
    start_cortex: StartCortex, mark: str, tmp_path: Path
) -> None:
    async with running_host(tmp_path, "a") as first:
        async with running_host(tmp_path, "b") as second:
            cortex = await start_cortex([first, second], [], poll={"unhealthy_after": 2})
            await loaded(cortex, [first, second])
        began = time.monotonic()
        await until(lambda: not marked_engines(mark))
        assert time.monotonic() - began < TAKEN_DOWN_SECS
        await first.neuron.until_status(MODEL, "unloaded")


async def test_a_part_that_its_neuron_forgets_takes_the_rest_down(
    start_cortex: StartCortex, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The neuron of rank 0 comes back with an empty state, before it counts as down: no part has failed."""
    monkeypatch.setattr("cortex.control.loads.groups.BEGIN_SECS", 3600.0)  # not because a part never came
    async with running_host(tmp_path, "b") as second:
        async with running_host(tmp_path, "a") as first:
            cortex = await start_cortex([first, second], [], poll={"unhealthy_after": 1000})
            await loaded(cortex, [first, second])
            port = int(first.url.rpartition(":")[2])
        async with running_host(tmp_path / "empty", "a", port=port):
            await second.neuron.until_status(MODEL, "unloaded")
            await until(lambda: not marked_engines(mark))


@pytest.mark.parametrize("unloaded", ["a", "b", None])
async def test_an_unload_takes_the_whole_engine_and_cuts_no_answer(
    start_cortex: StartCortex, hosts: list[Host], mark: str, unloaded: str | None
) -> None:
    """Also if the operator names the neuron of a part without requests of its own."""
    cortex = await start_cortex(hosts, [])
    await loaded(cortex, hosts)
    answering = asyncio.create_task(chat(cortex, max_tokens=400, ignore_eos=True))
    await until(lambda: hosts[0].neuron.activity().get(MODEL))
    where = {} if unloaded is None else {"node": unloaded}
    async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": MODEL, **where}) as answer:
        assert answer.status == 200, await answer.text()
    assert await answering == (200, "a", 400)
    assert not marked_processes(mark)


async def test_a_part_alone_is_taken_down(
    start_cortex: StartCortex, hosts: list[Host], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other part of a load never came, for example because the cortex that began it has died."""
    monkeypatch.setattr("cortex.control.loads.groups.BEGIN_SECS", 0.5)
    monkeypatch.setattr("cortex.control.loads.groups.RETRY_SECS", 0.1)
    cortex = await start_cortex(hosts, [])
    at = (await hosts[0].neuron.call("POST", "/groups/listen", json={"group": "g1"})).body
    group = {"id": "g1", "rank": 0, "size": 2, "master_addr": at["address"], "master_port": at["port"]}
    answer = await hosts[0].neuron.load(MODEL, group=group, parallel={"tensor": 2}, vram_mb=4000)
    assert (answer.status, answer.error["code"]) == (409, "load_cancelled")
    await until(lambda: not marked_processes(mark))
    assert cortex.parts.fleet.snapshot().serving(MODEL) == []
