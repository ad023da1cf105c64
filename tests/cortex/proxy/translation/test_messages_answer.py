"""Chat completions as answers of Anthropic's Messages API: whole ones, streams and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.proxy.translation.chat_stream import MAX_EVENT_BYTES
from cortex.proxy.translation.messages.translation import MessagesTranslation
from tests.cortex.proxy.translation.chat_engine import COMPLETION, STREAM, chunk, events, stream_of
from tests.cortex.raw_http import every_split


def translation(**fields: Any) -> MessagesTranslation:
    body = {"model": "org/small", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}], **fields}
    return MessagesTranslation(json.dumps(body).encode(), "org/small on benjy")


def whole(message: dict[str, Any], finish: str | None = "stop", *, asked: Any = None, **choice: Any) -> dict[str, Any]:
    completion = {**COMPLETION, "choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}]}
    answer = translation(**(asked or {})).answer(200, json.dumps(completion).encode())
    found: dict[str, Any] = json.loads(answer.body)
    assert answer.status == 200 or found["type"] == "error", answer
    return found


def streamed(data: bytes, size: int = 1 << 20, **fields: Any) -> list[dict[str, Any]]:
    """The events for a stream that arrives in pieces of `size` bytes and then ends."""
    stream = stream_of(translation(stream=True, **fields))
    out = b"".join(stream.feed(data[start : start + size]) for start in range(0, len(data), size)) + stream.finish()
    return parsed(out)


def parsed(out: bytes) -> list[dict[str, Any]]:
    found = []
    for event in out.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert out == b"" or out.endswith(b"\n\n")
    return found


def assembled(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of events; fails where they break Anthropic's order."""
    message: dict[str, Any] = found[0]["message"]
    assert [found[0]["type"], found[-1]["type"]] == ["message_start", "message_stop"]
    inputs: dict[int, str] = {}
    opened = None
    for event in found[1:-1]:
        kind = event["type"]
        if kind == "content_block_start":
            assert (opened, event["index"]) == (None, len(message["content"]))
            opened = event["index"]
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            assert event["index"] == opened
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "input_json_delta":
                inputs[opened] = inputs.get(opened, "") + delta["partial_json"]
            else:
                key = {"text_delta": "text", "thinking_delta": "thinking"}[delta["type"]]
                block[key] += delta[key]
        elif kind == "content_block_stop":
            assert event["index"] == opened
            opened = None
        else:
            assert (kind, opened) == ("message_delta", None)
            message |= event["delta"]
            message["usage"] |= event["usage"]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


TEXT = {"type": "text", "text": "Hi there"}
CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
    {"id": "", "type": "function", "function": {"name": "now", "arguments": ""}},
]
USES = [
    {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {"city": "Paris"}},
    {"type": "tool_use", "id": "toolu_1_1", "name": "now", "input": {}},
]


def test_whole_answer() -> None:
    """The engine's id with Anthropic's prefix, its model, its counts."""
    assert json.loads(translation().answer(200, json.dumps(COMPLETION).encode()).body) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "org/small",
        "content": [TEXT],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 2},
    }


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thinking_calls_and_text(key: str) -> None:
    """Blocks come in Anthropic's order; a call without an id gets one."""
    said = {"content": "Hi there", key: "Hm.", "tool_calls": CALLS}
    found = whole(said, "tool_calls")
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert found["content"] == [thought, TEXT, *USES]
    assert found["stop_reason"] == "tool_use"
    assert whole(said, asked={"thinking": {"type": "disabled"}})["content"][0] == TEXT


@pytest.mark.parametrize(
    ("finish", "more", "expected"),
    [
        ("stop", {}, ("end_turn", None)),
        ("length", {}, ("max_tokens", None)),
        ("content_filter", {}, ("refusal", None)),
        ("stop", {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"matched_stop": "END"}, ("stop_sequence", "END")),
        ("stop", {"stop_reason": 151645}, ("end_turn", None)),
        ("stop", {"matched_stop": "other"}, ("end_turn", None)),
        (None, {}, ("end_turn", None)),
    ],
)
def test_stop_reasons(finish: str | None, more: dict[str, Any], expected: tuple[str, str | None]) -> None:
    found = whole({"content": "x"}, finish, asked={"stop_sequences": ["END"]}, **more)
    assert (found["stop_reason"], found["stop_sequence"]) == expected


def test_call_that_the_engine_ends_with_stop() -> None:
    """Some engines say `stop` where the client named the tool, or always."""
    assert whole({"content": None, "tool_calls": CALLS}, "stop")["stop_reason"] == "tool_use"


