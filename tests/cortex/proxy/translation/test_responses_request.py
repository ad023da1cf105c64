"""What an engine that has only chat completions gets for a request of the Responses API."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from cortex.proxy.translation.responses.request import chat_request
from cortex.proxy.translation.responses.translation import ResponsesTranslation
from shared.errors import InvalidRequest

FUNCTION = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object"},
    "strict": True,
}
PICTURE = "data:image/png;base64,AAAA"


def chat(**fields: Any) -> dict[str, Any]:
    """The body for the engine."""
    return chat_request(json.dumps({"model": "m", "input": "hello", **fields}).encode()).body


def messages(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chat(input=list(items), **fields)["messages"]
    return found


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_a_text_is_a_message_of_the_user() -> None:
    """The simplest request; instructions come first."""
    assert chat() == {"model": "m", "messages": [said("user", "hello")]}
    assert chat(instructions="Be brief.")["messages"] == [said("system", "Be brief."), said("user", "hello")]


def test_leading_system_and_developer_messages_become_one() -> None:
    """Many chat templates allow one system message, at the start."""
    found = messages(
        said("developer", "Work."),
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Well."}]},
        said("user", "hi"),
        instructions="Be brief.",
    )
    assert found == [said("system", "Be brief.\n\nWork.\n\nWell."), said("user", "hi")]


def test_later_developer_messages_are_part_of_the_users() -> None:
    """In a tag, because many chat templates refuse a system message in the middle."""
    found = messages(said("user", "a"), said("developer", "Be brief."), said("assistant", "b"), said("system", "Stop."))
    assert found == [
        {"role": "user", "content": [text("a"), text("<system>\nBe brief.\n</system>")]},
        said("assistant", "b"),
        said("user", "<system>\nStop.\n</system>"),
    ]


@pytest.mark.parametrize("arguments", ["{broken", "[1]", "5"])
def test_a_call_with_broken_arguments_does_not_end_the_conversation(arguments: str) -> None:
    """Chat templates fail at arguments that are not an object."""
    found = messages({"type": "function_call", "call_id": "c", "name": "look", "arguments": arguments})
    assert json.loads(found[0]["tool_calls"][0]["function"]["arguments"]) == {"input": arguments}


@pytest.mark.parametrize(
    ("effort", "sent"), [("none", "none"), ("minimal", "low"), ("medium", "medium"), ("xhigh", "high")]
)
def test_effort_is_one_that_engines_know(effort: str, sent: str) -> None:
    """The answer repeats what the client asked for."""
    found = chat_request(json.dumps({"model": "m", "input": "a", "reasoning": {"effort": effort}}).encode())
    assert found.body["reasoning_effort"] == sent
    assert found.settings["reasoning"]["effort"] == effort


def test_many_tools_and_thoughts_are_read_quickly() -> None:
    """The cost grows with the body, not with its square."""
    names = [f"f{number}" for number in range(20_000)]
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x" * 20}]}
    began = time.process_time()
    chat(
        input=[*[thought] * 50_000, said("assistant", "x")],
        tools=[{"type": "namespace", "name": "n", "tools": [{**FUNCTION, "name": name} for name in names]}],
        tool_choice={"type": "allowed_tools", "tools": [{"type": "function", "name": name} for name in names]},
    )
    assert time.process_time() - began < 3


def test_consecutive_messages_of_the_user_become_one() -> None:
    """Many chat templates demand that user and assistant alternate."""
    found = messages(said("user", "a"), {"role": "user", "content": [{"type": "input_text", "text": "b"}]})
    assert found == [said("user", [text("a"), text("b")])]


def test_images_audio_and_files() -> None:
    """Parts have other names in a chat."""
    parts = [
        {"type": "input_text", "text": "see"},
        {"type": "input_image", "image_url": PICTURE, "detail": "low"},
        {"type": "input_image", "image_url": PICTURE, "detail": "original"},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"},
    ]
    [message] = messages(said("user", parts))
    assert message["content"] == [
        text("see"),
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": PICTURE}},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"}},
    ]


def test_a_round_with_tools() -> None:
    """Reasoning, words and calls of one turn are one message of the assistant; the results follow."""
    found = messages(
        said("user", "weather?"),
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
    )
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
    ]
    assert found == [
        said("user", "weather?"),
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
    ]


def test_encrypted_reasoning_and_searches_are_dropped() -> None:
    """No engine can read them; nothing else of the conversation is lost."""
    found = messages(
        said("user", "a"),
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "s"}],
            "encrypted_content": "x",
        },
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        said("assistant", "b"),
        said("user", "c"),
    )
    assert found == [said("user", "a"), said("assistant", "b"), said("user", "c")]


def test_an_image_that_a_tool_returns_follows_the_results() -> None:
    """Few engines accept an image in a tool's message, and results must not be separated."""
    image = {"type": "input_image", "image_url": PICTURE}
    found = messages(
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [image]},
        {"type": "function_call_output", "call_id": "c2", "output": "done"},
        said("user", "and?"),
    )
    assert [message["role"] for message in found] == ["assistant", "tool", "tool", "user"]
    assert found[-1]["content"] == [
        text("Returned by the tool call c1:"),
        {"type": "image_url", "image_url": {"url": PICTURE}},
        text("and?"),
    ]


