"""POST /v1/responses, plain and as typed events, and GET and cancel of what it has made."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

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
from neuron.sim.api.errors import ApiError
from neuron.sim.api.sse import EventStream
from neuron.sim.api.tools import call_id, reply_to, with_tools
from neuron.sim.engine.engine import ENGINE, Generation
from neuron.sim.engine.metrics import FinishReason
from neuron.sim.engine.replies import Prompt

STORED: web.AppKey[OrderedDict[str, dict[str, object]]] = web.AppKey("stored_responses", OrderedDict)
"""The last finished responses by id."""
_MAX_STORED = 1000

_STATUS = {"stop": "completed", "length": "incomplete", "abort": "cancelled"}


def _prompt_of(body: Body) -> Prompt:
    given = required(body, "input")
    prompt = Prompt(f"user: {given}\n", given) if isinstance(given, str) else conversation(given, param="input")
    prompt = with_tools(prompt, body)
    instructions = body.get("instructions")
    if isinstance(instructions, str) and instructions:
        return replace(prompt, text=f"system: {instructions}\n{prompt.text}")
    return prompt


class Send(Protocol):
    """Sends the next event."""

    async def __call__(self, kind: str, **fields: object) -> None: ...


class ResponseObject:
    """The `response` object, at any point of the answer, with one output item: a message or a function call."""

    def __init__(self, body: Body, generation: Generation) -> None:
        self._generation = generation
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._echoed = {
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata") or {},
            "temperature": body.get("temperature", 1.0),
            "top_p": body.get("top_p", 1.0),
            "max_output_tokens": generation.max_tokens,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "truncation": body.get("truncation") or "disabled",
        }
        self.item_id = f"{'msg' if generation.tool is None else 'fc'}_{uuid.uuid4().hex}"
        self._call_id = call_id()

    def item(self, text: str | None, status: str) -> dict[str, object]:
        """The output item; a message has no part until there is text."""
        if self._generation.tool is not None:
            return {
                "type": "function_call",
                "id": self.item_id,
                "call_id": self._call_id,
                "name": self._generation.tool,
                "arguments": text or "",
                "status": status,
            }
        content = [] if text is None else [part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def view(self, text: str | None = None, produced: int = 0, finish: FinishReason | None = None) -> dict[str, object]:
        status = "in_progress" if finish is None else _STATUS[finish]
        item_status = "completed" if finish == "stop" else "incomplete"
        read = self._generation.prompts[0].token_count
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
            "model": self._generation.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "output": [] if text is None else [self.item(text, item_status)],
            "usage": None if finish is None else usage,
            **self._echoed,
        }


def part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


async def responses(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    prompt = _prompt_of(body)
    limit = integer(body, "max_output_tokens", least=1)
    check_length(limit, [prompt], engine.settings, "max_output_tokens")
    reply = reply_to(body, prompt, engine.settings)
    generation = Generation(model, (prompt,), limit, streamed=wants_stream(body), reply=reply)
    response = ResponseObject(body, generation)
    if generation.streamed:
        return await _stream(request, body, generation, response)
    [answer] = await engine.answers(generation)
    made = response.view(answer.text, answer.token_count, answer.finish)
    _store(request, body, made)
    return web.json_response(made)


def _store(request: web.Request, body: Body, made: dict[str, object]) -> None:
    if body.get("store") is not False:
        stored = request.app[STORED]
        stored[str(made["id"])] = made
        if len(stored) > _MAX_STORED:
            stored.popitem(last=False)


async def show_response(request: web.Request) -> web.Response:
    return web.json_response(_stored(request))


async def cancel_response(request: web.Request) -> web.Response:
    """A stored response is complete."""
    _stored(request)
    raise ApiError(400, "Cannot cancel a synchronous response.", "invalid_request_error", param="response_id")


def _stored(request: web.Request) -> dict[str, object]:
    name = request.match_info["response_id"]
    found = request.app[STORED].get(name)
    if found is None:
        message = f"Response with id '{name}' not found."
        raise ApiError(404, message, "invalid_request_error", param="response_id")
    return found


async def _stream(
    request: web.Request, body: Body, generation: Generation, response: ResponseObject
) -> web.StreamResponse:
    stream = EventStream(request)
    await stream.open()
    numbers = itertools.count()

    async def send(kind: str, **fields: object) -> None:
        await stream.send({"type": kind, "sequence_number": next(numbers), **fields}, event=kind)

    item = _CallEvents(response, send, generation.tool) if generation.tool else _TextEvents(response, send)
    await send("response.created", response=response.view())
    await send("response.in_progress", response=response.view())
    text, produced = "", 0
    async with aclosing(request.app[ENGINE].generate(generation)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await send("error", code="500", message="the engine is shutting down", param=None)
                break
            if not produced:
                await item.open()
            text, produced = text + step.text, produced + 1
            await item.add(step.text)
            if step.finish is not None:
                await item.close(text)
                done = response.item(text, "completed")
                await send("response.output_item.done", output_index=0, item=done)
                made = response.view(text, produced, step.finish)
                _store(request, body, made)
                await send("response.completed", response=made)
    return await stream.close()


@dataclass(frozen=True)
class _TextEvents:
    """The events of an answer in words."""

    response: ResponseObject
    send: Send

    async def open(self) -> None:
        item = self.response.item(None, "in_progress")
        await self.send("response.output_item.added", output_index=0, item=item)
        await self._send("response.content_part.added", part=part(""))

    async def add(self, text: str) -> None:
        await self._send("response.output_text.delta", delta=text, logprobs=[])

    async def close(self, text: str) -> None:
        await self._send("response.output_text.done", text=text, logprobs=[])
        await self._send("response.content_part.done", part=part(text))

    async def _send(self, kind: str, **fields: object) -> None:
        await self.send(kind, output_index=0, content_index=0, item_id=self.response.item_id, **fields)


@dataclass(frozen=True)
class _CallEvents:
    """The events of a function call."""

    response: ResponseObject
    send: Send
    tool: str

    async def open(self) -> None:
        item = self.response.item(None, "in_progress")
        await self.send("response.output_item.added", output_index=0, item=item)

    async def add(self, text: str) -> None:
        kind = "response.function_call_arguments.delta"
        await self.send(kind, output_index=0, item_id=self.response.item_id, delta=text)

    async def close(self, text: str) -> None:
        kind = "response.function_call_arguments.done"
        await self.send(kind, output_index=0, item_id=self.response.item_id, name=self.tool, arguments=text)
