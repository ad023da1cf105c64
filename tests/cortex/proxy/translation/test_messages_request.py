"""Requests of Anthropic's Messages API as chat completions."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.proxy.translation.interface import to_json
from cortex.proxy.translation.messages.translation import MessagesTranslation, MessageTokenCount
from cortex.proxy.translation.token_count import TOKENS_PER_IMAGE
from shared.errors import InvalidRequest

ENGINE = "org/small on benjy"
USER = {"role": "user", "content": "hi"}
WEATHER = {"name": "weather", "description": "Weather in a city", "input_schema": {"properties": {"city": {}}}}
FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {}}},
    },
}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def chat(**fields: Any) -> dict[str, Any]:
    body = {"model": "org/small", "max_tokens": 64, "messages": [USER], **fields}
    found: dict[str, Any] = json.loads(MessagesTranslation(json.dumps(body).encode(), ENGINE).body)
    return found


def messages(*given: Any, **fields: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chat(messages=list(given), **fields)["messages"]
    return found


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def test_smallest_request() -> None:
    assert chat() == {"model": "org/small", "messages": [USER], "max_tokens": 64}


def test_sampling() -> None:
    """Fields with a counterpart keep their meaning, the engine's own options pass, and Anthropic's others are left
    out."""
    found = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        stop_sequences=["END"],
        metadata={"user_id": "u1"},
        seed=7,
        service_tier="auto",
        context_management={"edits": []},
    )
    del found["messages"], found["model"], found["max_tokens"]
    assert found == {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "stop": ["END"], "user": "u1", "seed": 7}


def test_stream_asks_for_usage() -> None:
    found = chat(stream=True)
    assert (found["stream"], found["stream_options"]) == (True, {"include_usage": True})
    assert "stream" not in chat(stream=False)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Be brief.", "Be brief."),
        ([text("Be brief.", cache_control={"type": "ephemeral"}), text("Be kind.")], "Be brief.\nBe kind."),
        ([text("x-anthropic-billing-header: cc=1"), text("Be kind.")], "Be kind."),
    ],
)
def test_system(system: Any, expected: str) -> None:
    """Cache marks are dropped, as is the line of Claude Code that would spoil the prefix cache."""
    assert messages(USER, system=system) == [{"role": "system", "content": expected}, USER]


def test_roles_alternate() -> None:
    """Templates of several models refuse two messages of one role, and a system message that is not the first."""
    late = {"role": "system", "content": [text("Be brief.")]}
    call = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    assert messages(late, USER, late, {"role": "user", "content": [PNG]}, system="Be kind.") == [
        {"role": "system", "content": "Be kind.\nBe brief."},
        {"role": "user", "content": [text("hi"), text("<system>\nBe brief.\n</system>"), PNG_PART]},
    ]
    answers = [{"role": "assistant", "content": content} for content in ("a", [text("b"), call], [call])]
    merged = messages(USER, *answers)[1]
    assert (merged["content"], len(merged["tool_calls"])) == ("ab", 2)


def test_user_blocks() -> None:
    """One text becomes a string; several parts stay apart, in their order, without cache marks."""
    assert messages({"role": "user", "content": [text("hi", cache_control={"type": "ephemeral"})]}) == [USER]
    url = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
    [found] = messages({"role": "user", "content": [text("a"), PNG, url, text("b")]})
    expected = [
        text("a"),
        PNG_PART,
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        text("b"),
    ]
    assert found == {"role": "user", "content": expected}


def test_documents() -> None:
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "abc"}, "title": "T"}
    blocks = {"type": "document", "source": {"type": "content", "content": [text("x"), PNG]}}
    [found] = messages({"role": "user", "content": [plain, blocks]})
    assert found["content"] == [text("T"), text("abc"), text("x"), PNG_PART]
    result = {"type": "search_result", "source": "https://a", "title": "A", "content": [text("x")]}
    [found] = messages({"role": "user", "content": [result]})
    assert found["content"] == [text("A (https://a)"), text("x")]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}, "base64"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "file"),
        ({"type": "container_upload", "file_id": "f"}, "container_upload"),
        ({"type": "image"}, "None"),
        ({}, "None"),
    ],
)
def test_content_that_cannot_be_sent_is_refused(block: Any, reason: str) -> None:
    """The error says where and for which engine."""
    error = refusal(messages=[USER, {"role": "user", "content": [text("a"), block]}])
    assert error.message.startswith("messages[1].content[1]"), error.message
    assert ENGINE in error.message
    assert reason in error.message


def test_conversation_with_tools() -> None:
    """Results directly follow the calls; what the user says beside them comes after."""
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("sunny"), text("22 C")]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such city", "is_error": True}
    found = messages(
        USER,
        {"role": "assistant", "content": [thought, hidden, text("Let me see."), call, {**call, "id": "toolu_2"}]},
        {"role": "user", "content": [text("And?"), result, failed]},
    )
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
        for name in ("1", "2")
    ]
    assert found[1:] == [
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sunny\n22 C"},
        {"role": "tool", "tool_call_id": "2", "content": "Error: no such city"},
        {"role": "user", "content": "And?"},
    ]


def test_call_without_text_and_empty_result() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    found = messages(
        USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]},
    )
    assert found[1]["content"] is None
    assert found[2:] == [{"role": "tool", "tool_call_id": "1", "content": ""}]


def test_images_of_a_result_follow_in_the_users_message() -> None:
    """A chat's tool message carries text only."""
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("shot"), PNG]}
    tool, user = messages({"role": "user", "content": [result, text("Well?")]})
    assert tool["content"].startswith("shot\n")
    assert user["content"] == [text("Images of the result of 1:"), PNG_PART, text("Well?")]