def test_call_cut_off_is_text_and_a_broken_one_an_error() -> None:
    cut = [{"id": "call_a", "function": {"name": "weather", "arguments": '{"city": "Pa'}}]
    found = whole({"content": None, "tool_calls": cut}, "length")
    assert (found["stop_reason"], found["content"]) == (
        "max_tokens",
        [{"type": "text", "text": 'weather({"city": "Pa'}],
    )
    assert whole({"content": None, "tool_calls": cut}, "tool_calls")["error"]["type"] == "api_error"


def test_empty_answer_has_an_empty_text() -> None:
    assert whole({"content": None}, "length")["content"] == [{"type": "text", "text": ""}]


def test_cached_tokens_are_not_input_tokens() -> None:
    """As in Anthropic's API, unlike in OpenAI's."""
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
    expected = {"input_tokens": 2, "output_tokens": 2, "cache_read_input_tokens": 8}
    answer = translation().answer(200, json.dumps({**COMPLETION, "usage": usage}).encode())
    assert json.loads(answer.body)["usage"] == expected
    found = streamed(events(chunk({"content": "x"}, "stop"), chunk(usage=usage), "[DONE]"))
    assert found[-2]["usage"] == expected


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, b'{"error": {"message": "too long", "type": "BadRequestError"}}', "invalid_request_error", "too long"),
        (401, b'{"error": "Unauthorized"}', "authentication_error", "Unauthorized"),
        (422, b'{"detail": "no"}', "invalid_request_error", "no"),
        (429, b'{"message": "slow"}', "rate_limit_error", "slow"),
        (500, b"<html>", "api_error", "the engine answered 500: <html>"),
        (503, b"", "overloaded_error", "the engine answered 503"),
    ],
)
def test_errors_keep_their_status(status: int, body: bytes, kind: str, message: str) -> None:
    answer = translation().answer(status, body)
    assert answer.status == status
    assert json.loads(answer.body) == {"type": "error", "error": {"type": kind, "message": message}}


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"choices": []}', b'{"choices": [1]}', b'{"error": "x"}'])
def test_success_without_a_completion_is_an_error(body: bytes) -> None:
    answer = translation().answer(200, body)
    assert (answer.status, json.loads(answer.body)["type"]) == (502, "error")


def test_stream() -> None:
    found = streamed(STREAM)
    assert [event["type"] for event in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert assembled(found) == json.loads(translation().answer(200, json.dumps(COMPLETION).encode()).body)


def call(
    index: int | None, name: str | None = None, arguments: str | None = None, given_id: Any = None
) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"tool_calls": [{"index": index, "id": given_id, "type": "function", "function": function}]}


EVERYTHING = b": a comment\n\nevent: chunk\nid: 1\n" + events(
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "Hm"}),
    chunk({"reasoning_content": "."}),
    chunk({"content": "Hi thére"}),
    chunk(call(0, "weather", "", "call_a")),
    chunk(call(0, None, '{"city":')),
    chunk(call(0, None, ' "Pa"}')),
    chunk(call(1, "now", "", "call_b")),
    chunk(call(1, None, "{}")),
    chunk({}, "tool_calls"),
    chunk(usage={"prompt_tokens": 7, "completion_tokens": 2}),
    "[DONE]",
)
PARTS = [
    {"type": "thinking", "thinking": "Hm.", "signature": ""},
    {"type": "text", "text": "Hi thére"},
    {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {"city": "Pa"}},
    {"type": "tool_use", "id": "toolu_b", "name": "now", "input": {}},
]


@pytest.mark.parametrize("data", [EVERYTHING, EVERYTHING.replace(b"\n", b"\r\n")], ids=["LF", "CR LF"])
def test_stream_split_anywhere(data: bytes) -> None:
    """The same events whatever the pieces are, and each as soon as its chunk is complete."""
    expected = streamed(data)
    message = assembled(streamed(data))
    assert (message["content"], message["stop_reason"]) == (PARTS, "tool_use")
    assert streamed(data, 1) == expected
    for first, second in every_split(data):
        stream = stream_of(translation(stream=True))
        assert parsed(stream.feed(first) + stream.feed(second) + stream.finish()) == expected


