"""What an engine's error says of the engine, if anything. Pure."""

from __future__ import annotations

import re
from typing import Final

from cortex.http.heads import ResponseHead
from cortex.routing.replica import STRANGE, UNAVAILABLE, Refusal

TOLD_BY_BODY: Final = frozenset({400, 500})
"""With these statuses only the body says whether the engine or the request is at fault."""

_ASLEEP: Final = b"x-neuron-sleeping:"
"""The header of the 503 from an engine that sleeps and could answer once woken."""

_UNKNOWN_MODEL: Final = re.compile(
    rb"model_not_found|model[^{}]{0,600}(?:not found|not exist|not loaded)", re.IGNORECASE
)
"""In an answer with 400: most engines answer 404 for a model that they do not have, some 400."""

_DEAD_TEXT: Final = (
    rb"(?:EngineCore encountered an issue\.|cannot schedule new futures after (?:interpreter )?shutdown)"
)
"""vLLM's API server outlives its core by a second or more and answers every request with the first; while it stops,
with the second (both seen with 0.32, on all paths). SGLang and llama.cpp end with their engine: a connection is lost
instead."""

_DEAD: Final = re.compile(rb'"message": ?"' + _DEAD_TEXT)
_DEAD_STREAM: Final = re.compile(
    rb"(?:[0-9a-fA-F]+\r\n)?(?:event: error\n)?data: "
    rb'\{(?:"type": ?"error", ?)?"error": ?\{(?:"type": ?"[a-z_]*", ?)?"message": ?"(?:'
    + _DEAD_TEXT
    # vLLM 0.32's `/v1/messages` fails to read its own error, which pydantic shortens.
    + rb"|\d+ validation errors? for ChatCompletionStreamResponse.{0,200}\{'error': \{'message': 'En\.\.\.)",
    re.DOTALL,
)
"""The same as the first event of a stream, with or without the framing of its chunk."""

_ERROR_WITHIN: Final = 48
"""An event that is an error says so in its first bytes."""


def starts_dead(body: bytes) -> bool:
    """True if a successful answer begins with an event that says that the engine is dead: it died after the head, while
    the request waited for its first token. `body`: the first bytes, as they came."""
    return b"error" in body[:_ERROR_WITHIN] and _DEAD_STREAM.match(body) is not None


def refusal_of(head: ResponseHead, body: bytes) -> Refusal | None:
    """What an answer with a status of 400 or more says of the engine; None if it is about the request. `body`: what
    there is of it."""
    status = head.status
    if status in UNAVAILABLE:
        asleep = any(line[: len(_ASLEEP)].lower() == _ASLEEP for line in head.passed)
        return "asleep" if asleep else "unavailable"
    if status == 500:
        return "dead" if _DEAD.search(body) is not None else None
    if status not in STRANGE or (status == 400 and _UNKNOWN_MODEL.search(body) is None):
        return None
    return "strange"
