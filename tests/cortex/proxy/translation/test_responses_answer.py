"""The response that a client gets for an answer of chat completions, whole and as a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from cortex.proxy.answers.error_event import error_event
from cortex.proxy.translation.responses.translation import ResponsesTranslation
from cortex.routing.response_owners import UNSTORED
from cortex.upstream.tail import HEAD_BYTES, KEPT_BYTES
from cortex.upstream.usage import Usage, find_usage
from shared.errors import UpstreamError
from tests.cortex.proxy.translation.chat_engine import stream_of

FUNCTION = {"type": "function", "name": "look", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "apply_patch"}
SPACE = {"type": "namespace", "name": "agents", "description": "d", "tools": [{**FUNCTION, "name": "spawn"}]}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def translation(**fields: Any) -> ResponsesTranslation:
    request = {"model": "m", "input": "hello", "tools": [FUNCTION, PATCH, SPACE], **fields}
    return ResponsesTranslation(json.dumps(request).encode(), "m on host")


def whole(message: dict[str, Any], finish: str | None = "stop", **fields: Any) -> dict[str, Any]:
    """The response for a complete answer, checked against the types of the openai package."""
    completion = {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": USAGE}
    status, body = translation(**fields).answer(200, json.dumps(completion).encode())
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    Response.model_validate(found)
    return found


def chunk(finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return data({"object": "chat.completion.chunk", "choices": [choice]})


def data(value: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(value).encode()


def call(index: int | None = 0, arguments: str | None = None, **more: Any) -> dict[str, Any]:
    """A piece of a call; `id` and `name` in the first one."""
    function = {"name": more.pop("name", None), "arguments": arguments}
    found = {"index": index, "function": {k: v for k, v in function.items() if v is not None}, **more}
    return {k: v for k, v in found.items() if v is not None}


END = data({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"


def events_of(written: bytes) -> list[dict[str, Any]]:
    """The events, checked: names, numbers without gaps, shapes as the openai package has them, one id throughout."""
    found = []
    for number, block in enumerate(written.decode().split("\n\n")[:-1]):
        name, line = block.split("\n")
        event = json.loads(line.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        if event["type"] != "response.failed":
            _EVENTS.validate_python(event)
        found.append(event)
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    assert len({event["response"]["id"] for event in found if "response" in event}) == 1
    return found


def streamed(pieces: Sequence[bytes], **fields: Any) -> list[dict[str, Any]]:
    stream = stream_of(translation(stream=True, **fields))
    return events_of(b"".join([stream.feed(piece) for piece in pieces]) + stream.finish())


def kinds(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def deltas(events: Sequence[dict[str, Any]], kind: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What does not differ between two responses with the same content."""
    unique = response["id"].removeprefix(UNSTORED)
    found: dict[str, Any] = json.loads(json.dumps(response).replace(unique, "0"))
    return found | {"created_at": 0}


MIXED = [
    chunk(role="assistant", content=""),
    chunk(reasoning_content="Hm"),
    chunk(reasoning_content="m."),
    chunk(content="I "),
    chunk(content="lo\u00e9k \U0001f600."),
    chunk(tool_calls=[call(0, "", id="c1", type="function", name="look")]),
    chunk(tool_calls=[call(0, '{"a":')]),
    chunk(tool_calls=[call(0, " 1}")]),
    chunk(tool_calls=[call(1, "{}", id="c2", type="function", name="agents__spawn")]),
    chunk(tool_calls=[call(2, '{"input": "*** \\u00e9', id="c3", type="function", name="apply_patch")]),
    chunk(tool_calls=[call(2, '\\n\\ud83d\\ude00"}')]),
    chunk("tool_calls"),
    END,
]
MIXED_MESSAGE = {
    "role": "assistant",
    "reasoning_content": "Hmm.",
    "content": "I lo\u00e9k \U0001f600.",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "agents__spawn", "arguments": "{}"}},
        {
            "id": "c3",
            "type": "function",
            "function": {"name": "apply_patch", "arguments": '{"input": "*** \u00e9\\n\U0001f600"}'},
        },
    ],
}


