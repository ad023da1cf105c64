"""What a translation between a client's dialect and an engine's chat completions is. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from shared.errors import InvalidRequest

Json: TypeAlias = dict[str, Any]

CHAT_PATH = b"/v1/chat/completions"


class WholeAnswer(NamedTuple):
    """An answer that is not a stream: its HTTP status and its JSON body."""

    status: int
    body: bytes


class StreamTranslation(Protocol):
    """Translates one event stream. Both methods return bytes of the client's event stream, whole events only, b"" if
    there is nothing to say yet.

    After an event that reports an error, or the last event, both return b"".
    """

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes of the engine's stream, split anywhere. An error event of the engine becomes one in the
        client's dialect; so does a chunk that is not JSON."""

    def finish(self) -> bytes:
        """The engine has ended its stream in order, with or without `[DONE]`. Without a finish reason the answer is not
        complete: returns an error event, never a normal end.

        Not called when the engine is lost: the relay then adds the error event of the client's path.
        """


class Translation(Protocol):
    """Translates one request and its answer. One object for each attempt at an engine, made by a `Translator` from the
    client's body."""

    @property
    def path(self) -> bytes:
        """The engine's path, such as `/v1/chat/completions`; no query."""

    @property
    def body(self) -> bytes:
        """The JSON body for the engine. It asks for a stream if the client's does, then with `usage`
        (`stream_options`)."""

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        """Translates a complete answer of the engine that is not a stream, an error included: that keeps its status and
        gets the dialect's shape. Never raises: a success that cannot be read becomes an error with status 502."""

    def stream(self) -> StreamTranslation | None:
        """None unless the client has asked for a stream. Used instead of `answer` if the engine answers 200 with an
        event stream or, although it was asked for one, with a complete answer."""


Translator: TypeAlias = Callable[[bytes, str], Translation]
"""Makes the translation of a client's body (JSON, `model` already without alias) for the engine described by the second
argument, such as "org/model on node-1", for messages.

Raises InvalidRequest, which names the field, the engine and what to do, for what chat completions cannot express."""


def read_object(body: bytes) -> Json:
    """The JSON object that a client sent.

    Raises:
        InvalidRequest: it is not one.
    """
    try:
        found = _read(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest("the body must be a JSON object")
    return found


def engine_object(body: bytes) -> Json | None:
    """The JSON object that an engine sent, None if it is not one."""
    try:
        found = _read(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def to_json(value: Any) -> bytes:
    """`value` as JSON. Half a surrogate pair, which UTF-8 cannot express, is escaped."""
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError):  # OverflowError: an integer of more than 64 bits
        return json.dumps(value).encode()


def _read(body: bytes) -> Any:
    """msgspec is five times as fast, and json accepts what it refuses: NaN, lone surrogates, a byte order mark."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(body)


def event(name: str, data: Json) -> bytes:
    """A server-sent event with a name."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(data))
