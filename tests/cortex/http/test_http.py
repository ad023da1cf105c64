"""HTTP as real clients use it: kept and shared connections, pipelining, old versions, odd targets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re

import pytest

from tests.cortex.conftest import RunningCortex
from tests.cortex.raw_engine import RawEngine, Received, answering, closing, echo_number, plain, stream_head
from tests.cortex.raw_http import (
    Answer,
    RawClient,
    Truncated,
    Wire,
    bounded,
    chunked,
    connected,
    request,
    settled,
    single_bytes,
)

MODEL = "org/small"
BODY = b'{"model":"org/small"}'
EVENTS = b"data: 1\n\ndata: [DONE]\n\n"
MODELS = request(method="GET", target="/v1/models")
HEALTH = request(method="GET", target="/health")


def hot(number: int, *lines: str, target: str = "/v1/completions", version: str = "HTTP/1.1") -> bytes:
    """A request for the engine, which answers with the number."""
    return request(b'{"model":"org/small","n":%d}' % number, *lines, target=target, version=version)


def number_of(answer: Answer) -> int:
    """The number in the body that the engine received."""
    assert answer.status == 200, answer
    return int(json.loads(answer.body)["n"])


def is_health(answer: Answer) -> bool:
    return answer.status == 200 and json.loads(answer.body)["status"] == "ok"


async def test_head_that_comes_byte_by_byte(client: RawClient, engine: RawEngine) -> None:
    """The head and the body arrive with each byte in its own segment."""
    data = hot(5, "X-Custom: yes")
    await client.send_apart(single_bytes(data))
    assert number_of(await client.answer()) == 5
    assert engine.requests[0].get("x-custom") == "yes"


@pytest.mark.parametrize("kinds", ["hh", "ch", "hc", "cc", "hchchhccch", "h" * 20, "hc" * 10])
@pytest.mark.parametrize("bytewise", [False, True], ids=["one-segment", "byte-by-byte"])
async def test_requests_sent_ahead_are_answered_in_order(client: RawClient, kinds: str, bytewise: bool) -> None:
    """Requests for engines (h) and for cortex itself (c), in one segment or split anywhere."""
    data = b"".join(hot(number) if kind == "h" else HEALTH for number, kind in enumerate(kinds))
    await client.send_apart(single_bytes(data) if bytewise else [data])
    for number, kind in enumerate(kinds):
        answer = await client.answer()
        assert is_health(answer) if kind == "c" else number_of(answer) == number


async def test_request_behind_a_slow_one_waits(client: RawClient, engine: RawEngine) -> None:
    """An answer that is ready at once does not overtake, whether the engine's or cortex's own."""
    release = asyncio.Event()

    async def slowly(wire: Wire, received: Received) -> None:
        await wire.send(stream_head() + b"9\r\ndata: 1\n\n\r\n")
        await bounded(release.wait())
        await wire.send(b"0\r\n\r\n")

    engine.scripts.append(slowly)
    await client.send(hot(1) + HEALTH + hot(2))
    assert (await client.head()).get("content-type") == "text/event-stream"
    assert await bounded(client.incoming.readuntil(b"\n\n")) == b"9\r\ndata: 1\n\n"
    release.set()
    assert await bounded(client.incoming.readuntil(b"0\r\n\r\n")) == b"\r\n0\r\n\r\n"
    assert is_health(await client.answer())
    assert number_of(await client.answer()) == 2


async def test_hundreds_of_requests_sent_ahead(client: RawClient) -> None:
    """Every answer comes, in order; so do refusals, which are ready at once."""
    count = 500
    data = b"".join(request(b"no") if number % 3 else hot(number) for number in range(count))
    assert len(data) < 65536
    await client.send(data)
    for number in range(count):
        answer = await client.answer()
        assert answer.status == 400 if number % 3 else number_of(answer) == number


@pytest.mark.parametrize("endless", [False, True], ids=["thousands", "endless"])
async def test_pipelining_beyond_the_limit(client: RawClient, engine: RawEngine, endless: bool) -> None:
    """The current answer is complete, all answers are in order, and the connection does not hang. A client that keeps
    sending does not lose its answers."""
    release = asyncio.Event()

    async def slowly(wire: Wire, received: Received) -> None:
        await bounded(release.wait())
        await echo_number(wire, received)

    engine.scripts.append(slowly)
    ahead = b"".join(hot(number) for number in range(1, 3000))

    async def send() -> None:
        await client.send(hot(0) + ahead)
        while endless:
            await client.send(ahead)

    sending = asyncio.ensure_future(send())
    await engine.next_request()
    await settled(client.unread)
    release.set()
    assert number_of(await client.answer()) == 0
    with contextlib.suppress(Truncated, ConnectionError):
        for number in range(1, 300 if endless else 3000):
            assert number_of(await client.answer()) == number
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_connection_is_kept_for_all_kinds_of_requests(client: RawClient, engine: RawEngine) -> None:
    """One connection for requests to engines, to cortex itself, and for refused ones."""
    for number in range(5):
        assert number_of(await client.ask(hot(number))) == number
        assert is_health(await client.ask(HEALTH))
        models = await client.ask(MODELS)
        assert [entry["id"] for entry in json.loads(models.body)["data"]] == [MODEL]
        assert (await client.ask(request(b"no json"))).status == 400
        assert (await client.ask(request(b'{"model":"org/unknown"}'))).status == 404
        assert (await client.ask(request(method="GET", target="/v1/nothing"), "GET")).status == 404
        engine.scripts.append(answering(stream_head() + chunked(EVENTS, 5)))
        assert (await client.ask(hot(number))).body == EVENTS


@pytest.mark.parametrize("line", ["Connection: close", "Connection: Keep-Alive, CLOSE"])
async def test_close_is_honoured(cortex: RunningCortex, engine: RawEngine, line: str) -> None:
    """The answer says so too, and cortex ignores requests after it."""
    for data in (hot(1, line), request(b"", line, method="GET", target="/health")):
        async with connected(cortex.url) as client:
            answer = await client.ask(data + hot(2))
            assert answer.status == 200
            assert (answer.get("connection") or "").lower() == "close"
            assert await client.rest() == b""
    assert len(engine.requests) == 1


@pytest.mark.parametrize("target", ["/v1/completions", "/health"])
async def test_old_client_without_keep_alive(cortex: RunningCortex, engine: RawEngine, target: str) -> None:
    """HTTP/1.0 closes after an answer, needs no Host, and gets neither chunks nor 100."""
    method = "GET" if target == "/health" else "POST"
    body = b"" if method == "GET" else BODY
    for sent in (plain(b'{"n": 1}'), stream_head() + chunked(EVENTS, 4)):
        engine.script = answering(sent)
        async with connected(cortex.url) as client:
            data = request(body, "Expect: 100-continue", method=method, target=target, version="HTTP/1.0", host=None)
            answer = await client.ask(data, method)
            assert (answer.status, answer.interim, answer.get("transfer-encoding")) == (200, [], None)
            if method == "POST":
                assert answer.body in (b'{"n": 1}', EVENTS)
            assert await client.rest() == b""


async def test_old_client_with_keep_alive(cortex: RunningCortex, engine: RawEngine) -> None:
    """The connection stays open, and the answer says so, if the length is known; otherwise the close is the answer's
    end."""
    keep = "Connection: keep-alive"
    async with connected(cortex.url) as client:
        for number in range(3):
            answer = await client.ask(hot(number, keep, version="HTTP/1.0"))
            assert number_of(answer) == number
            assert (answer.get("connection") or "").lower() == "keep-alive"
        engine.scripts.append(answering(stream_head() + chunked(EVENTS, 4)))
        answer = await client.ask(hot(9, keep, version="HTTP/1.0"))
        assert (answer.framing, answer.body) == ("close", EVENTS)
        assert (answer.get("connection") or "close").lower() == "close"


async def test_head_request_of_cortex_itself(client: RawClient) -> None:
    """The headers of a GET, no body, and the connection stays usable."""
    for _ in range(2):
        answer = await client.ask(request(method="HEAD", target="/health"), "HEAD")
        assert answer.status == 200
        assert int(answer.get("content-length") or "0") > 0
    assert number_of(await client.ask(hot(1))) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
async def test_other_method_on_an_inference_path(client: RawClient, engine: RawEngine, method: str) -> None:
    """405 with Allow, also with a body, which cortex discards; no engine gets the request."""
    for body in (b"", BODY):
        answer = await client.ask(request(body, method=method), method)
        assert (answer.status, answer.get("allow")) == (405, "POST")
        if method != "HEAD":
            assert json.loads(answer.body)["error"]["code"] == "method_not_allowed"
    assert engine.requests == []
    assert number_of(await client.ask(hot(1))) == 1


@pytest.mark.parametrize(
    ("target", "arrives"),
    [
        ("http://some.host:1/v1/completions?a=1", {"/v1/completions?a=1"}),
        ("/v1/completions?a=b%2Fc&d=%20+", {"/v1/completions?a=b%2Fc&d=%20+"}),
        ("/v1/completions?a=/../x?y", {"/v1/completions?a=/../x?y"}),
        ("/v1/completions?", {"/v1/completions?", "/v1/completions"}),
        ("/v1/chat/complet%69ons", {"/v1/chat/complet%69ons", "/v1/chat/completions"}),
    ],
)
async def test_target_arrives_as_it_was_sent(
    client: RawClient, engine: RawEngine, target: str, arrives: set[str]
) -> None:
    """Query and spelling stay the client's; an absolute URL works like its path (RFC 9112, 3.2.2)."""
    assert number_of(await client.ask(hot(4, target=target))) == 4
    assert engine.requests[0].target in arrives


