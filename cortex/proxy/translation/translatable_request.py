"""A request whose path the engine may lack: sent as it is, or translated to chat completions."""

from __future__ import annotations

import logging
from time import monotonic

from cortex.accounts.caller import Caller
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.held_answer import HeldAnswer
from cortex.proxy.answers.keep_alive import KeepAliveStream
from cortex.proxy.context import ProxyContext
from cortex.proxy.progress.state import Sent
from cortex.proxy.relay import Relay
from cortex.proxy.request_handler import RequestHandler
from cortex.proxy.translation.dialects import TRANSLATORS
from cortex.proxy.translation.interface import CHAT_PATH, Translation
from cortex.proxy.translation.probing_relay import ProbingRelay
from cortex.proxy.translation.translated_answer import TranslatedAnswer
from cortex.routing.replica import FailureKind, Refusal, Replica, ServedPaths
from cortex.upstream.address import Address
from shared.errors import InvalidRequest, ServiceError
from shared.request_ids import request_scope

log = logging.getLogger(__name__)


class TranslatableRequest(RequestHandler):
    """Implements `ProbeListener` as well. Each engine gets the client's own request unless it is known to lack the
    path; one that turns out to lack it gets the translation at once, before the client hears anything."""

    __slots__ = ("_held", "_translation")

    def __init__(self, context: ProxyContext, client: ClientConnection, request: Request, caller: Caller) -> None:
        super().__init__(context, client, request, caller)
        self._translation: Translation | None = None  # of the current attempt
        self._held: HeldAnswer | None = None  # of the first engine that lacked the path

    def lacks_path(self, held: HeldAnswer) -> None:
        state, self._state = self._state, None
        assert isinstance(state, Sent)
        replica, path = state.replica, self._request.path
        # Its place at a replica with a limit is kept: the same engine gets the request again.
        self._context.uncount(replica, self._account.key_id)
        self._held = held
        self._context.missing_paths.add(replica, path, monotonic())
        with request_scope(self._account.request_id):
            log.info("%s on %s has no %s: translating", replica.model_id, replica.node, path.decode("latin-1"))
        self._account.attempts -= 1  # it was the same engine
        self._send(replica, compared=state.compared)

    def _is_able(self, served: ServedPaths) -> bool:
        return super()._is_able(served) or served.has(CHAT_PATH)

    def refused(self, status: int, refusal: Refusal) -> bool:
        translation = self._translation
        if translation is not None and translation.path != CHAT_PATH and refusal == "strange":
            return False  # an engine without this path, such as `/tokenize`, is still the model's
        return super().refused(status, refusal)

    def done(self) -> None:
        state = self._state
        if self._translation is not None and isinstance(state, Sent) and state.relay.status in (404, 405):
            self._context.missing_paths.forget(state.replica, self._request.path)  # what it lacked was the model
        super().done()

    def _send(self, replica: Replica, *, compared: bool) -> None:
        request = self._request
        request.restore()
        self._translation = None
        if self._account.cold and self._held is None:
            self._context.missing_paths.forget(replica, request.path)  # it has just been loaded
        if self._context.missing_paths.lacks(replica, request.path, monotonic()):
            try:
                self._translation = _translated(request, replica)
            except ServiceError as error:
                path, now = request.path, monotonic()
                self._divert(replica, error, lambda each: not self._context.missing_paths.lacks(each, path, now))
                return
            request.translate(self._translation.path, self._translation.body)
        super()._send(replica, compared=compared)

    def _new_relay(self, replica: Replica, address: Address, head: bytes, answer: Answer) -> Relay:
        if self._translation is not None:
            return super()._new_relay(replica, address, head, answer)
        relay = ProbingRelay(self._context.pool, self._request, self, address=address, head=head, answer=answer)
        relay.probe = self
        return relay

    def _new_answer(self, extra: bytes) -> Answer:
        return self._translated(super()._new_answer(extra))

    def _deferred(self, keep_alive: KeepAliveStream) -> Answer:
        return self._translated(super()._deferred(keep_alive))

    def _translated(self, answer: Answer) -> Answer:
        translation = self._translation
        if translation is None:
            return answer
        return TranslatedAnswer(answer, translation, self._held if translation.path == CHAT_PATH else None)

    def _fail(self, reason: str, kind: FailureKind) -> None:
        if isinstance(self._state, Sent):
            self._context.missing_paths.forget(self._state.replica, self._request.path)  # it may come back changed
        super()._fail(reason, kind)


def _translated(request: Request, replica: Replica) -> Translation:
    try:
        return TRANSLATORS[request.path](request.body, f"{replica.model_id} on {replica.node}")
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
