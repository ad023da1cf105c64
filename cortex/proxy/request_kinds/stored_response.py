"""A request about an answer that an engine has stored: `GET`, `DELETE` and `POST …/cancel` of `/v1/responses/{id}`."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from cortex.accounts.caller import Caller
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.context import ProxyContext
from cortex.proxy.progress.state import Resolving
from cortex.proxy.request_handler import RequestHandler
from cortex.routing.replica import FailureKind, Refusal, Replica
from cortex.routing.response_owners import UNSTORED, unknown_response
from shared.errors import NotFound, ServiceError, shortened
from shared.protocol import ErrorCode

_REQUEST: Final = re.compile(
    rb"(?:GET|DELETE) /v1/responses/([^/]+)(?:/(?:cancel|input_items))?|POST /v1/responses/([^/]+)/cancel"
)


def stored_response_id(method: bytes, path: bytes) -> str | None:
    """The id that a request is about, None for other requests. A POST to `/v1/responses/compact` and the like is a new
    request with a model."""
    found = _REQUEST.fullmatch(b"%b %b" % (method, path))
    return None if found is None else (found[1] or found[2]).decode("latin-1")


class StoredResponse(RequestHandler):
    """Goes to the engine that made the answer, or nowhere."""

    __slots__ = ("_response_id",)

    def __init__(
        self, context: ProxyContext, client: ClientConnection, request: Request, caller: Caller, *, response_id: str
    ) -> None:
        super().__init__(context, client, request, caller)
        self._response_id = response_id
        self._account.retrieves = True

    def begin(self) -> None:
        if self._response_id.startswith(UNSTORED):
            self._refuse(self._unstored())
            return
        replica = self._context.published_maker(self._response_id, self._account.caller)
        if replica is None:
            self._state = Resolving(self._spawn(self._find_owner(), "owner for"))
        else:
            self._send_to_owner(replica)

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        self._fail(reason, kind)
        self._refuse(unknown_response(self._response_id))

    def refused(self, status: int, refusal: Refusal) -> bool:
        return False

    async def _find_owner(self) -> None:
        replica = await self._context.find_maker(self._response_id, self._account.caller)
        if replica is not None:  # an engine that is being drained still knows its responses
            replica = await self._context.loaded_maker(replica) or replica
        self._resolved()
        if replica is None or not replica.url:
            self._refuse(unknown_response(self._response_id))
        else:
            self._send_to_owner(replica)

    def _send_to_owner(self, replica: Replica) -> None:
        """A limit is for requests that generate."""
        self._name = self._account.model_id = self._account.asked = replica.requested_id
        self._account.choice = "maker"
        try:
            self._account.check_model()
        except ServiceError as error:
            self._refuse(error)
            return
        self._send(msgspec.structs.replace(replica, limit=None), compared=False)

    def _unstored(self) -> NotFound:
        return NotFound(
            f"the response {shortened(self._response_id)!r} is not stored: its engine has only /v1/chat/completions and"
            " stores nothing. Keep the answer yourself; to cancel a stream, close its connection",
            code=ErrorCode.NOT_FOUND,
        )
