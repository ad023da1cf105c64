"""Request bodies: chunked, compressed, huge, too large, hostile; what the engine gets, and the memory they take."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import random
import sys
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import brotli
import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import Answer, RawClient, bounded, chunked, connected, every_split, request, single_bytes

MODEL = "org/small"
MIB = 1 << 20
CHUNKED = "Transfer-Encoding: chunked"
BODY = b'{"model":"org/small","n":1,"s":"0\\r\\n\\r\\n"}'


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex in front of the engine that accepts bodies up to 1 MiB."""
    return await start_cortex([benjy], [{"id": MODEL}, {"id": "org/cold"}], gateway={"max_body_mib": 1})


@pytest.fixture
async def process(tmp_path: Path, benjy: V1Neuron, engine: RawEngine) -> AsyncIterator[CortexProcess]:
    """A cortex with the default limit that has answered one request, so its memory includes what that takes."""
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}]) as process:
        async with connected(process.url) as client:
            await usable(client)
        engine.requests.clear()
        yield process


async def usable(client: RawClient) -> None:
    """Checks that the connection serves the next request."""
    answer = await client.ask(request(b'{"model":"org/small","n":77}'))
    assert (answer.status, json.loads(answer.body)["n"]) == (200, 77)


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["error"]["code"]


def in_chunks(framed: bytes) -> bytes:
    return request(b"", CHUNKED, length=False) + framed


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("line", ["{:x}", "{:X}", "000{:x}", "{:x};a", '{:x};a="b;c"'])
@pytest.mark.parametrize("trailers", [b"", b"X-Trailer: 1\r\nX-More: 2\r\n"], ids=["", "trailers"])
async def test_chunked_body_arrives_whole(
    client: RawClient, engine: RawEngine, size: int, line: str, trailers: bytes
) -> None:
    """The engine gets the body with a length, without chunk framing and without trailers, which it did not request."""
    framed = chunked(BODY, size, line=line, trailers=trailers)
    answer = await client.ask(in_chunks(framed))
    assert answer.status == 200
    (received,) = engine.requests
    assert received.body == BODY
    assert received.get("content-length") == str(len(BODY))
    assert received.get("x-trailer") is None
    await usable(client)


@pytest.mark.parametrize(
    "line", [b"Content-Length: 3", b"Transfer-Encoding: gzip", b"Host: evil", b"x-request-id: evil"]
)
async def test_trailer_changes_no_header(cortex: RunningCortex, engine: RawEngine, line: bytes) -> None:
    """cortex drops or refuses a trailer that would have a meaning in a head."""
    async with connected(cortex.url) as client:
        answer = await client.ask(in_chunks(chunked(BODY, 9, trailers=line + b"\r\n")))
        assert answer.status in (200, 400)
    for received in engine.requests:
        assert (received.body, received.get("content-length")) == (BODY, str(len(BODY)))
        assert "evil" not in f"{received.headers}"


async def test_chunked_body_in_any_segments(client: RawClient, engine: RawEngine) -> None:
    """Split in two at every byte, and byte by byte, with the next request right after it."""
    data = in_chunks(chunked(BODY, 9, trailers=b"X-Trailer: 1\r\n"))
    for pieces in (*every_split(data), tuple(single_bytes(data))):
        engine.requests.clear()
        await client.send_apart((*pieces[:-1], pieces[-1] + request(b'{"model":"org/small","n":2}')))
        for number in (1, 2):
            assert json.loads((await client.answer()).body)["n"] == number
        assert engine.requests[0].body == BODY


async def test_100_continue_is_sent_to_clients_that_wait_for_it(client: RawClient, engine: RawEngine) -> None:
    """A client that asks first gets 100 and then its answer; one that does not wait gets at most the same."""
    expect = "Expect: 100-continue"
    for data in (request(BODY, expect), request(b"", expect, CHUNKED, length=False) + chunked(BODY, 9)):
        head, separator, body = data.partition(b"\r\n\r\n")
        await client.send(head + separator)
        assert (await client.head()).start.startswith("HTTP/1.1 100")
        await client.send(body)
        answer = await client.answer()
        assert (answer.status, answer.interim) == (200, [])
        await client.send(data)
        assert (await client.answer()).status == 200
    assert all(received.get("expect") is None for received in engine.requests)
    await usable(client)


