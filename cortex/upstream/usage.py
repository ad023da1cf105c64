"""The engine's token counts, read from the last bytes of an answer. Pure."""

from __future__ import annotations

import re
from json import JSONDecoder
from typing import Any

import msgspec

from cortex.upstream.usage_fields import Usage, UsageFields, decode_fields

_ATTEMPTS = 8
"""Objects that are read for one answer: a hostile one could hold hundreds in its last bytes, at 20 us each."""

_MOST_TOKENS = 1 << 53
"""Larger counts are invalid, and no float could hold them exactly."""

_NAME = b'"usage"'
# Behind the name. No string holds name and colon: its quotes are escaped, both that before and that behind `usage`.
_TO_OBJECT = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\{)")
_FRAMING = re.compile(rb"\r\n[0-9a-fA-F]+(?:;[^\r\n]*)?\r\n")
_read_json = JSONDecoder().raw_decode


def find_usage(tail: bytes | bytearray) -> Usage | None:
    """The last `usage` in the bytes that has counts; never raises.

    OpenAI's names (prompt_tokens, completion_tokens) and Anthropic's (input_tokens, output_tokens). Chunk sizes between
    the bytes do not matter, not even inside `usage`.
    """
    found = _last_usage(tail)
    if found is None and _FRAMING.search(tail) is not None:
        found = _last_usage(_FRAMING.sub(b"", tail))
    return found


def _last_usage(tail: bytes | bytearray) -> Usage | None:
    position, attempts = len(tail), _ATTEMPTS
    last: Usage | None = None
    while attempts and (position := tail.rfind(_NAME, 0, position)) >= 0:
        match = _TO_OBJECT.match(tail, position + len(_NAME))
        if match is None or tail[position - 1 : position] == b"\\":
            continue
        attempts -= 1
        try:
            found = _fields_at(tail, match.end())
        except (ValueError, RecursionError):
            continue
        usage = _usage_of(found)
        if usage is not None:
            last = usage if last is None else with_prompt(last, usage)
            if last.prompt:
                return last
    return last


def with_prompt(last: Usage, first: Usage) -> Usage:
    """What the last event of a stream counts, with the prompt that the first one counts: Anthropic's have each once."""
    return Usage(first.prompt, last.completion, first.cached, last.reasoning)


def _fields_at(tail: bytes | bytearray, start: int) -> UsageFields:
    """Of the JSON object whose brace is at `start`, whatever follows it. Raises ValueError, or RecursionError."""
    # The object usually ends at the first closing brace (the second if it has nested details). Try that slice first:
    # Python's parser must copy the rest of the answer and takes six times as long.
    end = tail.find(b"}", start)
    if tail.find(b"{", start + 1, end) >= 0:
        end = tail.find(b"}", end + 1)
    try:
        return decode_fields(tail[start : end + 1])
    except (msgspec.DecodeError, ValueError, RecursionError):
        found: dict[str, Any] = _read_json(tail[start:].decode("utf-8", "replace"))[0]
        return msgspec.convert(found, UsageFields)


def _usage_of(found: UsageFields) -> Usage | None:
    prompt, completion, details = found.prompt_tokens, found.completion_tokens, found.prompt_tokens_details
    more = found.completion_tokens_details
    if prompt is msgspec.UNSET and completion is msgspec.UNSET:
        prompt, completion, details = found.input_tokens, found.output_tokens, found.input_tokens_details
        more = found.output_tokens_details
        if prompt is msgspec.UNSET and completion is msgspec.UNSET:
            return None
    read = 0
    if details is not None:
        read = _detail(details, "cached_tokens")
        total = _count(prompt)
    else:  # Anthropic's prompt is the sum of three
        read = _count(found.cache_read_input_tokens)
        total = _count(prompt) + read + _count(found.cache_creation_input_tokens)
    return Usage(total, _count(completion), min(read, total), 0 if more is None else _detail(more, "reasoning_tokens"))


def _detail(details: object, name: str) -> int:
    return _count(details.get(name)) if isinstance(details, dict) else 0


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 < value <= _MOST_TOKENS else 0
