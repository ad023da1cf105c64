"""Sleep and wake through neuron's HTTP API, with simulated engines."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp

from tests.neuron.neurons import Answer, Client, Neuron, config_of, neuron_here, until

VRAM = "10000"


async def post(client: Client, what: str, model_id: str, **more: object) -> Answer:
    return await client.call("POST", f"/models/{what}", json={"model_id": model_id, **more})


async def until_state(client: Client, model_id: str, state: str) -> None:
    async def reached() -> bool:
        return (await client.model(model_id)).get("state") == state

    await until(reached)


async def used_mb(client: Client) -> int:
    devices = (await client.call("GET", "/health")).body["devices"]
    return sum(int(device["vram_used_mb"]) for device in devices)


async def test_sleep_frees_the_gpu_and_wake_takes_it_back(neuron: Neuron) -> None:
    """The process stays, its endpoint does not; repeating the request changes nothing."""
    assert (await neuron.load("m", "--vram-mb", VRAM)).status == 200
    pid = (await neuron.model("m"))["pid"]
    for _ in range(2):
        answer = await post(neuron, "sleep", "m")
        assert (answer.status, answer.body["status"]) == (200, "sleeping")
    entry = await neuron.model("m")
    assert (entry["status"], entry["pid"], await used_mb(neuron)) == ("sleeping", pid, 400)
    assert entry["vram_booked_mb"] == 400  # the rest can be promised to others, as /health reports
    assert (await neuron.endpoint("m")).status == 404
    for _ in range(2):
        answer = await post(neuron, "wake", "m")
        assert (answer.status, answer.body["status"]) == (200, "loaded")
    entry = await neuron.model("m")
    assert (entry["status"], entry["pid"], await used_mb(neuron)) == ("loaded", pid, 10000)
    assert entry["vram_booked_mb"] == 10000
    assert (await neuron.endpoint("m")).status == 200


async def test_a_load_wakes(neuron: Neuron) -> None:
    """A load with the same spec or the id alone wakes the model; concurrent loads wake it once."""
    await neuron.load("m", "--vram-mb", VRAM)
    pid = (await neuron.model("m"))["pid"]
    await post(neuron, "sleep", "m")
    bare = [neuron.call("POST", "/models/load", json={"model_id": "m"}) for _ in range(5)]
    answers = await asyncio.gather(neuron.load("m", "--vram-mb", VRAM), *bare)
    assert {answer.status for answer in answers} == {200}
    assert (await neuron.model("m"))["pid"] == pid


async def test_a_load_that_joins_a_wake_waits_for_it(neuron: Neuron) -> None:
    await neuron.load("m", "--vram-mb", VRAM, "--wake-secs", "0.7")
    await post(neuron, "sleep", "m")
    wake = asyncio.create_task(post(neuron, "wake", "m"))
    await until_state(neuron, "m", "waking")
    assert (await neuron.load("m", "--vram-mb", VRAM, "--wake-secs", "0.7")).status == 200
    assert (await neuron.endpoint("m")).status == 200
    assert (await wake).status == 200


async def test_a_wake_waits_for_memory_that_comes_back(neuron: Neuron) -> None:
    """The memory of an engine that is being stopped comes back soon; waking at once would run out of memory."""
    await neuron.load("m", "--vram-mb", "20000", devices=[0])
    pid = (await neuron.model("m"))["pid"]
    await post(neuron, "sleep", "m")
    assert (await neuron.load("n", "--vram-mb", "20000", "--fault", "ignore-sigterm", devices=[0])).status == 200
    unload = asyncio.create_task(neuron.unload("n"))
    await until_state(neuron, "n", "stopping")
    assert (await post(neuron, "wake", "m")).status == 200
    entry = await neuron.model("m")
    assert (entry["pid"], entry["failures"]) == (pid, 0)
    assert (await unload).status == 200


async def test_a_waking_engine_keeps_its_booking(neuron: Neuron) -> None:
    """The booking stays however often memory is measured before the engine has allocated it."""
    await neuron.load("m", "--vram-mb", "20000", devices=[0])
    pid = (await neuron.model("m"))["pid"]
    await post(neuron, "sleep", "m")
    os.kill(pid, signal.SIGSTOP)
    try:
        wake = asyncio.create_task(post(neuron, "wake", "m"))
        await until_state(neuron, "m", "waking")
        await asyncio.sleep(0.2)
        await neuron.model("m")
        assert (await neuron.load("n", "--vram-mb", "20000", devices=[0])).error["code"] == "insufficient_vram"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await wake).status == 200


async def test_a_sleeping_engine_stops_like_any_other(neuron: Neuron) -> None:
    await neuron.load("m", "--vram-mb", VRAM)
    await post(neuron, "sleep", "m")
    assert (await neuron.unload("m")).status == 200
    assert await used_mb(neuron) == 0


async def test_what_cannot_sleep(neuron: Neuron) -> None:
    """Unknown and unloaded models, engines without sleep mode and other levels are refused with their own codes."""
    assert (await post(neuron, "sleep", "m")).error["code"] == "model_not_found"
    assert (await post(neuron, "wake", "m")).error["code"] == "model_not_found"
    await neuron.load("m", "--no-enable-sleep-mode")
    answer = await post(neuron, "sleep", "m")
    assert (answer.status, answer.error["code"]) == (409, "sleep_unsupported")
    answer = await post(neuron, "sleep", "m", level=2)
    assert (answer.status, answer.error["param"]) == (400, "level")
    await neuron.unload("m")
    assert (await post(neuron, "sleep", "m")).error["code"] == "model_not_found"


async def test_a_busy_model_stays_awake(neuron: Neuron) -> None:
    """Its running request is not cut off."""
    await neuron.load("m", "--tokens-per-sec", "10")
    endpoint = (await neuron.endpoint("m")).body
    headers = {"Authorization": f"Bearer {endpoint['api_key']}"}
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10, "stream": True}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(endpoint["url"] + "/v1/chat/completions", json=body) as response,
    ):
        begun = await response.content.readany()
        assert (await post(neuron, "sleep", "m")).status == 200  # after a second, when the request is done
        assert (begun + await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_insufficient_host_memory(mark: str, tmp_path: Path) -> None:
    """Sleeping engines count: the second does not fit until the first is awake."""
    simulate = {"devices": ["RTX 5090", "RTX 5090"], "ram_mb": 10000}
    async with neuron_here(config_of(tmp_path / "state", simulate=simulate, sleep={"ram_reserve_mb": 3000})) as neuron:
        for model in ("a", "b"):
            await neuron.load(model, "--vram-mb", VRAM)  # 5.86 GiB of it are weights
        assert (await post(neuron, "sleep", "a")).status == 200
        error = (await post(neuron, "sleep", "b")).error
        assert (error["code"], error["available_mb"], error["reserve_mb"]) == ("insufficient_ram", 3999, 3000)
        assert (await neuron.model("b"))["status"] == "loaded"
        assert (await post(neuron, "wake", "a")).status == 200
        assert (await post(neuron, "sleep", "b")).status == 200
