"""A large multipart upload passes through cortex while it arrives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import Wire, bounded, chunked, connected, read_body, read_head, request, until

MODEL = "org/small"
MIB = 1 << 20
FORM = "Content-Type: multipart/form-data; boundary=XX"


def form(model: str, size: int, *, model_last: bool = False) -> bytes:
    field = b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model.encode() + b"\r\n"
    file = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"a" * size + b"\r\n"
    return (file + field if model_last else field + file) + b"--XX--\r\n"


class Engine(RawEngine):
    """Reads bodies piece by piece, when `reads_bodies` is set, and answers with their length."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.began = asyncio.Event()
        self.reads_bodies = asyncio.Event()
        self.reads_bodies.set()
        self.refuses = False
        self.on_connect = self._talk

    async def _talk(self, wire: Wire) -> None:
        head = await read_head(wire.incoming, secs=60)
        if head is None:
            return
        self.heads.append(dict(head.headers))
        self.bodies.append(b"")
        self.began.set()
        if self.refuses:
            await wire.send(answer(b'{"error": {"message": "too long"}}', status="413 No"))
            await wire.gone.wait()
            return
        await self.reads_bodies.wait()
        if head.get("transfer-encoding") is not None:
            self.bodies[-1] = await read_body(wire.incoming, "chunked", 0)
        else:
            left = int(head.get("content-length") or 0)
            pieces = []
            while left:
                pieces.append(await bounded(wire.incoming.read(min(left, 65536))))
                left -= len(pieces[-1])
                if not pieces[-1]:
                    return
            self.bodies[-1] = b"".join(pieces)
        await wire.send(answer(json.dumps({"got": len(self.bodies[-1])}).encode()))


def answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[Engine]:
    async with Engine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        assert isinstance(engine, Engine)
        yield engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: Engine) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}], aliases={"voice": MODEL})


def upload(body: bytes, *lines: str, target: str = "/v1/audio/transcriptions", length: bool = True) -> bytes:
    return request(body, FORM, *lines, target=target, length=length)