def test_a_text() -> None:
    """The usual answer: the text, the counts, and the settings of the request."""
    found = whole({"content": "Hi."}, temperature=0.5, metadata={"a": "b"}, store=True, instructions="Be brief.")
    [item] = found["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert found["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }
    assert (found["status"], found["model"], found["error"]) == ("completed", "m", None)
    assert (found["temperature"], found["metadata"], found["instructions"]) == (0.5, {"a": "b"}, "Be brief.")
    assert found["store"] is False  # nothing was stored


def test_items_of_each_kind() -> None:
    """Reasoning, words, a call of a function, of a namespace's function and of a custom tool."""
    reasoning, words, plain, spaced, custom = whole(MIXED_MESSAGE, "tool_calls")["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert words["content"][0]["text"] == "I lo\u00e9k \U0001f600."
    assert (plain["call_id"], plain["name"], plain["arguments"]) == ("c1", "look", '{"a": 1}')
    assert (spaced["namespace"], spaced["name"]) == ("agents", "spawn")
    assert (custom["type"], custom["name"], custom["input"]) == (
        "custom_tool_call",
        "apply_patch",
        "*** \u00e9\n\U0001f600",
    )
    assert len({item["id"] for item in (reasoning, words, plain, spaced, custom)}) == 5


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_was_cut_short_is_incomplete(finish: str, reason: str) -> None:
    """With the reason, whole and as a stream."""
    found = whole({"content": "Hi"}, finish)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert found["output"][0]["status"] == "incomplete"
    last = streamed([chunk(content="Hi"), chunk(finish), END])[-1]
    assert last["type"] == "response.incomplete"
    assert without_ids(last["response"]) == without_ids(found)


def test_a_stream_tells_everything_in_order() -> None:
    """Each item begins, grows and ends; the last event has all of it."""
    events = streamed(MIXED)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "output_item.added",
        "function_call_arguments.delta",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.delta",
        "function_call_arguments.done",
        "output_item.done",
        "function_call_arguments.done",
        "output_item.done",
        "custom_tool_call_input.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1]["response"]
    done = {e["output_index"]: e["item"] for e in events if e["type"] == "response.output_item.done"}
    assert final["output"] == [done[index] for index in range(5)]
    assert without_ids(final) == without_ids(whole(MIXED_MESSAGE, "tool_calls"))
    assert deltas(events, "custom_tool_call_input") == "*** \u00e9\n\U0001f600"
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == final["output"][event["output_index"]]["id"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_stream_may_be_split_anywhere(size: int, line_end: bytes) -> None:
    """Networks do not know events."""
    sent = b": comment\n" + b"".join(MIXED)
    sent = sent.replace(b"\n", line_end)
    pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
    assert [without_ids_of(e) for e in streamed(pieces)] == [without_ids_of(e) for e in streamed(MIXED)]


def without_ids_of(event: dict[str, Any]) -> str:
    """An event without the part that differs between two responses."""
    place = event.get("item_id") or event.get("item", {}).get("id") or event["response"]["id"].removeprefix("resp_")
    if "response" in event:
        event["response"]["created_at"] = 0
    return json.dumps(event).replace(place.partition("_")[2][:32], "0")


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_custom_input_is_decoded_from_pieces(cut: int) -> None:
    """An escape may be split between two chunks; the deltas add up to the input."""
    arguments = '{"input": "a\\\\\\"\\u00e9\\ud83d\\ude00\\n/\\/\\udc00 b"}'
    first = call(0, arguments[:cut], id="c", name="apply_patch")
    events = streamed([chunk(tool_calls=[first]), chunk(tool_calls=[call(0, arguments[cut:])]), chunk("stop"), END])
    wanted = 'a\\"\u00e9\U0001f600\n//\udc00 b'
    assert deltas(events, "custom_tool_call_input") == wanted
    assert events[-1]["response"]["output"][0]["input"] == wanted


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("*** Begin Patch", "*** Begin Patch"),
        ('{"patch": "x"}', '{"patch": "x"}'),
        ('{"input": "x", "more": 1}', "x"),
        ('{"input": "cut o', "cut o"),
        ('{ "input" :\n"x" }', "x"),
        ('{"more": 1, "input": "x"}', "x"),
        ('{"input": ""}', ""),
        ('{"input": 5}', '{"input": 5}'),
        ("", ""),
    ],
)
def test_a_model_may_miss_the_form_of_a_custom_call(arguments: str, wanted: str) -> None:
    """What it wrote reaches the tool, as text."""
    events = streamed([chunk(tool_calls=[call(0, arguments, id="c", name="apply_patch")]), chunk("stop"), END])
    [item] = events[-1]["response"]["output"]
    assert item["input"] == wanted == deltas(events, "custom_tool_call_input")


