"""What is known of one request: whether its limits admit it, what it has used, and where that is counted."""

from __future__ import annotations

import time
from time import monotonic
from typing import TYPE_CHECKING, Final

from cortex.accounts.caller import Caller
from cortex.accounts.limits.admission import UNKNOWN_CONTEXT
from cortex.accounts.limits.exceeded import LimitExceeded
from cortex.accounts.limits.rate_headers import rate_lines
from cortex.accounts.limits.terms import NO_RATES, Grant, RateState, TokenBound
from cortex.accounts.usage.record import UsageRecord
from cortex.http.request import Request
from cortex.metrics.counters import UNKNOWN
from cortex.metrics.requests.entries import FailedAttempt, LiveRequest, Wait
from cortex.metrics.requests.filter import RequestFilter
from cortex.proxy.answers.answer import own_lines
from cortex.proxy.body.request_fields import RequestFields
from cortex.proxy.body.token_bound import token_bound
from cortex.proxy.context import Choice, ProxyContext
from cortex.proxy.paths import INFERENCE_TEXT, NAMING_PATHS, in_background, recorded_path
from cortex.proxy.progress.state import SPANS, STAGES
from cortex.proxy.relay import Relay
from cortex.routing.replica import FailureKind, Replica, ReplicaKey, Route
from cortex.upstream.usage import Usage
from shared.errors import MAX_SHOWN_CHARS, Forbidden, ServiceError, shortened
from shared.protocol import ErrorCode
from shared.request_ids import request_id as make_request_id

if TYPE_CHECKING:  # needs packages that may be missing
    from cortex.metrics.tracing.request_trace import RequestTrace

CLIENT_DISCONNECTED: Final = 499
"""nginx's status for a client that disconnected before its answer."""

BYTES_PER_TOKEN: Final = 4
"""Of an answer whose tokens the engine has not told."""

_COLD: Final = b"\r\nx-cortex-cold-start: true"
_WARM: Final = b"\r\nx-cortex-cold-start: false"
_LOST: Final = ErrorCode.UPSTREAM_LOST.value

_POSTED: Final = {path: f"POST {path}" for path in INFERENCE_TEXT.values()}
_THOUSANDTHS: Final = [f".{number:03}" for number in range(1000)]


