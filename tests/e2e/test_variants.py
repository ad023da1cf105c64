"""A model with variants on the example fleet's two extremes, with real processes: two RTX 5090 and an RTX 3060."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, until
from tests.ports import free_port

__all__ = ["mark"]

MODEL, OTHER = "org/model", "org/other"
VARIANTS: list[dict[str, Any]] = [
    {"quant": "fp8", "vram_mb": 14000, "min_compute_capability": "8.9"},
    {"quant": "awq", "vram_mb": 8000, "source": "org/model-awq"},
]
OTHERS: list[dict[str, Any]] = [{"id": OTHER, "harness": "sim", "vram_mb": 11000}]
CONFIG = """
name = "{name}"
port = {port}
state_dir = "{directory}"
[[harnesses]]
name = "sim"
[harness.sim]
extra_args = ["--load-secs", "0.2"]
port_range = [{first}, {last}]
[simulate]
devices = {devices}
"""


@dataclass
class Host:
    """A neuron and its configuration."""

    name: str
    port: int
    config: Path
    neuron: NeuronProcess

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Fleet:
    """cortex and its two neurons."""

    session: aiohttp.ClientSession
    cortex: CortexProcess
    beast: Host
    quadbrat: Host

    async def get(self, path: str) -> Any:
        async with self.session.get(self.cortex.url + path) as response:
            return await response.json()

    async def ask(self, model: str, expected: int = 200) -> tuple[str, dict[str, Any]]:
        """The node that answered, and the answer."""
        body = {"model": model, "prompt": "x", "max_tokens": 4}
        async with self.session.post(f"{self.cortex.url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == expected, answer
            return response.headers.get("x-cortex-node", ""), answer

    async def variants(self, status: str = "loaded") -> list[tuple[str, str]]:
        """Node and variant of each engine of the model, by `/v1/models`."""
        listed = {each["id"]: each for each in (await self.get("/v1/models"))["data"]}
        places = listed[MODEL]["locations"]
        return sorted((place["node"], place["variant"]) for place in places if place["status"] == status)

    async def until_variants(self, *expected: tuple[str, str]) -> None:
        async def reached() -> bool:
            return await self.variants() == sorted(expected)

        await until(reached)


@contextlib.asynccontextmanager
async def running_host(tmp_path: Path, name: str, devices: str, first: int) -> AsyncIterator[Host]:
    port, config = free_port(), tmp_path / f"{name}.toml"
    config.write_text(
        CONFIG.format(name=name, port=port, directory=tmp_path / name, devices=devices, first=first, last=first + 19),
        encoding="utf-8",
    )
    async with neuron_process(config) as neuron:
        yield Host(name, port, config, neuron)


@contextlib.asynccontextmanager
async def running_fleet(tmp_path: Path, *, state_dir: str | None = None, **model: Any) -> AsyncIterator[Fleet]:
    models = [{"id": MODEL, "harness": "sim", "variants": VARIANTS, **model}, *OTHERS]
    async with (
        running_host(tmp_path, "beast", '["RTX 5090", "RTX 5090"]', 28650) as beast,
        running_host(tmp_path, "quadbrat", '["RTX 3060"]', 28670) as quadbrat,
        cortex_process(tmp_path, [beast, quadbrat], models, state_dir=state_dir) as cortex,
        aiohttp.ClientSession() as session,
    ):
        yield Fleet(session, cortex, beast, quadbrat)


@pytest.fixture
async def fleet(mark: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with running_fleet(tmp_path) as running:
        yield running


async def test_each_host_gets_its_variant(mark: str, tmp_path: Path) -> None:
    """FP8 on the 5090s and AWQ on the 3060, with the flags of each; both count as replicas. Every view says so."""
    async with running_fleet(tmp_path, replicas={"min": 2, "per_node": 1}) as fleet:
        await fleet.until_variants(("beast", "fp8"), ("quadbrat", "awq"))
        expected = ((fleet.beast, "fp8", MODEL, 14000), (fleet.quadbrat, "awq", "org/model-awq", 8000))
        for host, quant, source, mb in expected:
            entry = await host.neuron.model(MODEL)
            assert (entry["variant"], entry["vram_booked_mb"]) == (quant, mb)
            words = psutil.Process(entry["pid"]).cmdline()
            assert words[words.index("--quantization") + 1] == quant
            assert source in words
        explained = {node["node"]: node for node in (await fleet.get(f"/fleet/explain?model={MODEL}"))["nodes"]}
        assert explained["quadbrat"]["feasible"]
        status = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex", "status", "--url", fleet.cortex.url), stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await status.communicate()
        assert f"{MODEL} on 0 (loaded, fp8)" in printed.decode()
        assert f"{MODEL} (loaded, awq)" in printed.decode()
        nodes = {node["name"]: node["models"] for node in (await fleet.get("/fleet"))["nodes"]}
        assert [engine["variant"] for engine in nodes["beast"]] == ["fp8"]


async def test_usage_names_the_variant(mark: str, tmp_path: Path) -> None:
    """Where each request was served; a variant costs what its model costs."""
    prices = {"input": 0.0, "output": 1.0}
    async with running_fleet(tmp_path, state_dir="state", prices=prices, replicas={"min": 2, "per_node": 1}) as fleet:
        await fleet.until_variants(("beast", "fp8"), ("quadbrat", "awq"))
        for name in ("fp8", "awq"):
            await fleet.ask(f"{MODEL}@{name}")

        async def both_recorded() -> bool:
            return bool((await fleet.get("/usage"))["totals"]["requests"] == 2)

        await until(both_recorded)
        rows = (await fleet.get("/usage?group_by=model,variant,node"))["rows"]
        assert [(row["model"], row["variant"], row["node"], row["completion_tokens"]) for row in rows] == [
            (MODEL, "awq", "quadbrat", 4),
            (MODEL, "fp8", "beast", 4),
        ]
        assert [row["cost"] for row in rows] == pytest.approx([4e-6, 4e-6])


async def test_killed_engines_and_neurons_keep_their_variant(mark: str, tmp_path: Path) -> None:
    """An engine that dies comes back in its variant, a neuron adopts it with its label, and a cortex that starts again
    finds everything as it was."""
    async with running_fleet(tmp_path, replicas={"min": 2, "per_node": 1}) as fleet:
        await fleet.until_variants(("beast", "fp8"), ("quadbrat", "awq"))
        pid = (await fleet.quadbrat.neuron.model(MODEL))["pid"]
        psutil.Process(pid).kill()

        async def restarted() -> bool:
            entry = await fleet.quadbrat.neuron.model(MODEL)
            return bool(entry["status"] == "loaded" and entry["pid"] != pid)

        await until(restarted)
        await fleet.until_variants(("beast", "fp8"), ("quadbrat", "awq"))
        await fleet.quadbrat.neuron.stop(signal.SIGKILL)
        async with neuron_process(fleet.quadbrat.config) as second:
            assert (await second.until_status(MODEL, "loaded"))["variant"] == "awq"
            await fleet.until_variants(("beast", "fp8"), ("quadbrat", "awq"))
            models = [{"id": MODEL, "harness": "sim", "variants": VARIANTS}, *OTHERS]
            hosts = [fleet.beast, fleet.quadbrat]
            again = tmp_path / "again"
            again.mkdir()
            async with cortex_process(again, hosts, models) as other:
                fleet.cortex = other
                for name, node in ((f"{MODEL}@awq", "quadbrat"), (f"{MODEL}@fp8", "beast")):
                    assert (await fleet.ask(name))[0] == node
                assert await fleet.variants() == [("beast", "fp8"), ("quadbrat", "awq")]


async def test_a_request_may_insist_on_a_variant(fleet: Fleet) -> None:
    """It is loaded if necessary, and the engine knows its model by the plain id. Any replica serves the plain id."""
    node, answer = await fleet.ask(f"{MODEL}@awq")
    assert (node, answer["model"]) == ("quadbrat", MODEL)
    assert await fleet.variants() == [("quadbrat", "awq")]
    assert (await fleet.ask(MODEL))[0] == "quadbrat"
    assert (await fleet.ask(f"{MODEL}@fp8"))[0] == "beast"
    assert await fleet.variants() == [("beast", "fp8"), ("quadbrat", "awq")]
    for name, node in ((f"{MODEL}@awq", "quadbrat"), (f"{MODEL}@fp8", "beast")):
        answers = await asyncio.gather(*(fleet.ask(name) for _ in range(10)))
        assert {each for each, _ in answers} == {node}
    served = await asyncio.gather(*(fleet.ask(MODEL) for _ in range(20)))
    assert {each for each, _ in served} == {"beast", "quadbrat"}
    _, refused = await fleet.ask(f"{MODEL}@int4", expected=404)
    assert refused["error"]["code"] == "model_not_found"
    assert f"'{MODEL}' has the variants fp8, awq" in refused["error"]["message"]
    explained = await fleet.get(f"/fleet/explain?model={MODEL}@fp8")
    assert (explained["decision"]["action"], explained["decision"]["node"]) == ("serve", "beast")


async def test_a_variant_is_loaded_beside_another_on_one_host(fleet: Fleet) -> None:
    """With the 3060 drained, AWQ is loaded on a 5090 as an instance of its own, for requests that insist on it."""
    assert (await fleet.ask(MODEL))[0] == "beast"
    async with fleet.session.post(f"{fleet.cortex.url}/fleet/nodes/quadbrat/drain") as response:
        assert response.status == 200
    assert (await fleet.ask(f"{MODEL}@awq"))[0] == "beast"
    await fleet.until_variants(("beast", "fp8"), ("beast", "awq"))
    [beast] = [node for node in (await fleet.get("/fleet"))["nodes"] if node["name"] == "beast"]
    assert {tuple(engine["devices"]) for engine in beast["models"]} == {(0,), (1,)}


async def test_operators_load_and_unload_one_variant(fleet: Fleet) -> None:
    """By the name that a request would use. What is held back is the whole model."""

    async def act(action: str, status: int, **body: Any) -> dict[str, Any]:
        async with fleet.session.post(f"{fleet.cortex.url}/fleet/{action}", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == status, answer
            return answer

    assert (await act("load", 200, model=f"{MODEL}@fp8"))["node"] == "beast"
    assert (await act("load", 200, model=f"{MODEL}@awq", node="beast"))["instance"] == "1"
    assert (await act("load", 200, model=f"{MODEL}@fp8"))["instance"] == "0"
    assert await fleet.variants() == [("beast", "awq"), ("beast", "fp8")]
    refused = await act("load", 409, model=f"{MODEL}@fp8", node="quadbrat")
    assert "needs 1 device with compute capability 8.9" in refused["error"]["message"]
    assert "has the variants fp8, awq" in (await act("load", 404, model=f"{MODEL}@int4"))["error"]["message"]
    held = await act("unload", 400, model=f"{MODEL}@fp8", for_secs=60)
    assert "not one variant" in held["error"]["message"]
    assert [each["instance"] for each in (await act("unload", 200, model=f"{MODEL}@fp8"))["results"]] == ["0"]
    assert await fleet.variants() == [("beast", "awq")]
    assert (await act("unload", 404, model=f"{MODEL}@fp8"))["error"]["code"] == "model_not_found"
    assert (await act("unload", 200, model=MODEL))["nodes"] == ["beast"]


async def test_an_evicted_variant_is_replaced_by_what_fits(fleet: Fleet) -> None:
    """The 3060 holds AWQ or the other model, not both: each is evicted for the other and comes back."""
    assert (await fleet.ask(f"{MODEL}@awq"))[0] == "quadbrat"
    async with fleet.session.post(f"{fleet.cortex.url}/fleet/nodes/beast/drain") as response:
        assert response.status == 200
    assert (await fleet.ask(OTHER))[0] == "quadbrat"
    assert await fleet.variants() == []
    assert (await fleet.ask(MODEL))[0] == "quadbrat"
    assert await fleet.variants() == [("quadbrat", "awq")]


async def test_explain_says_which_variant_and_why(fleet: Fleet) -> None:
    """Before anything is loaded, for each node, in JSON and in the command's table."""
    explained = await fleet.get(f"/fleet/explain?model={MODEL}")
    assert (explained["decision"]["node"], explained["decision"]["variant"]) == ("beast", "fp8")
    nodes = {node["node"]: node for node in explained["nodes"]}
    assert (nodes["beast"]["variant"], nodes["beast"]["passed_over"]) == ("fp8", [])
    reason = "needs 1 device with compute capability 8.9, 0 of 1 have that"
    assert nodes["quadbrat"]["variant"] == "awq"
    assert nodes["quadbrat"]["passed_over"] == [{"variant": "fp8", "reason": reason}]
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cortex", "explain", MODEL, "--url", fleet.cortex.url), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await command.communicate()
    assert f"not fp8: {reason}" in printed.decode()
