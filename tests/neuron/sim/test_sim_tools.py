"""Tool calls and structured output of the simulated engine, in each dialect, through the real client packages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import date
from enum import Enum
from typing import Any, Literal

import aiohttp
import openai
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from neuron.sim.engine.schema import instance
from tests.neuron.sim_process import FAST, MODEL, SimProcess, ready_engine

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 3},
    },
    "required": ["city", "days"],
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
ARGUMENTS = {"city": "Paris", "days": 3}


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[SimProcess]:
    async with ready_engine(*FAST) as started:
        yield started


@pytest_asyncio.fixture
async def client(engine: SimProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest_asyncio.fixture
async def claude(engine: SimProcess) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=engine.url, auth_token="any", max_retries=0) as made:
        yield made


async def test_chat_calls_the_tool_that_the_question_is_about_and_then_answers(client: AsyncOpenAI) -> None:
    asked = await client.chat.completions.create(
        model=MODEL, messages=[QUESTION], tools=[CLOCK, WEATHER], max_tokens=500
    )
    [choice] = asked.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", ARGUMENTS)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
    history: Any = [QUESTION, choice.message.model_dump(exclude_none=True), result]
    answered = await client.chat.completions.create(model=MODEL, messages=history, tools=[CLOCK, WEATHER])
    assert answered.choices[0].finish_reason == "stop"
    assert "18 degrees, sunny" in (answered.choices[0].message.content or "")


async def test_chat_streams_a_call_in_pieces(client: AsyncOpenAI) -> None:
    events = []
    async with client.chat.completions.stream(model=MODEL, messages=[QUESTION], tools=[WEATHER]) as stream:
        events = [event async for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = await stream.get_final_completion()
    assert len(events) > 3
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", ARGUMENTS)


async def test_tool_choice_decides(client: AsyncOpenAI) -> None:
    """none: words; required: a call even where nothing suggests one; a name: that tool, with finish_reason stop as in
    OpenAI's API."""

    async def ask(choice: Any, content: str = "Hello") -> tuple[str, list[str]]:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], tools=[WEATHER, CLOCK], tool_choice=choice
        )
        calls = answer.choices[0].message.tool_calls or []
        return answer.choices[0].finish_reason, [call.function.name for call in calls if call.type == "function"]

    assert await ask("none", "What is the weather?") == ("stop", [])
    assert await ask("required") == ("tool_calls", ["get_weather"])
    assert await ask({"type": "function", "function": {"name": "get_time"}}) == ("stop", ["get_time"])
    with pytest.raises(openai.BadRequestError, match="does not match any of the specified `tools`"):
        await ask({"type": "function", "function": {"name": "nope"}})
    with pytest.raises(openai.BadRequestError, match="`tools` must be set"):
        await client.chat.completions.create(model=MODEL, messages=[QUESTION], tool_choice="required")


async def test_an_agent_with_many_tools_gets_words_unless_it_asks_for_one(client: AsyncOpenAI) -> None:
    names = ["Bash", "Edit", "Glob", "Grep", "Read", "WebFetch", "Write"]
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in names]
    calls = []
    for content in ("Say hello", "Please read notes/plan.md"):
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], tools=tools
        )
        calls.append([call.function for call in answer.choices[0].message.tool_calls or [] if call.type == "function"])
    assert calls[0] == []
    assert [(call.name, json.loads(call.arguments)["city"]) for call in calls[1]] == [("Read", "notes/plan.md")]


async def test_a_call_cut_by_max_tokens_ends_with_length(client: AsyncOpenAI) -> None:
    cut = await client.chat.completions.create(model=MODEL, messages=[QUESTION], tools=[WEATHER], max_tokens=3)
    assert cut.choices[0].finish_reason == "length"


async def test_without_a_parser_auto_is_refused_as_by_vllm(engine: SimProcess) -> None:
    body = {"messages": [QUESTION], "tools": [WEATHER]}
    async with ready_engine(*FAST, "--no-enable-auto-tool-choice") as bare, aiohttp.ClientSession() as session:
        async with session.post(bare.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 400
            message = (await response.json())["error"]["message"]
        async with session.post(bare.url + "/v1/chat/completions", json={**body, "tool_choice": "none"}) as response:
            assert response.status == 200
    assert message == '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'


async def test_messages_have_tool_use_blocks(claude: AsyncAnthropic) -> None:
    tools: Any = [{"name": "get_time", "input_schema": {"type": "object"}},
                  {"name": "get_weather", "input_schema": PARAMETERS}]  # fmt: skip
    plain = await claude.messages.create(model=MODEL, max_tokens=500, messages=[QUESTION], tools=tools)
    assert plain.stop_reason == "tool_use"
    [block] = plain.content
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("get_weather", ARGUMENTS)
    kinds: list[str] = []
    async with claude.messages.stream(model=MODEL, max_tokens=500, messages=[QUESTION], tools=tools) as stream:
        async for event in stream:
            kinds += [event.delta.type] if event.type == "content_block_delta" else [event.type]
        final = await stream.get_final_message()
    assert kinds.count("input_json_delta") > 3
    assert kinds[-1] == "message_stop"
    assert final.stop_reason == "tool_use"
    assert final.content[0].type == "tool_use"
    assert final.content[0].input == ARGUMENTS
    result: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "18 degrees"}]},
        {"type": "text", "text": "<system-reminder>be kind</system-reminder>"},
    ]
    history: Any = [
        QUESTION,
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": result},
    ]
    answered = await claude.messages.create(model=MODEL, max_tokens=500, messages=history, tools=tools)
    assert answered.stop_reason == "end_turn"
    assert answered.content[0].type == "text"
    assert '"18 degrees"' in answered.content[0].text
    counted = await claude.messages.count_tokens(model=MODEL, messages=history, tools=tools)
    assert counted.input_tokens == answered.usage.input_tokens
    chosen = await claude.messages.create(
        model=MODEL, max_tokens=500, messages=history, tools=tools, tool_choice={"type": "tool", "name": "get_time"}
    )
    assert [block.name for block in chosen.content if block.type == "tool_use"] == ["get_time"]


