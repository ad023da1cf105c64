"""Anthropic's dialect: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from contextlib import aclosing
from dataclasses import replace

from aiohttp import web

from neuron.sim.api.bodies import (
    Body,
    check_length,
    content_text,
    conversation,
    integer,
    read_json,
    required,
    served_model,
    wants_stream,
)
from neuron.sim.api.sse import EventStream
from neuron.sim.api.tools import call_id, reply_to, with_tools
from neuron.sim.engine.engine import ENGINE, Generation, SequenceAnswer
from neuron.sim.engine.metrics import FinishReason
from neuron.sim.engine.replies import Prompt


def _prompt_of(body: Body) -> Prompt:
    prompt = with_tools(conversation(required(body, "messages")), body)
    system = content_text(body.get("system"))
    return replace(prompt, text=f"system: {system}\n{prompt.text}") if system else prompt


async def count_tokens(request: web.Request) -> web.Response:
    body = await read_json(request)
    served_model(body.get("model"), request.app[ENGINE])
    count = _prompt_of(body).token_count
    return web.json_response({"input_tokens": count, "context_management": {"original_input_tokens": count}})


async def messages(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    prompt = _prompt_of(body)
    required(body, "max_tokens")
    limit = integer(body, "max_tokens", least=1)
    check_length(limit, [prompt], engine.settings, "max_tokens")
    reply = reply_to(body, prompt, engine.settings)
    generation = Generation(model, (prompt,), limit, streamed=wants_stream(body), reply=reply)
    message: dict[str, object] = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": prompt.token_count, "output_tokens": 0},
    }
    if generation.streamed:
        return await _stream(request, generation, message)
    [answer] = await engine.answers(generation)
    message["content"] = [_block(generation, answer)]
    message["stop_reason"] = _stop_reason(generation, answer.finish)
    message["usage"] = {"input_tokens": prompt.token_count, "output_tokens": answer.token_count}
    return web.json_response(message)


def _block(generation: Generation, answer: SequenceAnswer) -> dict[str, object]:
    """The whole answer. A call that was cut off is text: its arguments are not JSON."""
    if generation.tool is None or answer.finish != "stop":
        return {"type": "text", "text": answer.text}
    return {"type": "tool_use", "id": call_id(), "name": generation.tool, "input": json.loads(answer.text)}


def _stop_reason(generation: Generation, finish: FinishReason) -> str | None:
    if finish == "stop":
        return "end_turn" if generation.tool is None else "tool_use"
    return "max_tokens" if finish == "length" else None


async def _stream(request: web.Request, generation: Generation, message: dict[str, object]) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()
    tool = generation.tool
    block: dict[str, object] = {"type": "text", "text": ""}
    if tool is not None:
        block = {"type": "tool_use", "id": call_id(), "name": tool, "input": {}}

    async def send(kind: str, **fields: object) -> None:
        await stream.send({"type": kind, **fields}, event=kind)

    produced = 0
    async with aclosing(request.app[ENGINE].generate(generation)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await send("error", error={"type": "api_error", "message": "the engine is shutting down"})
                break
            if not produced:
                await send("message_start", message=message)
                await send("content_block_start", index=0, content_block=block)
            produced += 1
            delta = {"type": "text_delta", "text": step.text}
            if tool is not None:
                delta = {"type": "input_json_delta", "partial_json": step.text}
            await send("content_block_delta", index=0, delta=delta)
            if step.finish is not None:
                usage = {"input_tokens": generation.prompts[0].token_count, "output_tokens": produced}
                ending = {"stop_reason": _stop_reason(generation, step.finish), "stop_sequence": None}
                await send("content_block_stop", index=0)
                await send("message_delta", delta=ending, usage=usage)
                await send("message_stop")
    return await stream.close()
