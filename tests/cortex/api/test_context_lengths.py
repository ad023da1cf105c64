"""`max_model_len` of `/v1/models` is the engine's own, and stays known."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cortex.upstream.pool import IDLE_SECS
from shared.protocol.context_length import length_in
from tests.cortex import instances_neuron
from tests.cortex.conftest import StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.instances_neuron import InstancesNeuron
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import bounded, connected, request, until
from tests.cortex.raw_neuron import RawNeuron

MODEL = "org/small"
PAGE = {"object": "list", "data": [{"id": "lora", "max_model_len": 5}, {"id": MODEL, "max_model_len": 40960}]}


@pytest.fixture
async def engine() -> AsyncIterator[RawEngine]:
    async with RawEngine().running() as engine:
        engine.models_page = json.dumps(PAGE).encode()
        yield engine


async def told(url: str, target: str = "/v1/models/org/small", *lines: str) -> dict[str, Any]:
    async with connected(url) as client:
        answer = await client.ask(request(b"", *lines, method="GET", target=target), "GET")
    entry: dict[str, Any] = json.loads(answer.body)
    return entry


async def test_length_is_the_engines_and_outlives_it(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It replaces the catalogue's, in each shape, and is still told when the model is unloaded. A protocol v1 neuron is
    asked for the endpoint."""
    benjy.models[MODEL] = "loaded"
    benjy.engine.models_page = PAGE
    cortex = await start_cortex([benjy], [{"id": MODEL, "limit": {"context": 8192}}], aliases={"a": MODEL})
    assert (await told(cortex.url))["max_model_len"] == 40960
    page = await told(cortex.url, "/v1/models")
    assert [entry["max_model_len"] for entry in page["data"]] == [40960, 40960]
    assert [entry["context_window"] for entry in page["models"]] == [40960, 40960]
    version = "anthropic-version: 2023-06-01"
    assert (await told(cortex.url, "/v1/models/a", version))["max_input_tokens"] == 40960
    benjy.models[MODEL] = "unloaded"
    await cortex.until(lambda: not cortex.parts.fleet.snapshot().serving(MODEL))
    entry = await told(cortex.url)
    assert (entry["loaded"], entry["max_model_len"], entry["limit"]) == (False, 40960, {"context": 8192})
    assert benjy.engine.listed == 1


async def test_engine_is_asked_as_soon_as_it_has_loaded(start_cortex: StartCortex, engine: RawEngine) -> None:
    """If the neuron reports its endpoint, no client has to list the models while it is loaded."""
    async with RawNeuron().running() as neuron:
        cortex = await start_cortex([neuron], [{"id": MODEL}])
        assert (await told(cortex.url))["max_model_len"] is None
        await neuron.streaming.wait()
        neuron.change(MODEL, "loaded", endpoint={"url": f"{engine.url}/base", "api_key": "secret"})
        await neuron.tell("model", neuron.models[MODEL])
        await until(lambda: bool(engine.listed))
        received = engine.listed[0]
        assert (received.target, received.get("authorization")) == ("/base/v1/models", "Bearer secret")
        neuron.change(MODEL, "unloaded")
        await neuron.tell("model", neuron.models[MODEL])
        await cortex.until(lambda: not cortex.parts.fleet.snapshot().serving(MODEL))
        assert (await told(cortex.url))["max_model_len"] == 40960
        assert len(engine.listed) == 1


async def test_no_connection_is_kept_to_an_engine_that_was_asked(start_cortex: StartCortex, engine: RawEngine) -> None:
    """It would delay the engine's end when neuron judges by connections. The engine keeps its side open."""
    async with RawNeuron().running() as neuron:
        cortex = await start_cortex([neuron], [{"id": MODEL}])
        await neuron.streaming.wait()
        neuron.change(MODEL, "loaded", endpoint={"url": engine.url})
        await neuron.tell("model", neuron.models[MODEL])
        await until(lambda: bool(engine.listed))
        began = time.monotonic()
        await until(lambda: not engine.open_connections)
        assert time.monotonic() - began < IDLE_SECS
        assert (await told(cortex.url))["max_model_len"] == 40960


