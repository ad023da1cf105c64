"""POST /v1/responses, plain and as typed events."""

from __future__ import annotations

import itertools
import time
import uuid
from contextlib import aclosing

from aiohttp import web

from neuron.sim.api.bodies import (
    Body,
    check_length,
    conversation,
    integer,
    read_json,
    required,
    served_model,
    wants_stream,
)
from neuron.sim.api.sse import EventStream
from neuron.sim.engine.engine import ENGINE, Order, Prompt
from neuron.sim.engine.metrics import FinishReason

_STATUS = {"stop": "completed", "length": "incomplete", "abort": "cancelled"}


def _prompt_of(body: Body) -> Prompt:
    given = required(body, "input")
    prompt = Prompt(f"user: {given}\n", given) if isinstance(given, str) else conversation(given, param="input")
    instructions = body.get("instructions")
    if isinstance(instructions, str) and instructions:
        return Prompt(f"system: {instructions}\n{prompt.text}", prompt.quoted)
    return prompt


class ResponseObject:
    """The `response` object, at any point of the answer."""

    def __init__(self, body: Body, order: Order) -> None:
        self._order = order
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._asked = {
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata") or {},
            "temperature": body.get("temperature", 1.0),
            "top_p": body.get("top_p", 1.0),
            "max_output_tokens": order.max_tokens,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "truncation": body.get("truncation") or "disabled",
        }
        self.item_id = f"msg_{uuid.uuid4().hex}"

    def item(self, text: str | None, status: str) -> dict[str, object]:
        """The only output item; it has no part until there is text."""
        content = [] if text is None else [part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def view(self, text: str | None = None, produced: int = 0, finish: FinishReason | None = None) -> dict[str, object]:
        status = "in_progress" if finish is None else _STATUS[finish]
        item_status = "completed" if finish == "stop" else "incomplete"
        read = self._order.prompts[0].token_count
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": produced,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + produced,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._order.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "output": [] if text is None else [self.item(text, item_status)],
            "usage": None if finish is None else usage,
            **self._asked,
        }


def part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


async def responses(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine.settings)
    prompt = _prompt_of(body)
    limit = integer(body, "max_output_tokens", least=1)
    check_length(limit, [prompt], engine.settings, "max_output_tokens")
    order = Order(model, (prompt,), limit, streamed=wants_stream(body))
    response = ResponseObject(body, order)
    if order.streamed:
        return await _stream(request, order, response)
    [answer] = await engine.answers(order)
    return web.json_response(response.view(answer.text, answer.token_count, answer.finish))


async def _stream(request: web.Request, order: Order, response: ResponseObject) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()
    numbers = itertools.count()
    place = {"output_index": 0, "content_index": 0, "item_id": response.item_id}

    async def send(kind: str, **fields: object) -> None:
        await stream.send({"type": kind, "sequence_number": next(numbers), **fields}, event=kind)

    await send("response.created", response=response.view())
    await send("response.in_progress", response=response.view())
    text, produced = "", 0
    async with aclosing(request.app[ENGINE].generate(order)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await send("error", code="500", message="the engine is shutting down", param=None)
                break
            if not produced:
                await send("response.output_item.added", output_index=0, item=response.item(None, "in_progress"))
                await send("response.content_part.added", part=part(""), **place)
            text, produced = text + step.text, produced + 1
            await send("response.output_text.delta", delta=step.text, logprobs=[], **place)
            if step.finish is not None:
                await send("response.output_text.done", text=text, logprobs=[], **place)
                await send("response.content_part.done", part=part(text), **place)
                done = response.item(text, "completed")
                await send("response.output_item.done", output_index=0, item=done)
                await send("response.completed", response=response.view(text, produced, step.finish))
    return await stream.close()
