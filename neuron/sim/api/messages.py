"""Anthropic's dialect: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from contextlib import aclosing

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
from neuron.sim.engine.engine import ENGINE, Order, Prompt

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "abort": None}


def _prompt_of(body: Body) -> Prompt:
    prompt = conversation(required(body, "messages"))
    system = content_text(body.get("system"))
    return Prompt(f"system: {system}\n{prompt.text}", prompt.quoted) if system else prompt


async def count_tokens(request: web.Request) -> web.Response:
    body = await read_json(request)
    served_model(body.get("model"), request.app[ENGINE].settings)
    return web.json_response({"input_tokens": _prompt_of(body).token_count})


async def messages(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine.settings)
    prompt = _prompt_of(body)
    required(body, "max_tokens")
    limit = integer(body, "max_tokens", least=1)
    check_length(limit, [prompt], engine.settings, "max_tokens")
    order = Order(model, (prompt,), limit, streamed=wants_stream(body))
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
    if order.streamed:
        return await _stream(request, order, message)
    [answer] = await engine.answers(order)
    message["content"] = [{"type": "text", "text": answer.text}]
    message["stop_reason"] = _STOP_REASONS[answer.finish]
    message["usage"] = {"input_tokens": prompt.token_count, "output_tokens": answer.token_count}
    return web.json_response(message)


async def _stream(request: web.Request, order: Order, message: dict[str, object]) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()

    async def send(kind: str, **fields: object) -> None:
        await stream.send({"type": kind, **fields}, event=kind)

    produced = 0
    async with aclosing(request.app[ENGINE].generate(order)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await send("error", error={"type": "api_error", "message": "the engine is shutting down"})
                break
            if not produced:
                await send("message_start", message=message)
                await send("content_block_start", index=0, content_block={"type": "text", "text": ""})
            produced += 1
            await send("content_block_delta", index=0, delta={"type": "text_delta", "text": step.text})
            if step.finish is not None:
                usage = {"input_tokens": order.prompts[0].token_count, "output_tokens": produced}
                delta = {"stop_reason": _STOP_REASONS[step.finish], "stop_sequence": None}
                await send("content_block_stop", index=0)
                await send("message_delta", delta=delta, usage=usage)
                await send("message_stop")
    return await stream.close()