def test_settings() -> None:
    """Settings get the names of a chat; what only OpenAI's servers read is not sent."""
    found = chat(
        max_output_tokens=5,
        temperature=0.5,
        top_p=0.9,
        user="u",
        seed=1,
        reasoning={"effort": "low", "summary": "auto"},
        metadata={"a": "b"},
        store=True,
        truncation="auto",
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        client_metadata={"x": "y"},
        service_tier="auto",
        background=False,
        previous_response_id=None,
        text={"verbosity": "low"},
    )
    assert found == {
        "model": "m",
        "messages": [said("user", "hello")],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "u",
        "seed": 1,
        "reasoning_effort": "low",
    }


def test_a_stream_asks_for_usage() -> None:
    """The response needs the counts."""
    assert chat(stream=True)["stream_options"] == {"include_usage": True}


def test_structured_output_and_logprobs() -> None:
    """`text.format` is `response_format` in a chat."""
    schema = {"type": "object", "properties": {}}
    given = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert chat(text={"format": given})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert chat(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert "response_format" not in chat(text={"format": {"type": "text"}})
    found = chat(include=["message.output_text.logprobs"], top_logprobs=2)
    assert (found["logprobs"], found["top_logprobs"]) == (True, 2)


def test_functions() -> None:
    """A function keeps its fields, one level deeper."""
    found = chat(tools=[FUNCTION], tool_choice="required", parallel_tool_calls=False)
    expected = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}, "strict": True}
    assert found["tools"] == [{"type": "function", "function": expected}]
    assert (found["tool_choice"], found["parallel_tool_calls"]) == ("required", False)
    assert chat(tools=[FUNCTION], tool_choice={"type": "function", "name": "look"})["tool_choice"] == {
        "type": "function",
        "function": {"name": "look"},
    }


def test_without_tools_there_is_no_choice() -> None:
    """Engines refuse a `tool_choice` without tools."""
    assert chat(tools=[], tool_choice="auto", parallel_tool_calls=True).keys() == {"model", "messages"}


def test_a_custom_tool_is_a_function_with_one_text() -> None:
    """The grammar is told to the model."""
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tool = {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": grammar}
    found = chat(tools=[tool], tool_choice={"type": "custom", "name": "apply_patch"})
    function = found["tools"][0]["function"]
    assert function["parameters"]["required"] == ["input"]
    assert "Patches." in function["description"]
    assert "lark grammar:\nstart: /.+/" in function["description"]
    assert found["tool_choice"]["function"]["name"] == "apply_patch"


def test_a_custom_call_is_sent_back_as_the_function() -> None:
    """The model sees the call as it made it."""
    found = messages(
        {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": 'a "b"\n'},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "ok"},
    )
    [call] = found[0]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"input": 'a "b"\n'}
    assert found[1] == {"role": "tool", "tool_call_id": "c", "content": "ok"}


def test_a_namespace_is_a_prefix() -> None:
    """Codex groups its tools."""
    space = {"type": "namespace", "name": "agents", "description": "d", "tools": [FUNCTION]}
    found = chat(
        tools=[space],
        tool_choice={"type": "function", "name": "look"},
        input=[{"type": "function_call", "call_id": "c", "name": "look", "namespace": "agents", "arguments": "{}"}],
    )
    assert [tool["function"]["name"] for tool in found["tools"]] == ["agents__look"]
    assert found["tool_choice"]["function"]["name"] == "agents__look"
    assert found["messages"][0]["tool_calls"][0]["function"]["name"] == "agents__look"


def test_only_allowed_tools_are_offered() -> None:
    """A chat has no list of allowed tools."""
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "see"}]}
    found = chat(tools=[FUNCTION, {**FUNCTION, "name": "see"}], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in found["tools"]] == ["see"]
    assert found["tool_choice"] == "required"


def test_web_search_beside_other_tools_is_left_out() -> None:
    """Codex always offers it; the model need not use it."""
    found = chat_request(json.dumps({"input": "a", "tools": [FUNCTION, {"type": "web_search"}]}).encode())
    assert len(found.body["tools"]) == 1
    assert found.settings["tools"] == [FUNCTION]


def test_tools_declared_in_the_input() -> None:
    """They are added to the request's own."""
    item = {"type": "additional_tools", "role": "developer", "tools": [FUNCTION]}
    assert len(chat(input=[item, said("user", "a")])["tools"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [FUNCTION, {"type": "file_search", "vector_store_ids": ["v"]}]}, "tools[1].type"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "s"}]}, "tools[0].type"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": [{"type": "local_shell"}]}, "tools[0].type"),
        ({"tools": [FUNCTION, {"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [FUNCTION], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": "x"}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "u"}]}]},
            "input[0].content[0].file_url",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_video"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"instructions": 5}, "instructions"),
        ({"text": "x"}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": "low"}, "reasoning"),
        ({"metadata": "x"}, "metadata"),
        ({"stream": "yes"}, "stream"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"input": [{"role": "user", "content": []}]}, "input"),
    ],
)
def test_what_a_chat_cannot_do_is_refused(fields: dict[str, Any], param: str) -> None:
    """The error names the field."""
    error = refusal(**fields)
    assert error.status == 400
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


def test_an_error_names_the_engine() -> None:
    """The same request may work on another engine."""
    body = json.dumps({"model": "m", "input": "a", "previous_response_id": "resp_1"}).encode()
    with pytest.raises(InvalidRequest, match=r"send the whole conversation.* \(m on host has no /v1/responses"):
        ResponsesTranslation(body, "m on host")
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        ResponsesTranslation(b"{", "m on host")
