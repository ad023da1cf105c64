"""The outcome of a request, from the bytes that its client received. Strict: what is neither complete nor an
explicit error is a violation. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """How a request ended."""

    COMPLETE = "complete"
    ERROR = "error"  # a typed error: the whole answer, or the last event of a stream
    LEFT = "left"  # the client disconnected
    REFUSED = "refused"  # connection refused
    CUT = "cut"  # the connection ended before the answer did
    VIOLATION = "violation"


@dataclass(frozen=True)
class Outcome:
    """`code` is the error code; `detail` shows what is wrong."""

    kind: Kind
    code: str = ""
    detail: str = ""


COMPLETE = Outcome(Kind.COMPLETE)
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
_WHOLE = {"chat": "choices", "completions": "choices", "responses": "output", "messages": "content"}
_SHOWN = 400  # characters of an answer
_TORN = "torn"


@dataclass(frozen=True)
class Event:
    """A server-sent event; `data` is JSON, or the text `[DONE]`."""

    name: str
    data: Any


def of_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
    """An answer with a status other than 200: an error envelope, with Retry-After if it is temporary."""
    try:
        error = json.loads(body)["error"]
        code = str(error.get("code") or error["type"])
        said = error["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return _violation(f"{status} without an error envelope", body)
    if status < 400 or not said:
        return _violation(f"status {status}, error {error!r}", body)
    # An engine's own errors pass unchanged; their codes are numbers.
    if status in (429, 503) and isinstance(error.get("code"), str) and "Retry-After" not in headers:
        return _violation(f"{status} {code} without Retry-After", body)
    return Outcome(Kind.ERROR, code, said[:_SHOWN])


def of_whole(dialect: str, model_id: str, body: bytes) -> Outcome:
    """An answer in one piece."""
    try:
        answer = json.loads(body)
    except ValueError:
        return _violation("no JSON, although the answer ended normally", body)
    if not isinstance(answer, dict) or not answer.get(_WHOLE[dialect]):
        return _violation(f"no {_WHOLE[dialect]}", body)
    if answer.get("model") != model_id:
        return _violation(f"an answer of {answer.get('model')!r} to a request for {model_id!r}", body)
    return COMPLETE


def of_stream(dialect: str, model_id: str, body: bytes) -> Outcome:
    """A stream of events whose HTTP body ended normally."""
    try:
        events = parse_events(body)
    except ValueError as error:
        return _violation(f"not server-sent events: {error}", body)
    errors = [event for event in events if _is_error(event)]
    done = [event for event in events if _ends(dialect, event)]
    if errors:
        return _of_broken_stream(events, errors, done, body)
    if len(done) != 1 or events[-1] is not done[0]:
        return _violation("the stream ended without its last event and without an error", body)
    names = {str(name) for event in events if (name := _identity(event)) is not None}
    models = {model for event in events if (model := _model(event)) is not None}
    if len(names) != 1 or models != {model_id}:
        return _violation(f"spliced: ids {sorted(names)}, models {sorted(models)}", body)
    finished = sum(_finishes(event) for event in events)
    return COMPLETE if finished == 1 else _violation(f"{finished} choices finished", body)


def parse_events(body: bytes) -> list[Event]:
    """The events, without comments. Raises ValueError for anything else between them."""
    events: list[Event] = []
    for block in body.decode().split("\n\n"):
        name, data = "", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            if field == "event":
                name = value.strip()
            elif field == "data":
                data.append(value.strip())
            elif field:  # empty for a comment
                raise ValueError(f"the line {line[:80]!r}")
        text = "\n".join(data)
        if text == "[DONE]":
            events.append(Event(name, text))
        elif text:
            try:
                events.append(Event(name, json.loads(text)))
            except ValueError:
                # Part of an event whose engine was lost; the blank line before the error ends it.
                events.append(Event(_TORN, text))
    for number, event in enumerate(events):
        if event.name == _TORN and not any(map(_is_error, events[number + 1 : number + 2])):
            raise ValueError(f"{event.data[:80]!r} is not JSON, and no error follows")
    return events


def _of_broken_stream(events: list[Event], errors: list[Event], done: list[Event], body: bytes) -> Outcome:
    error = errors[0].data.get("error") or errors[0].data
    code = str(error.get("code") or error.get("type"))
    after = [event for event in events[events.index(errors[0]) + 1 :] if event.data != "[DONE]"]
    if len(errors) > 1 or after:
        return _violation(f"events after the error {code}", body)
    # When vLLM is stopped in the middle of an answer it sends an error and [DONE]; cortex passes both on.
    if done and code == "upstream_lost":
        return _violation("an error, although the answer ends like a complete one", body)
    return Outcome(Kind.ERROR, f"stream:{code}", str(error.get("message"))[:_SHOWN])


def _is_error(event: Event) -> bool:
    return isinstance(event.data, dict) and (
        isinstance(event.data.get("error"), dict) or event.data.get("type") == "error"
    )


def _ends(dialect: str, event: Event) -> bool:
    if dialect in ("chat", "completions"):
        return bool(event.data == "[DONE]")
    kinds = {"messages": ("message_stop",), "responses": ("response.completed", "response.incomplete")}[dialect]
    return isinstance(event.data, dict) and event.data.get("type") in kinds


def _identity(event: Event) -> object:
    """The id of the answer that the event belongs to."""
    if not isinstance(event.data, dict):
        return None
    inner = event.data.get("message") or event.data.get("response") or event.data
    return inner.get("id")


def _model(event: Event) -> str | None:
    if not isinstance(event.data, dict):
        return None
    inner = event.data.get("message") or event.data.get("response") or event.data
    model: str | None = inner.get("model")
    return model


def _finishes(event: Event) -> bool:
    """Whether the event says why an answer ended."""
    if not isinstance(event.data, dict):
        return False
    if event.data.get("type") in ("message_delta", "response.completed", "response.incomplete"):
        return True
    return any(choice.get("finish_reason") for choice in event.data.get("choices") or ())


def _violation(what: str, body: bytes) -> Outcome:
    shown = body.decode(errors="replace")
    if len(shown) > _SHOWN:
        shown = f"{shown[: _SHOWN // 2]} … {shown[-_SHOWN // 2 :]}"
    return Outcome(Kind.VIOLATION, detail=f"{what}: {shown!r}")
