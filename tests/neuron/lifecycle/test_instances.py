"""Several engines of one model on one host: each is loaded, listed, stopped and recovered by itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from neuron.config import NeuronConfig
from tests.neuron.neurons import (
    Client,
    Neuron,
    config_of,
    marked_engines,
    neuron_here,
    neuron_process,
    toml_config,
    until,
)
from tests.neuron.v1_cortex import v1_cortex

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


async def load(neuron: Client, *instances: str, args: Sequence[str] = (), **fields: Any) -> None:
    """Loads the instances at the same time."""
    loads = (neuron.load(MODEL, *args, vram_mb=20_000, instance=each, **fields) for each in instances)
    answers = await asyncio.gather(*loads)
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
    """An unloaded instance leaves the list while another is in it, and its files are removed; the last one stays, with
    its spec."""
    await load(host, "0", "1")
    engines = host.state_dir / "engines"
    assert len(await asyncio.to_thread(os.listdir, engines)) == 2
    await unload(host, "0")
    assert list(await entries(host)) == ["1"]
    await until(lambda: len(list(engines.iterdir())) == 1)
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


async def test_logs_of_one_and_of_all(host: Neuron) -> None:
    """The log of one instance is as that of a model; all together have the instance before each line."""
    await load(host, "0", "1")
    path = f"/models/{MODEL}/logs"
    own = (await host.call("GET", f"{path}?instance=1")).body["lines"]
    assert own[0].startswith("(")
    lines = (await host.call("GET", path)).body["lines"]
    assert [line for line in lines if line.startswith("[1] ")] == [f"[1] {line}" for line in own]
    assert {line[:4] for line in lines} == {"[0] ", "[1] "}


async def test_followed_logs_include_engines_that_start(host: Neuron) -> None:
    """A stream of all logs goes on with an instance that starts again after a crash, and with one that is new."""
    await load(host, "0", "1")
    async with host.session.get(f"{host.base}/models/{MODEL}/logs?follow=true&tail=0") as stream:

        async def until_ready(instance: str) -> None:
            while True:
                line = (await asyncio.wait_for(stream.content.readline(), 20)).decode()
                if line.startswith(f"data: [{instance}] ") and "Application startup complete" in line:
                    return

        os.kill((await entries(host))["1"]["pid"], signal.SIGKILL)
        await until_ready("1")
        await load(host, "2")
        await until_ready("2")
        await unload(host)
        assert await asyncio.wait_for(stream.content.read(), 20)


async def test_sleep_and_wake_of_one_and_of_all(host: Neuron) -> None:
    """One named instance sleeps and wakes while the others serve; without a name all do."""
    await load(host, "0", "1", "2")

    async def ask(what: str, **fields: Any) -> int:
        return (await host.call("POST", f"/models/{what}", json={"model_id": MODEL, **fields})).status

    async def statuses() -> list[str]:
        return [entry["status"] for entry in (await entries(host)).values()]

    assert await ask("sleep", instance="1") == 200
    assert await statuses() == ["loaded", "sleeping", "loaded"]
    assert await ask("sleep") == 200
    assert await statuses() == ["sleeping"] * 3
    assert await ask("wake", instance="2") == 200
    assert await statuses() == ["sleeping", "sleeping", "loaded"]
    assert await ask("wake") == 200
    assert await statuses() == ["loaded"] * 3
    assert await ask("wake", instance="3") == 404


async def test_loads_at_the_same_time(host: Neuron, mark: str) -> None:
    """Loads of the same instance join; loads of different instances never get the same device, and no more are
    accepted than there are devices."""
    names = [str(number) for number in range(12)]
    answers = await asyncio.gather(*(host.load(MODEL, vram_mb=50_000, instance=each) for each in names + names))
    statuses = [answer.status for answer in answers]
    assert statuses[:12] == statuses[12:]
    assert statuses.count(200) == 16
    found = await entries(host)
    assert sorted(index for entry in found.values() for index in entry["devices"]) == list(range(8))
    assert len(marked_engines(mark)) == 8


async def test_stopping_instance(host: Neuron) -> None:
    """A load of the same instance waits until it is gone; a load of another does not, unless it needs its device."""
    await load(host, *EIGHT, args=["--tokens-per-sec", "5"])
    url = (await host.call("GET", f"/models/{MODEL}/endpoint?instance=5")).body
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 10_000, "stream": True}
    headers = {"Authorization": f"Bearer {url['api_key']}"}
    async with host.session.post(f"{url['url']}/v1/chat/completions", json=body, headers=headers) as stream:
        await stream.content.readline()
        draining = asyncio.create_task(
            host.call("POST", "/models/unload?drain_secs=60", json={"model_id": MODEL, "instance": "5"})
        )

        async def drains() -> bool:
            return bool((await entries(host))["5"]["state"] == "draining")

        await until(drains)
        await unload(host, "6")
        assert (await host.load(MODEL, vram_mb=20_000, instance="8")).status == 200  # on the device of 6
        assert (await host.load(MODEL, vram_mb=20_000, instance="9", wait=False)).status == 202

        async def waits() -> bool:
            progress = (await entries(host))["9"]["progress"]
            return progress is not None and progress["message"] == (
                f"waiting until {MODEL} instance 5 is gone from the same device"
            )

        await until(waits)
        assert (await entries(host))["9"]["devices"] == (await entries(host))["5"]["devices"]
    assert (await draining).status == 200
    await until_loaded(host, "9")
    assert list(await entries(host)) == ["0", "1", "2", "3", "4", "7", "8", "9"]


async def until_loaded(neuron: Client, *instances: str) -> dict[str, dict[str, Any]]:
    async def loaded() -> dict[str, dict[str, Any]] | None:
        found = await entries(neuron)
        return found if all(found.get(each, {}).get("status") == "loaded" for each in instances) else None

    found: dict[str, dict[str, Any]] = await until(loaded)
    return found


async def test_all_are_adopted(tmp_path: Path, mark: str) -> None:
    """After kill -9 of neuron the next one adopts every instance under its name, and restarts the one that died
    meanwhile."""
    config = toml_config(tmp_path, f'state_dir = "{tmp_path / "state"}"')
    config.write_text(config.read_text().replace('["RTX 4090"]', '["H100", "H100", "H100", "H100"]'))
    async with neuron_process(config) as first:
        await load(first, "0", "1", "2", "3", variant="fp8")
        before = await entries(first)
        await first.stop(signal.SIGKILL)
    os.kill(before["2"]["pid"], signal.SIGKILL)
    async with neuron_process(config) as second:
        after = await until_loaded(second, "0", "1", "2", "3")
        assert {entry["variant"] for entry in after.values()} == {"fp8"}
        assert {name: entry["devices"] for name, entry in after.items()} == {
            name: entry["devices"] for name, entry in before.items()
        }
        for name, entry in after.items():
            assert (entry["pid"] == before[name]["pid"]) is (name != "2")
        await unload(second, "1")
        assert list(await entries(second)) == ["0", "2", "3"]
        assert await second.stop() == 0
    assert not marked_engines(mark)


async def test_a_load_of_the_model_after_all_are_unloaded(host: Neuron) -> None:
    """It makes the first instance, with the model's spec, whichever was unloaded last; but starts one that failed."""
    await load(host, "0", "1", "2")
    for instance in ("0", "2", "1"):
        await unload(host, instance)
    assert list(await entries(host)) == ["1"]
    answer = await host.call("POST", "/models/load", json={"model_id": MODEL})
    assert answer.body["instance"] == "0"
    assert list(await entries(host)) == ["0"]
    await unload(host)
    assert (await host.load(MODEL, "--fail-at", "weights", instance="4")).status == 500
    assert {name: entry["status"] for name, entry in (await entries(host)).items()} == {"4": "failed"}
    assert (await host.load(MODEL)).body["instance"] == "4"


