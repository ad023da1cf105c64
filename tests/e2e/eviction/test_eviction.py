"""Requests for more models than fit on a small fleet of real neurons, engines and a cortex."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tomli_w

from tests.cortex.cortex_process import ListedNeuron, cortex_process
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, until

__all__ = ["mark"]

pytestmark = pytest.mark.usefixtures("mark")

CARD = "RTX 4090"  # 24564 MiB


def model(name: str, vram_mb: int = 14000, **fields: Any) -> dict[str, Any]:
    return {"id": name, "harness": "sim", "vram_mb": vram_mb, "args": ["--tokens-per-sec", "100"], **fields}


@dataclass
class SmallFleet:
    """A cortex and its neurons."""

    http: aiohttp.ClientSession
    url: str
    neurons: list[NeuronProcess]
    log: Path
    done: list[str] = field(default_factory=list)
    """Models in the order in which requests for them ended."""

    async def ask(self, name: str, *, tokens: int = 3, stream: bool = False) -> tuple[int, str, Mapping[str, str]]:
        """Status, text and headers of one request."""
        body = {"model": name, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
        async with self.http.post(f"{self.url}/v1/completions", json=body) as response:
            text = await response.text()
        self.done.append(name)
        return response.status, text, response.headers

    async def well(self, name: str, *, tokens: int = 3) -> str:
        """The node that answered a request; checks that it succeeded."""
        status, text, headers = await self.ask(name, tokens=tokens)
        assert status == 200, text
        return headers["x-cortex-node"]

    async def get(self, path: str) -> Any:
        async with self.http.get(f"{self.url}{path}") as response:
            return await response.json()

    async def status(self, name: str) -> dict[str, str]:
        """The model's status, by neuron."""
        return {
            node["name"]: entry["status"]
            for node in (await self.get("/fleet"))["nodes"]
            for entry in node["models"]
            if entry["id"] == name
        }

    async def until_status(self, name: str, **wanted: str) -> None:
        async def reached() -> bool:
            return wanted.items() <= (await self.status(name)).items()

        await until(reached)

    def loads(self, name: str) -> int:
        """How often cortex has loaded a model."""
        return self.log.read_text().count(f"INFO    cortex.control.loads.loader: loaded {name} on ")


def neuron_toml(directory: Path, number: int, *, sleep: bool = False, fault: str | None = None) -> Path:
    """neuron.toml of a host with one card."""
    first = 27000 + 50 * number
    extra = ["--load-secs", "0.2", *(("--fault", fault) if fault else ())]
    harness = {"extra_args": extra, "port_range": [first, first + 49], **({"sleep_mode": True} if sleep else {})}
    config = {
        "name": f"n{number}",
        "port": 0,
        "state_dir": str(directory / f"state{number}"),
        "harnesses": [{"name": "sim"}],
        "harness": {"sim": harness},
        "simulate": {"devices": [CARD]},
    }
    path = directory / f"n{number}.toml"
    path.write_text(tomli_w.dumps(config), encoding="utf-8")
    return path


@contextlib.asynccontextmanager
async def fleet_of(
    directory: Path,
    models: list[dict[str, Any]],
    *,
    hosts: int = 1,
    faults: Mapping[int, str] | None = None,
    sleep: bool = False,
    **sections: Any,
) -> AsyncIterator[SmallFleet]:
    """A fleet that runs inside the body."""
    async with contextlib.AsyncExitStack() as stack:
        neurons = [
            await stack.enter_async_context(
                neuron_process(neuron_toml(directory, number, sleep=sleep, fault=(faults or {}).get(number)))
            )
            for number in range(hosts)
        ]
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        addresses = [ListedNeuron(f"n{number}", neuron.base) for number, neuron in enumerate(neurons)]
        cortex = await stack.enter_async_context(cortex_process(directory, addresses, models, **sections))
        yield SmallFleet(http, cortex.url, neurons, directory / "cortex.log")


async def test_peers_take_turns(tmp_path: Path) -> None:
    """Three models for one card, nine requests at once: three loads, and each model's requests together."""
    names = ["a", "b", "c"]
    placement = {"pause_secs": 0.2}
    async with fleet_of(tmp_path, [model(name) for name in names], placement=placement) as fleet:
        await asyncio.gather(*(fleet.well(name) for _ in range(3) for name in names))
        assert [fleet.loads(name) for name in names] == [1, 1, 1]
        assert sorted(fleet.done[at : at + 3] for at in (0, 3, 6)) == [[name] * 3 for name in names]


async def test_a_busy_model_is_drained_and_nothing_is_cut(tmp_path: Path) -> None:
    """The waiting request is served after the stream's last token, before later requests for the busy model."""
    placement = {"min_residency_secs": 0, "patience_secs": 0.3, "pause_secs": 0.1}
    async with fleet_of(tmp_path, [model("a"), model("b")], placement=placement) as fleet:
        await fleet.well("a")
        stream = asyncio.create_task(fleet.ask("a", tokens=200, stream=True))  # two seconds

        async def streaming() -> bool:
            return bool((await fleet.get("/fleet"))["in_flight"])

        await until(streaming)
        other = asyncio.create_task(fleet.well("b"))

        async def draining() -> bool:
            return any("evicting" in job["phase"] for job in (await fleet.get("/fleet"))["loads"])

        await until(draining)
        late = asyncio.create_task(fleet.well("a"))
        status, text, _ = await stream
        assert (status, text.count("data: {"), text.rstrip()[-6:]) == (200, 200, "[DONE]")
        await other
        assert fleet.done[:3] == ["a", "a", "b"]
        await late
        assert (fleet.loads("a"), fleet.loads("b")) == (2, 1)


