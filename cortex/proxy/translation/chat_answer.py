"""Reads an engine's chat completion, whole or in chunks, in the shapes that engines give it. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from cortex.proxy.translation.interface import Json, engine_object, to_json

UNFINISHED: Final = "the engine ended its answer without a finish_reason"
"""What to tell the client of an answer that breaks off."""

_ABORTED: Final = ("abort", "error")
"""Finish reasons of an answer that is not complete."""


def choice_of(answer: Json) -> Json | None:
    """The only choice of a chunk or an answer, None without one: the last chunk may have only `usage`."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) else None


def said_in(choice: Json) -> Json | None:
    """What a choice says: its `delta`, or the `message` of a whole answer, which a few engines put into chunks too."""
    for said in (choice.get("delta"), choice.get("message")):
        if isinstance(said, dict):
            return said
    return None


def finish_reason_of(choice: Json) -> str | None:
    """Why the answer ends, None while it goes on: null or, in a few engines, empty."""
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason else None


def abort_message(reason: str | None) -> str | None:
    """What to tell the client of an answer that the engine gave up, None for a reason that completes it."""
    if reason not in _ABORTED:
        return None
    return f"the engine stopped in the middle of its answer (finish_reason {reason!r})"


def content_text(value: Any) -> str:
    """A string, or the texts of a list of parts; "" for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))


def reasoning_of(said: Json) -> str:
    """What the model thought: `reasoning_content`, or `reasoning` in vLLM and Ollama."""
    return content_text(said.get("reasoning_content")) or content_text(said.get("reasoning"))


def as_stream(body: bytes) -> bytes | None:
    """A complete chat completion as the event stream that an engine would have sent, None for anything else."""
    found = engine_object(body)
    choice = None if found is None else choice_of(found)
    if choice is None or said_in(choice) is None:
        return None
    return b"data: %b\n\ndata: [DONE]\n\n" % to_json(found)


class ChatCall:
    """A call of a function as far as it has come. `call_id` and `name` are "" until the engine tells them."""

    __slots__ = ("_pieces", "_read", "call_id", "index", "name")

    def __init__(self, index: Any) -> None:
        self.index = index  # the engine's number, None without one
        self.call_id = ""
        self.name = ""
        self._pieces: list[str] = []
        self._read = 0  # of the pieces

    @property
    def arguments(self) -> str:
        """All that has come, as JSON text."""
        return "".join(self._pieces)

    def more_arguments(self) -> str:
        """What has come since the last call of this method."""
        new, self._read = self._pieces[self._read :], len(self._pieces)
        return "".join(new)

    def input(self) -> Json | None:
        """The arguments, None unless they are a JSON object. No arguments are {}."""
        text = self.arguments
        try:
            found = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def add(self, call_id: str, name: str, arguments: str) -> None:
        self.call_id = self.call_id or call_id
        self.name = self.name or name
        if arguments:
            self._pieces.append(arguments)


class ChatCalls:
    """The calls of one answer, in the order in which they begin."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[ChatCall] = []

    @property
    def complete(self) -> bool:
        """All have a name and readable arguments."""
        return all(call.name and call.input() is not None for call in self.found)

    def take(self, choice: Json) -> Iterator[ChatCall]:
        """Adds what a choice says of calls; yields each call that it says more of. A message, unlike a delta, has each
        call in one piece."""
        said = said_in(choice) or {}
        whole = said is choice.get("message")
        given = said.get("tool_calls")
        for piece in given if isinstance(given, list) else ():
            if isinstance(piece, dict):
                yield self._add(piece, whole=whole)

    def _add(self, piece: Json, *, whole: bool) -> ChatCall:
        function = piece.get("function")
        function = function if isinstance(function, dict) else {}
        call_id, name, arguments = piece.get("id"), function.get("name"), function.get("arguments")
        call_id = call_id if isinstance(call_id, str) else ""
        name = name if isinstance(name, str) else ""
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):  # a few engines send the object itself
            arguments = to_json(arguments).decode()
        index = piece.get("index")
        call = None if whole else self._continued(index, call_id, name, arguments)
        if call is None:
            call = ChatCall(index)
            self.found.append(call)
        call.add(call_id, name, arguments)
        return call

    def _continued(self, index: Any, call_id: str, name: str, arguments: str) -> ChatCall | None:
        """The call that a piece continues, None if it begins one. Not every engine numbers its calls or gives them ids;
        some use one number for all."""
        calls = self.found
        if index is not None:
            calls = [call for call in calls if call.index == index]
        elif call_id:
            calls = [call for call in calls if call.call_id == call_id] or calls
        if not calls:
            return None
        last = calls[-1]
        if not name or not last.name:
            return last
        if call_id and call_id == last.call_id:
            return last
        nameless = index is None and not call_id
        begins = nameless or (call_id and last.call_id) or (arguments and last.arguments and last.input() is not None)
        return None if begins else last