async def test_events_and_figures_by_instance(host: Neuron) -> None:
    """Every event names the instance; one that leaves the list is reported as removed."""
    async with host.session.get(f"{host.base}/events") as stream:
        await load(host, "0", "1")
        await unload(host, "1")
        told: list[tuple[str, dict[str, Any]]] = []
        while "removed" not in [name for name, _ in told]:
            name = (await stream.content.readline()).decode().strip()
            if name.startswith("event: "):
                await stream.content.readline()
                data = json.loads((await stream.content.readline()).decode().removeprefix("data: "))
                told.append((name.removeprefix("event: "), data))
    of_one = [data["status"] for name, data in told if name == "model" and data["instance"] == "1"]
    assert (of_one[0], of_one[-1]) == ("loading", "unloaded")
    assert told[-1] == ("removed", {"id": MODEL, "instance": "1"})

    async def both_have_figures() -> bool:
        told = (await host.call("GET", "/health")).body["models"]
        return [(each["id"], each["instance"]) for each in told] == [(MODEL, "0"), (MODEL, "1")]

    await load(host, "1")
    await until(both_have_figures)
    page = (await host.call("GET", "/metrics")).body
    assert f'neuron_engine_state{{model="{MODEL}",state="loaded"}} 2.0' in page
    assert f'neuron_instance_state{{engine="1",model="{MODEL}",state="loaded"}} 1.0' in page


