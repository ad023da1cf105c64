"""A request of a person, whom only the control knows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cortex.http.connection import ClientConnection
from cortex.http.errors import shutting_down
from cortex.http.handler import Handler
from cortex.http.request import Request
from shared.errors import ServiceError, internal_error
from shared.request_ids import request_id as make_request_id

log = logging.getLogger(__name__)


class UnidentifiedRequest:
    """Waits for the handler of the request, which depends on the sender, and then stands for it. Implements
    `http.connection.Handler`."""

    def __init__(self, client: ClientConnection, request: Request, find: Callable[[], Awaitable[Handler]]) -> None:
        """`find` returns the handler."""
        self._client = client
        self._request = request
        self._find = find
        self._handler: Handler | None = None

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._go_on(), name="sender of a request")

    async def _go_on(self) -> None:
        try:
            handler = await self._find()
        except Exception:
            log.exception("cannot find the sender of a request")
            self._refuse(internal_error())
            return
        self._handler = handler
        try:
            handler.begin()
        except Exception:
            log.exception("cannot begin a request")
            self._client.cut()  # as for any other request: part of an answer may have been written

    def abandon(self) -> None:
        if self._handler is None:
            self._task.cancel()
        else:
            self._handler.abandon()

    def stop(self) -> None:
        if self._handler is None:
            self._task.cancel()
            self._refuse(shutting_down())
        else:
            self._handler.stop()

    def pause(self) -> None:
        if self._handler is not None:
            self._handler.pause()

    def resume(self) -> None:
        if self._handler is not None:
            self._handler.resume()

    def tick(self, now: float) -> None:
        if self._handler is not None:
            self._handler.tick(now)

    def _refuse(self, error: ServiceError) -> None:
        self._client.refuse(error, make_request_id(self._request.request_id))
