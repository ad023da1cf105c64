"""Several engines of one model on one host: each is loaded, listed, stopped and recovered by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from neuron.config import NeuronConfig
from tests.neuron.neurons import Client, Neuron, config_of, marked_engines, neuron_here, until

MODEL = "Qwen/Qwen3-8B"
EIGHT = [str(number) for number in range(8)]


@pytest.fixture
def eight_gpus(tmp_path: Path, mark: str) -> NeuronConfig:
    return config_of(tmp_path / "state", simulate={"devices": ["H100"] * 8})


@pytest.fixture
async def host(eight_gpus: NeuronConfig) -> AsyncIterator[Neuron]:
    async with neuron_here(eight_gpus) as neuron:
        yield neuron


async def entries(neuron: Client, model: str = MODEL) -> dict[str, dict[str, Any]]:
    """The model's entries of `/models` by instance."""
    listed = (await neuron.call("GET", "/models")).body
    return {entry["instance"]: entry for entry in listed if entry["id"] == model}


async def load(neuron: Client, *instances: str, **fields: Any) -> None:
    """Loads the instances at the same time."""
    answers = await asyncio.gather(*(neuron.load(MODEL, vram_mb=20_000, instance=each, **fields) for each in instances))
    assert [answer.status for answer in answers] == [200] * len(instances), [answer.body for answer in answers]
    assert [answer.body["instance"] for answer in answers] == list(instances)


async def unload(neuron: Client, instance: str | None = None) -> None:
    named = {} if instance is None else {"instance": instance}
    answer = await neuron.call("POST", "/models/unload", json={"model_id": MODEL, **named})
    assert answer.status == 200, answer.body


async def test_eight_engines_on_eight_devices(host: Neuron, mark: str) -> None:
    """Eight instances are loaded side by side, each with its own process, endpoint and device; a ninth is refused with
    an error that says why. kill -9 of one brings back that one, on its device."""
    await load(host, *EIGHT)
    before = await entries(host)
    assert list(before) == EIGHT
    assert sorted(index for entry in before.values() for index in entry["devices"]) == list(range(8))
    assert len({entry["pid"] for entry in before.values()}) == len({e["endpoint"]["url"] for e in before.values()}) == 8
    refused = await host.load(MODEL, vram_mb=20_000, instance="8")
    assert (refused.status, refused.error["code"]) == (409, "insufficient_vram")
    assert "device 3 (H100) cannot be used: it holds instance " in refused.error["message"]
    assert list(await entries(host)) == EIGHT

    os.kill(before["3"]["pid"], signal.SIGKILL)

    async def is_back() -> bool:
        entry = (await entries(host))["3"]
        return bool(entry["status"] == "loaded" and entry["pid"] != before["3"]["pid"])

    await until(is_back)
    after = await entries(host)
    assert after["3"]["devices"] == before["3"]["devices"]
    assert {name: entry["pid"] for name, entry in after.items() if name != "3"} == {
        name: entry["pid"] for name, entry in before.items() if name != "3"
    }
    await unload(host)
    assert not marked_engines(mark)
    assert len(await entries(host)) == 1


async def test_unload_of_one(host: Neuron) -> None:
    """An unloaded instance leaves the list while another is in it; the last one stays, with its spec."""
    await load(host, "0", "1")
    await unload(host, "0")
    assert list(await entries(host)) == ["1"]
    gone = await host.call("POST", "/models/unload", json={"model_id": MODEL, "instance": "0"})
    assert (gone.status, gone.error["code"]) == (404, "model_not_found")
    assert gone.error["message"] == f"the model {MODEL!r} has no instance '0' here (instance: 1)"
    await unload(host, "1")
    assert {name: entry["status"] for name, entry in (await entries(host)).items()} == {"1": "unloaded"}
    answer = await host.call("POST", "/models/load", json={"model_id": MODEL, "instance": "0"})
    assert (answer.status, answer.body["instance"]) == (200, "0")
    assert {name: entry["vram_booked_mb"] for name, entry in (await entries(host)).items()} == {"0": 20_000}


async def test_load_without_an_instance(host: Neuron) -> None:
    """It makes the first one, joins any that has the spec, and is refused when none has it."""
    first = await host.load(MODEL, vram_mb=20_000)
    assert (first.status, first.body["instance"]) == (200, "0")
    await load(host, "1", devices=[5])
    assert (await host.load(MODEL, vram_mb=20_000, devices=[5])).body["instance"] == "1"
    refused = await host.load(MODEL, vram_mb=30_000)
    assert (refused.status, refused.error["code"]) == (409, "already_loaded")
    assert list(await entries(host)) == ["0", "1"]


async def test_named_devices_are_obeyed(host: Neuron) -> None:
    """Two instances share a device when their loads name it."""
    await load(host, "0", "1", devices=[2])
    assert [entry["devices"] for entry in (await entries(host)).values()] == [[2], [2]]


async def test_endpoints_take_turns(host: Neuron) -> None:
    """The endpoint without an instance is that of the one with the fewest requests, each in turn when all are idle."""
    await load(host, *EIGHT)
    path = f"/models/{MODEL}/endpoint"
    urls = {(await host.call("GET", path)).body["url"] for _ in EIGHT}
    assert urls == {entry["endpoint"]["url"] for entry in (await entries(host)).values()}
    named = await host.call("GET", f"{path}?instance=4")
    assert named.body["url"] == (await entries(host))["4"]["endpoint"]["url"]
    unknown = await host.call("GET", f"{path}?instance=9")
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    assert "has no instance '9' here (instances: 0, 1, 2, 3, 4, 5, 6, 7)" in unknown.error["message"]