def test_begun_answer_is_continued() -> None:
    found = chat(messages=[USER, {"role": "assistant", "content": "Once"}])
    assert (found["continue_final_message"], found["add_generation_prompt"]) == (True, False)
    assert "continue_final_message" not in chat()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, {}),
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            {
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
                "parallel_tool_calls": False,
            },
        ),
    ],
)
def test_tools(choice: Any, expected: dict[str, Any]) -> None:
    found = chat(tools=[WEATHER, {**WEATHER, "type": "custom", "cache_control": {}}], tool_choice=choice)
    assert found.pop("tools") == [FUNCTION, FUNCTION]
    assert {key: found[key] for key in found.keys() & {"tool_choice", "parallel_tool_calls"}} == expected


def test_choice_without_tools_is_left_out() -> None:
    """Engines refuse it."""
    assert "tool_choice" not in chat(tool_choice={"type": "auto"}, tools=[])


@pytest.mark.parametrize(
    "kind", ["web_search_20250305", "bash_20250124", "computer_20250124", "code_execution_20250522"]
)
def test_tools_of_anthropic_are_refused(kind: str) -> None:
    error = refusal(tools=[WEATHER, {"type": kind, "name": "x"}])
    assert error.param == "tools[1]"
    assert kind in error.message
    assert ENGINE in error.message


@pytest.mark.parametrize("kind", ["enabled", "adaptive", "disabled"])
def test_thinking(kind: str) -> None:
    """The switch that chat templates have."""
    found = chat(thinking={"type": kind, "budget_tokens": 1024}, chat_template_kwargs={"x": 1})
    assert found["chat_template_kwargs"] == {"enable_thinking": kind != "disabled", "x": 1}


def test_output_format_and_effort() -> None:
    schema = {"type": "object"}
    found = chat(output_config={"effort": "max", "format": {"type": "json_schema", "schema": schema}})
    assert found["reasoning_effort"] == "high"
    assert found["response_format"]["json_schema"]["schema"] == schema
    assert chat(output_format={"type": "json_schema", "schema": schema})["response_format"] == found["response_format"]


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("max_tokens", None, "max_tokens"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", True, "max_tokens"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", ["hi"], "messages[0]"),
        ("messages", [{"role": "tool", "content": ""}], "messages[0].role"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ("system", [PNG], "system[0]"),
        ("stop_sequences", "END", "stop_sequences"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", [{"role": "assistant", "content": None}], "messages[0].content"),
        (
            "messages",
            [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y", "input": "z"}]}],
            "messages[0].content[0].input",
        ),
        ("stream", "yes", "stream"),
        ("thinking", "yes", "thinking"),
        ("metadata", "x", "metadata"),
        ("output_config", "high", "output_config"),
        ("output_config", {"effort": 3}, "output_config.effort"),
        ("tool_choice", "auto", "tool_choice"),
        ("tool_choice", {"type": "any"}, "tool_choice"),
        ("tool_choice", {"type": "tool", "name": "x"}, "tool_choice.name"),
        ("tools", {}, "tools"),
        ("tools", ["x"], "tools[0]"),
        ("tools", [{"name": "x"}], "tools[0].input_schema"),
        ("tools", [{"input_schema": {}}], "tools[0].name"),
        ("mcp_servers", [{"type": "url"}], "mcp_servers"),
        ("output_format", {"type": "xml"}, "output_config.format"),
    ],
)
def test_malformed_request_is_refused(field: str, value: Any, where: str) -> None:
    """The error names the field."""
    assert refusal(**{field: value}).param == where


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_many_messages_of_one_role(role: str) -> None:
    """The event loop must not stand still for seconds: the cost grows with the body, not with its square."""
    many = [{"role": role, "content": "x"}] * 40_000

    def secs(count: int) -> float:
        body = json.dumps({"model": "org/small", "max_tokens": 1, "messages": many[:count]}).encode()
        began = time.process_time()
        MessagesTranslation(body, ENGINE)
        return time.process_time() - began

    assert secs(40_000) < 40 * secs(4000) + 0.1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["text", "image", "user", "tool_use"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "source", "name", "input", "id"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


@given(JSON, JSON, JSON, JSON)
@settings(max_examples=300, deadline=None)
def test_any_body_is_translated_or_refused(content: Any, system: Any, tools: Any, other: Any) -> None:
    """Whatever a client sends, nothing but InvalidRequest is raised."""
    bodies = [
        {
            "model": "m",
            "max_tokens": 1,
            "messages": [{"role": role, "content": content}],
            "system": system,
            "tools": tools,
        }
        for role in ("user", "assistant")
    ]
    bodies.append({"max_tokens": 1, "messages": other, "tool_choice": other, "thinking": other, "output_config": other})
    bodies.append({"max_tokens": 1, "messages": [USER], "tools": [WEATHER], "tool_choice": other, "metadata": other})
    for body in bodies:
        for translator in (MessagesTranslation, MessageTokenCount):
            with contextlib.suppress(InvalidRequest):
                json.loads(translator(json.dumps(body).encode(), ENGINE).body)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"nul", b"[" * 100_000])
