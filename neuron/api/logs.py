"""Answers `GET /models/{model_id}/logs`: the last lines, or those and all that follow."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from neuron.engine.output import EngineOutput
from shared.http import EVENT_STREAM_HEADERS, KEEP_ALIVE_COMMENT

KEEP_ALIVE_SECS = 15.0
_PAUSE_SECS = 0.25


async def last_lines(model_id: str, output: EngineOutput | None, tail: int) -> web.Response:
    """`{"id", "lines"}`; no lines for a model that has no engine and had none."""
    lines = [] if output is None else await output.tail(tail)
    return web.json_response({"id": model_id, "lines": lines})


async def stream_lines(
    request: web.Request, output: EngineOutput | None, tail: int, closing: asyncio.Event
) -> web.StreamResponse:
    """Server-sent events, a line in each: the last `tail` in memory, then each that comes, until the engine is gone,
    `closing` is set, or the client leaves."""
    response = web.StreamResponse(headers=EVENT_STREAM_HEADERS)
    await response.prepare(request)
    if output is None:
        return response
    with output.listening() as listener:
        lines: list[str] | None = await listener.start(tail)
        written = time.monotonic()
        while lines is not None and not closing.is_set():
            if lines:
                await response.write("".join(f"data: {line}\n\n" for line in lines).encode())
                written = time.monotonic()
            elif time.monotonic() - written >= KEEP_ALIVE_SECS:
                await response.write(KEEP_ALIVE_COMMENT)
                written = time.monotonic()
            lines = await listener.next(_PAUSE_SECS)
    return response
