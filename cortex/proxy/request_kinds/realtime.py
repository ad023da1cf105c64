"""A WebSocket to `/v1/realtime`: finds an engine as for any request, then passes bytes in both directions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qsl, urlencode

from cortex.accounts.caller import Caller
from cortex.config.aliases import Rewrite
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.upgrade import UpgradeAnswer
from cortex.proxy.context import ProxyContext
from cortex.proxy.progress.state import Sent
from cortex.proxy.request_handler import RequestHandler
from shared.errors import InvalidRequest, Unauthorized
from shared.request_ids import request_scope

log = logging.getLogger(__name__)

_ENDED: Final = "the API key of this WebSocket is no longer valid"


class RealtimeRequest(RequestHandler):
    """The model is in the query, because the first message, which names it too, comes after the handshake.

    A WebSocket may stay open for days, so unlike other requests it ends with its key.
    """

    __slots__ = ("_is_current",)

    def __init__(
        self,
        context: ProxyContext,
        client: ClientConnection,
        request: Request,
        caller: Caller,
        *,
        is_current: Callable[[], bool],
    ) -> None:
        """`is_current`: whether the caller's key is still valid."""
        super().__init__(context, client, request, caller)
        self._is_current = is_current

    def begin(self) -> None:
        request = self._request
        path, _, query = request.target.partition(b"?")
        given = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        model = dict(given).get("model") or self._context.default_model
        if not model:
            self._refuse(InvalidRequest("the query must name the model: /v1/realtime?model=MODEL", param="model"))
            return
        request.upgrading, self._account.asked = True, model
        rewrite = self._context.control.aliases.get(model) or Rewrite(model, model)
        if rewrite.model_id != dict(given).get("model"):
            rest = [(name, value) for name, value in given if name != "model"]
            request.target = path + b"?" + urlencode([*rest, ("model", rewrite.model_id)]).encode()
        self._admit(rewrite.name, rewrite.model_id)

    def tick(self, now: float) -> None:
        super().tick(now)
        state = self._state
        if isinstance(state, Sent) and state.relay.status and not self._is_current():
            state.relay.cut_off(_ENDED)

    def lost(self, reason: str) -> None:
        state = self._state
        if reason != _ENDED or not isinstance(state, Sent):
            super().lost(reason)
            return
        with request_scope(self._account.request_id):
            log.info("WebSocket closed: %s", reason)
        state.relay.end_lost(Unauthorized(reason))

    def _new_answer(self, extra: bytes) -> Answer:
        return UpgradeAnswer(self._client, self._request, extra=extra)
