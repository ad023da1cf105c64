"""The `response` object, from a chat's answer. Pure."""

from __future__ import annotations

from typing import Any, Final

from cortex.proxy.translation.chat_answer import UNFINISHED, abort_message
from cortex.proxy.translation.interface import Json
from cortex.proxy.translation.responses.output import COMPLETED, Output
from cortex.proxy.translation.responses.request import ChatRequest
from cortex.routing.response_owners import UNSTORED

IN_PROGRESS: Final = "in_progress"
INCOMPLETE: Final = "incomplete"
FAILED: Final = "failed"

_CUT_OFF: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}


class TranslatedResponse:
    """One response from its start to its end, with the same ids throughout."""

    def __init__(self, request: ChatRequest, unique: str, created_at: int) -> None:
        """`unique` is a part of every id, hexadecimal; `created_at` in Unix seconds."""
        self._request = request
        self._id = UNSTORED + unique
        self._created_at = created_at
        self.output = Output(request.tools, unique)
        self.finish_reason: str | None = None
        self.ended = False  # the engine has said that its answer is complete, perhaps without a reason
        self.usage: Json | None = None

    def note(self, answer: Json) -> None:
        """Takes the usage from a chunk, or from the whole answer."""
        usage = answer.get("usage")
        if isinstance(usage, dict):
            self.usage = usage

    @property
    def status(self) -> str:
        """What the response ends as: completed, incomplete or failed."""
        if self.failure() is not None:
            return FAILED
        return INCOMPLETE if self.finish_reason in _CUT_OFF else COMPLETED

    def failure(self) -> str | None:
        """Why the answer is not complete, in words, None if it is."""
        if self.finish_reason is None and not (self.ended and self.output.calls_are_complete):
            return UNFINISHED
        return abort_message(self.finish_reason)

    def view(self, status: str, error: Json | None = None) -> Json:
        """The object as a client gets it. `error`: `code` and `message`, for the status failed."""
        reason = _CUT_OFF.get(self.finish_reason or "") if status == INCOMPLETE else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": error,
            "incomplete_details": None if reason is None else {"reason": reason},
            "model": self._request.body.get("model"),
            "output": self.output.view(),
            **self._request.settings,
            # Last, because `upstream.tail` keeps only an answer's end, and tools may be long.
            "usage": None if status == IN_PROGRESS else _usage(self.usage),
        }


def _usage(usage: Json | None) -> Json | None:
    """Tokens as the Responses API counts them, None if the engine tells none."""
    if usage is None:
        return None
    read, written = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
    reasoning = _count(usage.get("completion_tokens_details"), "reasoning_tokens")
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": _count(usage, "total_tokens") or read + written,
    }


def _count(holder: Any, key: str) -> int:
    value = holder.get(key) if isinstance(holder, dict) else None
    return value if isinstance(value, int) else 0
