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
from neuron.sim.api.tools import structured_reply
from neuron.sim.engine.engine import ENGINE, Generation, SimEngine, TokenUsage
from neuron.sim.engine.replies import Prompt


async def completions(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    generation = _generation_of(body, engine)
    identity = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": generation.model,
    }
    usage = TokenUsage(sum(prompt.token_count for prompt in generation.prompts))
    if generation.streamed:
        return await _stream(request, generation, identity, usage if wants_usage(body) else None)
    answers = await engine.answers(generation)
    usage.completion_tokens = sum(answer.token_count for answer in answers)
    choices = [_choice(index, answer.text, answer.finish) for index, answer in enumerate(answers)]
    return web.json_response({**identity, "choices": choices, "usage": usage.openai()})


def _generation_of(body: Body, engine: SimEngine) -> Generation:
    model = served_model(body.get("model"), engine)
    prompts = tuple(Prompt(text, text) for text in text_list(required(body, "prompt"), "prompt"))
    limit = integer(body, "max_tokens", least=1)
    check_length(limit, prompts, engine.settings, "max_tokens")
    return Generation(
        model,
        prompts,
        limit,
        answers_wanted(body),
        wants_stream(body),
        ignore_eos=body.get("ignore_eos") is True,
        min_tokens=integer(body, "min_tokens") or 0,
        reply=structured_reply(body, prompts[0]),
    )


def _choice(index: int, text: str, finish: str | None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}


async def _stream(
    request: web.Request, generation: Generation, identity: dict[str, object], usage: TokenUsage | None
) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()
    async with aclosing(request.app[ENGINE].generate(generation)) as steps:
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
