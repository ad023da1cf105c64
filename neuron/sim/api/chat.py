"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing

from aiohttp import web

from neuron.sim.api.bodies import (
    Body,
    answers_wanted,
    check_length,
    conversation,
    integer,
    read_json,
    required,
    served_model,
    wants_stream,
    wants_usage,
)
from neuron.sim.api.sse import EventStream
from neuron.sim.api.tools import call_id, reply_to, with_tools
from neuron.sim.engine.engine import ENGINE, Generation, SequenceAnswer, SimEngine, TokenUsage
from neuron.sim.engine.metrics import FinishReason


async def chat_completions(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    generation = generation_of(body, engine)
    identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": generation.model}
    usage = TokenUsage(generation.prompts[0].token_count)
    if generation.streamed:
        return await _stream(request, generation, identity, usage if wants_usage(body) else None)
    answers = await engine.answers(generation)
    usage.completion_tokens = sum(answer.token_count for answer in answers)
    choices: list[dict[str, object]] = [
        {
            "index": index,
            "message": _message(generation, answer),
            "logprobs": None,
            "finish_reason": _finish_reason(generation, answer.finish),
            "stop_reason": None,
        }
        for index, answer in enumerate(answers)
    ]
    return web.json_response({**identity, "object": "chat.completion", "choices": choices, "usage": usage.openai()})


def generation_of(body: Body, engine: SimEngine) -> Generation:
    """What a chat request asks for. Raises ApiError when it cannot be served."""
    model = served_model(body.get("model"), engine)
    prompt = with_tools(conversation(required(body, "messages")), body)
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    limit = integer(body, key, least=1)
    check_length(limit, [prompt], engine.settings, key)
    return Generation(
        model,
        (prompt,),
        limit,
        answers_wanted(body),
        wants_stream(body),
        ignore_eos=body.get("ignore_eos") is True,
        min_tokens=integer(body, "min_tokens") or 0,
        reply=reply_to(body, prompt, engine.settings),
    )


def _message(generation: Generation, answer: SequenceAnswer) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": answer.text, "refusal": None, "tool_calls": []}
    if generation.tool is not None:
        function = {"name": generation.tool, "arguments": answer.text}
        message |= {"content": None, "tool_calls": [{"id": call_id(), "type": "function", "function": function}]}
    return message


def _finish_reason(generation: Generation, finish: FinishReason | None) -> str | None:
    """`tool_calls` for a complete call, but `stop`, as in OpenAI's API, when the client named the tool."""
    reply = generation.reply
    called = reply is not None and reply.tool is not None and not reply.named
    return "tool_calls" if finish == "stop" and called else finish


async def _stream(
    request: web.Request, generation: Generation, identity: dict[str, object], usage: TokenUsage | None
) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()

    def chunk(choices: list[dict[str, object]], **more: object) -> dict[str, object]:
        return {**identity, "object": "chat.completion.chunk", "choices": choices, **more}

    def opening(index: int, delta: dict[str, object]) -> dict[str, object]:
        return chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    opened = False
    async with aclosing(request.app[ENGINE].generate(generation)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await stream.send_aborted()
                break
            if not opened:
                opened = True
                for index in range(generation.choices):
                    await stream.send(opening(index, {"role": "assistant", "content": ""}))
                    if generation.tool is not None:
                        await stream.send(opening(index, _call_delta(generation.tool)))
            if usage is not None:
                usage.completion_tokens += 1
            choice: dict[str, object] = {
                "index": step.index,
                "delta": {"content": step.text} if generation.tool is None else _arguments_delta(step.text),
                "logprobs": None,
                "finish_reason": _finish_reason(generation, step.finish),
            }
            await stream.send(chunk([choice]))
        else:
            if usage is not None:
                await stream.send(chunk([], usage=usage.openai()))
    await stream.send("[DONE]")
    return await stream.close()


def _call_delta(tool: str) -> dict[str, object]:
    """The first event of a call: its id and name. The arguments follow in pieces."""
    call = {"id": call_id(), "type": "function", "index": 0, "function": {"name": tool, "arguments": ""}}
    return {"tool_calls": [call]}


def _arguments_delta(piece: str) -> dict[str, object]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
