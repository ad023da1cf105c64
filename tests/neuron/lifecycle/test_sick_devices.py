"""A GPU with a fault: nothing is placed on it, its engines do not come back there, and the reason is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

from neuron.gpu.simulated_vram import CONDITIONS_FILE
from tests.neuron.neurons import Neuron, until

FAULT = "Xid 79: the GPU has fallen off the bus"


def make_sick(neuron: Neuron, index: int, **condition: object) -> None:
    """Replaces the conditions of all devices."""
    path = neuron.state_dir / "vram" / CONDITIONS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({str(index): condition}))
    unfinished.replace(path)


async def devices_of(neuron: Neuron) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await neuron.call("GET", "/health")).body["devices"]
    return found


@contextlib.asynccontextmanager
async def device_events(neuron: Neuron) -> AsyncIterator[Any]:
    """A function that waits for the next `device` event."""
    async with neuron.session.get(neuron.base + "/events") as response:

        async def following() -> dict[str, Any]:
            async for line in response.content:
                if line.strip() == b"event: device":
                    _number, data = await response.content.readline(), await response.content.readline()
                    event: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
                    return event
            raise AssertionError("the events ended")

        yield following


async def test_loads_avoid_a_sick_device(neuron: Neuron) -> None:
    """The other device is chosen; naming the sick one is refused with the reason, until it is healthy again."""
    make_sick(neuron, 0, fault=FAULT)
    assert (await neuron.load("first", vram_mb=8000)).status == 200
    assert (await neuron.model("first"))["devices"] == [1]
    refused = await neuron.load("second", vram_mb=8000, devices=[0])
    assert (refused.status, refused.error["code"]) == (409, "insufficient_vram")
    assert FAULT in refused.error["message"]
    assert [device["vram_bookable_mb"] > 0 for device in await devices_of(neuron)] == [False, True]
    make_sick(neuron, 0)
    assert (await neuron.load("second", vram_mb=8000, devices=[0])).status == 200


async def test_the_reason_is_on_health_events_and_metrics(neuron: Neuron) -> None:
    """Each change is one event; warnings are told and change nothing else."""
    uuid = (await neuron.call("GET", "/discovery")).body["devices"][1]["uuid"]
    async with device_events(neuron) as next_event:
        make_sick(neuron, 1, fault=FAULT, xids={"79": 2})
        assert [device["fault"] for device in await devices_of(neuron)] == [None, FAULT]
        assert await next_event() == {"index": 1, "uuid": uuid, "fault": FAULT, "warnings": []}
        page = (await neuron.call("GET", "/metrics")).body
        assert f'neuron_device_fault{{index="1",reason="{FAULT}",uuid="{uuid}"}} 1.0' in page
        assert f'neuron_device_xids_total{{index="1",uuid="{uuid}",xid="79"}} 2.0' in page
        make_sick(neuron, 1, warnings=["slowed down because it is too hot"])
        assert (await devices_of(neuron))[1]["warnings"] == ["slowed down because it is too hot"]
        event = await next_event()
        assert (event["fault"], event["warnings"]) == (None, ["slowed down because it is too hot"])
        assert 'neuron_device_fault{index="1"' not in (await neuron.call("GET", "/metrics")).body
        assert (await neuron.load("model", vram_mb=8000, devices=[1])).status == 200


async def test_an_engine_does_not_come_back_on_a_sick_device(neuron: Neuron) -> None:
    """Where the load named the device it fails at once with both reasons: cortex loads it elsewhere meanwhile."""
    await neuron.load("model", vram_mb=8000, devices=[0])
    make_sick(neuron, 0, fault=FAULT)
    os.kill((await neuron.model("model"))["pid"], signal.SIGKILL)
    failed = await neuron.until_status("model", "failed")
    assert FAULT in failed["error"]
    assert "killed by signal 9" in failed["error"]
    assert failed["failures"] == 0  # no restart was tried


async def test_an_engine_comes_back_on_another_device(neuron: Neuron) -> None:
    """Where the load left the choice to neuron, the restart takes a healthy device."""
    await neuron.load("model", vram_mb=8000)
    before = await neuron.model("model")
    make_sick(neuron, before["devices"][0], fault=FAULT)
    os.kill(before["pid"], signal.SIGKILL)

    async def moved() -> bool:
        now = await neuron.model("model")
        return bool(now["status"] == "loaded" and now["devices"] != before["devices"])

    await until(moved)
