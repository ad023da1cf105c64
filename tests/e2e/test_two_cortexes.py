"""Two real cortexes before the same two real neurons. Each calls the neurons by other names, so that each by itself
would load a model on the other's second choice."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, toml_config, until
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/model"
ROUNDS = 20


@dataclass(frozen=True)
class Named:
    """A neuron as one of the cortexes knows it."""

    name: str
    url: str


@dataclass(frozen=True)
class TwoCortexes:
    neurons: tuple[NeuronProcess, NeuronProcess]
    cortexes: tuple[CortexProcess, CortexProcess]
    session: aiohttp.ClientSession

    async def ask(self, cortex: CortexProcess) -> int:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 3}
        async with self.session.post(f"{cortex.url}/v1/completions", json=body) as response:
            await response.read()
            return response.status

    async def operate(self, cortex: CortexProcess, action: str) -> dict[str, Any]:
        async with self.session.post(f"{cortex.url}/fleet/{action}", json={"model": MODEL}) as response:
            found: dict[str, Any] = await response.json()
            return found

    async def loads(self) -> int:
        """Engines that both neurons have started."""
        count = 0
        for neuron in self.neurons:
            answer = await neuron.session.get(f"{neuron.base}/metrics")
            found = re.findall(r"^neuron_model_load_seconds_count\{.*\} (\d+)", await answer.text(), re.MULTILINE)
            count += sum(map(int, found))
        return count

    async def unload(self) -> None:
        """Until both cortexes know that it is gone."""
        for neuron in self.neurons:
            if (await neuron.model(MODEL)).get("status") == "loaded":
                await neuron.unload(MODEL)
        for cortex in self.cortexes:
            await until(lambda: self._known_unloaded(cortex))  # noqa: B023 - awaited in this round

    async def _known_unloaded(self, cortex: CortexProcess) -> bool:
        async with self.session.get(f"{cortex.url}/fleet") as response:
            fleet = await response.json()
        statuses = [model["status"] for node in fleet["nodes"] for model in node["models"]]
        return not fleet["loads"] and set(statuses) <= {"unloaded"}


@pytest.fixture
async def both(mark: str, tmp_path: Path) -> AsyncIterator[TwoCortexes]:
    async with contextlib.AsyncExitStack() as stack:
        ports = free_port(), free_port()
        neurons, cortexes = [], []
        for port in ports:
            directory = tmp_path / f"neuron-{port}"
            directory.mkdir()
            config = toml_config(directory, f"port = {port}", f'state_dir = "{directory / "state"}"')
            neurons.append(await stack.enter_async_context(neuron_process(config)))
        for names in ("ab", "ba"):
            directory = tmp_path / f"cortex-{names}"
            directory.mkdir()
            known = [Named(name, f"http://127.0.0.1:{port}") for name, port in zip(names, ports, strict=True)]
            models = [{"id": MODEL, "harness": "sim", "vram_mb": 8000}]
            cortexes.append(await stack.enter_async_context(cortex_process(directory, known, models)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield TwoCortexes((neurons[0], neurons[1]), (cortexes[0], cortexes[1]), session)


async def test_a_cold_model_asked_from_both_is_loaded_once(both: TwoCortexes) -> None:
    """Both answer, from one engine, each time."""
    for number in range(ROUNDS):
        asked = [both.ask(cortex) for cortex in both.cortexes for _ in range(3)]
        assert await asyncio.gather(*asked) == [200] * 6
        assert await both.loads() == number + 1
        await both.unload()


async def test_loads_of_operators_meet(both: TwoCortexes) -> None:
    """The loser says where the winner has loaded it, by its own name for that neuron."""
    first, second = await asyncio.gather(*(both.operate(cortex, "load") for cortex in both.cortexes))
    assert (first["status"], second["status"]) == ("loaded", "loaded")
    assert {first["node"], second["node"]} == {"a", "b"}
    assert await both.loads() == 1


async def test_a_cortex_that_dies_with_a_lease_delays_others_only_shortly(both: TwoCortexes) -> None:
    """Its load went on: the other one joins it."""
    one, other = both.cortexes
    asking = asyncio.create_task(both.ask(one))
    await until(lambda: "loading org/model on" in one.log())
    one.process.kill()
    with contextlib.suppress(aiohttp.ClientError):
        await asking
    assert await asyncio.wait_for(both.ask(other), 15) == 200
    assert await both.loads() == 1
