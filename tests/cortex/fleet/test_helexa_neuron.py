"""helexa's neuron behind cortex, both as real processes, from the first request to the death of either model."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from shared.tasks import timeout
from tests.cortex.cortex_process import TOP, cortex_process
from tests.cortex.fleet.helexa_neuron import LIMITS
from tests.cortex.raw_http import bounded, connected, request
from tests.ports import free_port

ID = "org/small"
MODELS: list[dict[str, Any]] = [
    {"id": ID, "harness": "candle", "vram_mb": 4000},
    {"id": "org/broken", "harness": "candle", "vram_mb": 4000},
]
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
SAID = "Hello there"


class Neuron:
    """The process; `start` after `kill` begins another one on the same port."""

    name = "helexa"

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.cortex.fleet.helexa_neuron", str(self.port), cwd=TOP
        )
        await bounded(self._listens())

    async def _listens(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                async with connected(self.url) as client:
                    await client.ask(request(method="GET", target="/version"))
                    return
            await asyncio.sleep(0.02)

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    async def order(self, **order: Any) -> Any:
        """What only a test can ask."""
        async with aiohttp.ClientSession() as http, http.post(f"{self.url}/test", json=order) as response:
            return await response.json()


class Cortex:
    """The running cortex and a client of it."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def get(self, path: str) -> Any:
        async with self.http.get(f"{self.url}{path}") as response:
            return await response.json()

    async def ask(self, model: str = ID) -> tuple[int, str, Any]:
        """Status, whether it was a cold start, and the body."""
        body = {"model": model, "messages": MESSAGES}
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as response:
            return response.status, response.headers.get("x-cortex-cold-start", ""), await response.json()

    async def until_asked(self, wanted: int) -> Any:
        """Asks until the answer has this status."""
        async with timeout(20):
            while True:
                status, _, body = await self.ask()
                if status == wanted:
                    return body
                await asyncio.sleep(0.05)

    async def until_limited(self) -> None:
        """Waits for the poll that brings the limits of a model that was just loaded."""
        async with timeout(10):
            while True:
                (node,) = (await self.get("/fleet"))["nodes"]
                if node["models"][0]["activity"] is not None:
                    return
                await asyncio.sleep(0.05)


@pytest.fixture
async def neuron() -> AsyncIterator[Neuron]:
    running = Neuron()
    await running.start()
    yield running
    await running.kill()


@contextlib.asynccontextmanager
async def cortex_of(
    neuron: Neuron, directory: Path, *, poll_secs: float = 0.1, workers: int = 1
) -> AsyncIterator[Cortex]:
    async with contextlib.AsyncExitStack() as stack:
        process = await stack.enter_async_context(
            cortex_process(directory, [neuron], MODELS, poll_secs=poll_secs, workers=workers)
        )
        cortex = Cortex(process.url, await stack.enter_async_context(aiohttp.ClientSession()))
        stack.push_async_callback(cortex.openai.close)
        yield cortex


