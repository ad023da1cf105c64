"""What neurons tell of a model beyond protocol v1: passed on to clients, and used for routing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.protocol import ModelView
from shared.tasks import timeout
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

ID = "org/small"
MODEL = {"id": ID, "vram_mb": 4000}
TOLD = {
    "limit": {"context": 32768, "input": 28000, "output": 4096},
    "cost": {"input": 0.5, "output": 1.5, "cache_read": 0.1},
    "capabilities": ["text"],
    "modalities": {"input": ["text"], "output": ["text"]},
    "tool_call": False,
    "reasoning": False,
    "attachment": False,
    "temperature": True,
    "structured_output": True,
}
OTHER = {
    "limit": {"context": 16384, "output": 8192},
    "cost": {"input": 9},
    "capabilities": ["text", "vision"],
    "modalities": {"input": ["image"]},
    "tool_call": True,
    "attachment": True,
}
SQUEEZED = {"ok": False, "reason": "insufficient_vram", "detail": "412 MiB free"}


@pytest.fixture
async def pair() -> AsyncIterator[list[V1Neuron]]:
    """Two neurons, the first with the model."""
    async with contextlib.AsyncExitStack() as stack:
        neurons = [V1Neuron(name, 24000) for name in ("a", "b")]
        neurons[0].models[ID] = "loaded"
        for neuron in neurons:
            await stack.enter_async_context(neuron.running())
        yield neurons


async def got(cortex: RunningCortex, path: str, **headers: str) -> Any:
    async with cortex.http.get(f"{cortex.url}{path}", headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_clients_are_told(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    """The list, one entry and aliases; Anthropic's shape and Codex's gain the lengths and nothing else."""
    pair[0].entries[ID] = TOLD
    cortex = await start_cortex(pair, [MODEL], aliases={"small": ID})
    listed = await got(cortex, "/v1/models")
    for entry in (*listed["data"], await got(cortex, f"/v1/models/{ID}")):
        assert {name: entry[name] for name in TOLD} == TOLD
        assert entry["max_model_len"] == 32768
    assert listed["models"][0]["context_window"] == 32768
    assert not TOLD.keys() & listed["models"][0].keys()
    (shown,) = (await got(cortex, "/fleet"))["nodes"][0]["models"]
    assert {name: shown[name] for name in TOLD} == TOLD
    anthropic = await got(cortex, f"/v1/models/{ID}", **{"anthropic-version": "2023-06-01"})
    assert anthropic.keys() == {"type", "id", "display_name", "created_at", "max_input_tokens", "max_tokens"}
    assert (anthropic["max_input_tokens"], anthropic["max_tokens"]) == (32768, 4096)


async def test_copies_that_differ(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    """The tightest limit holds at each of them; what one can do the model can do. The operator's own limit wins."""
    one, other = pair
    other.models[ID] = "loaded"
    one.entries[ID], other.entries[ID] = TOLD, OTHER
    cortex = await start_cortex(pair, [{**MODEL, "limit": {"output": 1000}}])
    (entry,) = (await got(cortex, "/v1/models"))["data"]
    assert entry["limit"] == {"context": 16384, "input": 28000, "output": 1000}
    assert entry["cost"] == TOLD["cost"]
    assert entry["capabilities"] == ["text", "vision"]
    assert entry["modalities"] == {"input": ["text", "image"], "output": ["text"]}
    assert (entry["tool_call"], entry["reasoning"], entry["attachment"]) == (True, False, True)


async def test_what_does_not_read_is_left_out(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    pair[0].entries[ID] = {
        "limit": {"context": "32768", "input": 0, "output": 4096.0},
        "cost": {"input": -1, "output": "free"},
        "capabilities": "text",
        "tool_call": [],
        "reasoning": None,
        "servable": {"reason": "?"},
        "modalities": {"input": None, "output": [1]},
    }
    cortex = await start_cortex(pair, [MODEL])
    (entry,) = (await got(cortex, "/v1/models"))["data"]
    assert entry["limit"] == {"context": 32768, "output": 4096}
    assert entry["modalities"] == {"input": [], "output": []}
    assert not {"cost", "capabilities", "tool_call", "reasoning"} & entry.keys()
    async with cortex.chat(ID) as response:
        assert response.status == 200
    (node, _) = (await got(cortex, "/fleet"))["nodes"]
    assert node["ignored_fields"] == [
        "/models: capabilities",
        "/models: cost.input",
        "/models: cost.output",
        "/models: limit.input",
        "/models: modalities.output",
        "/models: servable.ok",
        "/models: tool_call",
    ]


async def answered_by(cortex: RunningCortex) -> str:
    async with cortex.chat(ID) as response:
        assert response.status == 200, await response.text()
        return str(response.headers["x-cortex-node"])


@pytest.mark.parametrize("servable", [False, "no", 0, SQUEEZED])
async def test_a_model_that_cannot_serve_now_gets_no_requests(
    start_cortex: StartCortex, pair: list[V1Neuron], servable: Any
) -> None:
    """Neither for requests nor for a load, until its neuron says otherwise."""
    one, other = pair
    cortex = await start_cortex(pair, [MODEL])
    assert await answered_by(cortex) == "a"
    one.entries[ID] = {"servable": servable}
    await cortex.until(lambda: not cortex.parts.fleet.snapshot().serving(ID))
    assert ID not in cortex.parts.routes.table
    explained = await got(cortex, f"/fleet/explain?model={ID}")
    assert (explained["decision"]["action"], explained["decision"]["node"]) == ("load", "b")
    assert "says that it cannot serve it now" in explained["nodes"][0]["reason"]
    assert await answered_by(cortex) == "b"
    assert (len(one.loads), len(other.loads)) == (0, 1)
    (entry,) = (await got(cortex, "/v1/models"))["data"]
    assert [each.get("servable") for each in entry["locations"]] == [False, None]
    other.models.clear()
    one.entries[ID] = {"servable": {"ok": True}}
    await cortex.until(
        lambda: not cortex.parts.fleet.node("b").models and bool(cortex.parts.fleet.snapshot().serving(ID))
    )
    assert await answered_by(cortex) == "a"


@pytest.mark.parametrize("catalogue", [[MODEL], []], ids=["catalogue", "only the neuron's"])
async def test_a_model_that_can_serve_nowhere(
    start_cortex: StartCortex, pair: list[V1Neuron], catalogue: list[dict[str, Any]]
) -> None:
    """The client hears why at once, instead of waiting for a load that would not help."""
    one = pair[0]
    one.entries[ID] = {"servable": SQUEEZED}
    cortex = await start_cortex([one], catalogue)
    async with timeout(5), cortex.chat(ID) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (503, "neuron_unavailable")
        assert "retry-after" in response.headers
    assert "a: insufficient_vram: 412 MiB free" in error["message"]
    explained = await got(cortex, f"/fleet/explain?model={ID}")
    assert explained["decision"]["action"] == "refuse"
    assert "412 MiB free" in explained["decision"]["reason"]
    (entry,) = (await got(cortex, "/v1/models"))["data"]
    assert entry["locations"][0]["reason"] == "insufficient_vram: 412 MiB free"


def test_our_neuron_sends_none_of_it() -> None:
    """Not even as null: helexa's cortex reads `capabilities` as a list and `tool_call` as a boolean."""
    sent = ModelView(id=ID, status="loaded").model_dump(mode="json")
    assert not sent.keys() & {*TOLD, "servable"}
