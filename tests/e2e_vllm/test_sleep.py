"""Sleep mode of the real vLLM behind the guard. On a CPU it frees nothing, so this tests the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neuron.config import HarnessSettings
from neuron.harness.vllm.control import sleep_routes as sleeping
from neuron.harness.vllm.guard.neuron_guard import CONTROL_HEADER, digest_of
from tests.e2e_vllm.conftest import RealVllm
from tests.e2e_vllm.engine import API_KEY, CONTROL_KEY, MODEL, RunningEngine, running_engine
from tests.processes import of_session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "The cat sees the moon"}], "max_tokens": 8}
OWN_MIDDLEWARE = """
async def tag(request, call_next):
    response = await call_next(request)
    response.headers["x-own"] = "1"
    return response
"""


@pytest.fixture(scope="module")
def engine(real_vllm: RealVllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """An engine that also has a middleware of its operator, found through the operator's PYTHONPATH."""
    directory = tmp_path_factory.mktemp("engine")
    (directory / "own_middleware.py").write_text(OWN_MIDDLEWARE, encoding="utf-8")
    settings = HarnessSettings(
        command=real_vllm.command,
        extra_args=[
            *("--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M"),
            *("--middleware", "own_middleware.tag"),
        ],
        env={"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(directory)},
        sleep_mode="dev",
    )
    with running_engine(directory, real_vllm.tiny, settings) as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_KEY}"}) as session:
        yield session


async def chat(http: aiohttp.ClientSession, engine: RunningEngine, **changes: Any) -> tuple[int, str]:
    async with http.post(f"{engine.url}/v1/chat/completions", json={**CHAT, **changes}) as response:
        assert response.headers["x-own"] == "1"
        return response.status, await response.text()


async def test_public_routes_are_unchanged(engine: RunningEngine, http: aiohttp.ClientSession) -> None:
    """Plain and streamed answers and token counts work, with the operator's middleware around the guard."""
    status, text = await chat(http, engine)
    assert (status, json.loads(text)["object"]) == (200, "chat.completion")
    status, text = await chat(http, engine, stream=True)
    assert status == 200
    assert text.endswith("data: [DONE]\n\n")
    for path in ("/health", "/ping", "/version", "/load", "/metrics", "/v1/models", "/openapi.json", "/docs"):
        async with http.get(engine.url + path) as response:
            assert response.status == 200, path
    async with http.post(engine.url + "/tokenize", json={"model": MODEL, "prompt": "the cat"}) as response:
        assert response.status == 200


async def test_what_is_refused_leaves_no_traceback(engine: RunningEngine, http: aiohttp.ClientSession) -> None:
    """Development mode would log one per request, and neuron would search them for the cause of an engine's exit."""
    assert (await chat(http, engine, model="unknown"))[0] == 404
    assert (await chat(http, engine, max_tokens=-1))[0] == 400
    assert "Traceback" not in engine.text()


async def test_development_routes_are_hidden(engine: RunningEngine, http: aiohttp.ClientSession) -> None:
    """Any request for vLLM's development routes gets vLLM's own 404."""
    async with http.get(engine.url + "/v1/no-such-path") as response:
        unknown = (response.status, await response.text())
    async with http.get(engine.url + "/openapi.json") as response:
        listed = {(method.upper(), path) for path, of in (await response.json())["paths"].items() for method in of}
    hidden = {
        ("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"), ("GET", "/server_info"),
        ("POST", "/collective_rpc"), ("POST", "/pause"), ("POST", "/reset_prefix_cache"), ("POST", "/update_weights"),
    }  # fmt: skip
    assert hidden <= listed
    tricks = {
        ("POST", path) for path in ("/sleep/", "//sleep", "/%73leep", "/SLEEP", "/v1/../sleep", "/v1/%2e%2e/sleep")
    }
    for method, path in hidden | tricks | {("OPTIONS", "/sleep")}:
        for headers in ({}, {CONTROL_HEADER: API_KEY}, {CONTROL_HEADER: digest_of(CONTROL_KEY)}):
            async with http.request(method, engine.url + path, headers=headers, allow_redirects=False) as response:
                assert (response.status, await response.text()) == unknown, (method, path)
    for path in ("/sleep", "/collective_rpc"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect(engine.url + path)
        assert caught.value.status == 403


async def test_sleep_and_wake(engine: RunningEngine, http: aiohttp.ClientSession) -> None:
    """A running request finishes, one during the sleep is refused, one after it is served."""
    assert await sleeping.is_guarded(http, engine.url, CONTROL_KEY)
    assert await sleeping.is_sleeping(http, engine.url, CONTROL_KEY) is False
    long = {**CHAT, "max_tokens": 32, "ignore_eos": True, "stream": True}
    async with http.post(f"{engine.url}/v1/chat/completions", json=long) as running:
        begun = await running.content.readany()
        await sleeping.sleep(http, engine.url, CONTROL_KEY)
        assert await sleeping.is_sleeping(http, engine.url, CONTROL_KEY) is True
        assert (begun + await running.content.read()).endswith(b"data: [DONE]\n\n")
    assert (await chat(http, engine))[0] == 503
    async with http.get(engine.url + "/metrics") as response:
        assert 'sleep_state="weights_offloaded"} 1.0' in await response.text()
    async with http.get(engine.url + "/health") as response:
        assert response.status == 200
    await sleeping.sleep(http, engine.url, CONTROL_KEY)  # already asleep
    for _ in range(2):
        await sleeping.wake(http, engine.url, CONTROL_KEY)
        assert await sleeping.is_sleeping(http, engine.url, CONTROL_KEY) is False
    assert (await chat(http, engine))[0] == 200


async def test_the_key_is_nowhere(engine: RunningEngine, http: aiohttp.ClientSession) -> None:
    """Neither the log nor anything that the engine's processes show contains the key."""
    assert await sleeping.is_sleeping(http, engine.url, CONTROL_KEY) is False
    text = engine.text()
    assert "/is_sleeping" in text
    assert CONTROL_KEY not in text
    members = of_session(engine.pid)
    assert len(members) > 1
    for member in members:
        for name in ("environ", "cmdline"):
            shown = await asyncio.to_thread(Path(f"/proc/{member.pid}/{name}").read_bytes)
            assert CONTROL_KEY.encode() not in shown
