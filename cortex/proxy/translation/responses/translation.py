"""One request of the Responses API on an engine that has only chat completions."""

from __future__ import annotations

import time
import uuid

from cortex.proxy.answers.error_event import MAX_QUOTED
from cortex.proxy.translation.chat_answer import choice_of, finish_reason_of, said_in
from cortex.proxy.translation.chat_stream import error_message
from cortex.proxy.translation.interface import (
    CHAT_PATH,
    Json,
    StreamTranslation,
    Translation,
    WholeAnswer,
    engine_object,
    to_json,
)
from cortex.proxy.translation.lacking import lacks_chats, lacks_path
from cortex.proxy.translation.responses.request import ChatRequest, chat_request
from cortex.proxy.translation.responses.response import TranslatedResponse
from cortex.proxy.translation.responses.stream import ResponseStream
from cortex.proxy.translation.token_count import TokenCount
from shared.errors import InvalidRequest, UpstreamError
from shared.protocol import ErrorCode

RESPONSES_PATH = b"/v1/responses"


class ResponsesTranslation:
    """Implements `interface.Translation`."""

    __slots__ = ("_engine", "_response", "_streams", "body", "path")

    def __init__(self, body: bytes, engine: str) -> None:
        """Raises as `interface.Translator`."""
        request = _chat_request(body, engine)
        self._engine = engine
        self.path = CHAT_PATH
        self.body = to_json(request.body)
        self._streams = request.body.get("stream") is True
        self._response = TranslatedResponse(request, uuid.uuid4().hex, int(time.time()))

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        found = engine_object(body)
        if status >= 400:
            return _engine_error(self._engine, status, body, found)
        choice = None if found is None else choice_of(found)
        if found is None or choice is None or said_in(choice) is None:
            if found is not None and found.get("error"):
                return _error(f"{self._engine} answered {status}: {error_message(found)}", None)
            return _error(f"{self._engine} answered {status} without a chat completion", None)
        response = self._response
        response.note(found)
        response.finish_reason = finish_reason_of(choice)
        response.ended = True
        for _ in response.output.take(choice):
            pass  # the events are for streams
        failure = response.failure()
        if failure is not None:
            return _error(failure, None)
        for _ in response.output.close(response.status):
            pass
        return WholeAnswer(200, to_json(response.view(response.status)))

    def stream(self) -> StreamTranslation | None:
        return ResponseStream(self._response) if self._streams else None


class InputTokenCount(TokenCount):
    """`/v1/responses/input_tokens`."""

    def __init__(self, body: bytes, engine: str) -> None:
        """Raises as `interface.Translator`."""
        super().__init__(_chat_request(body, engine).body)
        self._engine = engine

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        found = self.count(status, body)
        if found is None:
            return _engine_error(self._engine, status, body, engine_object(body))
        return WholeAnswer(200, to_json({"object": "response.input_tokens", **found}))


def refuse_compaction(body: bytes, engine: str) -> Translation:
    """The `interface.Translator` of `/v1/responses/compact`: a chat has no state that could be made shorter.

    Raises:
        InvalidRequest: always.
    """
    raise InvalidRequest(
        f"{engine} has only {CHAT_PATH.decode()} and cannot compact a conversation: summarize it with a request of your"
        " own, or send fewer items",
        permanent=True,
    )


def _chat_request(body: bytes, engine: str) -> ChatRequest:
    try:
        return chat_request(body)
    except InvalidRequest as error:
        message = f"{error.message} ({engine} has no {RESPONSES_PATH.decode()}, only {CHAT_PATH.decode()})"
        raise InvalidRequest(message, param=error.param, permanent=True) from error


def _engine_error(engine: str, status: int, body: bytes, found: Json | None) -> WholeAnswer:
    if status in (404, 405) and lacks_path(status, body):
        return _error(lacks_chats(engine, RESPONSES_PATH.decode()), status)
    if found is not None and isinstance(found.get("error"), dict):
        return WholeAnswer(status, body)
    said = error_message(found) if found is not None else body[:MAX_QUOTED].decode("utf-8", "replace").strip()
    return _error(f"{engine} answered {status}: {said}", status)


def _error(message: str, status: int | None) -> WholeAnswer:
    error = UpstreamError(message, code=ErrorCode.UPSTREAM_ERROR, status=status)
    return WholeAnswer(error.status, to_json(error.body()))
