"""`cortex dev` as a new user sees it: the example catalogue on three simulated hosts, real clients."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from tests.e2e.dev import Dev
from tests.processes import eventually

LARGE, MIDDLE, SMALL = "Qwen/Qwen3.6-27B", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"


@pytest.fixture
def client(dev: Dev) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{dev.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def get(dev: Dev, path: str) -> Any:
    with urllib.request.urlopen(dev.url + path, timeout=20) as response:
        return json.loads(response.read())


def test_all_three_models_are_listed_with_where_they_can_run(dev: Dev) -> None:
    """Models are listed before anything is loaded."""
    entries = {entry["id"]: entry for entry in get(dev, "/v1/models")["data"]}
    assert entries[LARGE]["feasible_on"] == ["beast"]
    assert entries[MIDDLE]["feasible_on"] == ["beast", "benjy"]
    assert entries[SMALL]["feasible_on"] == ["beast", "benjy", "quadbrat"]
    assert entries["large"]["alias_of"] == LARGE


async def test_fifty_first_requests_load_once(dev: Dev) -> None:
    """One engine starts and answers all of them."""
    body = {"model": SMALL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    async with aiohttp.ClientSession() as session:

        async def ask() -> tuple[int, str]:
            async with session.post(f"{dev.url}/v1/chat/completions", json=body) as response:
                await response.read()
                return response.status, response.headers["x-cortex-node"]

        answers = await asyncio.gather(*(ask() for _ in range(50)))
    assert set(answers) == {(200, "quadbrat")}
    nodes = {node["name"]: node for node in get(dev, "/fleet")["nodes"]}
    assert [model["id"] for model in nodes["quadbrat"]["models"]] == [SMALL]
    assert not nodes["benjy"]["models"]


def test_large_model_is_split_over_both_gpus_of_beast(dev: Dev, client: openai.OpenAI) -> None:
    """A chat with the openai client cold-loads it; the simulated GPUs fill up."""
    answer = client.chat.completions.create(
        model="large", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8

    def fetch_beast() -> Any:
        return next(node for node in get(dev, "/fleet")["nodes"] if node["name"] == "beast")

    beast = fetch_beast()
    (model,) = [entry for entry in beast["models"] if entry["id"] == LARGE]
    assert model["status"] == "loaded"
    assert model["devices"] == [0, 1]
    assert model["tensor_parallel"] == 2
    eventually(
        lambda: all(device["vram_used_mb"] >= 27000 for device in fetch_beast()["devices"]),
        "both GPUs are half full",
        within_secs=20,
    )


def test_streams_of_both_client_libraries(dev: Dev, client: openai.OpenAI) -> None:
    """The openai and anthropic packages stream answers with usage."""
    chunks = list(
        client.chat.completions.create(
            model=SMALL,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) >= 8
    assert chunks[-1].usage is not None
    with (
        anthropic.Anthropic(base_url=dev.url, api_key="none", max_retries=0) as claude,
        claude.messages.stream(model=SMALL, max_tokens=8, messages=[{"role": "user", "content": "Hello"}]) as stream,
    ):
        assert "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == 8


def test_embeddings_and_responses(client: openai.OpenAI) -> None:
    """The other dialects take the same path."""
    assert client.embeddings.create(model=SMALL, input="a text").data[0].embedding
    assert client.responses.create(model=SMALL, input="Hello", max_output_tokens=4).output_text


def test_explain_gives_each_node_with_numbers(dev: Dev) -> None:
    """The answer says where a model is or would go, and why."""
    plan = get(dev, f"/fleet/explain?model={MIDDLE}")
    reasons = {node["node"]: node for node in plan["nodes"]}
    assert not reasons["quadbrat"]["feasible"]
    assert "16000" in reasons["quadbrat"]["reason"]
    assert reasons["benjy"]["devices"] == [0]


async def test_events_reach_cortex_in_milliseconds(dev: Dev) -> None:
    """cortex notices a model that was unloaded directly through its neuron without waiting for a poll."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{dev.url}/fleet/events") as events:
            await events.content.readuntil(b"\n\n")
            async with session.post(f"{dev.url}/fleet/load", json={"model": MIDDLE}) as response:
                assert response.status == 200
            statuses: list[str] = []
            while "loaded" not in statuses:
                event = (await events.content.readuntil(b"\n\n")).decode()
                data = json.loads(event.partition("data: ")[2])
                statuses += [m["status"] for n in data["nodes"] for m in n["models"] if m["id"] == MIDDLE]
        assert "loading" in statuses, "the load's progress was seen on its way"
