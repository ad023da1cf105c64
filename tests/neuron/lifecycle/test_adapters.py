"""LoRA adapters of running engines: loaded, unloaded, displaced, kept over a crash and a restart of neuron."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp

from tests.neuron.neurons import Answer, Client, Neuron, config_of, neuron_here, until

BASE = "base"


def adapter(directory: Path, name: str, rank: int = 8) -> str:
    """The directory of an adapter, as far as the simulation and neuron look at it."""
    path = directory / name
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    return str(path)


async def attach(neuron: Client, name: str, source: str, **fields: Any) -> Answer:
    body = {"model_id": BASE, "adapter": name, "source": source, **fields}
    return await neuron.call("POST", "/adapters/load", json=body)


async def detach(neuron: Client, name: str) -> Answer:
    return await neuron.call("POST", "/adapters/unload", json={"model_id": BASE, "adapter": name})


async def ask(neuron: Client, model: str, path: str = "/v1/completions", **fields: Any) -> int:
    """The status of a request to the engine itself."""
    endpoint = (await neuron.endpoint(BASE)).body
    headers = {"Authorization": f"Bearer {endpoint['api_key']}"}
    body = {"model": model, "prompt": "hello", "max_tokens": 2, **fields}
    async with neuron.session.post(endpoint["url"] + path, json=body, headers=headers) as response:
        await response.read()
        return response.status


async def test_an_adapter_comes_and_goes(neuron: Neuron, tmp_path: Path) -> None:
    """A loaded adapter serves under its name and is listed; unloaded it is neither. Loading it twice is fine, and one
    that is known with another source is replaced."""
    first, second = adapter(tmp_path, "first"), adapter(tmp_path, "second")
    assert (await neuron.load(BASE, max_loras=2)).status == 200
    assert await ask(neuron, "a") == 404
    for source in (first, first, second):
        answer = await attach(neuron, "a", source)
        assert (answer.status, answer.body) == (200, {"model_id": BASE, "adapters": {"0": ["a"]}})
    assert await ask(neuron, "a") == 200
    view = await neuron.model(BASE)
    assert (view["adapters"], view["max_loras"]) == (["a"], 2)
    assert (await detach(neuron, "a")).status == 200
    assert await ask(neuron, "a") == 404
    assert (await neuron.model(BASE))["adapters"] == []
    assert (await detach(neuron, "a")).error["code"] == "model_not_found"


async def test_only_neuron_loads_adapters(neuron: Neuron, tmp_path: Path) -> None:
    """A client of the engine, which has its key, finds no route that loads or unloads an adapter."""
    source = adapter(tmp_path, "a")
    assert (await neuron.load(BASE, max_loras=1)).status == 200
    assert (await attach(neuron, "a", source)).status == 200
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": source}),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ):
        assert await ask(neuron, "", path, **body) == 404
    assert await ask(neuron, "a") == 200


async def test_a_full_engine(neuron: Neuron, tmp_path: Path) -> None:
    """At its limit an engine unloads the first adapter that the caller offers and that has no requests; without one it
    refuses. The requests of the others go on."""
    sources = {name: adapter(tmp_path, name) for name in ("a", "b", "c")}
    assert (await neuron.load(BASE, "--tokens-per-sec", "20", max_loras=2)).status == 200
    for name in ("a", "b"):
        assert (await attach(neuron, name, sources[name])).status == 200
    refused = await attach(neuron, "c", sources["c"])
    assert (refused.status, refused.error["code"]) == (409, "adapters_full")
    long = asyncio.ensure_future(ask(neuron, "a", max_tokens=2000, ignore_eos=True))

    async def runs() -> bool:
        engine = neuron.registry.get(BASE).engine
        assert engine is not None
        async with neuron.session.get(engine.url + "/metrics") as page:
            return 'running_lora_adapters="a"' in await page.text()

    await until(runs)
    assert (await attach(neuron, "c", sources["c"], displaceable=["a"])).error["code"] == "adapters_full"
    answer = await attach(neuron, "c", sources["c"], displaceable=["a", "b"])
    assert answer.body["adapters"] == {"0": ["a", "c"]}
    assert not long.done()
    long.cancel()


async def test_refusals(neuron: Neuron, tmp_path: Path) -> None:
    """Each fault is named: no adapters allowed, no such model, a wrong directory, a rank above the engine's, a
    harness without adapters."""
    good, high = adapter(tmp_path, "good"), adapter(tmp_path, "high", rank=64)
    assert (await attach(neuron, "a", good)).status == 404
    assert (await neuron.load(BASE)).status == 200
    unprepared = await attach(neuron, "a", good)
    assert (unprepared.status, "without max_loras" in unprepared.error["message"]) == (409, True)
    await neuron.unload(BASE)
    assert (await neuron.load(BASE, max_loras=1, lora_sources=[good])).status == 200
    cases = {
        str(tmp_path / "none"): "is not a directory on this host",
        str(tmp_path): "has no adapter_config.json",
        high: "LoRA rank 64 is greater than max_lora_rank 8",
        "-flag": "could be read as a flag",
    }
    for source, reason in cases.items():
        answer = await attach(neuron, "a", source)
        assert answer.status >= 400
        assert reason in answer.error["message"]
    assert (await neuron.model(BASE))["adapters"] == []


async def test_adapters_return_after_a_crash(neuron: Neuron, tmp_path: Path) -> None:
    """The engine that follows a crashed one serves the same adapters, except one whose files are gone."""
    kept, gone = adapter(tmp_path, "kept"), adapter(tmp_path, "gone")
    assert (await neuron.load(BASE, max_loras=2)).status == 200
    assert (await attach(neuron, "kept", kept)).status == 200
    assert (await attach(neuron, "gone", gone)).status == 200
    (Path(gone) / "adapter_config.json").unlink()
    pid = (await neuron.model(BASE))["pid"]
    os.kill(pid, signal.SIGKILL)

    async def back() -> bool:
        entry = await neuron.model(BASE)
        return bool(entry["status"] == "loaded" and entry["pid"] != pid)

    await until(back)
    assert (await neuron.model(BASE))["adapters"] == ["kept"]
    assert await ask(neuron, "kept") == 200


async def test_adapters_stay_over_sleep(neuron: Neuron, tmp_path: Path) -> None:
    """A sleeping engine takes no adapter; awake it has those from before."""
    source = adapter(tmp_path, "a")
    assert (await neuron.load(BASE, max_loras=2)).status == 200
    assert (await attach(neuron, "a", source)).status == 200
    await neuron.call("POST", "/models/sleep", json={"model_id": BASE})
    assert (await attach(neuron, "b", source)).status == 404
    await neuron.call("POST", "/models/wake", json={"model_id": BASE})
    assert await ask(neuron, "a") == 200


async def test_the_next_neuron_knows_them(mark: str, tmp_path: Path) -> None:
    """A neuron that adopts the engine of another lists its adapters, and loads and unloads them."""
    config = config_of(tmp_path / "state", on_stop="leave_engines")
    source = adapter(tmp_path, "a")
    async with neuron_here(config) as neuron:
        assert (await neuron.load(BASE, max_loras=2)).status == 200
        assert (await attach(neuron, "a", source)).status == 200
    async with neuron_here(config_of(tmp_path / "state")) as neuron:
        await neuron.until_status(BASE, "loaded")
        assert (await neuron.model(BASE))["adapters"] == ["a"]
        assert (await attach(neuron, "b", source)).body["adapters"] == {"0": ["a", "b"]}
        assert (await detach(neuron, "a")).body["adapters"] == {"0": ["b"]}


async def test_an_adapter_that_left_by_itself(neuron: Neuron, tmp_path: Path) -> None:
    """A load of an adapter that the engine has lost loads it again."""
    source = adapter(tmp_path, "a")
    assert (await neuron.load(BASE, max_loras=1)).status == 200
    assert (await attach(neuron, "a", source)).status == 200
    engine = neuron.registry.get(BASE).engine
    assert engine is not None
    headers = {"x-neuron-control": engine.control_key, "Authorization": f"Bearer {engine.api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(f"{engine.url}/v1/unload_lora_adapter", json={"lora_name": "a"}) as reply,
    ):
        assert reply.status == 200
    assert await ask(neuron, "a") == 404
    assert (await attach(neuron, "a", source)).status == 200
    assert await ask(neuron, "a") == 200
