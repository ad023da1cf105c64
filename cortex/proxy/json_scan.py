"""Where a member of a JSON object stands in its bytes. Nothing is decoded, built or copied. Pure."""

from __future__ import annotations

import json
import re

MAX_STEPS = 100_000
"""Brackets, strings and (32 at a time) escapes that are looked at: well under 0.2 s. The body of a chat takes some
thousand, however long its texts are, since a string without escapes is one step."""

_SMALL_BODY_BYTES = 1 << 16
_QUOTE = ord('"')
_BACKSLASH = ord("\\")
_STRUCTURE = re.compile(rb'["\[\]{}]')
_BEFORE_VALUE = re.compile(rb"[\s:]*")
_SCALAR = re.compile(rb"[^,}\]\s]*")
# Part of a string, up to 32 escapes of it: bounded, because the regex engine keeps a record of each repetition.
_ESCAPES = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,32}', re.DOTALL)


class TooIntricateError(Exception):
    """More steps than MAX_STEPS: going on would hold up the event loop."""


def place_of_member(body: bytes, name: str) -> tuple[int, int]:
    """(start, end) of the value of the top-level member `name`, the last of several.

    `body` has to be known as a valid JSON object in UTF-8 that has such a member (a byte order mark, NaN and Infinity
    may be in it); `name` is ASCII.

    Raises:
        TooIntricateError: it would take too long.
        LookupError: there is no such member (not always noticed).
    """
    scan, written = _Scan(body), f'"{name}"'.encode()
    # A name is written plainly or with \u00XX: where the one stands once and the other not at all, it can be nowhere
    # else. That is a quarter of the walk's 13 us for a chat, but ten times its cost for a large image.
    if len(body) <= _SMALL_BODY_BYTES and body.count(written) == 1 and b"\\u00" not in body:
        return scan.value_at(body.find(written) + len(written))
    return scan.member(name)


class _Scan:
    """One pass over the body."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._steps = MAX_STEPS

    def member(self, name: str) -> tuple[int, int]:
        """The place of the value, found by a walk along the top level."""
        body, found = self._body, None
        longest, plain = len(name) * len(r"\u0000") + 2, f'"{name}"'.encode()
        position = body.find(b"{") + 1
        while (key := body.find(b'"', position)) >= 0:
            key_end = self._end_of_string(key)
            place = self.value_at(key_end)
            position = place[1]
            if key_end - key <= longest:
                written = body[key:key_end]
                if written == plain or (b"\\" in written and json.loads(written) == name):
                    found = place
        if found is None:
            raise LookupError(f"no {name!r} at the top of the object")
        return found

    def value_at(self, position: int) -> tuple[int, int]:
        """The place of the value whose name ends at `position`."""
        start = self._skip(_BEFORE_VALUE, position)
        return start, self._end_of_value(start)

    def _end_of_value(self, start: int) -> int:
        first = self._body[start : start + 1]
        if first == b'"':
            return self._end_of_string(start)
        if first in {b"[", b"{"}:
            return self._end_of_nested(start)
        return self._skip(_SCALAR, start)

    def _end_of_nested(self, start: int) -> int:
        body, depth, position = self._body, 0, start
        while (match := _STRUCTURE.search(body, position)) is not None:
            position = match.start()
            character = body[position]
            if character == _QUOTE:
                position = self._end_of_string(position)
                continue
            self._step()
            position += 1
            depth += 1 if character in b"[{" else -1
            if depth == 0:
                return position
        return len(body)

    def _end_of_string(self, start: int) -> int:
        """After the closing quote of the string that opens at `start`. One without escapes, such as an image, is one
        search for a byte."""
        body = self._body
        self._step()
        end = body.find(b'"', start + 1)
        if end < 0:
            return len(body)
        if body[end - 1] != _BACKSLASH:
            return end + 1
        end = start + 1
        while body[end : end + 1] not in {b'"', b""}:
            self._step()
            end = self._skip(_ESCAPES, end)
        return end + 1

    def _skip(self, pattern: re.Pattern[bytes], position: int) -> int:
        match = pattern.match(self._body, position)
        return position if match is None else match.end()

    def _step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise TooIntricateError(f"more than {MAX_STEPS} brackets and strings")
