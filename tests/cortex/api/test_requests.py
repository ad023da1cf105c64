"""`GET /fleet/requests` and `cortex requests`: where requests go, and what they wait for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cortex.cli.test_cli import run
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

KEYS = """[[keys]]
name = "alice"
key = "sk-alice"
[[keys]]
name = "watcher"
key = "sk-watcher"
role = "viewer"
"""
MODELS = [{"id": "a", "vram_mb": 20000}, {"id": "b", "vram_mb": 20000}]


async def seen(cortex: RunningCortex, query: str = "", key: str = "", status: int = 200) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with cortex.http.get(f"{cortex.url}/fleet/requests{query}", headers=headers) as response:
        assert response.status == status
        answer: dict[str, Any] = await response.json()
        return answer


async def test_a_cold_start_from_its_wait_to_its_end(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It is seen while it waits, then among those that have ended, with what it waited for; a later look has only what
    is new."""
    cortex = await start_cortex([benjy], MODELS, aliases={"first": "a"})
    benjy.load_gate.clear()
    asking = asyncio.create_task(cortex.chat("first", stream=True).__aenter__())
    await benjy.load_started.wait()
    before = await seen(cortex)
    assert (before["ended"], before["live_count"]) == ([], 1)
    while (await seen(cortex))["live"][0]["secs"] < 0.05:  # a shorter wait is not shown
        pass
    (live,) = before["live"]
    assert (live["model"], live["asked"], live["stage"]) == ("a", "first", "waiting for an engine")
    assert live["note"].startswith("loading a on benjy")
    benjy.load_gate.set()
    async with await asking as response:
        assert response.status == 200
    after = await seen(cortex, f"?since={before['place']}")
    assert (after["whole"], after["live"]) == (False, [])
    (ended,) = after["ended"]
    told = {name: ended[name] for name in ("id", "model", "asked", "node", "status", "error", "cold", "choice")}
    assert told == {
        "id": live["id"], "model": "a", "asked": "first", "node": "benjy", "status": 200, "error": None, "cold": True,
        "choice": "loaded",
    }  # fmt: skip
    assert [step["kind"] for step in ended["steps"] if step["kind"] != "load"][-2:] == ["engine", "answer"]
    assert any(step["kind"] in ("load", "wait") for step in ended["steps"])
    assert (await seen(cortex, f"?since={after['place']}"))["ended"] == []


async def test_errors_and_filters(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    cortex = await start_cortex([benjy], MODELS)
    for model, status in (("a", 200), ("nowhere", 404)):
        async with cortex.chat(model) as response:
            assert response.status == status
    (failed,) = (await seen(cortex, "?status=error"))["ended"]
    assert (failed["model"], failed["status"], failed["error"]) == ("nowhere", 404, "model_not_found")
    assert "'nowhere'" in failed["message"]
    assert failed["steps"] == []
    assert [each["model"] for each in (await seen(cortex, "?node=benjy"))["ended"]] == ["a"]
    assert [each["model"] for each in (await seen(cortex, "?model=nowhere"))["ended"]] == ["nowhere"]
    assert [each["model"] for each in (await seen(cortex, "?limit=1"))["ended"]] == ["nowhere"]
    table = await run("requests", "--url", cortex.url)
    assert [row[1:5] for row in table.rows[1:]] == [
        ["nowhere", "-", "anonymous", "404"],
        ["a", "benjy", "anonymous", "200"],
    ]
    only = await run("requests", "--errors", "--json", "--url", cortex.url)
    assert [each["id"] for each in only.json["ended"]] == [failed["id"]]


async def test_a_client_that_left_does_not_count_as_an_error(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    cortex = await start_cortex([benjy], MODELS)
    benjy.load_gate.clear()
    asking = asyncio.create_task(cortex.chat("a").__aenter__())
    await benjy.load_started.wait()
    asking.cancel()
    while not (await seen(cortex, "?status=499"))["ended"]:
        pass
    assert (await seen(cortex, "?status=error"))["ended"] == []


async def test_a_user_sees_its_own(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    cortex = await start_cortex([benjy], MODELS, keys=KEYS)
    for key in ("sk-alice", "sk-watcher"):
        body = {"model": "a", "messages": [{"role": "user", "content": "a secret"}]}
        headers = {"Authorization": f"Bearer {key}"}
        async with cortex.http.post(f"{cortex.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
    assert [each["key"] for each in (await seen(cortex, key="sk-alice"))["ended"]] == ["alice"]
    everything = await seen(cortex, key="sk-watcher")
    assert [each["key"] for each in everything["ended"]] == ["watcher", "alice"]
    assert "secret" not in str(everything)
    assert "sk-" not in str(everything)


@pytest.mark.parametrize("query", ["?limit=0", "?limit=1001", "?limit=x", "?status=bad", "?status=20"])
async def test_odd_queries(start_cortex: StartCortex, benjy: V1Neuron, query: str) -> None:
    answer = await seen(await start_cortex([benjy], MODELS), query, status=400)
    assert answer["error"]["param"] == query[1:].partition("=")[0]