@pytest.mark.parametrize(
    "pieces",
    [
        [call(0, "{", id="a", name="look"), call(1, "{", id="b", name="look"), call(0, "}"), call(1, "}")],
        [call(0, "{}", id="a", name="look"), call(0, "{}", id="b", name="look")],
        [call(None, "{}", id="a", name="look"), call(None, "{}", id="b", name="look")],
        [call(None, "{", id="a", name="look"), call(None, "}"), call(None, "{}", id="b", name="look")],
        [call(0, "{", id="a"), call(0, "}", name="look"), call(1, "{}", id="b", name="look")],
        [call(0, "{", id="a", name="look"), call(0, "}", id="a", name="look"), call(1, "{}", id="b", name="look")],
    ],
    ids=["alternating", "same number", "no numbers", "no numbers, in pieces", "name later", "name repeated"],
)
def test_calls_as_engines_number_them(pieces: list[dict[str, Any]]) -> None:
    """Two calls, each with its own arguments."""
    events = streamed([*(chunk(tool_calls=[piece]) for piece in pieces), chunk("tool_calls"), END])
    output = events[-1]["response"]["output"]
    assert [(i["call_id"], i["name"], i["arguments"]) for i in output] == [("a", "look", "{}"), ("b", "look", "{}")]


def test_calls_without_ids_get_some() -> None:
    """The client answers by id. The function may not exist, and the arguments may be an object instead of its JSON."""
    calls = [{"function": {"name": "look", "arguments": "{}"}}, {"function": {"name": "nosuch", "arguments": {"a": 1}}}]
    output = whole({"content": None, "tool_calls": calls}, "tool_calls")["output"]
    assert [(item["name"], item["arguments"]) for item in output] == [("look", "{}"), ("nosuch", '{"a":1}')]
    assert len({item["call_id"] for item in output}) == 2


def test_a_refusal_is_a_part_of_its_own() -> None:
    """As the API has it."""
    events = streamed([chunk(content="Well. "), chunk(refusal="No."), chunk("stop"), END])
    assert deltas(events, "refusal") == "No."
    [item] = events[-1]["response"]["output"]
    assert [part["type"] for part in item["content"]] == ["output_text", "refusal"]


def test_logprobs_are_passed_on() -> None:
    """Both APIs have them in one shape."""
    entry = {"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": []}
    choice = {"index": 0, "delta": {"content": "Hi"}, "logprobs": {"content": [entry]}, "finish_reason": "stop"}
    events = streamed([data({"choices": [choice]}), END], top_logprobs=1)
    assert events[4]["logprobs"][0]["token"] == "Hi"
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [entry]


def test_a_stream_begins_before_its_first_chunk() -> None:
    """The client learns the response's id while the engine reads the prompt."""
    stream = stream_of(translation(stream=True))
    assert kinds(events_of(stream.feed(b""))) == ["created", "in_progress"]
    assert stream.feed(b": waiting\n") == b""


def test_the_end_of_an_answer_tells_usage_and_number() -> None:
    """cortex keeps only the last 2 KiB for its own counts and for the error event of a lost engine."""
    long = {**FUNCTION, "description": "x" * 5000}
    stream = stream_of(translation(stream=True, tools=[long], instructions="y" * 5000))
    start = stream.feed(b"")
    lost = error_event(b"/v1/responses", UpstreamError("gone"), start=start[:HEAD_BYTES], end=start[-KEPT_BYTES:])
    assert [event["type"] for event in events_of(start + lost)][-1] == "response.failed"
    end = stream.feed(chunk(content="z" * 5000) + chunk("stop") + END)
    assert find_usage(end[-KEPT_BYTES:]) == Usage(prompt=7, completion=5, cached=3, reasoning=2)


