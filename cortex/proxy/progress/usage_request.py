"""Asks the engines that a stream is sent to for its usage, and does without where one refuses to be asked."""

from __future__ import annotations

from time import monotonic

from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.usage_event import UnaskedUsage
from cortex.proxy.body.alias_edit import Splice, spliced
from cortex.proxy.body.request_fields import RequestFields
from cortex.proxy.body.usage_option import HAVE_OPTION, usage_splice
from cortex.routing.stream_usage import StreamUsage


class UsageRequest:
    """Belongs to one request for a stream whose client does not ask for usage."""

    __slots__ = ("_asks", "_engine", "_given_up", "_request", "_splice", "_taken")

    def __init__(self, request: Request, splice: Splice) -> None:
        self._request = request
        self._splice = splice
        self._taken = b""  # what the splice replaces
        self._asks = False  # the body has the splice
        self._engine = StreamUsage()  # that the request is sent to
        self._given_up = False  # that engine has refused the splice

    def prepare(self, engine: StreamUsage) -> None:
        """Makes the body fit the engine that gets it next."""
        if engine is not self._engine:
            self._engine, self._given_up = engine, False
        asks = not self._given_up and not engine.refuses(monotonic())
        if asks != self._asks:
            self._replace(asks=asks)

    def form(self, answer: Answer) -> Answer:
        """The form of that engine's answer."""
        return UnaskedUsage(answer, self._engine) if self._asks else answer

    def give_up(self) -> bool:
        """True if the engine has refused a body that is not the client's. Its error may be about the field, or describe
        the body, as vLLM's does: the request should be sent again without it."""
        if self._asks:
            self._given_up = True
        return self._asks

    def answered(self, status: int) -> None:
        """The request has its answer."""
        if self._given_up and status == 200:  # as the client sent it
            self._engine.refuse(monotonic())

    def _replace(self, *, asks: bool) -> None:
        request, (start, end, value) = self._request, self._splice
        if asks:
            self._taken = request.body[start:end]
            request.body = spliced(request.body, [(start, end, value)])
        else:
            request.body = spliced(request.body, [(start, start + len(value), self._taken)])
        self._asks = asks


def usage_request(request: Request, fields: RequestFields) -> UsageRequest | None:
    """For a request whose body has these fields; None if no engine has to be asked."""
    splice = usage_splice(request.body, fields) if request.path in HAVE_OPTION else None
    return None if splice is None else UsageRequest(request, splice)