async def test_encoded_path_of_cortex_itself(client: RawClient) -> None:
    """The slash of a model id may be encoded or plain."""
    for target in ("/v1/models/org%2Fsmall", "/v1/models/org/small"):
        answer = await client.ask(request(method="GET", target=target), "GET")
        assert json.loads(answer.body)["id"] == MODEL


@pytest.mark.parametrize(
    ("lines", "dropped"),
    [
        (("Connection: Upgrade", "Upgrade: example/1"), "upgrade"),
        (("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAA"), "http2-settings"),
        (("Connection: X-Hop", "X-Hop: 1"), "x-hop"),
        (("TE: trailers", "Connection: TE"), "te"),
        (("Keep-Alive: timeout=5",), "keep-alive"),
        (("Proxy-Authorization: Basic x",), "proxy-authorization"),
        (("Expect: 100-continue",), "expect"),
        (("Trailer: X-T",), "trailer"),
    ],
)
async def test_headers_of_one_connection_go_no_further(
    client: RawClient, engine: RawEngine, lines: tuple[str, ...], dropped: str
) -> None:
    """cortex ignores an offered upgrade and answers the request as usual; hop-by-hop headers do not reach the
    engine."""
    for number in range(2):
        answer = await client.ask(hot(number, *lines))
        assert number_of(answer) == number
        assert engine.requests[number].all(dropped) == []
        assert (engine.requests[number].get("connection") or "keep-alive").lower() == "keep-alive"


