"""What an engine's error says of the engine, if anything. Pure."""

from __future__ import annotations

import re
from typing import Final

from cortex.http.heads import ResponseHead
from cortex.routing.replica import STRANGE, UNAVAILABLE, Refusal

TOLD_BY_BODY: Final = frozenset({400, 500})
"""The statuses of which the body says whether the engine or the request is at fault."""

_ASLEEP: Final = b"x-neuron-sleeping:"
"""The header of the 503 from an engine that sleeps and could answer once woken."""

_UNKNOWN_MODEL: Final = re.compile(
    rb"model_not_found|model[^{}]{0,600}(?:not found|not exist|not loaded)", re.IGNORECASE
)
"""In an answer with 400: most engines answer 404 for a model that they do not have, some 400."""

_DEAD: Final = re.compile(
    rb'"message": ?"(?:EngineCore encountered an issue\.|cannot schedule new futures after (?:interpreter )?shutdown)'
)
"""In an answer with 500: vLLM's API server outlives its core by a second or more and answers every request with the
first; while it stops, with the second (both seen with 0.32, and on all paths). SGLang and llama.cpp end with their
engine, so a connection is lost instead."""


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
