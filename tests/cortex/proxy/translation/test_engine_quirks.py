"""Engines that bend the chat completions API: both dialects still get a correct answer, or an error that says why."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cortex.proxy.translation.interface import Translation
from cortex.proxy.translation.messages.translation import MessagesTranslation
from cortex.proxy.translation.responses.translation import ResponsesTranslation
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.translation.chat_engine import COMPLETION, STREAM, ChatEngine, chunk, events, stream_of
from tests.cortex.raw_engine import closing, plain, stream_head
from tests.cortex.raw_http import Answer, RawClient, chunked, connected, read_body, request

MODEL = "org/small"
PATHS = ["/v1/messages", "/v1/responses"]
LAST = {"/v1/messages": ["message_stop", "error"], "/v1/responses": ["response.completed", "response.failed"]}


def asked(path: str, **fields: Any) -> bytes:
    given: dict[str, Any] = (
        {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]} if path == PATHS[0] else {"input": "hi"}
    )
    return json.dumps({"model": MODEL, **given, **fields}).encode()


def translation(path: str, **fields: Any) -> Translation:
    translator = MessagesTranslation if path == PATHS[0] else ResponsesTranslation
    return translator(asked(path, **fields), "org/small on benjy")


def parsed(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.partition("data: ")[2]) for event in out.decode().split("\n\n") if "data: " in event]


def text_of(found: list[dict[str, Any]]) -> str:
    """All text of the answer's words."""
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    blocks = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    return "".join(deltas + [delta["text"] for delta in blocks if delta["type"] == "text_delta"])


