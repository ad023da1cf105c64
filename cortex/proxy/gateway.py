"""Dispatches requests: those that name a model to an engine, all others to the control app."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final

from cortex.http.connection import ClientConnection, Handler
from cortex.http.request import Request
from cortex.metrics.counters import UNKNOWN, Counters
from cortex.metrics.in_flight import InFlight, Key
from cortex.proxy.authentication import authenticate
from cortex.proxy.context import ProxyContext
from cortex.proxy.control_request import ControlRequest
from cortex.proxy.cross_site import CrossSiteCheck, RefusedRequest
from cortex.proxy.request_handler import RequestHandler
from cortex.upstream.address import Address
from shared.cross_site import CrossSitePolicy
from shared.errors import ServiceError, shortened
from shared.request_ids import request_id as make_request_id

INFERENCE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""POST routes whose body names a model."""
_INFERENCE: Final = frozenset(path.encode() for path in INFERENCE_PATHS)


class Gateway:
    """A worker's entry point for requests. Implements `http.connection.Dispatcher` and
    `metrics.worker_counts.WorkerCounts`."""

    def __init__(
        self,
        context: ProxyContext,
        *,
        control_address: Address,
        max_body_bytes: int,
        cross_site_policy: CrossSitePolicy,
        authenticate: Callable[[bytes | None], str] = authenticate,
    ) -> None:
        """`control_address` is where the control app listens. `authenticate`: `authentication.authenticate`."""
        self.max_body_bytes = max_body_bytes
        self.draining = False
        self._context = context
        self._control_address = control_address
        self._cross_site = CrossSiteCheck(cross_site_policy)
        self._authenticate = authenticate

    @property
    def in_flight(self) -> InFlight:
        return self._context.in_flight

    def handle(self, client: ClientConnection, request: Request) -> Handler:
        refused = self._cross_site.refusal(request)
        if refused is not None:
            return RefusedRequest(client, refused, self.rejected(request, refused))
        try:
            caller = self._authenticate(request.api_key)
        except ServiceError as error:
            return RefusedRequest(client, error, self.rejected(request, error))
        if request.method == b"POST" and request.path in _INFERENCE:
            return RequestHandler(self._context, client, request, caller)
        return ControlRequest(self._context, client, request, self._control_address)

    def rejected(self, request: Request | None, error: ServiceError) -> str:
        context = self._context
        request_id = make_request_id(None if request is None else request.request_id)
        if request is not None and request.path in _INFERENCE:
            context.counters.error(UNKNOWN, UNKNOWN, error.code)
            context.counters.request(UNKNOWN, UNKNOWN, error.status, monotonic() - request.received, None)
        if context.access_log.on:
            what = "-" if request is None else f"{request.method.decode()} {shortened(request.path.decode('latin-1'))}"
            context.access_log.line(f"{what} {error.status} refused={error.message!r} id={request_id}", request_id)
        return request_id

    def collect(self) -> Counters:
        return self._context.counters

    def in_flight_here(self) -> Mapping[Key, int]:
        return self._context.in_flight.here

    def begun_here(self) -> Mapping[Key, int]:
        return self._context.in_flight.begun

    async def refresh(self) -> None:
        """Does nothing: the counts are always current."""
