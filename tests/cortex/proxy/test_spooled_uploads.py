"""A large multipart upload whose file comes before its `model` waits on disk, not in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

import pytest

from cortex.proxy.request_kinds.spooled_form import spool_directory
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.test_uploads import MIB, MODEL, Engine, cortex, engine, form, upload
from tests.cortex.raw_http import bounded, chunked, connected, request, until

CLOSING = b"--XX--\r\n"


__all__ = ["cortex", "engine"]


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are where no one else has any."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def spooled_files() -> int:
    """How many forms are on disk."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith(os.environ["TMPDIR"])
    return count


async def test_thirty_mebibytes_take_no_memory(tmp_path: Path, benjy: V1Neuron, engine: Engine) -> None:
    """Neither while they arrive, nor while a slow engine takes them."""
    body = form(MODEL, 30 * MIB, model_last=True)
    engine.reads_bodies.clear()
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}]) as process, connected(process.url) as client:
        before = process.rss_bytes()
        process.reset_peak()
        await bounded(client.send(upload(body)))
        await bounded(engine.began.wait())
        engine.reads_bodies.set()
        assert json.loads((await client.answer()).body) == {"got": len(body)}
        assert process.peak_rss_bytes() - before < 12 * MIB
    assert engine.bodies == [body]


@pytest.mark.parametrize("model", [MODEL, "voice"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_engine_gets_it_whole(cortex: RunningCortex, engine: Engine, model: str, framing: str) -> None:
    """Byte for byte, but for an alias, and with its length. The connection and the disk are free afterwards."""
    body = form(model, 3 * MIB, model_last=True)
    data = upload(body)
    if framing == "chunked":
        data = upload(b"", "Transfer-Encoding: chunked", length=False) + chunked(body, 100_000)
    async with connected(cortex.url) as client:
        assert (await client.ask(data)).status == 200
        assert not spooled_files()
        assert (await client.ask(request(method="GET", target="/health"), "GET")).status == 200
    expected = form(MODEL, 3 * MIB, model_last=True)
    assert engine.bodies == [expected]
    assert engine.heads[0]["content-length"] == str(len(expected))


async def test_model_between_two_files(cortex: RunningCortex, engine: Engine) -> None:
    first = form("voice", 2 * MIB, model_last=True).removesuffix(CLOSING)
    second = form("", 2 * MIB).partition(b"\r\n\r\n\r\n")[2]
    async with connected(cortex.url) as client:
        assert (await client.ask(upload(first + second))).status == 200
    assert engine.bodies == [first.replace(b"voice", MODEL.encode()) + second]


async def test_form_without_a_model(cortex: RunningCortex, engine: Engine) -> None:
    """The same 400 as for a small one, and nothing stays on disk."""
    body = form("", 3 * MIB)
    async with connected(cortex.url) as client:
        got = await client.ask(upload(body))
    assert (got.status, json.loads(got.body)["error"]["param"]) == (400, "model")
    assert not spooled_files()


async def test_default_model_is_added(start_cortex: StartCortex, benjy: V1Neuron, engine: Engine) -> None:
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"default_model": MODEL})
    body = form("", 3 * MIB).partition(b"\r\n\r\n\r\n")[2]
    async with connected(cortex.url) as client:
        assert (await client.ask(upload(body))).status == 200
    assert engine.bodies == [form(MODEL, 3 * MIB)]


async def test_another_engine_gets_it_again(start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """An engine that is lost in the middle of the upload costs nothing: the form is still there."""
    body = form(MODEL, 8 * MIB, model_last=True)
    async with Engine().running() as one, Engine().running() as other:
        for neuron, engine in ((benjy, one), (beast, other)):
            assert isinstance(engine, Engine)
            neuron.models[MODEL], neuron.engine_url = "loaded", engine.url
            engine.reads_bodies.clear()
        cortex = await start_cortex([benjy, beast], [{"id": MODEL}])
        async with connected(cortex.url) as client:
            sending = asyncio.create_task(client.ask(upload(body)))
            await until(lambda: one.began.is_set() or other.began.is_set())  # type: ignore[attr-defined]
            lost, left = (one, other) if one.began.is_set() else (other, one)  # type: ignore[attr-defined]
            lost.connections[0].reset()
            left.reads_bodies.set()  # type: ignore[attr-defined]
            assert json.loads((await bounded(sending)).body) == {"got": len(body)}
    assert left.bodies == [body]  # type: ignore[attr-defined]


async def test_engine_that_answers_early(cortex: RunningCortex, engine: Engine) -> None:
    engine.refuses = True
    async with connected(cortex.url) as client:
        got = await client.ask(upload(form(MODEL, 8 * MIB, model_last=True)))
        assert (got.status, json.loads(got.body)["error"]["message"]) == (413, "too long")
    await bounded(engine.connections[0].gone.wait())
    await until(lambda: not spooled_files())


async def test_client_that_leaves(cortex: RunningCortex, engine: Engine) -> None:
    """While it uploads, and while the engine reads."""
    data = upload(form(MODEL, 4 * MIB, model_last=True))
    async with connected(cortex.url) as client:
        await client.send(data[: len(data) // 2])
        await until(lambda: spooled_files() == 1)
    await until(lambda: not spooled_files())
    assert not engine.heads
    engine.reads_bodies.clear()
    async with connected(cortex.url) as client:
        await client.send(data)
        await bounded(engine.began.wait())
    await until(lambda: not spooled_files())
    await until(lambda: not any(cortex.parts.counts.all_in_flight().values()))


async def test_no_place_on_disk(cortex: RunningCortex, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the fault and the way around it."""
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    async with connected(cortex.url) as client:
        got = await client.ask(upload(form(MODEL, 3 * MIB, model_last=True)))
    assert got.status == 503
    assert "'model' before the file" in json.loads(got.body)["error"]["message"]
    assert not engine.heads


async def test_too_many_parts(cortex: RunningCortex, engine: Engine) -> None:
    part = b'--XX\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"a" * 2000 + b"\r\n"
    async with connected(cortex.url) as client:
        got = await client.ask(upload(part * 1500 + CLOSING))
    assert (got.status, "more than 1000 parts" in json.loads(got.body)["error"]["message"]) == (400, True)
    assert not spooled_files()


async def test_it_stays_within_the_limit(start_cortex: StartCortex, benjy: V1Neuron, engine: Engine) -> None:
    """A chunked form, whose length is not known in advance."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"max_body_mib": 2})
    body = chunked(form(MODEL, 4 * MIB, model_last=True), 100_000)
    async with connected(cortex.url) as client:
        await client.send(upload(b"", "Transfer-Encoding: chunked", length=False) + body)
        assert (await client.answer()).status == 413
    await until(lambda: not spooled_files())


def test_the_directory_is_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/tmp is in memory on many hosts; TMPDIR says otherwise."""
    monkeypatch.delenv("TMPDIR", raising=False)
    assert spool_directory() == "/var/tmp" or not os.access("/var/tmp", os.W_OK)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert spool_directory() == str(tmp_path)
