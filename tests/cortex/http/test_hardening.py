"""cortex refuses requests that two parsers could read differently and malformed ones, and nothing of them takes
effect."""

from __future__ import annotations

import contextlib
import json

import pytest

from tests.cortex.conftest import RunningCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import Truncated, connected, every_split, request

MODEL = "org/small"
BODY = b'{"model":"org/small"}'
SMUGGLED = request(b'{"model":"org/small","n":666}')
SENTINEL = request(b'{"model":"org/small","n":1}')
REFUSALS = (400, 405, 411, 413, 414, 417, 431, 501, 505)
"""400 for nearly all; a server may be more exact about a method, a coding or a version that it does not know."""


def post(headers: bytes, rest: bytes = BODY, *, start: bytes = b"POST /PATH HTTP/1.1") -> bytes:
    return start + b"\r\nHost: cortex\r\n" + headers + b"\r\n\r\n" + rest


def lengths(*values: bytes) -> bytes:
    """A request with these Content-Lengths."""
    return post(b"\r\n".join(b"Content-Length: " + value for value in values))


def coded(*values: bytes, rest: bytes = b"15\r\n" + BODY + b"\r\n0\r\n\r\n") -> bytes:
    """A request with these Transfer-Encodings."""
    return post(b"\r\n".join(b"Transfer-Encoding: " + value for value in values), rest)


def with_header(line: bytes) -> bytes:
    """A request that is valid except for one header line."""
    return post(line + b"\r\nContent-Length: 21")


def started(start: bytes) -> bytes:
    return post(b"Content-Length: 21", start=start)