@pytest.mark.parametrize("model", [MODEL, "voice"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_engine_gets_it_while_it_arrives(cortex: RunningCortex, engine: Engine, model: str, framing: str) -> None:
    """The engine has the request before the client has sent half of it; an alias is replaced."""
    body = form(model, 4 * MIB)
    data = upload(body)
    if framing == "chunked":
        data = upload(b"", "Transfer-Encoding: chunked", length=False) + chunked(body, 100_000)
    async with connected(cortex.url) as client:
        half = len(data) // 2
        await client.send(data[:half])
        await bounded(engine.began.wait())
        got = await client.ask(data[half:])
        expected = form(MODEL, 4 * MIB)
        assert (got.status, json.loads(got.body)) == (200, {"got": len(expected)})
        assert (await client.ask(request(method="GET", target="/health"), "GET")).status == 200
    assert engine.bodies == [expected]
    (head,) = engine.heads
    assert head.get("content-length") == (str(len(expected)) if framing == "length" else None)


async def test_slow_engine_holds_the_client_back(tmp_path: Path, benjy: V1Neuron, engine: Engine) -> None:
    """256 MiB of which cortex never holds more than a few."""
    engine.reads_bodies.clear()
    body = form(MODEL, 256 * MIB)
    async with (
        cortex_process(tmp_path, [benjy], [{"id": MODEL}], max_body_mib=300) as process,
        connected(process.url) as client,
    ):
        before = process.rss_bytes()
        process.reset_peak()
        sending = asyncio.create_task(client.send(upload(body)))
        await bounded(engine.began.wait())
        await asyncio.sleep(0.5)
        assert not sending.done()
        engine.reads_bodies.set()
        await asyncio.wait_for(sending, 30)
        got = await client.answer()
        assert json.loads(got.body) == {"got": len(body)}
        assert process.peak_rss_bytes() - before < 40 * MIB


async def test_load_holds_the_client_back(cortex: RunningCortex, benjy: V1Neuron, engine: Engine) -> None:
    """The rest of the upload waits with the client until the model is loaded."""
    del benjy.models[MODEL]
    await until(lambda: not cortex.parts.fleet.snapshot().serving(MODEL))
    benjy.load_gate.clear()
    body = form(MODEL, 30 * MIB)
    async with connected(cortex.url) as client:
        sending = asyncio.create_task(client.send(upload(body)))
        await bounded(benjy.load_started.wait())
        await asyncio.sleep(0.3)
        assert not sending.done()
        benjy.load_gate.set()
        await bounded(sending)
        assert json.loads((await client.answer()).body) == {"got": len(body)}


async def test_engine_that_answers_early(cortex: RunningCortex, engine: Engine) -> None:
    """The client gets the answer, and the connection to the engine is not used again."""
    engine.refuses = True
    data = upload(form(MODEL, 4 * MIB))
    async with connected(cortex.url) as client:
        await client.send(data[: len(data) // 2])
        got = await client.answer()
        assert (got.status, json.loads(got.body)["error"]["message"]) == (413, "too long")
    await bounded(engine.connections[0].gone.wait())


async def test_engine_that_is_lost_on_the_way(cortex: RunningCortex, engine: Engine) -> None:
    """What has been passed on is gone: the client is told, and sends it again itself."""
    engine.reads_bodies.clear()
    data = upload(form(MODEL, 4 * MIB))
    async with connected(cortex.url) as client:
        await client.send(data[: len(data) // 2])
        await bounded(engine.began.wait())
        await asyncio.sleep(0.1)
        engine.connections[0].reset()
        got = await client.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (502, "upstream_unreachable")
    assert len(engine.heads) == 1


async def test_client_that_leaves_on_the_way(cortex: RunningCortex, engine: Engine) -> None:
    data = upload(form(MODEL, 4 * MIB))
    async with connected(cortex.url) as client:
        await client.send(data[: len(data) // 2])
        await bounded(engine.began.wait())
    await bounded(engine.connections[0].gone.wait())
    await until(lambda: not any(cortex.parts.counts.all_in_flight().values()))


async def test_client_that_stalls(cortex: RunningCortex, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is let go, as with any body."""
    monkeypatch.setattr("cortex.http.connection.BODY_TIMEOUT_SECS", 0.3)
    data = upload(form(MODEL, 4 * MIB))
    async with connected(cortex.url) as client:
        await client.send(data[: len(data) // 2])
        await bounded(client.gone.wait())
    await bounded(engine.connections[0].gone.wait())


async def test_pipelined_request_behind_it(cortex: RunningCortex, engine: Engine) -> None:
    body = form(MODEL, 2 * MIB)
    async with connected(cortex.url) as client:
        await client.send(upload(body) + request(method="GET", target="/health"))
        assert json.loads((await client.answer()).body) == {"got": len(body)}
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("bad", [b"zz\r\n", b"5\r\nabcdefgh\r\n"])
async def test_broken_framing_on_the_way(cortex: RunningCortex, engine: Engine, bad: bytes) -> None:
    data = upload(b"", "Transfer-Encoding: chunked", length=False)
    data += chunked(form(MODEL, 2 * MIB), 100_000).removesuffix(b"0\r\n\r\n")
    async with connected(cortex.url) as client:
        await client.send(data)
        await bounded(engine.began.wait())
        assert (await client.ask(bad)).status == 400
    await bounded(engine.connections[0].gone.wait())


async def test_chunked_upload_over_the_limit(start_cortex: StartCortex, benjy: V1Neuron, engine: Engine) -> None:
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"max_body_mib": 2})
    data = upload(b"", "Transfer-Encoding: chunked", length=False) + chunked(form(MODEL, 4 * MIB), 100_000)
    async with connected(cortex.url) as client:
        await client.send(data)
        assert (await client.answer()).status == 413