class RequestAccount:
    """The account of a request, which its handler keeps and closes once.

    `label` and `node` are metric labels: only names that exist, so clients cannot create time series. `replica`: the
    engine that it was sent to last; `attempts`: to how many. `cold`: it waited for a load. `waited`: seconds spent
    waiting, `for_engine`: of these, for an engine. `retrieves`: its answer is that of an earlier request, which has
    used the tokens. `asked`: the model as the client names it. `choice`: why this engine. `relay`: the last one, until
    the end.
    """

    __slots__ = (
        "_background",
        "_body_bytes",
        "_bound",
        "_context",
        "_failed",
        "_grant",
        "_request",
        "_stage",
        "_stage_since",
        "_waited_for",
        "_waits",
        "asked",
        "attempts",
        "caller",
        "choice",
        "closed",
        "cold",
        "for_engine",
        "key_id",
        "label",
        "model_id",
        "node",
        "relay",
        "replica",
        "request_id",
        "retrieves",
        "trace",
        "waited",
    )

    def __init__(self, context: ProxyContext, request: Request, caller: Caller) -> None:
        self._context = context
        self._request = request
        self.request_id = make_request_id(request.request_id)
        self.caller = caller
        self.key_id = caller.key_id  # compiled, reading it of the caller takes thirty times as long
        self.model_id = ""
        self.label = self.node = UNKNOWN
        self.replica: Replica | None = None
        self.attempts = 0
        self.cold = False
        self.closed = False
        self.retrieves = False
        self.waited = self.for_engine = 0.0
        self._bound: TokenBound | None = None
        self._body_bytes = 0  # when it was bounded
        self._background = False
        self._grant: Grant | None = None
        self.asked = ""
        self.choice: Choice = ""
        self.relay: Relay | None = None
        self._failed: list[FailedAttempt] | None = None
        self._waits: list[Wait] | None = None
        self._stage = ""
        self.trace: RequestTrace | None = None
        if context.tracing is not None:
            path = recorded_path(request.path)
            self.trace = context.tracing.begin(request, self.request_id, path, named=path in NAMING_PATHS)
        context.requests.began(self)

    def check_model(self) -> None:
        """Raises Forbidden if the caller may not use the model."""
        caller, model_id = self.caller, self.model_id
        if caller.models and not caller.may_use(model_id):
            raise Forbidden(
                f"API key {caller.name!r} may not use the model {shortened(model_id)!r}; GET /v1/models lists those"
                " that it may",
                code=ErrorCode.MODEL_NOT_ALLOWED,
                param="model",
            )

    def admit(self, fields: RequestFields | None) -> bool:
        """Whether the request may go on; False if that takes a while: then wait for `admission`. `fields`: of its body,
        if they are known.

        Raises:
            Forbidden: the caller may not use the model.
            LimitExceeded: a limit refuses the request.
        """
        if self.caller.models:
            self.check_model()
        limiter, request = self._context.control.limiter, self._request
        if not self.caller.limited and self.model_id not in limiter.limited_models:
            return True
        self._body_bytes, self._background = len(request.body), in_background(request)
        self._bound = token_bound(request.path, request.body, request.content_type.decode("latin-1"), fields)
        try:
            grant = limiter.admit(self.caller, self.model_id, self._bound)
        except LimitExceeded as error:
            self._tell(error.rates)
            raise
        if grant is None:
            return False
        self._take(grant)
        return True

    async def admission(self) -> None:
        """Raises ServiceError if a limit refuses the request, or if that cannot be found out."""
        assert self._bound is not None
        try:
            self._take(await self._context.control.limiter.admission(self.caller, self.model_id, self._bound))
        except LimitExceeded as error:
            self._tell(error.rates)
            raise

    def sent_to(self, replica: Replica) -> None:
        """The request goes to this engine now."""
        self.replica = replica
        self.label, self.node = self.model_id, replica.key.node
        self.attempts += 1
        self._stage = ""
        if self.trace is not None:
            self.trace.sent_to(replica)

    def waits(self, stage: str, name: str) -> None:
        """A task works on the request from now on: `stage` as of `STAGES`, for the model `name`."""
        self._stage, self._stage_since, self._waited_for = stage, monotonic(), name

    def has_waited(self, since: float) -> None:
        """It has waited since then, in monotonic seconds."""
        now, came = monotonic(), self._request.received
        self.waited += now - since
        if self._stage == "resolve":
            self.for_engine += now - since
        self._waits = [*(self._waits or ()), (since - came, now - came)]
        if self.trace is not None:
            self.trace.waited(SPANS.get(self._stage, "queue"), since, now)
        self._stage = ""

    def found(self, route: Route) -> None:
        """The control has named an engine."""
        self.cold = self.cold or route.cold
        self.choice = "loaded" if route.cold else "control"
        if self.trace is not None:
            self.trace.loaded(route.phases)

    def failed(self, replica: Replica, reason: str, kind: FailureKind) -> None:
        """This engine had no answer."""
        at, key = monotonic() - self._request.received, replica.key
        attempt = FailedAttempt(key.node, key.instance, kind, shortened(reason), at)
        self._failed = [*(self._failed or ()), attempt]
        self._context.counters.failover(self.label, self.node, kind)
        if self.trace is not None:
            self.trace.failed(reason, kind)
        self.relay = None

    def fits(self, asked: RequestFilter) -> bool:
        """Whether the request is asked for. As `shown`, implements `metrics.requests.ring.OngoingRequest`."""
        if asked.status is not None:
            return False
        key = self._engine()
        models = (self.model_id, self.asked)
        return asked.fits(self.key_id, self.caller.name, models, "" if key is None else key.node, self._failed)

    def _engine(self) -> ReplicaKey | None:
        """Where it is, not where it has failed before."""
        return None if self.replica is None or self._stage == "resolve" else self.replica.key

    def shown(self) -> LiveRequest:
        """The request as it is now."""
        now, came, relay, replica = monotonic(), self._request.received, self.relay, self.replica
        stage, note, waits = self._stage, None, self._waits or []
        if stage:
            note = self._context.control.note(self._waited_for) if stage == "resolve" else None
            waits = [*waits, (self._stage_since - came, now - came)]
        elif relay is not None:
            stage = "answer" if relay.status else "engine"
        head_at = None if relay is None else relay.first_byte_at
        key = self._engine()
        return LiveRequest(
            since=time.time() - (now - came),
            request_id=self.request_id,
            key_id=self.key_id,
            key=self.caller.name,
            asked=shortened(self.asked),
            model=shortened(self.model_id),
            variant="" if replica is None else replica.variant,
            node="" if key is None else key.node,
            instance="" if key is None else key.instance,
            path=recorded_path(self._request.path),
            stage=STAGES.get(stage, "starting"),
            note="" if note is None else note.text,
            secs=now - came,
            first_byte_secs=None if head_at is None else head_at - came,
            cold=self.cold,
            streamed=relay is not None and relay.answer.events,
            choice=self.choice,
            attempts=self._failed or [],
            waits=waits,
        )

    def head_lines(self) -> bytes:
        """The header lines of cortex for the engine's answer, without the final CRLF."""
        lines = own_lines(self._request, self.request_id.encode())
        # Compiled, adding takes fewer instructions than formatting with `%`.
        return lines + b"\r\nx-cortex-node: " + self.node.encode() + (_COLD if self.cold else _WARM)

    def close(self, status: int, relay: Relay | None, *, left: bool = False, error: ServiceError | None = None) -> None:
        """Counts the request and writes its access line. `relay` is the one whose answer the client got, if any;
        `left`: not all of it. `error` refuses it."""
        context, request, node = self._context, self._request, self.node
        self.closed = True
        if self.label is UNKNOWN and context.control.knows(self.model_id):
            self.label = self.model_id
        model = self.label
        took = monotonic() - request.received
        usage: Usage | None = None
        sent, more, code, message, streamed = 0, "", "", "", False
        first_byte_secs: float | None = None
        if relay is not None:
            usage = context.count_answer(self.model_id, model, node, relay, retrieved=self.retrieves)
            if usage is not None and self.key_id:
                context.expected_tokens.learn(self.key_id, self.model_id, usage.prompt + usage.completion)
            sent, streamed = relay.answer.tail.fed_bytes, relay.answer.events
            if relay.lost_because is not None:
                left, code, message = True, _LOST, relay.lost_because
                more = f" lost={relay.lost_because!r}"
            if relay.first_byte_at is not None:
                first_byte_secs = relay.first_byte_at - request.received
                context.counters.answer(model, node, request.content_length or 0, sent)
            if relay.first_event_at:
                self._count_stream(relay.first_event_at - request.received, took, None if left else usage)
        if error is not None:
            code, message = error.code, error.message
            context.counters.error(model, node, code)
        context.counters.request(model, node, status, took, first_byte_secs, waited_secs=self.for_engine)
        if self.key_id:
            context.counters.caller(self.caller.name, model, status, usage)
        if self._grant is not None:
            self._settle(self._grant, usage, relay, sent, left=left)
        record = self._record(status, usage, first_byte_secs, took, complete=not left)
        if self.model_id:
            context.usage.add(record)
        self.relay = None  # it holds this account
        asked = self.asked
        if len(asked) > MAX_SHOWN_CHARS:
            asked = shortened(asked)
        shown = shortened(message) if message else ""
        note = (record, asked, code, shown, streamed, self.choice, self._failed, self._waits)
        context.requests.ended(self, note)
        self._end_trace(status, code, message)
        if context.access_log.on:
            self._log(status, sent, usage, took, more)

    def _end_trace(self, status: int, code: str, message: str) -> None:
        if self.trace is not None:
            self.trace.end(status, code, message)

    def _count_stream(self, first_event_secs: float, took: float, usage: Usage | None) -> None:
        """`usage`: None if it is not known, or not all of the stream arrived."""
        later_tokens = 0 if usage is None else usage.completion - 1
        self._context.counters.stream(self.label, self.node, first_event_secs, took - first_event_secs, later_tokens)

    def _take(self, grant: Grant) -> None:
        if grant.number:
            self._grant = grant
        self._tell(grant.rates)

    def _tell(self, rates: RateState) -> None:
        """The client learns of its limits with the answer."""
        if rates is not NO_RATES:
            anthropic = self._request.anthropic
            self._request.rates = rate_lines(rates, time.time() if anthropic else 0.0, anthropic=anthropic)

    def _settle(self, grant: Grant, usage: Usage | None, relay: Relay | None, sent: int, *, left: bool) -> None:
        prompt = completion = cached = 0
        if usage is not None:
            prompt, completion, cached = usage.prompt, usage.completion, usage.cached
            if left and self._request.anthropic:  # the first event has told the prompt, and no more is known
                most = self._most_completion(sent)
                if most > completion:
                    self._context.control.limiter.settle_estimate(grant, prompt, most, cached)
                    return
        elif relay is not None and relay.status < 400:  # the client has left, or the engine does not count
            bound = self._bound
            assert bound is not None
            prompt = min(bound.prompt, self._body_bytes, UNKNOWN_CONTEXT)
            self._context.control.limiter.settle_estimate(grant, prompt, self._most_completion(sent), 0)
            return
        self._context.control.limiter.settle(grant, prompt, completion, cached)

    def _most_completion(self, sent: int) -> int:
        """The tokens of an answer of so many bytes, at most, if the engine has not told them."""
        bound = self._bound
        assert bound is not None
        # In the background the engine goes on, and only those that ask for the response learn what it used.
        found = UNKNOWN_CONTEXT if self._background else sent // BYTES_PER_TOKEN
        return found if bound.output is None else min(found, bound.output * bound.answers)

    def _record(
        self, status: int, usage: Usage | None, first_byte_secs: float | None, took: float, *, complete: bool
    ) -> UsageRecord:
        replica, caller, path = self.replica, self.caller, self._request.path
        key = None if replica is None else replica.key
        prompt: int | None = None
        cached: int | None = None
        completion: int | None = None
        reasoning: int | None = None
        if usage is not None:
            prompt, cached, completion, reasoning = usage.prompt, usage.cached, usage.completion, usage.reasoning
        return UsageRecord(
            time.time(),
            self.request_id,
            self.key_id,
            caller.name,
            self.label,
            "" if replica is None else replica.variant,
            "" if key is None else key.node,
            "" if key is None else key.instance,
            INFERENCE_TEXT.get(path) or recorded_path(path),
            status,
            prompt,
            cached,
            completion,
            reasoning,
            first_byte_secs,
            took,
            self.waited,
            self.cold,
            complete,
        )

    def _log(self, status: int, sent: int, usage: Usage | None, took: float, more: str) -> None:
        request, request_id, key = self._request, self.request_id, ""
        path = INFERENCE_TEXT.get(request.path) if request.method == b"POST" else None
        if usage is not None:
            more = f" prompt={usage.prompt} completion={usage.completion}{more}"
        if self.key_id:
            key = f" caller={self.caller.name}"
        if self.attempts > 1:
            key = f" attempts={self.attempts}{key}"
        if self.waited >= 0.001:
            key = f" waited={format(self.waited, '.3f')}{key}"
        # Compiled, a format within an f-string takes 8,000 instructions more, `format` 1,000.
        millis = int(took * 1000 + 0.5)
        secs, part = millis // 1000, _THOUSANDTHS[millis % 1000]
        self._context.access_log.line(
            f"{request.shown if path is None else _POSTED[path]} {status} model={self.label} node={self.node}"
            f" cold={'yes' if self.cold else 'no'} bytes={sent} secs={secs}{part} id={request_id}{key}{more}",
            request_id,
        )
