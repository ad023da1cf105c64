"""LoRA adapters as models of the catalogue, with a real cortex, neurons and simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cortex.cortex_process import CortexProcess, ListedNeuron, cortex_process
from tests.neuron.conftest import mark
from tests.neuron.lifecycle.test_adapters import BASE, adapter
from tests.neuron.neurons import Neuron, config_of, neuron_here, until

__all__ = ["mark"]

ARGS = ("--load-secs", "0.2", "--tokens-per-sec", "50")

Reply = tuple[int, str, dict[str, Any]]
"""The status, the node that answered and the answer."""


@dataclass
class Fleet:
    """cortex and its neurons `n0`, `n1`, ..."""

    session: aiohttp.ClientSession
    cortex: CortexProcess
    neurons: list[Neuron]

    async def ask(self, model: str, **fields: Any) -> Reply:
        body = {"model": model, "prompt": "x", "max_tokens": 2, **fields}
        return await self.post("/v1/completions", body)

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        async with self.session.post(self.cortex.url + path, json=body) as response:
            return response.status, response.headers.get("x-cortex-node", ""), await response.json()

    async def get(self, path: str) -> Any:
        async with self.session.get(self.cortex.url + path) as response:
            return await response.json()

    async def adapters(self, neuron: int = 0) -> list[str]:
        """Those that the neuron lists."""
        found: list[str] = (await self.neurons[neuron].model(BASE)).get("adapters", [])
        return found

    async def lose(self, name: str) -> None:
        """The engine of the first neuron loses the adapter, without its neuron's knowledge."""
        engine = self.neurons[0].registry.get(BASE).engine
        assert engine is not None
        headers = {"x-neuron-control": engine.control_key or "", "Authorization": f"Bearer {engine.api_key}"}
        url = f"{engine.url}/v1/unload_lora_adapter"
        async with self.session.post(url, json={"lora_name": name}, headers=headers) as reply:
            assert reply.status == 200

    @contextlib.asynccontextmanager
    async def long_request(self, model: str) -> AsyncIterator[None]:
        """A request for the model is being answered inside the body, and is given up after it."""
        body = {"model": model, "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with self.session.post(f"{self.cortex.url}/v1/completions", json=body) as response:
            assert response.status == 200
            assert await response.content.readany()
            yield
            response.close()


@contextlib.asynccontextmanager
async def running_fleet(
    directory: Path, *, neurons: int = 1, workers: int = 1, placement: dict[str, Any] | None = None, **base: Any
) -> AsyncIterator[Fleet]:
    """The base has the adapters `a`, `b` and `c`, and `broken`, whose directory is missing."""
    names = ("a", "b", "c")
    sources = {name: adapter(directory, name) for name in names} | {"broken": str(directory / "none")}
    models: list[dict[str, Any]] = [
        {"id": BASE, "harness": "sim", "vram_mb": 8000, "args": list(ARGS), **base},
        *({"id": name, "base": BASE, "lora": source} for name, source in sources.items()),
    ]
    async with contextlib.AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(
                neuron_here(config_of(directory / f"state{number}", simulate={"devices": ["RTX 5090"]}))
            )
            for number in range(neurons)
        ]
        listed = [ListedNeuron(f"n{number}", neuron.base) for number, neuron in enumerate(running)]
        cortex = await stack.enter_async_context(
            cortex_process(directory, listed, models, placement=placement, workers=workers)
        )
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Fleet(session, cortex, running)


