"""One request of the Responses API on an engine that has only chat completions."""

from __future__ import annotations

import time
import uuid

from cortex.proxy.answers.error_event import MAX_QUOTED
from cortex.proxy.translation.chat_stream import error_message
from cortex.proxy.translation.interface import CHAT_PATH, Json, StreamTranslation, WholeAnswer, engine_object, to_json
from cortex.proxy.translation.lacking import lacks_path
from cortex.proxy.translation.responses.request import chat_request
from cortex.proxy.translation.responses.response import FAILED, TranslatedResponse, choice_of, logprobs_of
from cortex.proxy.translation.responses.stream import ResponseStream
from shared.errors import InvalidRequest, UpstreamError
from shared.protocol import ErrorCode

RESPONSES_PATH = b"/v1/responses"


class ResponsesTranslation:
    """Implements `interface.Translation`."""

    __slots__ = ("_engine", "_response", "body", "path")

    def __init__(self, body: bytes, engine: str) -> None:
        """Raises InvalidRequest, which names the engine, for what a chat cannot express."""
        try:
            request = chat_request(body)
        except InvalidRequest as error:
            message = f"{error.message} ({engine} has no {RESPONSES_PATH.decode()}, only {CHAT_PATH.decode()})"
            raise InvalidRequest(message, param=error.param, permanent=True) from error
        self._engine = engine
        self.path = CHAT_PATH
        self.body = to_json(request.body)
        self._response = TranslatedResponse(request, uuid.uuid4().hex, int(time.time()))

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        found = engine_object(body)
        if status >= 400:
            return self._engine_error(status, body, found)
        choice = None if found is None else choice_of(found)
        message = None if choice is None else choice.get("message")
        if found is None or choice is None or not isinstance(message, dict):
            return _error(f"{self._engine} answered {status} without a chat completion", None)
        response = self._response
        response.note(found)
        reason = choice.get("finish_reason")
        response.finish_reason = reason if isinstance(reason, str) else None
        if response.status == FAILED:
            return _error(response.failure(), None)
        for _ in response.output.take(message, logprobs_of(choice)):
            pass  # the events are for streams
        for _ in response.output.close(response.status):
            pass
        return WholeAnswer(200, to_json(response.view(response.status)))

    def _engine_error(self, status: int, body: bytes, found: Json | None) -> WholeAnswer:
        if status in (404, 405) and lacks_path(status, body):
            paths = f"neither {RESPONSES_PATH.decode()} nor {CHAT_PATH.decode()}"
            return _error(f"{self._engine} has {paths}: this model does not answer such requests", status)
        if found is not None and isinstance(found.get("error"), dict):
            return WholeAnswer(status, body)
        said = error_message(found) if found is not None else body[:MAX_QUOTED].decode("utf-8", "replace").strip()
        return _error(f"{self._engine} answered {status}: {said}", status)

    def stream(self) -> StreamTranslation:
        return ResponseStream(self._response)


def _error(message: str, status: int | None) -> WholeAnswer:
    error = UpstreamError(message, code=ErrorCode.UPSTREAM_ERROR, status=status)
    return WholeAnswer(error.status, to_json(error.body()))