@pytest.mark.parametrize("workers", [1, 2])
async def test_cold_and_warm(neuron: Neuron, tmp_path: Path, workers: int) -> None:
    """Chat and responses, plain and streamed, through the official client; the list; the operator's view."""
    async with cortex_of(neuron, tmp_path, workers=workers) as cortex:
        assert [(await cortex.ask())[:2] for _ in range(2)] == [(200, "true"), (200, "false")]
        client = cortex.openai
        chat = await client.chat.completions.create(model=ID, messages=MESSAGES)
        assert chat.choices[0].message.content == SAID
        stream = await client.chat.completions.create(model=ID, messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
        assert (await client.responses.create(model=ID, input="hi")).output_text == SAID
        events = [event async for event in await client.responses.create(model=ID, input="hi", stream=True)]
        assert [event.type for event in events][-1] == "response.completed"
        entries = {entry["id"]: entry for entry in (await cortex.get("/v1/models"))["data"]}
        assert entries[ID]["limit"] == {"context": 32768, "input": 28000, "output": 4096}
        assert entries[ID]["capabilities"] == ["text", "vision"]
        assert (entries[ID]["tool_call"], entries[ID]["reasoning"], entries[ID]["loaded"]) == (True, True, True)
        (node,) = (await cortex.get("/fleet"))["nodes"]
        assert (node["healthy"], node["last_error"]) == (True, None)
        assert (await cortex.get(f"/fleet/explain?model={ID}"))["decision"]["action"] == "serve"


async def test_a_load_that_it_refuses(neuron: Neuron, tmp_path: Path) -> None:
    """The client gets its words."""
    async with cortex_of(neuron, tmp_path) as cortex:
        status, _, body = await cortex.ask("org/broken")
    assert status == 503
    assert "quant_not_found" in body["error"]["message"]


@pytest.mark.parametrize("poll_secs", [0.1, 60])
@pytest.mark.parametrize("workers", [1, 2])
async def test_it_evicts_by_itself(neuron: Neuron, tmp_path: Path, poll_secs: float, workers: int) -> None:
    """Its engine's 404 does not reach the client: the model is loaded again, however long the last poll is ago."""
    async with cortex_of(neuron, tmp_path, poll_secs=poll_secs, workers=workers) as cortex:
        for _ in range(3):
            await cortex.ask()
            assert (await cortex.ask())[0] == 200
            await neuron.order(evict=ID)
            assert (await cortex.ask())[:2] == (200, "true")


async def test_killed_and_started_again(neuron: Neuron, tmp_path: Path) -> None:
    """Its models are gone with it. While it is away clients get an error with a time to retry; a stream in progress
    ends with an error; afterwards the model is loaded again."""
    async with cortex_of(neuron, tmp_path) as cortex:
        assert (await cortex.ask())[0] == 200
        body = {"model": ID, "messages": MESSAGES, "stream": True, "pause": 30}
        async with cortex.http.post(f"{cortex.url}/v1/chat/completions", json=body) as response:
            assert b"Hel" in await bounded(response.content.readuntil(b'"Hel"'))
            await neuron.kill()
            rest = await bounded(response.content.read())
        assert b"upstream_lost" in rest
        status, _, answer = await bounded(cortex.ask(), secs=20)
        assert status in (502, 503), answer
        await neuron.start()
        await cortex.until_asked(200)
        assert (await cortex.ask())[:2] == (200, "false")
        assert len((await cortex.get("/v1/models"))["data"]) == 2


async def test_restarted_between_two_polls(neuron: Neuron, tmp_path: Path) -> None:
    """No client notices, and nothing of the old process is used."""
    async with cortex_of(neuron, tmp_path, poll_secs=60) as cortex:
        for _ in range(3):
            assert (await cortex.ask())[0] == 200
            await neuron.kill()
            await neuron.start()
            assert (await cortex.ask())[:2] == (200, "true")


async def test_it_recovers_a_model(neuron: Neuron, tmp_path: Path) -> None:
    """Requests wait for it instead of failing or loading it again."""
    async with cortex_of(neuron, tmp_path) as cortex:
        assert (await cortex.ask())[0] == 200
        await neuron.order(recovering=ID, secs=0.5)
        assert (await cortex.ask())[0] == 200


async def test_it_cannot_serve_for_a_while(neuron: Neuron, tmp_path: Path) -> None:
    async with cortex_of(neuron, tmp_path) as cortex:
        assert (await cortex.ask())[0] == 200
        squeezed = {"ok": False, "reason": "insufficient_vram", "detail": "1200 MiB free, need 1500"}
        await neuron.order(servable=squeezed)
        refused = await cortex.until_asked(503)
        assert "1200 MiB free" in refused["error"]["message"]
        await neuron.order(servable={"ok": True})
        await cortex.until_asked(200)


@pytest.mark.parametrize("workers", [1, 2])
async def test_more_requests_than_it_has_seats(neuron: Neuron, tmp_path: Path, workers: int) -> None:
    """None is refused by its admission control."""
    async with cortex_of(neuron, tmp_path, workers=workers) as cortex:
        await cortex.ask()
        await cortex.until_limited()
        answers = await bounded(asyncio.gather(*(cortex.ask() for _ in range(40))), secs=20)
        assert {status for status, *_ in answers} == {200}
        assert (await neuron.order())["most"] <= LIMITS["anon_max_in_flight"]