FRAMING = {
    "length-and-chunked": post(b"Content-Length: 21\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "chunked-and-length": post(b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"0\r\n\r\n"),
    "two-lengths": lengths(b"21", b"0"),
    "two-lengths-turned": lengths(b"0", b"21"),
    "length-plus": lengths(b"+21"),
    "length-spaced": lengths(b"2 1"),
    "length-list": lengths(b"21,21"),
    "length-list-differing": lengths(b"21, 0"),
    "length-negative": lengths(b"-21"),
    "length-huge": lengths(b"9" * 30),
    "length-2**64": lengths(b"18446744073709551637"),
    "length-hex": lengths(b"0x15"),
    "length-underscore": lengths(b"2_1"),
    "length-letters": lengths(b"21a"),
    "length-empty": lengths(b""),
    "length-fraction": lengths(b"21.0"),
    "length-other-digits": lengths("٢١".encode()),
    "coding-gzip": coded(b"gzip"),
    "coding-gzip-chunked": coded(b"gzip, chunked"),
    "coding-chunked-gzip": coded(b"chunked, gzip"),
    "coding-twice": coded(b"chunked, chunked"),
    "coding-two-lines": coded(b"chunked", b"chunked"),
    "coding-two-lines-identity": coded(b"chunked", b"identity"),
    "coding-identity": coded(b"identity"),
    "coding-xchunked": coded(b"xchunked"),
    "coding-chunkedx": coded(b"chunkedx"),
    "coding-quoted": coded(b'"chunked"'),
    "coding-parameter": coded(b"chunked;q=1"),
    "coding-vertical-tab": coded(b"\x0bchunked"),
    "coding-empty": coded(b""),
    "coding-in-1.0": coded(b"chunked").replace(b"HTTP/1.1", b"HTTP/1.0"),
}
HEADS = {
    "space-before-colon": post(b"Content-Length : 21"),
    "tab-before-colon": post(b"Content-Length\t: 21"),
    "coding-space-before-colon": post(b"Transfer-Encoding : chunked\r\nContent-Length: 21"),
    "folded-line": with_header(b"X-Folded: a\r\n b"),
    "folded-length": post(b"Content-Length:\r\n 21"),
    "folded-with-tab": with_header(b"X-Folded: a\r\n\tTransfer-Encoding: chunked"),
    "first-line-folded": started(b"POST /PATH HTTP/1.1\r\n X-Y: z"),
    "bare-lf-everywhere": lengths(b"21").replace(b"\r\n", b"\n"),
    "bare-lf-in-a-header": with_header(b"X-A: a\nX-B: b"),
    "bare-lf-at-the-end": post(b"Content-Length: 21").replace(b"\r\n\r\n", b"\r\n\n"),
    "bare-lf-hides-a-length": post(b"X-A: a\nContent-Length: 0\r\nContent-Length: 21"),
    "bare-cr-in-a-value": with_header(b"X-A: a\rContent-Length: 0"),
    "cr-cr-lf": with_header(b"X-A: a\r"),
    "nul-in-a-value": with_header(b"X-A: a\x00b"),
    "control-in-a-value": with_header(b"X-A: a\x01b"),
    "delete-in-a-value": with_header(b"X-A: a\x7fb"),
    "nul-in-a-name": with_header(b"X-\x00A: a"),
    "space-in-a-name": with_header(b"X A: a"),
    "high-byte-in-a-name": with_header(b"X-\xe4: a"),
    "no-name": with_header(b": a"),
    "no-colon": with_header(b"X-A"),
    "method-letters": started(b"PO<ST /PATH HTTP/1.1"),
    "method-lower-case": started(b"post /PATH HTTP/1.1"),
    "method-unknown": started(b"FOO /PATH HTTP/1.1"),
    "method-missing": started(b" /PATH HTTP/1.1"),
    "method-connect": started(b"CONNECT cortex:80 HTTP/1.1"),
    "target-missing": started(b"POST HTTP/1.1"),
    "target-with-space": started(b"POST /PATH /PATH HTTP/1.1"),
    "target-with-control": started(b"POST /PATH\x01 HTTP/1.1"),
    "target-with-nul": started(b"POST /PATH\x00 HTTP/1.1"),
    "version-missing": started(b"POST /PATH"),
    "version-1.2": started(b"POST /PATH HTTP/1.2"),
    "version-2.0": started(b"POST /PATH HTTP/2.0"),
    "version-0.9": started(b"POST /PATH HTTP/0.9"),
    "version-11": started(b"POST /PATH HTTP/11"),
    "version-1.10": started(b"POST /PATH HTTP/1.10"),
    "version-lower-case": started(b"POST /PATH http/1.1"),
    "version-other": started(b"POST /PATH RTSP/1.0"),
    "no-host": lengths(b"21").replace(b"Host: cortex\r\n", b""),
    "two-hosts": with_header(b"Host: other"),
    "two-equal-hosts": with_header(b"Host: cortex"),
    "http2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls-hello": bytes.fromhex("16030100c2010000be0303") + b"x" * 100 + b"\r\n\r\n",
    "value-over-64k": with_header(b"X-A: " + b"x" * 70_000),
    "target-over-64k": started(b"POST /PATH?" + b"x" * 70_000 + b" HTTP/1.1"),
    "name-over-64k": with_header(b"X-" + b"a" * 70_000 + b": x"),
    "2000-headers": with_header(b"\r\n".join(b"X-%d: x" % number for number in range(2000))),
}


def chunks(rest: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", rest)


def sized(size: bytes, end: bytes = b"\r\n") -> bytes:
    """A body in one chunk with this size line."""
    return chunks(size + end + BODY + b"\r\n0\r\n\r\n")


CHUNKS = {
    "0x": sized(b"0x15"),
    "underscore": sized(b"1_5"),
    "plus": sized(b"+15"),
    "minus": sized(b"-15"),
    "empty": sized(b""),
    "space-before": sized(b" 15"),
    "space-after": sized(b"15 "),
    "letters": sized(b"15g"),
    "overflow-64": sized(b"10000000000000015"),
    "overflow-long": sized(b"f" * 40),
    "huge": sized(b"fffffffffffffff0"),
    "bare-lf": sized(b"15", b"\n"),
    "bare-cr": sized(b"15", b"\r"),
    "bare-lf-in-an-extension": sized(b"15;a\nb"),
    "bare-cr-in-an-extension": sized(b"15;a\rb"),
    "nul-in-an-extension": sized(b"15;\x00"),
    "too-long": chunks(b"15\r\n" + BODY + b"x\r\n0\r\n\r\n"),
    "too-short": chunks(b"16\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "no-line-end": chunks(b"15\r\n" + BODY + b"0\r\n\r\n"),
    "lf-line-end": chunks(b"15\r\n" + BODY + b"\n0\r\n\r\n"),
    "request-for-a-trailer": chunks(b"15\r\n" + BODY + b"\r\n0\r\nGET / HTTP/1.1\r\n\r\n"),
    "folded-trailer": chunks(b"15\r\n" + BODY + b"\r\n0\r\nX-A: a\r\n b\r\n\r\n"),
    "trailers-over-64k": chunks(b"15\r\n" + BODY + b"\r\n0\r\n" + b"X-A: aaaa\r\n" * 20_000 + b"\r\n"),
}


async def refused(cortex: RunningCortex, engine: RawEngine, pieces: tuple[bytes, ...]) -> int:
    """The status of the only answer to the bytes. Checks that the connection then ends and the engine has seen
    nothing."""
    async with connected(cortex.url) as client:
        with contextlib.suppress(ConnectionError):  # cortex may close before everything is sent
            await client.send_apart(pieces)
        answer = await client.answer()
        assert answer.status in REFUSALS, answer
        assert await client.rest() == b"", "expected one answer and then a close"
    assert engine.requests == []
    # Anything else that cortex held would have reached the engine before this.
    async with connected(cortex.url) as client:
        assert json.loads((await client.ask(SENTINEL)).body)["n"] == 1
    assert len(engine.requests) == 1
    engine.requests.clear()
    return answer.status


@pytest.mark.parametrize("case", [*FRAMING, *HEADS, *(f"chunk-{name}" for name in CHUNKS)])
async def test_request_is_refused(cortex: RunningCortex, engine: RawEngine, benjy: V1Neuron, case: str) -> None:
    """Paths for engines and for cortex refuse it, also when a careless parser would take the following bytes as a
    second request."""
    data = CHUNKS[case.removeprefix("chunk-")] if case.startswith("chunk-") else {**FRAMING, **HEADS}[case]
    for path in (b"/v1/completions", b"/fleet/unload"):
        await refused(cortex, engine, (data.replace(b"/PATH", path) + SMUGGLED,))
    assert benjy.unloads == []


@pytest.mark.parametrize("case", [*FRAMING, *(f"chunk-{name}" for name in CHUNKS)])
async def test_request_in_pieces_is_refused(cortex: RunningCortex, engine: RawEngine, case: str) -> None:
    """The same with head and body in separate segments, after a valid request on the same connection."""
    data = CHUNKS[case.removeprefix("chunk-")] if case.startswith("chunk-") else FRAMING[case]
    head, separator, rest = data.replace(b"/PATH", b"/v1/completions").partition(b"\r\n\r\n")
    await refused(cortex, engine, (head + separator, rest + SMUGGLED))


@pytest.mark.parametrize("case", ["two-lengths", "length-and-chunked", "coding-twice", "length-plus"])
async def test_refusal_does_not_depend_on_segments(cortex: RunningCortex, engine: RawEngine, case: str) -> None:
    """The request is refused however the network splits it."""
    for pieces in every_split(FRAMING[case].replace(b"/PATH", b"/v1/completions")):
        await refused(cortex, engine, pieces)


async def test_head_over_the_limit_is_refused(cortex: RunningCortex, engine: RawEngine) -> None:
    """A large head gets 431, a large target 414 or 431."""
    for case in ("value-over-64k", "name-over-64k", "2000-headers"):
        assert await refused(cortex, engine, (HEADS[case].replace(b"/PATH", b"/v1/completions"),)) == 431
    target = HEADS["target-over-64k"].replace(b"/PATH", b"/v1/completions")
    assert await refused(cortex, engine, (target,)) in (414, 431)


@pytest.mark.parametrize("line", [b"X-A: " + b"x" * 1000 + b"\r\n", b"x" * 1000], ids=["lines", "one-line"])
async def test_endless_head_is_cut_off(cortex: RunningCortex, engine: RawEngine, line: bytes) -> None:
    """cortex refuses it long before a megabyte of it has arrived."""
    sent = 0
    async with connected(cortex.url) as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: cortex\r\n")
        with contextlib.suppress(ConnectionError):
            while not client.gone.is_set() and sent < 1 << 20:
                await client.send_apart([line])
                sent += len(line)
        assert client.gone.is_set()
        assert sent < 300_000
        with contextlib.suppress(Truncated):  # our bytes may cross the answer, and a reset then discards it
            assert (await client.answer()).status in REFUSALS
    assert engine.requests == []


async def test_bad_request_behind_a_good_one(cortex: RunningCortex, engine: RawEngine) -> None:
    """cortex answers the good one, refuses the bad one, and never looks at what follows."""
    bad = FRAMING["two-lengths"].replace(b"/PATH", b"/v1/completions")
    async with connected(cortex.url) as client:
        await client.send(SENTINEL + bad + SMUGGLED)
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)
        assert (await client.answer()).status == 400
        assert await client.rest() == b""
    assert len(engine.requests) == 1


async def test_request_that_ends_early_does_nothing(cortex: RunningCortex, engine: RawEngine) -> None:
    """A client that disconnects within its head or body has requested nothing."""
    for data in (request(BODY), chunks(b"15\r\n" + BODY + b"\r\n0\r\n\r\n").replace(b"/PATH", b"/v1/completions")):
        for kept in (10, 40, len(data) - 20, len(data) - 1):
            async with connected(cortex.url) as client:
                await client.send_apart([data[:kept]])
                client.writer.write_eof()
                assert not (await client.rest()).startswith(b"HTTP/1.1 2")
    async with connected(cortex.url) as client:
        assert (await client.ask(SENTINEL)).status == 200
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "line",
    [
        "X-Empty:",
        "X-Spaced:  \t a b \t",
        "X-High: \xe4\xff",
        "X-Odd!#$%&'*+-.^_`|~: 1",
        "X-Long: " + "x" * 4000,
        *("Content-Type:application/json", "content-TYPE: application/json"),
    ],
)
async def test_unusual_and_valid_header_passes(cortex: RunningCortex, engine: RawEngine, line: str) -> None:
    """Being strict must not refuse valid requests: the engine gets the header unchanged."""
    async with connected(cortex.url) as client:
        assert (await client.ask(request(BODY, line))).status == 200
    name, _, value = line.partition(":")
    assert engine.requests[0].get(name) == value.strip(" \t")


@pytest.mark.parametrize(
    "data",
    [
        post(b"Content-Length:21"),
        post(b"content-length: \t21 \t"),
        post(b"Content-Length: 0021"),
        post(b"TRANSFER-ENCODING: Chunked", b"015;a=b;c\r\n" + BODY + b"\r\n000\r\nX-T: 1\r\n\r\n"),
        post(b"Content-Length: 21\r\n" + b"\r\n".join(b"X-%d: x" % number for number in range(60))),
        b"\r\n" + post(b"Content-Length: 21"),
    ],
    ids=["no-space", "tabs", "zeros", "chunked-case", "60-headers", "empty-line-before"],
)
async def test_unusual_and_valid_request_is_answered(cortex: RunningCortex, engine: RawEngine, data: bytes) -> None:
    """The next request on the connection is answered too, because cortex found the end of the first."""
    async with connected(cortex.url) as client:
        await client.send(data.replace(b"/PATH", b"/v1/completions") + SENTINEL)
        for number in (None, 1):
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["n"]) == (200, number)
    assert [received.body for received in engine.requests] == [BODY, SENTINEL.partition(b"\r\n\r\n")[2]]
