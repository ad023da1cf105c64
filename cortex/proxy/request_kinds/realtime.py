"""A WebSocket to `/v1/realtime`: finds an engine as for any request, then passes bytes in both directions."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

from cortex.config.aliases import Rewrite
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.upgrade import UpgradeAnswer
from cortex.proxy.request_handler import RequestHandler
from shared.errors import InvalidRequest


class RealtimeRequest(RequestHandler):
    """The model is in the query, because the first message, which names it too, comes after the handshake."""

    __slots__ = ()

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

    def _new_answer(self, extra: bytes) -> Answer:
        return UpgradeAnswer(self._client, self._request, extra=extra)
