"""Relays a request to the control app (model list, fleet, operator actions), as to an engine."""

from __future__ import annotations

import logging

from cortex.accounts.caller import Caller, shown_caller
from cortex.http.connection import ClientConnection
from cortex.http.errors import shutting_down
from cortex.http.headers import CALLER_NAME
from cortex.http.request import Request
from cortex.proxy.answers.answer import DirectAnswer, own_lines
from cortex.proxy.context import ProxyContext
from cortex.proxy.relay import Relay
from cortex.routing.replica import FailureKind, Refusal
from cortex.upstream.address import Address
from shared.errors import Unavailable, UpstreamError
from shared.protocol import ErrorCode
from shared.request_ids import request_id as make_request_id
from shared.request_ids import request_scope
from shared.retry_after import CONTROL_PROCESS_SECS

log = logging.getLogger(__name__)


class ControlRequest:
    """Implements `http.connection.Handler` and `relay.RelayListener`."""

    __slots__ = ("_client", "_relay", "_request_id")

    def __init__(
        self,
        context: ProxyContext,
        client: ClientConnection,
        request: Request,
        address: Address,
        caller: Caller | None,
    ) -> None:
        """`caller` is None for a client that has not shown a valid key."""
        self._client = client
        self._request_id = make_request_id(request.request_id)
        request_id = self._request_id.encode()
        shown = request.credentials
        if caller is not None:
            shown.append(b"%b: %b" % (CALLER_NAME, shown_caller(caller)))
        self._relay = Relay(
            context.pool,
            request,
            self,
            address=address,
            head=request.head_for(request.host or b"cortex", b"", request_id, shown),
            answer=DirectAnswer(client, request, extra=own_lines(request, request_id)),
        )

    def begin(self) -> None:
        self._relay.start()

    def abandon(self) -> None:
        self._relay.abandon()

    def stop(self) -> None:
        if self._relay.status:
            self._relay.cut_off("cortex is stopping")
        else:
            self._relay.abandon()
            self._client.refuse(shutting_down(), self._request_id)

    def pause(self) -> None:
        self._relay.pause()

    def resume(self) -> None:
        self._relay.resume()

    def tick(self, now: float) -> None:
        """Does nothing: the control app's event streams have keep-alive comments of their own."""

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        with request_scope(self._request_id):
            log.error("control process unavailable: %s", reason)
        error = Unavailable(
            "control process unavailable, retry shortly", code=ErrorCode.UNAVAILABLE, retry_after=CONTROL_PROCESS_SECS
        )
        self._client.refuse(error, self._request_id)

    def refused(self, status: int, refusal: Refusal) -> bool:
        return False

    def lost(self, reason: str) -> None:
        message = f"cortex's control process was lost while it answered: {reason}"
        self._relay.end_lost(UpstreamError(message, code=ErrorCode.UPSTREAM_LOST))

    def done(self) -> None:
        self._client.finished()