async def test_100_continue_is_not_sent_for_a_body_over_the_limit(cortex: RunningCortex, engine: RawEngine) -> None:
    """The client gets 413 at once and never sends the body."""
    async with connected(cortex.url) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {2 * MIB}\r\nExpect: 100-continue\r\n\r\n"
        answer = await client.ask(head.encode())
        assert (code(answer), answer.interim) == ((413, "request_too_large"), [])
    assert engine.requests == []


async def told_it_is_too_large(cortex: RunningCortex, head: bytes, body: bytes) -> None:
    """A simple client sends everything before it reads: the answer must still be readable."""
    async with connected(cortex.url) as client:
        client.stop_reading()
        await client.send(head)
        for start in range(0, len(body), 1 << 16):
            await bounded(client.send(body[start : start + (1 << 16)]))
        client.read_on()
        assert code(await client.answer()) == (413, "request_too_large")


async def test_too_large_body_is_refused_while_it_arrives(cortex: RunningCortex, engine: RawEngine) -> None:
    """Both bodies with a length and chunked bodies are limited."""
    body = b'{"model":"org/small","pad":"' + b"x" * (3 * MIB) + b'"}'
    await told_it_is_too_large(cortex, request(body).removesuffix(body), body)
    await told_it_is_too_large(cortex, in_chunks(b""), chunked(body, 50_000))
    assert engine.requests == []


async def test_endless_body_is_cut_off(cortex: RunningCortex) -> None:
    """A client that keeps sending after its 413 is disconnected."""
    async with connected(cortex.url) as client:
        await client.send(in_chunks(b""))
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                await client.send(piece)
        assert code(await client.answer()) == (413, "request_too_large")
        with contextlib.suppress(ConnectionError):
            while not client.gone.is_set():
                await client.send(piece)
        await bounded(client.gone.wait())


async def test_body_at_the_limit_passes(client: RawClient, engine: RawEngine) -> None:
    """The exact limit is allowed and arrives completely; one byte more is refused."""
    body = b'{"model":"org/small","n":1,"pad":"' + b"x" * (MIB - 36) + b'"}'
    assert len(body) == MIB
    assert (await client.ask(request(body))).status == 200
    assert (await client.ask(in_chunks(chunked(body, 70_000)))).status == 200
    assert [received.body for received in engine.requests] == [body, body]
    assert (await client.ask(request(body + b" "))).status == 413


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:10]) + gzip.compress(BODY[10:])),
        ("deflate", zlib.compress(BODY)),
        ("deflate", deflated(BODY)),
        ("br", brotli.compress(BODY)),
        ("zstd", zstd.compress(BODY)),
        ("zstd", zstd.compress(BODY[:10]) + zstd.compress(BODY[10:])),
        ("gzip, br", brotli.compress(gzip.compress(BODY))),
        ("deflate, zstd,identity", zstd.compress(zlib.compress(BODY))),
        ("identity", BODY),
    ],
    ids=[
        *("gzip", "upper-case", "x-gzip", "gzip-members", "deflate-zlib", "deflate-raw", "br", "zstd", "zstd-frames"),
        *("gzip-br", "deflate-zstd", "identity"),
    ],
)
async def test_compressed_body_is_decompressed(
    client: RawClient, engine: RawEngine, coding: str, packed: bytes
) -> None:
    """The engine gets the decompressed body with its length and without Content-Encoding; also for chunked bodies."""
    for data in (
        request(packed, f"Content-Encoding: {coding}"),
        request(b"", f"Content-Encoding: {coding}", CHUNKED, length=False) + chunked(packed, 9),
    ):
        assert (await client.ask(data)).status == 200
    for received in engine.requests:
        assert (received.body, received.get("content-encoding") or "identity") == (BODY, "identity")


