"""Dispatches requests: those that name a model to an engine, all others to the control app."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import monotonic

from cortex.accounts.caller import Caller
from cortex.accounts.keys.key_table import KeyTable
from cortex.accounts.prices import PriceList
from cortex.config.settings import CortexConfig
from cortex.http.body_reader import BodySpool
from cortex.http.connection import ClientConnection
from cortex.http.handler import Handler
from cortex.http.request import Request
from cortex.metrics.counters import UNKNOWN, Counters
from cortex.metrics.in_flight import CallerAt, CallerCount, InFlight
from cortex.metrics.requests.entries import SeenRequests
from cortex.metrics.requests.filter import RequestFilter
from cortex.proxy.answers.own_answer import OwnAnswer, RefusedRequest
from cortex.proxy.authentication import Authentication, Unidentified
from cortex.proxy.body.form_scan import is_form
from cortex.proxy.body.model_field import model_at_start
from cortex.proxy.context import ProxyContext
from cortex.proxy.cross_site import CrossSiteCheck, allowed_page, is_of_other_page, preflight_answer
from cortex.proxy.paths import (
    INFERENCE,
    METRICS,
    REALTIME,
    RESPONSES,
    START_PAGE,
    has_wrong_base,
    is_below_responses,
    is_for_web_pages,
    is_misspelt_response,
    is_open,
    is_own,
    manages_engine,
    meant_path,
    no_route,
    not_for_clients,
)
from cortex.proxy.request_handler import RequestHandler
from cortex.proxy.request_kinds.control_request import ControlRequest
from cortex.proxy.request_kinds.new_response import NewResponse, RelatedResponse, TranslatableRelatedResponse
from cortex.proxy.request_kinds.realtime import RealtimeRequest
from cortex.proxy.request_kinds.spooled_form import SpooledForm
from cortex.proxy.request_kinds.spooled_upload import SpooledUpload
from cortex.proxy.request_kinds.stored_response import StoredResponse, stored_response_id
from cortex.proxy.request_kinds.unidentified import UnidentifiedRequest
from cortex.proxy.translation.dialects import TRANSLATORS
from cortex.proxy.translation.translatable_request import TranslatableRequest
from cortex.routing.replica import ReplicaKey
from cortex.upstream.address import Address, parse_url
from shared.cross_site import CrossSitePolicy
from shared.errors import InvalidRequest, ServiceError, shortened
from shared.request_ids import request_id as make_request_id


class Gateway:
    """A worker's entry point for requests. Implements `http.connection.Dispatcher`,
    `metrics.worker_counts.WorkerCounts` and `metrics.requests.history.RequestSource`."""

    def __init__(
        self,
        context: ProxyContext,
        *,
        control_address: Address,
        max_body_bytes: int,
        cross_site_policy: CrossSitePolicy,
        authentication: Authentication,
    ) -> None:
        """`control_address` is where the control app listens."""
        self.max_body_bytes = max_body_bytes
        self.draining = False
        self._context = context
        self._control_address = control_address
        self._cross_site = CrossSiteCheck(cross_site_policy)
        self._authentication = authentication
        context.has_keys = authentication.has_keys
        self._origins = cross_site_policy.origins

    @property
    def in_flight(self) -> InFlight:
        return self._context.in_flight

    def configure(self, config: CortexConfig) -> None:
        """Applies a reloaded configuration to requests that arrive from now on."""
        self._context.configure(config)
        self._authentication.configure(config)

    def use_keys(self, keys: KeyTable) -> None:
        """These are the keys from now on."""
        self._authentication.use_keys(keys)
        self._context.has_keys = self._authentication.has_keys
        self._context.counters.keep_callers({caller.name for caller in keys.callers.values()})

    def use_prices(self, prices: PriceList) -> None:
        """What the tokens of requests that end from now on cost."""
        self._context.usage.use_prices(prices)

    def retire(self, url: str) -> None:
        """Keeps no connection to this engine: it gets no requests any more."""
        self._context.pool.retire(parse_url(url)[0])

    def can_begin(self, request: Request, start: bytes) -> bool:
        model = model_at_start(start, request.content_type.decode("latin-1")) if request.method == b"POST" else None
        rewrite = None if model is None else self._context.control.aliases.get(model)
        return model is not None and (rewrite is None or rewrite.edits is None)  # edits need the whole form

    def spool(self, request: Request) -> BodySpool | None:
        content_type = request.content_type.decode("latin-1")
        if request.method != b"POST" or is_own(request.path) or not is_form(content_type):
            return None
        return SpooledForm(content_type)

    def handle(self, client: ClientConnection, request: Request) -> Handler:
        refused = self._cross_site.refusal(request)
        if refused is not None:
            return self._refuse(client, request, refused)
        if self._origins and request.origin is not None:
            self._admit_page(request)
            if _is_preflight(request):  # a browser sends it without the key
                return OwnAnswer(client, request, preflight_answer(request))
            if is_of_other_page(request):  # it may use cortex, but not as a person with a session
                request.drop_cookie()
        try:
            caller = self._authentication.caller_of(request)
        except Unidentified as unknown:
            find = partial(self._identified, client, request, unknown.credential)
            return UnidentifiedRequest(client, request, find)
        except ServiceError as error:
            return self._handle_stranger(client, request, error)
        return self._handle_from(client, request, caller)

    async def _identified(self, client: ClientConnection, request: Request, credential: bytes) -> Handler:
        try:
            caller = await self._authentication.identify(request, credential)
        except ServiceError as error:
            return self._handle_stranger(client, request, error)
        return self._handle_from(client, request, caller)

    def _handle_from(self, client: ClientConnection, request: Request, caller: Caller) -> Handler:
        if request.method == b"POST" and request.path in INFERENCE:
            return self._infer(client, request, caller)
        return self._handle_other(client, request, caller)

    def _handle_stranger(self, client: ClientConnection, request: Request, error: ServiceError) -> Handler:
        request.notice_anthropic_client()
        path = meant_path(request.raw_path, reads=_reads(request))
        if path == METRICS:  # Prometheus has no key, and would not find them with one
            return self._refuse(client, request, no_route(request))
        if not is_open(path) or (path == START_PAGE and not _reads(request)):
            return self._refuse(client, request, error)
        if path != request.raw_path:
            request.use_path(path)
        return ControlRequest(self._context, client, request, self._control_address, None)

    def _handle_other(self, client: ClientConnection, request: Request, caller: Caller) -> Handler:
        method = request.method
        request.notice_anthropic_client()
        if method == b"GET" and b"websocket" in (request.upgrade or b"").lower():
            return self._open_websocket(client, request, caller)
        path = meant_path(request.raw_path, reads=method in {b"GET", b"HEAD"})
        if path != request.raw_path:
            request.use_path(path)
        own = is_own(request.path) or (request.path == START_PAGE and _reads(request))
        if own or (request.path in INFERENCE and method != b"POST"):
            return ControlRequest(self._context, client, request, self._control_address, caller)
        response_id = stored_response_id(method, request.path)
        if response_id is not None:
            return StoredResponse(self._context, client, request, caller, response_id=response_id)
        refusal = _refusal(request)
        if refusal is not None:
            return self._refuse(client, request, refusal)
        if is_below_responses(request.path) and request.streamed is None:
            kind = TranslatableRelatedResponse if request.path in TRANSLATORS else RelatedResponse
            return kind(self._context, client, request, caller)
        return self._infer(client, request, caller)

    def _infer(self, client: ClientConnection, request: Request, caller: Caller) -> Handler:
        if request.streamed is not None and isinstance(request.streamed, SpooledForm):
            return SpooledUpload(self._context, client, request, caller, form=request.streamed)
        if request.path == RESPONSES:
            return NewResponse(self._context, client, request, caller)
        if request.path in TRANSLATORS:
            return TranslatableRequest(self._context, client, request, caller)
        return RequestHandler(self._context, client, request, caller)

    def _open_websocket(self, client: ClientConnection, request: Request, caller: Caller) -> Handler:
        path = meant_path(request.raw_path, reads=False)
        if path == REALTIME:
            request.use_path(path)
            is_current = partial(self._authentication.is_current, request.api_key, caller)
            return RealtimeRequest(self._context, client, request, caller, is_current=is_current)
        return self._refuse(client, request, _no_websocket(request))

    def _refuse(self, client: ClientConnection, request: Request, error: ServiceError) -> Handler:
        return RefusedRequest(client, error, self.rejected(request, error))

    def _admit_page(self, request: Request) -> None:
        """Lets a page of an allowed origin read the answer."""
        if is_for_web_pages(meant_path(request.raw_path, reads=True)):
            request.cors = allowed_page(request.origin or b"", self._origins)

    def rejected(self, request: Request | None, error: ServiceError) -> str:
        context = self._context
        request_id = make_request_id(None if request is None else request.request_id)
        if request is not None and self._origins and request.origin is not None and not request.cors:
            self._admit_page(request)
        if request is not None and request.path in INFERENCE:
            context.counters.error(UNKNOWN, UNKNOWN, error.code)
            context.counters.request(UNKNOWN, UNKNOWN, error.status, monotonic() - request.received, None)
        if context.access_log.on:
            what = "-" if request is None else request.shown
            sender = "" if request is None else f" from={request.peer or '-'}"
            text = f"{what} {error.status} refused={error.message!r}{sender} id={request_id}"
            context.access_log.line(text, request_id)
        return request_id

    def collect(self, *, callers: bool = False) -> Counters:
        return self._context.counters.collect(callers=callers)

    def in_flight_here(self) -> Mapping[ReplicaKey, int]:
        return self._context.in_flight.here

    def begun_here(self) -> Mapping[ReplicaKey, int]:
        return self._context.in_flight.begun

    def take_callers(self) -> Mapping[CallerAt, CallerCount]:
        return self._context.in_flight.take_callers()

    async def requests_since(self, place: int, asked: RequestFilter, limit: int) -> SeenRequests:
        return self._context.requests.since(place, asked, limit)

    async def refresh(self, *, callers: bool = False) -> None:
        """Does nothing: the counts are always current."""


def _reads(request: Request) -> bool:
    return request.method in {b"GET", b"HEAD"}


def _is_preflight(request: Request) -> bool:
    """True for the question of a browser, for a page that it may answer to, whether it may send a request."""
    asked = request.passed_value(b"access-control-request-method")
    return request.method == b"OPTIONS" and bool(request.cors) and asked is not None


def _refusal(request: Request) -> ServiceError | None:
    """Why a request that is not for cortex is not for engines either."""
    if request.method != b"POST" or has_wrong_base(request.path):
        realtime = request.method == b"GET" and request.path == REALTIME
        return _needs_websocket() if realtime else no_route(request)
    if manages_engine(request.path):
        return not_for_clients(request)
    return no_route(request) if is_misspelt_response(request.path) else None


def _needs_websocket() -> ServiceError:
    return InvalidRequest(
        "/v1/realtime needs a WebSocket: send `Upgrade: websocket`", status=426, headers={"upgrade": "websocket"}
    )


def _no_websocket(request: Request) -> ServiceError:
    path = shortened(request.raw_path.decode("latin-1"))
    return InvalidRequest(
        f"{path!r} cannot be used over a WebSocket: send an HTTP/1.1 POST", status=426, headers={"upgrade": "HTTP/1.1"}
    )
