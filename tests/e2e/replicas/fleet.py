"""cortex and simulated hosts with eight GPUs each, as real processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.cortex.cortex_process import CortexProcess, cortex_process, neuron_at
from tests.neuron.neurons import NeuronProcess, neuron_process, until
from tests.ports import free_port

CONFIG = """
name = "{name}"
port = {port}
state_dir = "{directory}/state"
[[harnesses]]
name = "sim"
[harness.sim]
extra_args = ["--load-secs", "0.2"]
port_range = [{first_port}, {last_port}]
[recovery]
backoff_secs = 0.2
[simulate]
devices = ["H100", "H100", "H100", "H100", "H100", "H100", "H100", "H100"]
"""


@dataclass
class Hosts:
    """cortex, and neurons by name."""

    session: aiohttp.ClientSession
    directory: Path
    cortex: CortexProcess
    neurons: dict[str, NeuronProcess]

    async def get(self, path: str) -> Any:
        async with self.session.get(self.cortex.url + path) as response:
            return await response.json()

    async def ask(self, model: str, text: str = "x", tokens: int = 4) -> int:
        body = {"model": model, "prompt": text, "max_tokens": tokens}
        async with self.session.post(f"{self.cortex.url}/v1/completions", json=body) as response:
            await response.read()
            return response.status

    async def operate(self, action: str, **body: Any) -> dict[str, Any]:
        async with self.session.post(f"{self.cortex.url}/fleet/{action}", json=body) as response:
            found: dict[str, Any] = await response.json()
            return found

    async def engines(self, model: str, name: str = "a") -> list[dict[str, Any]]:
        """What the neuron lists of the model."""
        listed = (await self.neurons[name].call("GET", "/models")).body
        return sorted((entry for entry in listed if entry["id"] == model), key=lambda entry: entry["instance"])

    async def loaded(self, model: str, name: str = "a") -> list[dict[str, Any]]:
        return [entry for entry in await self.engines(model, name) if entry["status"] == "loaded"]

    async def until_loaded(self, model: str, count: int, name: str = "a") -> list[dict[str, Any]]:
        """As soon as so many are loaded there and none is on its way, as neuron and cortex know it."""

        async def reached() -> list[dict[str, Any]] | None:
            found = [each for each in await self.engines(model, name) if each["status"] not in ("unloaded", "failed")]
            node = next(node for node in (await self.get("/fleet"))["nodes"] if node["name"] == name)
            known = [entry for entry in node["models"] if entry["id"] == model and entry["status"] == "loaded"]
            settled = all(each["status"] == "loaded" for each in found) and not (await self.get("/fleet"))["loads"]
            return found if settled and len(found) == count == len(known) else None

        listed: list[dict[str, Any]] = await until(lambda: reached(), 30)  # noqa: PLW0108 - `until` awaits it
        return listed

    async def stays_loaded(self, model: str, count: int, *, secs: float, name: str = "a") -> None:
        """Fails the test if the count changes within this time."""
        deadline = asyncio.get_running_loop().time() + secs
        while asyncio.get_running_loop().time() < deadline:
            assert len(await self.loaded(model, name)) == count
            await asyncio.sleep(0.1)

    async def answered(self, model: str, name: str = "a") -> Counter[str]:
        """Requests that each instance has answered, by its name."""
        activity = (await self.neurons[name].call("GET", "/health")).body["models"]
        return Counter({each["instance"]: each["ended"] for each in activity if each["id"] == model})


@contextlib.asynccontextmanager
async def running_hosts(
    directory: Path,
    models: list[dict[str, Any]],
    *,
    names: Sequence[str] = ("a",),
    placement: Mapping[str, Any] | None = None,
) -> AsyncIterator[Hosts]:
    """Inside the body. Each host has eight simulated H100."""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        addresses, neurons = [], {}
        for place, name in enumerate(names):
            port = free_port()
            addresses.append(neuron_at(port, name))
            config = config_file(directory, name, port, first_port=27000 + 100 * place)
            neurons[name] = await stack.enter_async_context(neuron_process(config))
        cortex = await stack.enter_async_context(cortex_process(directory, addresses, models, placement=placement))
        yield Hosts(session, directory, cortex, neurons)


def config_file(directory: Path, name: str, port: int, *, first_port: int) -> Path:
    """The neuron.toml of one of these hosts."""
    own = directory / name
    own.mkdir(exist_ok=True)
    path = own / "neuron.toml"
    text = CONFIG.format(name=name, port=port, directory=own, first_port=first_port, last_port=first_port + 99)
    path.write_text(text, encoding="utf-8")
    return path