def zstd_in_a_window_of_128_mib(data: bytes) -> bytes:
    """A receiver would have to hold the whole window (RFC 9659 allows 8 MiB)."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    return packer.compress(data) + packer.flush()


def fifty_fold(data: bytes) -> bytes:
    """Compressed fifty times: each layer costs the receiver a pass over the body, and the sender one word."""
    for _ in range(50):
        data = gzip.compress(data, 0)
    return data


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        (", ".join(["gzip"] * 50), fifty_fold(BODY)),
        ("gzip", b"junk"),
        ("gzip", b""),
        ("gzip", gzip.compress(BODY)[:-9]),
        ("gzip", gzip.compress(BODY)[:-8] + b"\0" * 8),
        ("deflate", b"junk"),
        ("deflate", zlib.compress(BODY)[:-5]),
        ("br", b"junk"),
        ("br", brotli.compress(BODY)[:-5]),
        ("br", brotli.compress(BODY) + b"more"),
        ("zstd", b"junk"),
        ("zstd", zstd.compress(BODY)[:-5]),
        ("zstd", zstd_in_a_window_of_128_mib(BODY)),
        ("gzip, br", gzip.compress(brotli.compress(BODY))),
    ],
    ids=[
        *("fifty-fold", "junk", "empty", "cut", "wrong-sum", "deflate-junk", "deflate-cut", "br-junk", "br-cut"),
        *("br-more", "zstd-junk", "zstd-cut", "zstd-window", "wrong-order"),
    ],
)
async def test_body_that_cannot_be_decompressed(
    client: RawClient, engine: RawEngine, coding: str, packed: bytes
) -> None:
    """4xx with the envelope, and nothing reaches the engine; the connection stays usable or says that it closes."""
    answer = await client.ask(request(packed, f"Content-Encoding: {coding}"))
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
    assert engine.requests == []
    if answer.get("connection") == "close":
        assert await client.rest() == b""
    else:
        await usable(client)


@pytest.mark.parametrize("coding", ["foo", "gzip, foo", "compress", "aes128gcm", "x" * 2000])
async def test_unknown_coding_is_415(client: RawClient, engine: RawEngine, coding: str) -> None:
    """The answer lists the supported codings in Accept-Encoding (RFC 9110, section 15.5.16)."""
    answer = await client.ask(request(BODY, f"Content-Encoding: {coding}"))
    assert code(answer) == (415, "invalid_request")
    assert answer.get("accept-encoding") == "gzip, deflate, br, zstd"
    assert len(answer.body) < 400
    assert engine.requests == []


async def test_body_of_very_many_gzip_members(cortex: RunningCortex, engine: RawEngine) -> None:
    """Each gzip member costs little: no copy of everything after it."""
    packed = gzip.compress(b"") * 40_000 + gzip.compress(BODY)
    began = time.process_time()
    async with connected(cortex.url) as client:
        assert (await client.ask(request(packed, "Content-Encoding: gzip"))).status in (200, 400, 413)
    assert time.process_time() - began < 2


async def test_decompression_bombs_are_refused_early(process: CortexProcess, engine: RawEngine) -> None:
    """A body of a megabyte that expands to a quarter of a gigabyte gets 413, without the memory for it."""
    blanks = b" " * (64 * MIB)
    packer, flat = zlib.compressobj(1, wbits=31), zlib.compressobj(1)
    bomb = b"".join(packer.compress(blanks) for _ in range(4)) + packer.flush()
    bombs = [("gzip", bomb), ("gzip", gzip.compress(blanks[:MIB], 1) * 400)]
    bombs.append(("deflate", b"".join(flat.compress(blanks) for _ in range(4)) + flat.flush()))
    bombs.append(("br", brotli.compress(blanks * 4, quality=1)))
    bombs.append(("zstd", zstd.compress(blanks * 4, 1)))
    bombs.append(("zstd, br, gzip", gzip.compress(brotli.compress(zstd.compress(blanks * 4, 1), quality=5))))
    process.reset_peak()
    before = process.rss_bytes()
    for coding, packed in bombs:
        async with connected(process.url) as client:
            assert code(await client.ask(request(packed, f"Content-Encoding: {coding}"))) == (413, "request_too_large")
    grown = process.peak_rss_bytes() - before
    print(f"the bombs took {grown / MIB:.1f} MiB")
    assert grown < 2 * 32 * MIB + 8 * MIB
    assert engine.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model":"org/cold"',
        b'{"model":"org/cold"}}',
        b'{"model":"org/cold",}',
        b'{"model":"org/cold"} {"model":"org/cold"}',
        b'{"model":"org/cold","x":tru}',
        b'{"model":"org/cold","x":"\x01"}',
        b'{"model":"org/cold","x":"\\q"}',
        b'{"model":"org/cold","x":[1,2}',
        b"{'model':'org/cold'}",
        b'{"model":"org/cold","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"model":"org/cold","x":' + b'{"a":' * 100_000,
        b'["model","org/cold"]',
        b'{"model":["org/cold"]}',
        b'{"x":{"model":"org/cold"}}',
    ],
)
async def test_body_that_is_not_json_starts_nothing(
    client: RawClient, benjy: V1Neuron, engine: RawEngine, body: bytes
) -> None:
    """400 invalid_request, although a `model` can be read in it: no load, no engine, and the connection stays
    usable."""
    assert code(await client.ask(request(body))) == (400, "invalid_request")
    assert benjy.loads == []
    assert engine.requests == []
    await usable(client)


@pytest.mark.parametrize("first", [True, False], ids=["model-first", "model-last"])
async def test_prompt_with_ten_megabytes_of_images(process: CortexProcess, engine: RawEngine, first: bool) -> None:
    """It arrives byte for byte; cortex holds it once, plus what parsing takes, and frees it afterwards."""
    image = base64.b64encode(random.Random(3).randbytes(7 * MIB + MIB // 2)).decode()
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}, {"model": "no"}]
    messages = {"messages": [{"role": "user", "content": content}]}
    fields = {"model": MODEL, **messages} if first else {**messages, "model": MODEL}
    body = json.dumps({**fields, "n": 1}).encode()
    async with connected(process.url) as client:
        await client.ask(request(body))
        engine.requests.clear()
        process.reset_peak()
        before = process.rss_bytes()
        for _ in range(8):
            assert (await client.ask(request(body))).status == 200
        grown, kept = process.peak_rss_bytes() - before, process.rss_bytes() - before
    print(f"{len(body) / MIB:.1f} MiB: at most {grown / MIB:.1f} MiB more, {kept / MIB:.1f} MiB after")
    assert all(received.body == body for received in engine.requests)
    assert grown < 2.5 * len(body)
    # The C library may keep the freed memory of one request; a leak would keep that of eight.
    assert kept < 2.5 * len(body), "eight requests leave no more memory in use than one"


async def test_reading_ahead_is_bounded(process: CortexProcess) -> None:
    """cortex reads ahead only a little of 32 MiB of pipelined requests; the memory for them does not grow with each
    answer."""
    one = request(b'{"model":"org/small","n":1}')
    async with connected(process.url) as client:
        before = process.rss_bytes()
        sending = asyncio.ensure_future(client.send(one * (32 * MIB // len(one))))
        for _ in range(100):
            assert (await client.answer()).status == 200
        grown = process.rss_bytes() - before
        print(f"memory grew by {grown / MIB:.2f} MiB in 100 answers")
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert grown < 4 * MIB


async def test_large_uploads_do_not_delay_others(process: CortexProcess, engine: RawEngine) -> None:
    """While eight clients send 8 MiB each, small requests are answered at once."""
    body = json.dumps({"model": MODEL, "n": 1, "pad": "x" * (8 * MIB)}).encode()

    async def upload() -> None:
        async with connected(process.url) as client:
            assert (await client.ask(request(body))).status == 200

    uploads = asyncio.gather(*(upload() for _ in range(8)))
    async with connected(process.url) as client:
        while not uploads.done():
            await bounded(usable(client), secs=2)
    await uploads