async def test_reloaded_engine_is_asked_again(start_cortex: StartCortex, engine: RawEngine) -> None:
    """Its arguments may have changed."""
    async with RawNeuron().running() as neuron:
        cortex = await start_cortex([neuron], [{"id": MODEL}])
        await neuron.streaming.wait()
        for length in (1000, 2000):
            engine.models_page = json.dumps({"data": [{"id": MODEL, "max_model_len": length}]}).encode()
            neuron.change(MODEL, "loaded", endpoint={"url": engine.url})
            await neuron.tell("model", neuron.models[MODEL])
            while (await told(cortex.url))["max_model_len"] != length:
                pass


async def test_the_shortest_of_the_present_engines_is_told(start_cortex: StartCortex) -> None:
    """Each location has its own, as its neuron tells it; `id@variant` has that of its engines. Without any, what was
    last known stays."""
    model = instances_neuron.MODEL
    one, two = InstancesNeuron("one", "0"), InstancesNeuron("two", "0")
    one.variant, one.max_model_len = "fp8", 8000
    two.variant, two.max_model_len = "awq", 4000
    async with one.running(), two.running():
        cortex = await start_cortex([one, two], [{"id": model, "variants": [{"quant": "fp8"}, {"quant": "awq"}]}])

        async def length(name: str) -> int:
            tokens: int = (await told(cortex.url, f"/v1/models/{name}"))["max_model_len"]
            return tokens

        entry = await told(cortex.url, f"/v1/models/{model}")
        assert {each["node"]: each["max_model_len"] for each in entry["locations"]} == {"one": 8000, "two": 4000}
        assert [await length(name) for name in (model, f"{model}@fp8", f"{model}@awq")] == [4000, 8000, 4000]
        for neuron, left in ((two, {"one"}), (one, set())):
            neuron.statuses["0"] = "unloaded"
            await cortex.until(lambda: {e.node.name for e in cortex.parts.fleet.snapshot().serving(model)} == left)  # noqa: B023
            assert [await length(name) for name in (model, f"{model}@awq")] == [8000, 4000]
        assert not one.engines["0"].listed
        assert not two.engines["0"].listed


@pytest.mark.parametrize(
    "body", [b"", b"no", b"[]", b'{"data": 1}', b'{"data": [1, {"id": "x", "max_model_len": "9"}]}']
)
async def test_engine_without_a_length(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, body: bytes
) -> None:
    """The list has the catalogue's length, and does not ask the engine each time."""
    benjy.models[MODEL] = "loaded"
    benjy.engine_url = engine.url
    engine.models_page = body
    cortex = await start_cortex([benjy], [{"id": MODEL, "limit": {"context": 8192}}])
    for _ in range(3):
        assert (await told(cortex.url))["max_model_len"] == 8192
    assert len(engine.listed) == 1


async def test_silent_engine_does_not_hold_up_the_list(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The list comes without the length."""
    benjy.models[MODEL] = "loaded"
    benjy.engine.models_page = None
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    assert (await bounded(told(cortex.url)))["max_model_len"] is None


async def test_length_survives_a_restart(tmp_path: Path, benjy: V1Neuron) -> None:
    """The state file keeps it."""
    benjy.models[MODEL] = "loaded"
    benjy.engine.models_page = PAGE
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state") as process:
        assert (await told(process.url))["max_model_len"] == 40960
        process.process.terminate()
        assert await process.ended() == 0
    benjy.models[MODEL] = "unloaded"
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state") as process:
        assert (await told(process.url))["max_model_len"] == 40960


def test_own_entry_comes_first() -> None:
    """Of several models in an engine's list its own name counts; a single one under another name counts too."""
    assert length_in(MODEL, PAGE) == 40960
    assert length_in("m", {"data": [{"id": "m", "meta": {"n_ctx": 9}}]}, "meta.n_ctx") == 9
    assert length_in("other", {"data": [{"id": "path"}, {"id": "x", "max_model_len": 7}]}) == 7
    with pytest.raises(ValueError, match="no max_model_len"):
        length_in(MODEL, {"data": [{"id": MODEL, "max_model_len": True}]})