async def test_responses_have_function_calls(client: AsyncOpenAI) -> None:
    tools: Any = [{"type": "web_search"}, {"type": "function", "name": "get_weather", "parameters": PARAMETERS}]
    plain = await client.responses.create(model=MODEL, input=[QUESTION], tools=tools)
    [call] = plain.output
    assert call.type == "function_call"
    assert (plain.status, call.status) == ("completed", "completed")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", ARGUMENTS)
    kinds: list[str] = []
    async with client.responses.stream(model=MODEL, input=[QUESTION], tools=tools) as stream:
        async for event in stream:
            kinds += [] if kinds[-1:] == [event.type] else [event.type]
        final = await stream.get_final_response()
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output[0].type == "function_call"
    assert json.loads(final.output[0].arguments) == ARGUMENTS
    assert final.usage == plain.usage
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    history: Any = [QUESTION, call.model_dump(), result]
    answered = await client.responses.create(model=MODEL, input=history, tools=tools)
    assert '"18 degrees"' in answered.output_text


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Wheel(BaseModel):
    inches: float = Field(gt=10, le=30)
    spokes: int = Field(ge=20, multiple_of=4)
    kind: Literal["road", "gravel"]


class Bicycle(BaseModel):
    name: str = Field(min_length=12, max_length=20)
    colour: Colour
    wheels: list[Wheel] = Field(min_length=2, max_length=2)
    owner: str | None
    sold: date | None
    tags: set[str] = Field(min_length=2)
    spare: dict[str, int]
    parts: list[Bicycle] = Field(max_length=3)
    electric: bool


async def test_structured_output_satisfies_its_schema_in_each_dialect(
    client: AsyncOpenAI, claude: AsyncAnthropic
) -> None:
    question: Any = [{"role": "user", "content": "A bicycle, please"}]
    schema: Any = {"name": "bicycle", "schema": Bicycle.model_json_schema()}
    chat = await client.chat.completions.create(
        model=MODEL, messages=question, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert chat.choices[0].finish_reason == "stop"
    Bicycle.model_validate_json(chat.choices[0].message.content or "")
    text: Any = {"format": {"type": "json_schema", **schema}}
    responses = await client.responses.create(model=MODEL, input=question, text=text)
    Bicycle.model_validate_json(responses.output_text)
    message = await claude.messages.create(
        model=MODEL, messages=question, max_tokens=2000,
        extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema["schema"]}}},
    )  # fmt: skip
    assert message.content[0].type == "text"
    Bicycle.model_validate_json(message.content[0].text)
    free = await client.chat.completions.create(model=MODEL, messages=question, response_format={"type": "json_object"})
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, "Paris"),
        (True, "Paris"),
        ({"type": ["null", "integer"], "exclusiveMinimum": 4}, 5),
        ({"type": "number", "minimum": 0.25, "maximum": 0.75}, 0.5),
        ({"type": "integer", "maximum": -3}, -3),
        ({"oneOf": [{"type": "null"}, {"const": 7}]}, 7),
        ({"allOf": [{"required": ["a"]}, {"properties": {"a": {"type": "boolean"}}}]}, {"a": True}),
        ({"type": "array", "minItems": 2, "items": {"type": "integer"}, "uniqueItems": True}, [1, 2]),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, [1, "Paris"]),
        ({"type": "string", "format": "email"}, "ada@example.com"),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"enum": ["x", "y"]}}}, "x"),
        ({"$ref": "#/nowhere"}, "Paris"),
        ({"$ref": "#"}, "Paris"),
    ],
)
def test_instances_of_schemas(schema: object, expected: object) -> None:
    """Each JSON schema keyword that agents use yields a valid instance."""
    assert instance(schema, "Paris") == expected


async def test_a_prompt_that_fills_the_context_is_refused_and_a_limit_beyond_it_is_not() -> None:
    async with ready_engine(*FAST, "--max-model-len", "100") as engine, aiohttp.ClientSession() as session:

        async def ask(prompt: str, limit: int) -> tuple[int, Any]:
            body = {"prompt": prompt, "max_tokens": limit}
            async with session.post(engine.url + "/v1/completions", json=body) as response:
                return response.status, await response.json()

        status, refused = await ask("word " * 200, 5)
        assert status == 400
        assert refused["error"]["param"] == "input_tokens"
        assert refused["error"]["message"].startswith(
            "This model's maximum context length is 100 tokens. However, your prompt contains at least 101 input "
            "tokens, which exceeds this limit even without any output tokens."
        )
        status, cut = await ask("word " * 80, 50)
        assert (status, cut["choices"][0]["finish_reason"], cut["usage"]["total_tokens"]) == (200, "length", 100)


async def test_transcriptions_stream_vllms_chunks(engine: SimProcess) -> None:
    form = aiohttp.FormData({"model": MODEL, "stream": "true", "stream_include_usage": "true"})
    form.add_field("file", b"RIFF" * 9000, filename="b.wav")
    async with (
        aiohttp.ClientSession() as session,
        session.post(engine.url + "/v1/audio/transcriptions", data=form) as response,
    ):
        assert response.content_type == "text/event-stream"
        events = [line.removeprefix(b"data: ").strip() async for line in response.content if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"transcription.chunk"}
    *deltas, usage = chunks
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
    assert text.startswith(f"{MODEL} (simulated) heard b.wav: 36000 bytes")
    assert deltas[-1]["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], len(deltas))
