"""A request that no engine answers: lists, the fleet, the dashboard. It goes to the control app, as to an engine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.http.stopping import stopping
from cortex.proxy.relay import Relay
from cortex.upstream.pool import Address
from cortex.upstream.replica import FailureKind
from shared.errors import Unavailable
from shared.request_ids import request_scope

if TYPE_CHECKING:
    from cortex.proxy.gateway import Gateway

log = logging.getLogger(__name__)

RETRY_AFTER_SECS = 1


class ControlRequest:
    """Implements `front.client.Handling` and `relay.Listener`."""

    __slots__ = ("_client", "_relay", "_request_id")

    def __init__(self, gateway: Gateway, client: ClientConnection, request: Request, address: Address) -> None:
        self._client = client
        self._request_id = gateway.request_id(request.request_id)
        request_id = self._request_id.encode()
        self._relay = Relay(
            gateway.pool,
            client,
            request,
            self,
            address=address,
            head=request.head_for(b"cortex", b"", request_id, request.credentials),
            extra=b"x-request-id: " + request_id,
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
            self._client.refuse(stopping(), self._request_id)

    def pause(self) -> None:
        self._relay.pause()

    def resume(self) -> None:
        self._relay.resume()

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        with request_scope(self._request_id):
            log.error("the control process cannot be reached: %s", reason)
        error = Unavailable("cortex is starting again", code="unavailable", retry_after=RETRY_AFTER_SECS)
        self._client.refuse(error, self._request_id)

    def refused(self, status: int, *, asleep: bool) -> bool:
        return False

    def done(self) -> None:
        self._client.finished()