def test_without_usage_there_are_no_counts() -> None:
    """A guess would be taken for the truth. The last chunk may lack its empty line."""
    events = streamed([chunk(content="Hi"), chunk("stop")[:-1]])
    assert events[-1]["response"]["status"] == "completed"
    assert events[-1]["response"]["usage"] is None


@pytest.mark.parametrize(
    ("pieces", "message", "code"),
    [
        ([data({"error": {"message": "no memory", "code": 500}})], "no memory", "server_error"),
        ([data({"error": {"message": "bad", "code": 400}})], "bad", "invalid_prompt"),
        ([data({"error": "no memory"})], "no memory", "upstream_error"),
        ([b"data: {broken\n\n"], "not a JSON object", "upstream_error"),
        ([b"data: [1]\n\n"], "not a JSON object", "upstream_error"),
        ([], "without a finish_reason", "upstream_error"),
        ([b"data: [DONE]\n\n"], "without a finish_reason", "upstream_error"),
        ([chunk("abort"), END], "finish_reason 'abort'", "upstream_error"),
    ],
)
def test_a_stream_that_fails_says_why(pieces: list[bytes], message: str, code: str) -> None:
    """In the response, where Codex reads it, and beside it, where the openai packages do; then nothing more."""
    unfinished = chunk(tool_calls=[call(0, '{"a', id="c", name="look")])
    events = streamed([unfinished, *pieces, chunk(content="late"), END])[:]
    last = events[-1]
    assert last["type"] == "response.failed"
    assert message in last["response"]["error"]["message"]
    assert message in last["error"]["message"]
    assert last["response"]["error"]["code"] == code
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert "output_item.done" not in kinds(events)  # Codex would run the call


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": "x"},
        {"choices": [{}]},
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": {"content": 5, "tool_calls": "x"}}]},
        {"choices": [{"delta": {"tool_calls": [None, {"function": None, "index": None}]}}]},
        {"choices": [{"delta": {"content": "", "reasoning": None}, "logprobs": {"content": [1]}}], "usage": 5},
        {"usage": {"prompt_tokens": None, "prompt_tokens_details": 5}},
    ],
)
def test_odd_chunks_do_no_harm(odd: dict[str, Any]) -> None:
    """Engines send more than the API says."""
    events = streamed([chunk(content="a"), data(odd), chunk(content="b"), chunk("stop")])
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "ab"


def test_errors_keep_their_status() -> None:
    """An error in OpenAI's shape is passed on; any other is quoted in it."""
    given = b'{"error": {"message": "too long", "type": "BadRequestError", "param": "input_tokens", "code": 400}}'
    assert translation().answer(400, given) == (400, given)
    status, body = translation().answer(422, b'{"detail": "bad field"}')
    assert (status, json.loads(body)["error"]["message"]) == (422, "m on host answered 422: bad field")
    status, body = translation().answer(500, b"<html>oops")
    assert (status, json.loads(body)["error"]["message"]) == (500, "m on host answered 500: <html>oops")


@pytest.mark.parametrize(
    ("status", "body"), [(404, b'{"detail": "Not Found"}'), (404, b""), (405, b"Method Not Allowed")]
)
def test_an_engine_without_chats_either_is_named(status: int, body: bytes) -> None:
    """It serves embeddings, for example."""
    found, answer = translation().answer(status, body)
    assert (found, json.loads(answer)["error"]["type"]) == (status, "invalid_request_error")
    assert "m on host has neither /v1/responses nor /v1/chat/completions" in json.loads(answer)["error"]["message"]


def test_an_unknown_model_is_passed_on() -> None:
    """The engine's own words say more."""
    given = b'{"error": {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model"}}'
    assert translation().answer(404, given) == (404, given)


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}'])
def test_a_success_without_a_completion_is_an_error(body: bytes) -> None:
    """Never an empty answer that looks complete."""
    status, found = translation().answer(200, body)
    assert (status, json.loads(found)["error"]["code"]) == (502, "upstream_error")