@pytest.mark.parametrize(
    "target", ["/v1/responses", "/v1/realtime/x?model=org/small", "/v1/models", "/health", "/nowhere"]
)
async def test_websocket_upgrade_is_426(client: RawClient, engine: RawEngine, target: str) -> None:
    """Codex probes for a WebSocket and uses HTTP after a 426. The connection stays usable."""
    lines = ("Connection: Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
    answer = await client.ask(request(b"", *lines, method="GET", target=target), "GET")
    assert (answer.status, answer.get("upgrade"), answer.get("connection")) == (426, "HTTP/1.1", "keep-alive, upgrade")
    assert "HTTP/1.1" in json.loads(answer.body)["error"]["message"]
    assert engine.requests == []
    assert number_of(await client.ask(hot(1))) == 1


@pytest.mark.parametrize("cut", [3, 10, 17, 18, 24])
async def test_http2_preface_gets_an_answer(cortex: RunningCortex, cut: int) -> None:
    """A client with prior knowledge of HTTP/2 learns what to use, however its preface is cut."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    async with connected(cortex.url) as client:
        await client.send_apart([preface[:cut], preface[cut:]])
        answer = await client.answer("GET")
        assert (answer.status, answer.get("connection")) == (505, "close")
        assert "HTTP/1.1" in json.loads(answer.body)["error"]["message"]


async def test_header_belongs_to_a_connection_only_where_it_is_said(client: RawClient, engine: RawEngine) -> None:
    """The same line passes in requests that do not name it in `Connection`, before and after one that does."""
    for named in (False, True, False):
        lines = ("X-Own: 1", "Connection: X-Own") if named else ("X-Own: 1",)
        assert number_of(await client.ask(hot(1, *lines))) == 1
        assert engine.requests[-1].all("x-own") == ([] if named else ["1"])


async def test_headers_of_an_engines_connection_go_no_further(client: RawClient, engine: RawEngine) -> None:
    """Hop-by-hop headers of the engine do not reach the client; a repeated header stays repeated."""
    engine.scripts.append(
        answering(
            plain(
                b"{}",
                *("Keep-Alive: timeout=5", "Connection: X-Hop, keep-alive", "X-Hop: 1", "Proxy-Authenticate: Basic"),
                *("X-Twice: 1", "x-twice: 2"),
            )
        )
    )
    answer = await client.ask(hot(1))
    for name in ("keep-alive", "x-hop", "proxy-authenticate"):
        assert answer.all(name) == []
    assert answer.all("x-twice") == ["1", "2"]
    assert number_of(await client.ask(hot(2))) == 2


@pytest.mark.parametrize("given", ["abc-1.2:3_X", None, "", "with space", "x" * 129, "ä", "a\tb"])
async def test_request_id(cortex: RunningCortex, client: RawClient, engine: RawEngine, given: str | None) -> None:
    """cortex echoes and forwards a safe id and replaces any other: on answers of engines, its own, and errors."""
    lines = () if given is None else (f"x-request-id: {given}",)
    harmless = given is not None and re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given) is not None
    unknown = request(b'{"model":"org/unknown"}', *lines)
    asked = [(hot(1, *lines), "POST"), (request(b"no", *lines), "POST"), (unknown, "POST")]
    asked.append((request(b"", *lines, method="GET", target="/health"), "GET"))
    made = set()
    for data, method in asked:
        answer = await client.ask(data, method)
        got = answer.get("x-request-id")
        assert got is not None
        assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", got)
        assert (got == given) is harmless
        made.add(got)
    assert len(made) == (1 if harmless else len(asked)), "generated ids differ"
    assert engine.requests[0].get("x-request-id") in made


async def test_engine_that_closes_does_not_affect_the_client(client: RawClient, engine: RawEngine) -> None:
    """The client's connection outlives the engine's."""
    for number in range(3):
        engine.scripts.append(closing(plain(b'{"n": %d}' % number)))
        assert number_of(await client.ask(hot(number))) == number
    engine.script = echo_number
    assert number_of(await client.ask(hot(7))) == 7
