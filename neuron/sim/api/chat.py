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
from neuron.sim.engine.engine import ENGINE, Order, SimEngine, TokenUsage


async def chat_completions(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    order = order_of(body, engine)
    identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": order.model}
    usage = TokenUsage(order.prompts[0].token_count)
    if order.streamed:
        return await _stream(request, order, identity, usage if wants_usage(body) else None)
    answers = await engine.answers(order)
    usage.completion_tokens = sum(answer.token_count for answer in answers)
    choices: list[dict[str, object]] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None, "tool_calls": []},
            "logprobs": None,
            "finish_reason": answer.finish,
            "stop_reason": None,
        }
        for index, answer in enumerate(answers)
    ]
    return web.json_response({**identity, "object": "chat.completion", "choices": choices, "usage": usage.openai()})


def order_of(body: Body, engine: SimEngine) -> Order:
    """The order of a chat request. Raises ApiError when it cannot be served."""
    model = served_model(body.get("model"), engine.settings)
    prompt = conversation(required(body, "messages"))
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    limit = integer(body, key, least=1)
    check_length(limit, [prompt], engine.settings, key)
    choices = answers_wanted(body)
    return Order(model, (prompt,), limit, choices, wants_stream(body))


async def _stream(
    request: web.Request, order: Order, identity: dict[str, object], usage: TokenUsage | None
) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()

    def chunk(choices: list[dict[str, object]], **more: object) -> dict[str, object]:
        return {**identity, "object": "chat.completion.chunk", "choices": choices, **more}

    opened = False
    async with aclosing(request.app[ENGINE].generate(order)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await stream.send_aborted()
                break
            if not opened:
                opened = True
                for index in range(order.choices):
                    delta = {"role": "assistant", "content": ""}
                    await stream.send(chunk([{"index": index, "delta": delta, "finish_reason": None}]))
            if usage is not None:
                usage.completion_tokens += 1
            choice = {
                "index": step.index,
                "delta": {"content": step.text},
                "logprobs": None,
                "finish_reason": step.finish,
            }
            await stream.send(chunk([choice]))
        else:
            if usage is not None:
                await stream.send(chunk([], usage=usage.openai()))
    await stream.send("[DONE]")
    return await stream.close()
