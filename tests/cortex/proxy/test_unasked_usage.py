"""cortex counts the usage of streams whose client did not ask for it, and the client sees nothing of that."""

from __future__ import annotations

import json
from time import monotonic
from typing import Any

import pytest

from cortex.http.heads import request_reader
from cortex.http.request import Request
from cortex.proxy.answers.usage_event import UsageEventFilter
from cortex.proxy.body.alias_edit import spliced
from cortex.proxy.body.model_field import read_fields
from cortex.proxy.body.usage_option import usage_splice
from cortex.proxy.progress.usage_request import usage_request
from cortex.routing.stream_usage import StreamUsage
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.test_keep_alive import without_signs
from tests.cortex.proxy.test_relay_usage import metrics, tokens
from tests.cortex.proxy.test_silence import paced
from tests.cortex.raw_engine import RawEngine, Received, answering, plain, stream_head
from tests.cortex.raw_http import Wire, chunked, connected, request, single_bytes

MODEL = "org/small"
BODY = b'{"model":"org/small","stream":true}'
USAGE = {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}
FINGERPRINT = "vllm-0.32.0-0a1b2c3d"


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": choices, **more}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def choice(text: str, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "finish_reason": reason}


DONE = b"data: [DONE]\n\n"
TOKENS = [event([choice("a")]), event([choice('"choices":[],"usage":{}')]), event([choice("c")])]
USAGE_EVENT = event([], usage=USAGE, system_fingerprint=FINGERPRINT)
LAST = event([choice("", "stop")])
ASKED = [*TOKENS, LAST, USAGE_EVENT, DONE]
UNASKED = b"".join([*TOKENS, event([choice("", "stop")], system_fingerprint=FINGERPRINT), DONE])
"""What vLLM sends if it is asked for usage, and if not."""


@pytest.mark.parametrize(
    "given",
    [
        b'{"stream":true}',
        b'{"stream": true, "stream_options": null}',
        b'{"stream":true,"stream_options":{}}',
        b'{"stream":true, "stream_options": {"include_usage": false}, "n": 1}',
        b'{"stream":true,"stream_options":{"include_usage":null,"continuous_usage_stats":true,"other":1}}',
        b'{"stream_options":{"include_usage":true},"stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream":true,"temperature":NaN}',
        b'{"str\\u0065am":true}',
        '{"stream":true,"user":"ü"} '.encode(),
    ],
)
def test_streams_ask_for_usage(given: bytes) -> None:
    """Also where `stream_options` is there, and nothing but that member changes."""
    place = usage_splice(given, read_fields(given))
    assert place is not None
    start, end, value = place
    before, after = json.loads(given), json.loads(spliced(given, [place]))
    options = dict(before.pop("stream_options", None) or {})
    options.pop("continuous_usage_stats", None)
    assert after.pop("stream_options") == {**options, "include_usage": True}
    assert repr(after) == repr(before)
    assert len(given) - (end - start) + len(value) == len(spliced(given, [place]))


@pytest.mark.parametrize(
    "given",
    [
        b'{"model":"x"}',
        b'{"stream":false}',
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":"wrong"}',
        b'{"messages":[{"stream":true}]}',
        b"not json, stream",
    ],
)
def test_other_requests_stay_as_they_are(given: bytes) -> None:
    """What the client asks for itself, or got wrong, is between it and the engine."""
    assert usage_splice(given, read_fields(given)) is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 300, 10_000])
@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"])
def test_only_the_usage_event_is_removed_however_it_is_cut(size: int, ending: bytes) -> None:
    """The usage event may be in any pieces, together with others or alone. vLLM's fingerprint is where it would be."""
    sent = b"".join(ASKED).replace(b"\n\n", ending)
    events = UsageEventFilter(StreamUsage())
    passed = [events.feed(sent[at : at + size]) for at in range(0, len(sent), size)]
    assert b"".join([*passed, events.finish()]) == UNASKED.replace(b"\n\n", ending)
    assert events.usage_event == USAGE_EVENT.replace(b"\n\n", ending)


@pytest.mark.parametrize(
    "sent",
    [
        b"".join([*TOKENS, LAST, DONE]),
        b"".join([event([], usage=None), *TOKENS, event([], prompt_filter_results=[]), LAST, DONE]),
        b": working\n" + b"".join(TOKENS) + b": ping\n\n" + LAST,
        b'data: {"choices":[],"usage":{"broken"\n\n' + DONE,
        b"".join([event([choice("a", "stop", 0)]), *TOKENS * 500, event([choice("b", "length", 1)]), DONE]),
        b"data: {}",
    ],
)
@pytest.mark.parametrize("size", [1, 500, 1_000_000])
def test_all_else_passes_unchanged(sent: bytes, size: int) -> None:
    """From engines that ignore the option, with comments, and events that are not JSON."""
    assert _filtered(sent, size) == sent


@pytest.mark.parametrize("size", [20, 500, 1_000_000])
def test_a_very_long_event_passes_unchanged(size: int) -> None:
    """In single bytes it would take ten seconds: what is held is searched at each piece."""
    sent = b"".join([event([choice("x" * 200_000)]), LAST, DONE])
    assert _filtered(sent, size) == sent