def test_what_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        MessagesTranslation(body, ENGINE)


def test_lenient_json() -> None:
    """What Python's parser accepts passes: NaN, half a surrogate pair, a byte order mark, large numbers."""
    message = '{"role":"user","content":"\\ud800"}'
    body = f'\ufeff{{"model":"m","max_tokens":1,"temperature":NaN,"seed":{2**70},"messages":[{message}]}}'
    found = json.loads(MessagesTranslation(body.encode(), ENGINE).body)
    assert found["messages"] == [{"role": "user", "content": "\ud800"}]
    assert json.loads(to_json({"a": 2**70, "b": "\ud800"})) == {"a": 2**70, "b": "\ud800"}


COUNTED = {"model": "m", "messages": [{"role": "user", "content": [text("x" * 350), PNG]}], "tools": [WEATHER]}


def test_token_count_asks_as_vllm_and_as_llama_cpp() -> None:
    """vLLM counts the conversation with its tools, llama.cpp the text."""
    count = MessageTokenCount(json.dumps(COUNTED).encode(), ENGINE)
    asked = json.loads(count.body)
    assert (count.path, asked["tools"]) == (b"/tokenize", [FUNCTION])
    assert asked["messages"] == [{"role": "user", "content": [text("x" * 350), PNG_PART]}]
    assert "x" * 350 in asked["content"]
    assert "weather" in asked["content"]


@pytest.mark.parametrize(
    ("status", "body", "expected", "estimated"),
    [
        (200, {"count": 42, "max_model_len": 99, "tokens": []}, range(42, 43), False),
        (200, {"tokens": [1, 2, 3]}, range(TOKENS_PER_IMAGE, TOKENS_PER_IMAGE + 20), True),
        (200, {"tokens": []}, range(TOKENS_PER_IMAGE + 100, TOKENS_PER_IMAGE + 200), True),
        (404, {"detail": "Not Found"}, range(TOKENS_PER_IMAGE + 100, TOKENS_PER_IMAGE + 200), True),
        (422, {"detail": []}, range(TOKENS_PER_IMAGE + 100, TOKENS_PER_IMAGE + 200), True),
    ],
)
def test_token_count(status: int, body: Any, expected: range, estimated: bool) -> None:
    """Exact where the engine counts the conversation, otherwise an estimate that says so."""
    answer = MessageTokenCount(json.dumps(COUNTED).encode(), ENGINE).answer(status, json.dumps(body).encode())
    found = json.loads(answer.body)
    assert answer.status == 200
    assert found["input_tokens"] in expected
    assert found.get("estimated", False) is estimated


def test_token_count_of_a_broken_engine_is_an_error() -> None:
    answer = MessageTokenCount(json.dumps(COUNTED).encode(), ENGINE).answer(500, b'{"error": "boom"}')
    assert (answer.status, json.loads(answer.body)["error"]) == (500, {"type": "api_error", "message": "boom"})


@pytest.mark.parametrize("given", ["a1B2c3D4e", "0"])
def test_ids_of_calls_return_to_the_engine(given: str) -> None:
    """Mistral's templates fail at ids that are not nine letters and digits."""
    call = {"id": given, "function": {"name": "now", "arguments": "{}"}}
    completion = {"choices": [{"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    body = json.dumps({"model": "org/small", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}).encode()
    answer = json.loads(MessagesTranslation(body, ENGINE).answer(200, json.dumps(completion).encode()).body)
    result = {"type": "tool_result", "tool_use_id": answer["content"][0]["id"], "content": "ok"}
    found = chat(messages=[{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}])
    assert found["messages"][0]["tool_calls"][0]["id"] == found["messages"][1]["tool_call_id"] == given