@pytest.fixture
async def fleet(mark: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """One neuron, whose engine can have one adapter."""
    async with running_fleet(tmp_path, max_loras=1) as running:
        yield running


async def test_a_cold_adapter_brings_its_base(fleet: Fleet) -> None:
    """The first request loads the base, then the adapter; both are served by one engine and listed. `explain` says each
    time what would happen."""
    explained = await fleet.get("/fleet/explain?model=a")
    assert (explained["decision"]["action"], explained["base"]) == ("load", BASE)
    status, node, answer = await fleet.ask("a")
    assert (status, node, answer["model"]) == (200, "n0", "a")
    assert (await fleet.ask(BASE))[0] == 200
    assert (await fleet.get("/fleet/explain?model=a"))["decision"]["action"] == "serve"
    assert (await fleet.get("/fleet/explain?model=b"))["decision"]["action"] == "load_adapter"
    listed = {entry["id"]: entry for entry in (await fleet.get("/v1/models"))["data"]}
    assert [(listed[name]["base"], listed[name]["loaded"]) for name in ("a", "b")] == [(BASE, True), (BASE, False)]
    assert list(listed) == [BASE, "a", "b", "c", "broken"]
    assert len((await fleet.get("/fleet"))["nodes"][0]["models"]) == 1


async def test_the_least_recently_used_adapter_goes(mark: str, tmp_path: Path) -> None:
    """A full engine gives up the adapter that was used longest ago, and never one with requests."""
    async with running_fleet(tmp_path, max_loras=2) as fleet:
        for name in ("a", "b", "a", "c"):
            assert (await fleet.ask(name))[0] == 200
            await fleet.get("/fleet/explain?model=a")  # cortex notes who was used, as it does each second
        assert sorted(await fleet.adapters()) == ["a", "c"]
        async with fleet.long_request("a"):
            assert (await fleet.ask("c"))[0] == 200
            assert (await fleet.ask("b"))[0] == 200
            assert sorted(await fleet.adapters()) == ["a", "b"]


async def test_requests_wait_for_room(fleet: Fleet) -> None:
    """While the only adapter that an engine can have is in use, requests for another one wait, and go on as soon as it
    is idle."""
    async with fleet.long_request("a"):
        waiting = asyncio.ensure_future(fleet.ask("b"))

        async def waits() -> bool:
            return any(entry["model"] == BASE for entry in (await fleet.get("/fleet"))["waiting"])

        await until(waits)
        assert (await fleet.ask(BASE))[0] == 200
        assert not waiting.done()
    assert (await waiting)[0] == 200
    assert await fleet.adapters() == ["b"]


@pytest.mark.parametrize("workers", [1, 2])
async def test_an_adapter_that_its_engine_has_lost(mark: str, tmp_path: Path, workers: int) -> None:
    """The engine's 404 is not the client's: the adapter is loaded again, and the request is answered. A path that the
    engine does not have gets its 404, after one more attempt."""
    async with running_fleet(tmp_path, workers=workers, max_loras=1) as fleet:
        assert (await fleet.ask("a"))[0] == 200
        await fleet.lose("a")
        assert (await fleet.ask("a"))[0] == 200
        status, node, _ = await fleet.post("/v1/images/generations", {"model": "a", "prompt": "x"})
        assert (status, node) == (404, "n0")


async def test_an_adapter_that_cannot_be_loaded(fleet: Fleet) -> None:
    """Its requests get the neuron's reason at once; the base and other adapters go on."""
    status, _, answer = await fleet.ask("broken")
    assert (status, answer["error"]["code"]) == (503, "adapter_failed")
    assert "is not a directory on this host" in answer["error"]["message"]
    assert (await fleet.ask("a"))[0] == 200


async def test_by_hand(fleet: Fleet) -> None:
    """`cortex load` and `unload` take an adapter; `status` shows it at its engine. The base stays when it goes."""
    for command, printed in (
        (("load", "a"), "a is loaded on n0 in"),
        (("load", "a"), "a was already loaded on n0"),
        (("status",), f"{BASE} (loaded, with a)"),
        (("models",), f"adapter of {BASE}"),
        (("load", "b", "--on", "n0"), "b is loaded on n0 in"),
        (("unload", "b"), "b is unloaded from n0"),
        (("status",), f"{BASE} (loaded)"),
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex", *command, "--url", fleet.cortex.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        text = (await process.communicate())[0].decode()
        assert printed in text
    status, _, answer = await fleet.post("/fleet/unload", {"model": "a"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_another_engine_of_the_base_takes_over(mark: str, tmp_path: Path) -> None:
    """A killed engine's adapter is loaded at another engine of its base, and one on a drained node too."""
    async with running_fleet(tmp_path, neurons=2, max_loras=2, replicas={"min": 2, "per_node": 1}) as fleet:
        for neuron in fleet.neurons:
            await neuron.until_status(BASE, "loaded")
        _, node, _ = await fleet.ask("a")
        first = int(node[1:])
        assert await fleet.adapters(1 - first) == []
        os.kill((await fleet.neurons[first].model(BASE))["pid"], signal.SIGKILL)
        assert (await fleet.ask("a"))[:2] == (200, f"n{1 - first}")
        await fleet.neurons[first].until_status(BASE, "loaded")
        status, _, _ = await fleet.post(f"/fleet/nodes/n{1 - first}/drain", {})
        assert status == 200
        assert (await fleet.ask("a"))[:2] == (200, f"n{first}")


async def test_a_busy_adapter_gets_another_engine(mark: str, tmp_path: Path) -> None:
    """An adapter whose engine has more than `replica_target` requests is loaded at an idle engine of its base too."""
    placement = {"replica_target": 1}
    replicas = {"min": 2, "per_node": 1}
    async with running_fleet(tmp_path, neurons=2, placement=placement, max_loras=2, replicas=replicas) as fleet:
        for neuron in fleet.neurons:
            await neuron.until_status(BASE, "loaded")
        async with fleet.long_request("a"), fleet.long_request("a"):

            async def both() -> bool:
                return [await fleet.adapters(number) for number in range(2)] == [["a"], ["a"]]

            await until(both)
            assert (await fleet.ask("a"))[0] == 200


async def test_a_response_is_continued_where_it_was_made(mark: str, tmp_path: Path) -> None:
    """An adapter's response too: requests that name it go to its engine, as requests for the adapter."""
    async with running_fleet(tmp_path, neurons=2, max_loras=2, replicas={"min": 2, "per_node": 1}) as fleet:
        for number, neuron in enumerate(fleet.neurons):
            await neuron.until_status(BASE, "loaded")
            assert (await fleet.post("/fleet/load", {"model": "a", "node": f"n{number}"}))[0] == 200
        made: dict[str, str] = {}
        while len(made) < 2:  # prompts with other beginnings go to other engines
            body = {"model": "a", "input": str(uuid.uuid4()), "max_output_tokens": 2}
            status, node, answer = await fleet.post("/v1/responses", body)
            assert status == 200
            made[node] = answer["id"]
        for node, made_id in made.items():
            body = {"model": "a", "input": "go on", "max_output_tokens": 2, "previous_response_id": made_id}
            assert (await fleet.post("/v1/responses", body))[1] == node
            assert (await fleet.get(f"/v1/responses/{made_id}"))["id"] == made_id

        async def counted() -> bool:
            lines = fleet.cortex.log().splitlines()
            return sum("GET /v1/responses/" in line and "model=a " in line for line in lines) == 2

        await until(counted)


async def test_other_weights(fleet: Fleet, tmp_path: Path) -> None:
    """After a reload with another `lora` the engine gives up the old weights; the next request brings the new ones."""
    assert (await fleet.ask("a"))[0] == 200
    models = tmp_path / "models.toml"
    text = models.read_text(encoding="utf-8")
    models.write_text(text.replace(str(tmp_path / "a"), adapter(tmp_path, "other")), encoding="utf-8")

    async def gone() -> bool:
        return await fleet.adapters() == []

    await until(gone)
    assert (await fleet.ask("a"))[0] == 200


async def test_other_weights_during_a_load(fleet: Fleet, tmp_path: Path) -> None:
    """A reload with another `lora` while the old weights are being loaded: the waiting request gets the new ones."""
    assert (await fleet.ask(BASE))[0] == 200
    engine = fleet.neurons[0].registry.get(BASE).engine
    assert engine is not None
    other, models = adapter(tmp_path, "other"), tmp_path / "models.toml"
    loaded_at = (await fleet.get("/fleet"))["configuration"]["loaded_at"]

    async def reloaded() -> bool:
        return bool((await fleet.get("/fleet"))["configuration"]["loaded_at"] != loaded_at)

    body = {"model": "a", "prompt": "x", "max_tokens": 2, "stream": True}
    async with contextlib.AsyncExitStack() as stack:
        async with engine.adapter_lock:  # the load takes as long as this
            response = await stack.enter_async_context(
                fleet.session.post(f"{fleet.cortex.url}/v1/completions", json=body)
            )
            while b"loading the adapter a" not in await response.content.readline():
                pass
            text = models.read_text(encoding="utf-8")
            models.write_text(text.replace(str(tmp_path / "a"), other), encoding="utf-8")
            await until(reloaded)
        assert b"[DONE]" in await response.read()
    assert engine.adapters == {"a": other}


async def test_an_engine_without_adapters(fleet: Fleet) -> None:
    """An engine that was started without adapters, by another caller, is named as the reason, with what to do."""
    assert (await fleet.neurons[0].load(BASE)).status == 200

    async def known() -> bool:
        return bool((await fleet.ask(BASE))[0] == 200)

    await until(known)
    status, _, answer = await fleet.ask("a")
    assert (status, answer["error"]["code"]) == (503, "adapter_failed")
    assert f"unload '{BASE}'" in answer["error"]["message"]