def _filtered(sent: bytes, size: int) -> bytes:
    """What passes, in pieces of this size."""
    events = UsageEventFilter(StreamUsage())
    passed = [events.feed(sent[at : at + size]) for at in range(0, len(sent), size)]
    return b"".join([*passed, events.finish()])


def test_a_comment_is_not_held_back() -> None:
    """A client that waits for its first token gets the engine's signs of life at once."""
    events = UsageEventFilter(StreamUsage())
    assert events.feed(b": working\n") == b": working\n"


FRAMINGS = {
    "an event a chunk": [stream_head(), *(chunked(each, 10_000)[:-5] for each in ASKED), b"0\r\n\r\n"],
    "all at once": [stream_head() + chunked(b"".join(ASKED), 10_000)],
    "small chunks": [stream_head() + chunked(b"".join(ASKED), 7)],
    "byte by byte": list(single_bytes(stream_head() + chunked(b"".join(ASKED), 100))),
    "a length": [plain(b"".join(ASKED), content_type="text/event-stream")],
}


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_the_client_gets_its_stream_and_cortex_the_usage(
    cortex: RunningCortex, engine: RawEngine, framing: str, version: str
) -> None:
    """With any framing of the engine's, and for clients of both versions of HTTP."""
    engine.scripts.append(answering(*FRAMINGS[framing]))
    async with connected(cortex.url) as client:
        answer = await client.ask(request(BODY, version=version))
    assert (answer.status, answer.body) == (200, UNASKED)
    assert json.loads(engine.requests[0].body) == {**json.loads(BODY), "stream_options": {"include_usage": True}}
    assert tokens(await metrics(cortex)) == {"prompt": 3.0, "completion": 5.0}


async def test_a_stream_that_asks_passes_unchanged(cortex: RunningCortex, engine: RawEngine) -> None:
    """The client gets the usage event, and the fingerprint where the engine put it."""
    body = b'{"model":"org/small","stream":true,"stream_options":{"include_usage":true}}'
    engine.scripts.append(answering(stream_head() + chunked(b"".join(ASKED), 10_000)))
    async with connected(cortex.url) as client:
        answer = await client.ask(request(body))
    assert answer.body == b"".join(ASKED)
    assert engine.requests[0].body == body


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity"])
async def test_an_engine_that_refuses_the_option_is_asked_no_more(
    cortex: RunningCortex, engine: RawEngine, status: str
) -> None:
    """The client gets its stream anyway, and the next one without a second attempt."""

    async def script(wire: Wire, received: Received) -> None:
        refused = b"stream_options" in received.body
        answer = plain(b'{"error":"extra fields"}', status=status) if refused else stream_head() + chunked(DONE, 99)
        await wire.send(answer)

    engine.script = script
    async with connected(cortex.url) as client:
        answers = [await client.ask(request(BODY)) for _ in range(3)]
    assert [(answer.status, answer.body) for answer in answers] == [(200, DONE)] * 3
    assert [received.body for received in engine.requests[1:]] == [BODY] * 3


def test_a_refusal_is_only_that_engines() -> None:
    """Another engine, which gets the request after one that has refused the option and was then lost, is asked for
    usage, and does not count as one that refuses."""
    head, reader = request_reader()
    reader.feed(request(BODY))
    retried = Request(head, peer="", received=0)
    retried.body = BODY
    first, second = StreamUsage(), StreamUsage()
    asking = usage_request(retried, read_fields(retried.body))
    assert asking is not None
    asking.prepare(first)
    assert asking.give_up()
    asking.prepare(first)
    assert retried.body == BODY
    asking.prepare(second)
    assert "stream_options" in json.loads(retried.body)
    asking.answered(200)
    assert not second.refuses(monotonic())


async def test_a_faulty_request_gets_the_engines_error(cortex: RunningCortex, engine: RawEngine) -> None:
    """vLLM's error says how many fields the body has: it must be about the client's. It does not make cortex believe
    that the engine refuses to report usage."""

    async def count_fields(wire: Wire, received: Received) -> None:
        fields = str(len(json.loads(received.body))).encode()
        await wire.send(plain(fields, status="400 Bad Request"))

    engine.script = count_fields
    async with connected(cortex.url) as client:
        answer = await client.ask(request(BODY))
        assert (answer.status, answer.body) == (400, b"2")
        engine.script = answering(stream_head() + chunked(b"".join(ASKED), 10_000))
        assert (await client.ask(request(BODY))).body == UNASKED


async def test_a_stream_that_has_begun_with_signs_of_life(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """The client got comments before the engine's first byte: it sees neither the usage event nor a cut event."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": 0.1})
    engine.scripts.append(paced(b"", stream_head() + chunked(b"".join(ASKED), 50)))
    async with connected(cortex.url) as client:
        answer = await client.ask(request(BODY))
    assert b": " in answer.body
    assert without_signs(answer.body) == UNASKED
    assert tokens(await metrics(cortex)) == {"prompt": 3.0, "completion": 5.0}
