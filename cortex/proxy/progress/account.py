"""What is known of one request, and where it is counted when it has ended."""

from __future__ import annotations

from time import monotonic

from cortex.accounts.caller import Caller
from cortex.http.request import Request
from cortex.metrics.counters import UNKNOWN
from cortex.proxy.context import ProxyContext
from cortex.proxy.relay import Relay
from shared.request_ids import request_id as make_request_id

CLIENT_DISCONNECTED = 499
"""nginx's status for a client that disconnected before its answer."""


class RequestAccount:
    """The account of a request, which its handler keeps and closes once.

    `label` and `node` are metric labels: only names that exist, so clients cannot create time series. `attempts`: the
    engines that it was sent to. `cold`: it waited for a load. `waited`: seconds spent waiting for the control.
    """

    __slots__ = (
        "_context",
        "_request",
        "attempts",
        "caller",
        "cold",
        "label",
        "model_id",
        "node",
        "request_id",
        "waited",
    )

    def __init__(self, context: ProxyContext, request: Request, caller: Caller) -> None:
        self._context = context
        self._request = request
        self.request_id = make_request_id(request.request_id)
        self.caller = caller
        self.model_id = ""
        self.label = self.node = UNKNOWN
        self.attempts = 0
        self.cold = False
        self.waited = 0.0

    def close(self, status: int, relay: Relay | None) -> None:
        """Counts the request and writes its access line. `relay` is the one whose answer the client got, if any."""
        context, request, model, node = self._context, self._request, self.label, self.node
        took = monotonic() - request.received
        sent, more = 0, ""
        first_byte_secs: float | None = None
        if relay is not None:
            context.count_answer(self.model_id, model, node, relay)
            sent = relay.answer.tail.fed_bytes
            if relay.first_byte_at is not None:
                first_byte_secs = relay.first_byte_at - request.received
            if relay.lost_because is not None:
                more = f" lost={relay.lost_because!r}"
        context.counters.request(model, node, status, took, first_byte_secs)
        if context.access_log.on:
            self._log(status, sent, took, more)

    def _log(self, status: int, sent: int, took: float, more: str) -> None:
        if self.caller.key_id:
            more = f" caller={self.caller.name}{more}"
        if self.attempts > 1:
            more = f" attempts={self.attempts}{more}"
        if self.waited >= 0.001:
            more = f" waited={format(self.waited, '.3f')}{more}"
        secs = format(took, ".3f")  # compiled, a format within an f-string takes 8,000 instructions more
        self._context.access_log.line(
            f"{self._request.shown} {status} model={self.label} node={self.node}"
            f" cold={'yes' if self.cold else 'no'} bytes={sent} secs={secs} id={self.request_id}{more}",
            self.request_id,
        )
