"""Clients behind nginx and caddy, stock and as documented: comments, tokens and long waits arrive."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.cortex.behind_proxies.proxies import (
    STOCK_CADDY,
    STOCK_NGINX,
    caddy,
    documented_caddy,
    documented_nginx,
    nginx,
)
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain, stream_head
from tests.cortex.raw_http import Wire, chunked

MODEL = "org/small"
TOKEN_SECS = 0.25
TOKENS = [f'data: {{"token": {number}}}\n\n'.encode() for number in range(6)]
END = b"0\r\n\r\n"

StartProxy = Callable[[str], contextlib.AbstractAsyncContextManager[str]]


@pytest.fixture(params=["nginx-stock", "nginx-documented", "caddy-stock", "caddy-documented"])
def start_proxy(request: pytest.FixtureRequest, tmp_path: Path) -> StartProxy:
    """Starts a proxy in front of the cortex at a URL."""
    return {
        "nginx-stock": lambda url: nginx(url, tmp_path, STOCK_NGINX),
        "nginx-documented": lambda url: nginx(url, tmp_path, documented_nginx()),
        "caddy-stock": lambda url: caddy(url, tmp_path, STOCK_CADDY),
        "caddy-documented": lambda url: caddy(url, tmp_path, documented_caddy()),
    }[request.param]


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[RawEngine]:
    async with RawEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine


def framed(data: bytes) -> bytes:
    return chunked(data, len(data)).removesuffix(END)


async def tokens(wire: Wire, received: Received) -> None:
    await wire.send(stream_head())
    for token in TOKENS:
        await wire.send(framed(token))
        await asyncio.sleep(TOKEN_SECS)
    await wire.send(END)


async def lines(url: str) -> list[tuple[float, bytes]]:
    """The lines of a streamed chat that are not blank, with the seconds after which they came."""
    started, found = time.monotonic(), []
    async with aiohttp.ClientSession() as http:
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            async for line in response.content:
                if line.strip():
                    found.append((time.monotonic() - started, line))
    return found


async def test_tokens_come_one_by_one(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, start_proxy: StartProxy
) -> None:
    engine.script = tokens
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with start_proxy(cortex.url) as url:
        got = await lines(url)
    assert b"".join(line + b"\n" for _, line in got) == b"".join(TOKENS)
    times = [secs for secs, _ in got]
    assert all(later - sooner > TOKEN_SECS / 3 for sooner, later in itertools.pairwise(times)), times


async def test_first_comment_comes_in_about_a_second(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, start_proxy: StartProxy
) -> None:
    """A cold start with the usual settings sends its first comment through the proxy."""
    engine.script = tokens
    del benjy.models[MODEL]
    benjy.load_gate.clear()
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with start_proxy(cortex.url) as url:
        asking = asyncio.create_task(lines(url))
        await asyncio.sleep(3.5)
        benjy.load_gate.set()
        got = await asking
    comments = [secs for secs, line in got if line.startswith(b": loading org/small")]
    assert 0.9 < comments[0] < 2
    assert 2.5 < comments[1] < 3.5
    assert b"".join(line + b"\n" for _, line in got if not line.startswith(b": ")) == b"".join(TOKENS)


@pytest.mark.parametrize("head", [False, True], ids=["before-the-head", "after-the-head"])
async def test_long_prefill_is_not_cut(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, tmp_path: Path, head: bool
) -> None:
    """Several times longer than nginx waits for a byte. Usually that is 60 s, and comments come every 15 s."""

    async def prefill(wire: Wire, received: Received) -> None:
        if head:
            await wire.send(stream_head())
        await asyncio.sleep(5)
        await wire.send((b"" if head else stream_head()) + framed(TOKENS[0]) + END)

    engine.script = prefill
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": 0.5})
    brief = STOCK_NGINX.replace("proxy_pass", "proxy_read_timeout 2s; proxy_pass")
    async with nginx(cortex.url, tmp_path, brief) as url:
        got = await lines(url)
    assert sum(line.startswith(b": ") for _, line in got) >= 5
    assert got[-1][1] + b"\n" == TOKENS[0]


async def test_plain_request_with_white_space_is_not_cut(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, tmp_path: Path
) -> None:
    async def late(wire: Wire, received: Received) -> None:
        await asyncio.sleep(4)
        await wire.send(plain(b'{"ok": 1}'))

    engine.script = late
    waiting = {"plain_keepalive": "whitespace"}
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": 0.5}, waiting=waiting)
    brief = STOCK_NGINX.replace("proxy_pass", "proxy_read_timeout 2s; proxy_pass")
    async with (
        nginx(cortex.url, tmp_path, brief) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/completions", json={"model": MODEL}) as response,
    ):
        assert response.status == 200
        assert await response.json() == {"ok": 1}


async def test_client_that_leaves_stops_its_engine(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, start_proxy: StartProxy
) -> None:
    """cortex sees the disconnect through the proxy as well."""
    engine.script = endless
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with start_proxy(cortex.url) as url:
        asking = asyncio.create_task(lines(url))
        await engine.next_request()
        asking.cancel()
        await asyncio.wait_for(engine.connections[-1].gone.wait(), 10)


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
async def test_clients_of_the_documented_proxies_may_only_use_models(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, tmp_path: Path, kind: str
) -> None:
    """Also while there is no key: cortex tells them from programs on its own host."""
    engine.script = tokens
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    proxy = (
        nginx(cortex.url, tmp_path, documented_nginx())
        if kind == "nginx"
        else caddy(cortex.url, tmp_path, documented_caddy())
    )
    async with proxy as url, aiohttp.ClientSession() as http:
        assert len(await lines(url)) == len(TOKENS)
        async with http.get(f"{url}/fleet") as answer:
            assert answer.status == 403
        async with http.post(f"{url}/keys", json={"name": "mine", "role": "admin"}) as answer:
            assert answer.status == 403
    async with cortex.http.get(f"{cortex.url}/fleet") as answer:
        assert answer.status == 200


async def endless(wire: Wire, received: Received) -> None:
    await wire.send(stream_head())
    while True:
        await wire.send(framed(TOKENS[0]))
        await asyncio.sleep(0.05)


async def test_large_prompt_passes_the_documented_proxies(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, tmp_path: Path
) -> None:
    """A prompt of 20 MB passes; a stock nginx would refuse it."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    for number, start in enumerate((nginx, caddy)):
        directory = tmp_path / str(number)
        directory.mkdir()
        conf = documented_nginx() if start is nginx else documented_caddy()
        async with start(cortex.url, directory, conf) as url, aiohttp.ClientSession() as http:
            body = {"model": MODEL, "n": number, "prompt": "x" * 20_000_000}
            async with http.post(f"{url}/v1/completions", data=io.BytesIO(json.dumps(body).encode())) as response:
                assert (response.status, (await response.json())["n"]) == (200, number)