async def test_default_models(tmp_path: Path, mark: str) -> None:
    """neuron loads the named instances when it starts, and tells each in its progress."""
    wanted = [{"model_id": MODEL, "instance": each, "vram_mb": 20_000} for each in ("0", "1")]
    async with neuron_here(config_of(tmp_path / "state", harnesses=[{"name": "sim"}], default_models=wanted)) as neuron:
        found = await until_loaded(neuron, "0", "1")
        assert sorted(entry["devices"] for entry in found.values()) == [[0], [1]]

        async def done() -> dict[str, Any] | None:
            activation: dict[str, Any] = (await neuron.call("GET", "/health")).body["activation"]
            return activation if activation["state"] == "done" else None

        assert (await until(done))["completed"] == [MODEL, f"{MODEL} instance 1"]


async def test_engines_that_are_left_are_adopted(tmp_path: Path, mark: str) -> None:
    """on_stop = "leave_engines" leaves all instances; a record of a neuron that knew none is of the first."""
    config = toml_config(tmp_path, f'state_dir = "{tmp_path / "state"}"', 'on_stop = "leave_engines"')
    config.write_text(config.read_text().replace('["RTX 4090"]', '["H100", "H100"]'))
    async with neuron_process(config) as first:
        await load(first, "3", "4")
        before = await entries(first)
        assert await first.stop() == 0
    for path in (tmp_path / "state" / "engines").glob("*/run.json"):
        record = json.loads(path.read_text())
        if record.pop("instance") == "3":
            path.write_text(json.dumps(record))
    async with neuron_process(config) as second:
        after = await until_loaded(second, "0", "4")
        assert [after["0"]["pid"], after["4"]["pid"]] == [before["3"]["pid"], before["4"]["pid"]]
        await unload(second)
        assert await second.stop() == 0
    assert not marked_engines(mark)


async def test_host_without_devices(tmp_path: Path, mark: str) -> None:
    """Any number of instances run there."""
    async with neuron_here(config_of(tmp_path / "state", simulate={"devices": []})) as neuron:
        await load(neuron, "0", "1")
        assert [entry["devices"] for entry in (await entries(neuron)).values()] == [[], []]
        await unload(neuron)


async def test_displacement_takes_one_instance(tmp_path: Path, mark: str) -> None:
    """For a protocol v1 caller's model the instance ends that has been idle for longest; the others serve on."""
    config = config_of(tmp_path / "state", simulate={"devices": ["H100"] * 2}, engine_keys="never")
    async with neuron_here(config) as neuron, v1_cortex(neuron) as cortex:
        assert (await neuron.load("other", vram_mb=70_000)).status == 200
        await neuron.unload("other")
        await load(neuron, "0", devices=[1])
        await load(neuron, "1", devices=[0])
        await cortex.forward(MODEL, to=(await entries(neuron))["0"]["endpoint"]["url"])
        await until(lambda: [each.ended for each in neuron.registry.activity()] == [1, 0])
        await cortex.forward("other")
        assert {name: entry["status"] for name, entry in (await entries(neuron)).items()} == {"0": "loaded"}
        assert (await neuron.model("other"))["devices"] == [0]


async def test_callers_do_not_all_go_to_one_idle_engine(host: Neuron) -> None:
    """Between two samples of the engines' requests, callers that were told an endpoint count as its requests."""
    await load(host, "0", "1", args=["--tokens-per-sec", "5"])
    endpoint = (await host.call("GET", f"/models/{MODEL}/endpoint?instance=0")).body
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 10_000, "stream": True}
    headers = {"Authorization": f"Bearer {endpoint['api_key']}"}
    async with host.session.post(f"{endpoint['url']}/v1/chat/completions", json=body, headers=headers):
        await until(lambda: host.activity().get(MODEL) == 1)
        answers = [await host.call("GET", f"/models/{MODEL}/endpoint") for _ in range(8)]
    urls = [answer.body["url"] for answer in answers]
    assert urls[0] != endpoint["url"]
    assert 1 <= urls.count(endpoint["url"]) <= 6
