"""The engine's token counts, read from the last bytes of an answer. Pure."""

from __future__ import annotations

import re
from json import JSONDecoder
from typing import Any, Final

import msgspec
from msgspec import UNSET
from msgspec.structs import astuple

from cortex.upstream.usage_fields import UsageFields, decode_fields

_ATTEMPTS = 8
"""Objects that are read for one answer: a hostile one could hold hundreds in its last bytes, at 20 us each."""

_MOST_TOKENS = 1 << 53
"""Larger counts are invalid, and no float could hold them exactly."""

_NAME: Final = b'"usage"'
_COLON: Final = 58
_BRACE: Final = 123
_BLANKS: Final = (32, 9, 10, 13)
_FRAMING = re.compile(rb"\r\n[0-9a-fA-F]+(?:;[^\r\n]*)?\r\n")
_read_json = JSONDecoder().raw_decode


class Usage:
    """Tokens of one request. `cached` of the prompt came from the engine's prefix cache; `reasoning` of the completion
    are not part of the text."""

    __slots__ = ("cached", "completion", "prompt", "reasoning")

    def __init__(self, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> None:
        self.prompt = prompt
        self.completion = completion
        self.cached = cached
        self.reasoning = reasoning

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Usage) and self.counts == other.counts

    def __hash__(self) -> int:
        return hash(self.counts)

    def __repr__(self) -> str:
        return f"Usage{self.counts}"

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """All four, in the order of the arguments."""
        return self.prompt, self.completion, self.cached, self.reasoning


def find_usage(tail: bytes) -> Usage | None:
    """The last `usage` in the bytes that has counts; never raises.

    OpenAI's names (prompt_tokens, completion_tokens) and Anthropic's (input_tokens, output_tokens). Chunk sizes between
    the bytes do not matter, not even inside `usage`.
    """
    found = _last_usage(tail)
    if found is None and _FRAMING.search(tail) is not None:
        found = _last_usage(_FRAMING.sub(b"", tail))
    return found


def _last_usage(tail: bytes) -> Usage | None:
    before, attempts = tail, _ATTEMPTS
    last: Usage | None = None
    while attempts:
        before, name, _ = before.rpartition(_NAME)
        if not name:
            break
        start = _object_behind(tail, len(before) + len(_NAME))
        if start < 0 or before[-1:] == b"\\":
            continue
        attempts -= 1
        try:
            found = _fields_at(tail[start:])
        except (ValueError, RecursionError):
            continue
        usage = _usage_of(found)
        if usage is not None:
            last = usage if last is None else with_prompt(last, usage)
            if last.prompt:
                return last
    return last


def _object_behind(tail: bytes, place: int) -> int:
    """Where the object begins if a colon and an object are next, otherwise -1."""
    # No string holds name and colon: its quotes are escaped, both that before and that behind `usage`.
    colon = False
    while place < len(tail):
        byte = tail[place]
        if byte == _COLON and not colon:
            colon = True
        elif byte not in _BLANKS:
            return place if colon and byte == _BRACE else -1
        place += 1
    return -1


def with_prompt(last: Usage, first: Usage) -> Usage:
    """What the last event of a stream counts, with the prompt that the first one counts: Anthropic's have each once."""
    return Usage(first.prompt, last.completion, first.cached, last.reasoning)


def _fields_at(rest: bytes) -> UsageFields:
    """Of the JSON object at the start, whatever follows it. Raises ValueError, or RecursionError."""
    # The object usually ends at the first closing brace (the second if it has nested details). Try that slice first:
    # Python's parser must copy the rest of the answer and takes six times as long.
    end, nested = rest.find(b"}"), rest.find(b"{", 1)
    if 0 < nested < end:
        end = rest.find(b"}", end + 1)
    try:
        return decode_fields(rest[: end + 1])
    except (msgspec.DecodeError, ValueError, RecursionError):
        found: dict[str, Any] = _read_json(rest.decode("utf-8", "replace"))[0]
        return msgspec.convert(found, UsageFields)


def _usage_of(found: UsageFields) -> Usage | None:
    fields = astuple(found)  # compiled, reading each by itself would take three times as long
    prompt, completion, details, more = fields[:4]
    if prompt is UNSET and completion is UNSET:
        prompt, completion, details, more = fields[4:8]
        if prompt is UNSET and completion is UNSET:
            return None
    if details is not None:
        read = _detail(details, "cached_tokens")
        total = _count(prompt)
    else:  # Anthropic's prompt is the sum of three
        read = _count(fields[8])
        total = _count(prompt) + read + _count(fields[9])
    return Usage(total, _count(completion), min(read, total), 0 if more is None else _detail(more, "reasoning_tokens"))


def _detail(details: object, name: str) -> int:
    return _count(details.get(name)) if isinstance(details, dict) else 0


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 < value <= _MOST_TOKENS else 0
