"""A GPU becomes sick under a running engine: cortex moves the engine, and no answer is cut. Real processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from neuron.gpu.simulated_vram import CONDITIONS_FILE
from tests.e2e.replicas.fleet import Hosts, running_hosts
from tests.neuron.conftest import mark
from tests.neuron.neurons import until

__all__ = ["mark"]

MODEL, LARGE = "org/model", "org/large"
FAULT = "Xid 95: uncorrectable memory error, not contained"
SLOW = ["--tokens-per-sec", "20"]
TOKENS = 100


def make_sick(hosts: Hosts, *devices: int, name: str = "a") -> None:
    """These devices of the host are sick from now on, and no others."""
    path = hosts.directory / name / "state" / "vram" / CONDITIONS_FILE
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({str(index): {"fault": FAULT} for index in devices}))
    unfinished.replace(path)


async def stream(hosts: Hosts, model: str, begun: asyncio.Event) -> list[str]:
    """The data of every event of a long answer."""
    body = {"model": model, "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    async with hosts.session.post(f"{hosts.cortex.url}/v1/completions", json=body) as response:
        assert response.status == 200
        found = []
        async for line in response.content:
            begun.set()
            if line.startswith(b"data: "):
                found.append(line.removeprefix(b"data: ").decode().strip())
        return found


async def only_on(hosts: Hosts, model: str, devices: list[int]) -> list[dict[str, Any]] | None:
    """The model's engines, if there is only one left, and on these devices."""
    found = [each for each in await hosts.engines(model) if each["status"] not in ("unloaded", "failed")]
    placed = [each["devices"] for each in found if each["status"] == "loaded"]
    return found if placed == [devices] and len(found) == 1 else None


async def test_an_engine_in_use_moves_without_a_cut(mark: str, tmp_path: Path) -> None:
    """It goes to another device of the host, new requests to the new engine; the old one ends after its last answer.
    The reason is on /fleet and in the explanation, and the device is used again afterwards."""
    async with running_hosts(tmp_path, [{"id": MODEL, "harness": "sim", "vram_mb": 60_000, "args": SLOW}]) as hosts:
        begun = asyncio.Event()
        answer = asyncio.create_task(stream(hosts, MODEL, begun))
        await begun.wait()
        await until(lambda: only_on(hosts, MODEL, [0]))
        make_sick(hosts, 0)
        await until(lambda: _loaded_on(hosts, 1), 30)
        [node] = (await hosts.get("/fleet"))["nodes"]
        assert node["devices"][0]["fault"] == FAULT
        assert not answer.done()
        assert await hosts.ask(MODEL) == 200
        events = await answer
        assert events[-1] == "[DONE]"
        assert len([event for event in events if event != "[DONE]" and json.loads(event)["choices"]]) >= TOKENS
        await until(lambda: only_on(hosts, MODEL, [1]), 30)
        explained = (await hosts.get(f"/fleet/explain?model={MODEL}"))["nodes"][0]
        assert explained["sick_devices"] == {"0": FAULT}


async def _loaded_on(hosts: Hosts, device: int) -> list[dict[str, Any]]:
    return [each for each in await hosts.loaded(MODEL) if each["devices"] == [device]]


async def test_only_what_can_be_placed_elsewhere_moves(mark: str, tmp_path: Path) -> None:
    """A model that needs all eight devices stays where it is while one is sick, and answers; once it is unloaded its
    request is refused with the reason, until the device is healthy again."""
    model = {"id": LARGE, "harness": "sim", "vram_mb": 400_000, "min_devices": 8}
    async with running_hosts(tmp_path, [model]) as hosts:
        assert await hosts.ask(LARGE) == 200
        make_sick(hosts, 3)
        await until(lambda: _knows(hosts, 3))
        assert await hosts.ask(LARGE) == 200
        await hosts.operate("unload", model=LARGE)
        body = {"model": LARGE, "prompt": "x"}
        async with hosts.session.post(f"{hosts.cortex.url}/v1/completions", json=body) as response:
            refused = await response.json()
            assert response.status == 503, refused
        assert f"device 3 cannot be used ({FAULT})" in refused["error"]["message"]
        make_sick(hosts)
        await until(lambda: _knows(hosts))
        assert await hosts.ask(LARGE) == 200


async def _knows(hosts: Hosts, *devices: int) -> bool:
    [node] = (await hosts.get("/fleet"))["nodes"]
    return [device["index"] for device in node["devices"] if device.get("fault")] == list(devices)
