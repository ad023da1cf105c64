"""Server-sent events, one at a time."""

from __future__ import annotations

import json

from aiohttp import web

from neuron.sim.api.errors import error_body
from neuron.sim.engine.engine import ENGINE


class EventStream:
    """A streamed answer; each event is written at once."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )

    async def open(self) -> None:
        await self.response.prepare(self._request)

    async def send(self, data: object, *, event: str | None = None) -> None:
        head = f"event: {event}\n" if event is not None else ""
        body = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        await self.response.write(f"{head}data: {body}\n\n".encode())

    async def send_aborted(self) -> None:
        """Sends what vLLM sends when it shuts down, or its core dies, in the middle of an answer."""
        await self.send(error_body(500, self._request.app[ENGINE].abort_message, "InternalServerError"))

    async def close(self) -> web.StreamResponse:
        await self.response.write_eof()
        return self.response