def calls_of(found: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Name and input of each call."""
    items = found[-1].get("response", {}).get("output", [])
    calls = [(item["name"], json.loads(item["arguments"])) for item in items if item["type"] == "function_call"]
    inputs: dict[int, str] = {}
    names: dict[int, str] = {}
    for event in found:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            names[event["index"]] = event["content_block"]["name"]
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
    return calls + [(name, json.loads(inputs.get(index, "{}"))) for index, name in names.items()]


def streamed(path: str, data: bytes) -> list[dict[str, Any]]:
    stream = stream_of(translation(path, stream=True))
    return parsed(stream.feed(data) + stream.finish())


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": name, "arguments": arguments}, **more}]}


TEXTS = {
    "no finish reason but [DONE]": events(chunk({"content": "Hi"}), chunk({"content": " there"}), "[DONE]"),
    "empty finish reasons": events(chunk({"content": "Hi"}, ""), chunk({"content": " there"}, ""), "[DONE]"),
    "content in parts": events(chunk({"content": [{"type": "text", "text": "Hi there"}]}, "stop")),
    "message for delta": events({"choices": [{"message": {"content": "Hi there"}, "finish_reason": "stop"}]}),
    "null everywhere": events(
        {**chunk({"role": "assistant", "content": None, "tool_calls": None}), "usage": None, "model": None, "id": None},
        chunk({"role": "assistant", "content": "Hi there", "tool_calls": []}),
        chunk({"content": None}, "stop"),
    ),
    "usage beside the last choice": events(chunk({"content": "Hi there"}, "stop", usage={"prompt_tokens": 1})),
    "no spaces and comments": STREAM.replace(b"data: ", b"data:").replace(b"\n\n", b"\n\n: still here\n\n"),
    "carriage returns": STREAM.replace(b"\n", b"\r\n"),
    "an empty event": b"data:\n\nevent: message\n" + STREAM,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", TEXTS)
def test_text(path: str, kind: str) -> None:
    found = streamed(path, TEXTS[kind])
    assert (text_of(found), found[-1]["type"]) == ("Hi there", LAST[path][0])


CALLS = {
    "neither numbers nor ids": [call("a", '{"x": 1}'), call("b", '{"x": 2}')],
    "one name, neither numbers nor ids": [call("a", '{"x": 1}'), call("a", '{"x": 2}')],
    "one number, no ids": [call("a", '{"x": 1}', index=0), call("b", '{"x": 2}', index=0)],
    "objects for arguments": [call("a", {"x": 1}, index=0, id="1"), call("b", {"x": 2}, index=1, id="2")],
    "numbers as text": [call("a", '{"x": 1}', index="0"), call("b", '{"x": 2}', index="1")],
    "ids but no numbers, alternating": [
        call("a", '{"x":', id="1"),
        call("b", '{"x":', id="2"),
        {"tool_calls": [{"id": "1", "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"id": "2", "function": {"arguments": "2}"}}]},
    ],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ending", [[chunk({}, "tool_calls"), "[DONE]"], [chunk({}, "stop")], ["[DONE]"]])
@pytest.mark.parametrize("kind", CALLS)
def test_calls(path: str, kind: str, ending: list[Any]) -> None:
    """However an engine tells its calls apart, and whatever it calls the end."""
    found = streamed(path, events(*(chunk(delta) for delta in CALLS[kind]), *ending))
    first, second = calls_of(found)
    assert found[-1]["type"] == LAST[path][0]
    assert first == ("a", {"x": 1})
    assert second == ("a" if kind.startswith("one name") else "b", {"x": 2})


@pytest.mark.parametrize("path", PATHS)
def test_whole_calls_with_one_id(path: str) -> None:
    """In a whole message each entry is a call of its own."""
    calls = [*call("a", {"x": 1}, id="call_0")["tool_calls"], *call("b", "", id="call_0")["tool_calls"]]
    choice = {"message": {"content": None, "tool_calls": calls}, "finish_reason": None}
    status, body = translation(path).answer(200, json.dumps({"choices": [choice]}).encode())
    answer = json.loads(body)
    assert status == 200
    items = answer.get("content") or answer["output"]
    assert [item["name"] for item in items] == ["a", "b"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("end", "message"),
    [
        (b'error: {"code": 500, "message": "boom", "type": "server_error"}\n\n', "boom"),
        (b'event: error\ndata: {"message": "boom"}\n\n', "boom"),
        (events({"error": {"message": "boom"}}), "boom"),
        (events({"error": "boom"}), "boom"),
        (events(chunk({}, "abort"), "[DONE]"), "finish_reason 'abort'"),
        (events(chunk({}, "error"), "[DONE]"), "finish_reason 'error'"),
        (b"", "without a finish_reason"),
        (events(chunk(call("a", '{"x":', index=0)), "[DONE]"), "without a finish_reason"),
    ],
)
def test_stream_that_fails(path: str, end: bytes, message: str) -> None:
    """In the words of the engine, in each shape that engines use, and never as a complete answer. A call that breaks
    off is not complete, whatever follows."""
    found = streamed(path, events(chunk({"content": "Hi"})) + end)
    assert found[-1]["type"] == LAST[path][1]
    assert message in found[-1]["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reason", ["abort", "error"])
def test_whole_answer_that_was_aborted(path: str, reason: str) -> None:
    choice = {"message": {"content": "Hi"}, "finish_reason": reason}
    status, body = translation(path).answer(200, json.dumps({"choices": [choice]}).encode())
    assert status == 502
    assert f"finish_reason '{reason}'" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_whole_answer_that_is_an_error(path: str) -> None:
    """Some engines answer 200 whatever happens."""
    status, body = translation(path).answer(200, b'{"error": "out of memory"}')
    assert status == 502
    assert "out of memory" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("status", "body"), [(404, b"404 page not found"), (405, b'{"detail": "Method Not Allowed"}')])
def test_engine_without_chats(path: str, status: int, body: bytes) -> None:
    """A model for embeddings, for example: its engine's own words say little."""
    found, answer = translation(path).answer(status, body)
    said = f"{MODEL} on benjy has neither {path} nor /v1/chat/completions"
    assert (found, json.loads(answer)["error"]["message"].startswith(said)) == (status, True)


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[ChatEngine]:
    async with ChatEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine  # type: ignore[misc]


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": 0.2})


async def ask(client: RawClient, path: str, **fields: Any) -> Answer:
    return await client.ask(request(asked(path, **fields), target=path))


ZIPPED = gzip.compress(STREAM)
ANSWERS: dict[str, list[bytes]] = {
    "JSON for a stream": [plain(json.dumps(COMPLETION, indent=1).encode())],
    "JSON in chunks for a stream": [
        stream_head(content_type="application/json") + chunked(json.dumps(COMPLETION).encode(), 30)
    ],
    "gzip": [stream_head("Content-Encoding: gzip") + chunked(ZIPPED, 20)],
    "gzip, whole": [plain(ZIPPED, "Content-Encoding: gzip", content_type="text/event-stream")],
    "no content type": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(STREAM, 30)],
    "text": [stream_head(content_type="text/plain; charset=utf-8") + chunked(STREAM, 30)],
    "until close": [b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", STREAM[:100], STREAM[100:]],
    "sized": [plain(STREAM, content_type="text/event-stream")],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ANSWERS)
async def test_stream_in_any_form(client: RawClient, engine: ChatEngine, path: str, kind: str) -> None:
    """A client that asks for a stream gets one."""
    await ask(client, path)  # the engine is known to lack the path
    engine.scripts.append(closing(*ANSWERS[kind]) if kind == "until close" else closing(b"".join(ANSWERS[kind])))
    answer = await ask(client, path, stream=True)
    assert (answer.status, answer.get("content-type")) == (200, "text/event-stream; charset=utf-8")
    found = parsed(answer.body)
    assert (text_of(found), found[-1]["type"]) == ("Hi there", LAST[path][0])
    assert answer.get("content-encoding") is None


@pytest.mark.parametrize("path", PATHS)
async def test_old_client_of_an_engine_that_ignores_stream(
    cortex: RunningCortex, engine: ChatEngine, path: str
) -> None:
    """The stream ends with the connection."""
    engine.stream = engine.completion
    async with connected(cortex.url) as client:
        answer = await client.ask(request(asked(path, stream=True), target=path, version="HTTP/1.0"))
    found = parsed(answer.body)
    assert (text_of(found), found[-1]["type"]) == ("Hi there", LAST[path][0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("failing", [False, True])
async def test_white_space_before_a_translated_answer(
    start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine, path: str, failing: bool
) -> None:
    """A plain request that waits gets white space, then the answer or the error in its dialect."""
    if failing:
        engine.completion = plain(b'{"error": {"message": "too long"}}', status="400 Bad Request")
    benjy.models.clear()
    benjy.load_gate.clear()
    cortex = await start_cortex(
        [benjy], [{"id": MODEL}], waiting={"plain_keepalive": "whitespace", "first_comment_secs": 0.01}
    )
    async with connected(cortex.url) as client:
        await client.send(request(asked(path), target=path))
        assert (await client.head()).start == "HTTP/1.1 200 OK"
        benjy.load_gate.set()
        found = json.loads(await read_body(client.incoming, "chunked", 0))
    if failing:
        assert found["error"]["message"] == "too long"
    else:
        assert "Hi there" in json.dumps(found.get("content") or found.get("output"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("encoding", ["gzip", "br"])
async def test_encoding_that_cannot_be_read(client: RawClient, engine: ChatEngine, path: str, encoding: str) -> None:
    await ask(client, path)
    engine.completion = plain(b"\x00\x01garbage", f"Content-Encoding: {encoding}")
    answer = await ask(client, path)
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (502, "api_error")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_200_for_an_unknown_path(client: RawClient, engine: ChatEngine, path: str, stream: bool) -> None:
    """LM Studio answers every path with 200."""
    engine.missing = plain(json.dumps({"error": f"Unexpected endpoint or method. (POST {path})"}).encode())
    answer = await ask(client, path, stream=stream)
    assert b"Unexpected" not in answer.body
    assert engine.paths == [path, "/v1/chat/completions"]


@pytest.mark.parametrize("body", [b'{"error": "out of memory"}', b"{}", b"", b"Unexpected endpoint"])
async def test_other_short_answers_are_passed_on(client: RawClient, engine: ChatEngine, body: bytes) -> None:
    """Byte for byte."""
    engine.missing = plain(body)
    answer = await ask(client, PATHS[0])
    assert (answer.status, answer.body) == (200, body)
    assert engine.paths == [PATHS[0]]