async def test_priorities_decide_evictions(tmp_path: Path) -> None:
    """A higher priority evicts a lower one, whose requests learn the reason. A pinned model never moves."""
    models = [model("low"), model("high", residency_priority=300), model("pinned", pinned_on=["n1"])]
    async with fleet_of(tmp_path, models, hosts=2, placement={"pause_secs": 0.1}) as fleet:
        assert await fleet.well("pinned") == "n1"
        assert await fleet.well("low") == "n0"
        assert await fleet.well("high") == "n0"
        status, text, headers = await fleet.ask("low")
        assert (status, json.loads(text)["error"]["code"]) == (503, "insufficient_vram")
        assert "high stays (priority 300 is above 100)" in text
        assert "pinned stays (pinned on n1)" in text
        assert int(headers["retry-after"]) > 0
        plan = await fleet.get("/fleet/explain?model=low")
        assert plan["decision"]["action"] == "refuse"


async def test_cancelled_request_evicts_nothing(tmp_path: Path) -> None:
    """A client disconnects while it waits for a busy card: the loaded model stays."""
    placement = {"min_residency_secs": 0, "patience_secs": 0.2}
    async with fleet_of(tmp_path, [model("a"), model("b")], placement=placement) as fleet:
        await fleet.well("a")
        stream = asyncio.create_task(fleet.ask("a", tokens=300, stream=True))
        waiting = asyncio.create_task(fleet.ask("b"))

        async def draining() -> bool:
            return any("evicting" in job["phase"] for job in (await fleet.get("/fleet"))["loads"])

        await until(draining)
        waiting.cancel()
        status, text, _ = await stream
        assert (status, text.rstrip()[-6:]) == (200, "[DONE]")
        assert await fleet.well("a") == "n0"
        assert (fleet.loads("a"), fleet.loads("b"), await fleet.status("b")) == (1, 0, {})


@pytest.mark.parametrize(("when_idle", "status"), [("unload", "unloaded"), ("sleep", "sleeping")])
async def test_idle_models_are_evicted(tmp_path: Path, when_idle: str, status: str) -> None:
    """A model is unloaded after `idle_ttl_secs` without requests; the next request loads it again."""
    models = [model("a", idle_ttl_secs=0.5, when_idle=when_idle)]
    async with fleet_of(tmp_path, models, sleep=when_idle == "sleep") as fleet:
        await fleet.well("a")
        await fleet.until_status("a", n0=status)
        assert await fleet.well("a") == "n0"


async def test_a_kept_model_moves_when_its_neuron_dies(tmp_path: Path) -> None:
    """`replicas.min` is kept without any request."""
    async with fleet_of(tmp_path, [model("a", replicas={"min": 1})], hosts=2) as fleet:
        await fleet.until_status("a", n0="loaded")
        await fleet.neurons[0].stop(signal.SIGKILL)
        await fleet.until_status("a", n1="loaded")
        assert await fleet.well("a") == "n1"
        async with neuron_process(tmp_path / "n0.toml"):  # stops the engine that the killed neuron left
            pass


async def test_replicas_come_under_load_and_go(tmp_path: Path) -> None:
    """Load adds a second replica on free memory, never more than the maximum. One remains when load stops."""
    placement = {"replica_target": 2, "scale_up_secs": 0.1, "scale_down_secs": 1.5}
    models = [model("a", replicas={"max": 2})]
    async with fleet_of(tmp_path, models, hosts=3, placement=placement) as fleet:
        await fleet.well("a")
        busy = [asyncio.create_task(fleet.ask("a", tokens=400, stream=True)) for _ in range(6)]

        async def two() -> bool:
            return list((await fleet.status("a")).values()).count("loaded") == 2

        await until(two)
        used = await asyncio.gather(*(fleet.ask("a", tokens=20) for _ in range(8)))
        assert "n1" in {headers["x-cortex-node"] for _, _, headers in used}  # the other has six
        assert all(status == 200 for status, _, _ in [*used, *await asyncio.gather(*busy)])

        async def one() -> bool:
            return list((await fleet.status("a")).values()).count("loaded") == 1

        await until(one)
        assert await fleet.well("a")


async def test_a_host_that_cannot_load_it_is_passed_over(tmp_path: Path) -> None:
    """If the node is at fault, the client gets one answer, from another node."""
    async with fleet_of(tmp_path, [model("a")], hosts=2, faults={0: "oom-at-load"}) as fleet:
        assert await fleet.well("a") == "n1"
        plan = await fleet.get("/fleet/explain?model=a")
        assert "not tried again for" in next(node["reason"] for node in plan["nodes"] if node["node"] == "n0")


async def test_a_model_that_fails_everywhere_is_tried_once(tmp_path: Path) -> None:
    """If the model is at fault, cortex tries no other host, and tells clients not to retry."""
    async with fleet_of(tmp_path, [model("a", args=["--no-such-flag"])], hosts=2) as fleet:
        for _ in range(2):
            status, text, headers = await fleet.ask("a")
            assert (status, json.loads(text)["error"]["code"]) == (503, "cold_load_failed")
            assert "--no-such-flag" in text
            assert headers["x-should-retry"] == "false"
        assert list((await fleet.status("a")).values()) == ["failed"]
