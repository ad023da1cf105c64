"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing

from aiohttp import web

from neuron.sim.api.bodies import (
    Body,
    answers_wanted,
    check_length,
    integer,
    read_json,
    required,
    served_model,
    text_list,
    wants_stream,
    wants_usage,
)
from neuron.sim.api.sse import EventStream
from neuron.sim.engine.engine import ENGINE, Order, Prompt, SimEngine, TokenUsage


async def completions(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    order = _order_of(body, engine)
    identity = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": order.model,
    }
    usage = TokenUsage(sum(prompt.token_count for prompt in order.prompts))
    if order.streamed:
        return await _stream(request, order, identity, usage if wants_usage(body) else None)
    answers = await engine.answers(order)
    usage.completion_tokens = sum(answer.token_count for answer in answers)
    choices = [_choice(index, answer.text, answer.finish) for index, answer in enumerate(answers)]
    return web.json_response({**identity, "choices": choices, "usage": usage.openai()})


def _order_of(body: Body, engine: SimEngine) -> Order:
    model = served_model(body.get("model"), engine.settings)
    prompts = tuple(Prompt(text, text) for text in text_list(required(body, "prompt"), "prompt"))
    limit = integer(body, "max_tokens", least=1)
    check_length(limit, prompts, engine.settings, "max_tokens")
    return Order(model, prompts, limit, answers_wanted(body), wants_stream(body))


def _choice(index: int, text: str, finish: str | None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}


async def _stream(
    request: web.Request, order: Order, identity: dict[str, object], usage: TokenUsage | None
) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()
    async with aclosing(request.app[ENGINE].generate(order)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await stream.send_aborted()
                break
            if usage is not None:
                usage.completion_tokens += 1
            await stream.send({**identity, "choices": [_choice(step.index, step.text, step.finish)]})
        else:
            if usage is not None:
                await stream.send({**identity, "choices": [], "usage": usage.openai()})
    await stream.send("[DONE]")
    return await stream.close()