CALL_STREAMS = {
    "interleaved": [call(0, "a", "{", "x"), call(1, "b", "{", "y"), call(0, None, "}"), call(1, None, "}")],
    "no ids": [call(0, "a", "{}"), call(1, "b", "{}")],
    "one index": [call(0, "a", "{}", "x"), call(0, "b", "{}", "y")],
    "no index": [call(None, "a", "{}", "x"), call(None, "b", "{}", "y")],
    "id repeated": [call(0, "a", "", "x"), call(0, None, "{", "x"), call(0, "", "}", "x"), call(1, "b", "{}", "y")],
    "at once": [{"tool_calls": call(0, "a", "{}", "x")["tool_calls"] + call(1, "b", "{}", "y")["tool_calls"]}],
    "name late": [call(0, None, "{", "x"), call(0, "a", "}"), call(1, "b", "{}", "y")],
}


@pytest.mark.parametrize("kind", CALL_STREAMS)
def test_calls_as_engines_stream_them(kind: str) -> None:
    chunks = [chunk(delta) for delta in CALL_STREAMS[kind]]
    message = assembled(streamed(events(*chunks, chunk({}, "tool_calls"), "[DONE]")))
    assert [(use["name"], use["input"]) for use in message["content"]] == [("a", {}), ("b", {})]
    ids = [use["id"] for use in message["content"]]
    assert len(set(ids)) == 2
    assert all(each.startswith("toolu_") for each in ids)


def test_text_behind_a_call_is_not_lost() -> None:
    chunks = [chunk(call(0, "a", "{", "x")), chunk({"content": "So"}), chunk(call(0, None, "}")), chunk({}, "stop")]
    message = assembled(streamed(events(*chunks)))
    assert [block["type"] for block in message["content"]] == ["tool_use", "text"]
    assert message["stop_reason"] == "tool_use"


def test_thinking_is_left_out_if_it_was_disabled() -> None:
    message = assembled(streamed(EVERYTHING, thinking={"type": "disabled"}))
    assert message["content"] == PARTS[1:]


def test_end_without_done_or_usage() -> None:
    """The finish reason makes an answer complete."""
    message = assembled(streamed(events(chunk({"content": "x"}), chunk({}, "length"))))
    assert (message["stop_reason"], message["usage"]) == ("max_tokens", {"input_tokens": 0, "output_tokens": 0})
    assert assembled(streamed(events(chunk({"content": "x"}, "stop")).rstrip()))["stop_reason"] == "end_turn"


@pytest.mark.parametrize("data", [b"", events(chunk({"content": "x"})), events("[DONE]")])
def test_end_without_a_finish_reason_is_an_error(data: bytes) -> None:
    """It must not look like a complete answer."""
    found = streamed(data)
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["code"] == "upstream_lost"
    assert "message_stop" not in [event["type"] for event in found]


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ({"error": {"message": "boom", "type": "InternalServerError", "code": 500}}, "api_error", "boom"),
        ({"error": {"message": "long", "code": 400}}, "invalid_request_error", "long"),
        ({"error": "boom"}, "api_error", "boom"),
        ({"object": "error", "message": "boom"}, "api_error", "boom"),
        ("not json", "api_error", "not json"),
        ("[1]", "api_error", "[1]"),
    ],
)
def test_error_in_the_stream(said: Any, kind: str, message: str) -> None:
    """It is the last event, whatever the engine sends after it."""
    found = streamed(events(chunk({"content": "x"}), said, chunk({"content": "y"}, "stop"), "[DONE]"))
    assert [event["type"] for event in found].count("error") == 1
    assert (found[-1]["type"], found[-1]["error"]["type"]) == ("error", kind)
    assert message in found[-1]["error"]["message"]


def test_event_without_end_is_an_error() -> None:
    """A line is not collected without limit."""
    stream = stream_of(translation(stream=True))
    out = b"".join(stream.feed(b"x" * 65536) for _ in range(MAX_EVENT_BYTES // 65536 + 2))
    assert [event["type"] for event in parsed(out)] == ["error"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["stop", "length"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "index", "function", "name", "arguments", "content", "tool_calls", "message", "code"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=10,
)


@given(JSON, JSON, JSON, JSON)
@settings(max_examples=300, deadline=None)
def test_any_engine_is_survived(said: Any, finish: Any, usage: Any, other: Any) -> None:
    """Whatever an engine sends, the client gets JSON and whole events."""
    choice = {"message": said, "delta": said, "finish_reason": finish, "stop_reason": other}
    for body in ({"id": other, "choices": [choice], "usage": usage}, {"choices": other}, {"error": other}, other):
        json.loads(translation().answer(200, json.dumps(body).encode()).body)
        json.loads(translation().answer(400, json.dumps(body).encode()).body)
        parsed(stream_of(translation(stream=True)).feed(events(json.dumps(body), json.dumps(body))))
        streamed(events(json.dumps(body)))
