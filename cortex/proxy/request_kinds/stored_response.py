"""A request about an answer that an engine has stored: `GET`, `DELETE` and `POST …/cancel` of `/v1/responses/{id}`."""

from __future__ import annotations

import asyncio
import re
from typing import Final

import msgspec

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.context import ProxyContext
from cortex.proxy.request_handler import RequestHandler
from cortex.proxy.request_state import Resolving
from cortex.routing.replica import FailureKind, Replica
from cortex.routing.response_owners import UNSTORED
from shared.errors import NotFound, shortened
from shared.protocol import ErrorCode

OTHER_WORKER_SECS: Final = 0.2
"""How long it may take to learn which response another worker has just passed on."""

_PATH: Final = re.compile(rb"/v1/responses/([^/]+)(?:/(?:cancel|input_items))?")


def stored_response_id(path: bytes) -> str | None:
    """The id that a path names, None for other paths."""
    found = _PATH.fullmatch(path)
    return None if found is None else found[1].decode("latin-1")


class StoredResponse(RequestHandler):
    """Goes to the engine that made the answer, or nowhere."""

    __slots__ = ("_response_id",)

    def __init__(
        self, context: ProxyContext, client: ClientConnection, request: Request, caller: str, *, response_id: str
    ) -> None:
        super().__init__(context, client, request, caller)
        self._response_id = response_id

    def begin(self) -> None:
        if self._response_id.startswith(UNSTORED):
            self._refuse(self._unstored())
            return
        owner = self._context.response_owners.find(self._response_id)
        if owner is None:
            self._state = Resolving(self._spawn(self._await_owner(), "owner for"))
        else:
            self._send_to_owner(owner)

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        self._fail(reason, kind)
        self._refuse(self._unknown())

    def refused(self, status: int, *, asleep: bool) -> bool:
        return False

    async def _await_owner(self) -> None:
        await asyncio.sleep(OTHER_WORKER_SECS)
        self._resolved()
        owner = self._context.response_owners.find(self._response_id)
        if owner is None:
            self._refuse(self._unknown())
        else:
            self._send_to_owner(owner)

    def _send_to_owner(self, owner: Replica) -> None:
        """A published replica may be newer than the recorded one. A limit is for requests that generate."""
        self._model_id = owner.model_id
        replicas = self._context.control.table.get(owner.model_id, ())
        replica = next((r for r in replicas if r.node == owner.node), owner)
        self._send(msgspec.structs.replace(replica, limit=None), compared=False)

    def _unstored(self) -> NotFound:
        return NotFound(
            f"the response {shortened(self._response_id)!r} is not stored: its engine has only /v1/chat/completions and"
            " stores nothing. Keep the answer yourself; to cancel a stream, close its connection",
            code=ErrorCode.NOT_FOUND,
        )

    def _unknown(self) -> NotFound:
        return NotFound(
            f"no engine has the response {shortened(self._response_id)!r}: engines forget responses when their model is"
            " unloaded, and cortex forgets which engine has one when it restarts",
            code=ErrorCode.NOT_FOUND,
        )
