"""Affinity keys: requests with the same session header or the same beginning of a prompt go to the same engine, which
still has that prefix in its cache. Pure.

Only the beginning of a prompt is decoded: msgspec skips the rest in C and creates only the first elements of arrays. A
body costs about as much as in `find_model`, whatever it contains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TypeAlias

import msgspec

_LONGEST_CHARACTER = len(r"\ud83d\ude00")  # bytes of one character in JSON, at most
_USER = b'"user"'
_QUOTE = ord('"')
_LIST = ord("[")
_NO_VALUE = (b"", b"null")
# Complete escapes only: the beginning of a string may end within one.
_WHOLE_ESCAPES = re.compile(r'[^"\\]*(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*)*')
_unescaped = json.JSONDecoder(strict=False).raw_decode  # accepts lone surrogates, unlike msgspec


class _Message(msgspec.Struct, gc=False):
    """Also an item of `input`, or a part of a message's content."""

    role: msgspec.Raw = msgspec.Raw(b"")
    content: msgspec.Raw = msgspec.Raw(b"")
    text: msgspec.Raw = msgspec.Raw(b"")


class _Messages(msgspec.Struct, array_like=True, gc=False):
    """The first messages of an array of any length. They include a conversation's first user message: rarely more than
    two with instructions come before it."""

    first: _Message | None = None
    second: _Message | None = None
    third: _Message | None = None
    fourth: _Message | None = None
    fifth: _Message | None = None
    sixth: _Message | None = None


class _Items(msgspec.Struct, array_like=True, gc=False):
    """The first elements of any other array."""

    first: msgspec.Raw = msgspec.Raw(b"")
    second: msgspec.Raw = msgspec.Raw(b"")
    third: msgspec.Raw = msgspec.Raw(b"")
    fourth: msgspec.Raw = msgspec.Raw(b"")


class _Chat(msgspec.Struct, gc=False):
    """A body for `/v1/chat/completions`, or for Anthropic's `/v1/messages`."""

    system: msgspec.Raw = msgspec.Raw(b"")
    messages: _Messages | None = None


class _Completion(msgspec.Struct, gc=False):
    """`/v1/completions`."""

    prompt: msgspec.Raw = msgspec.Raw(b"")


class _Response(msgspec.Struct, gc=False):
    """`/v1/responses`."""

    instructions: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


_Prompt: TypeAlias = _Chat | _Completion | _Response

_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_completion = msgspec.json.Decoder(_Completion).decode
_decode_response = msgspec.json.Decoder(_Response).decode
_decode_messages = msgspec.json.Decoder(_Messages).decode
_decode_items = msgspec.json.Decoder(_Items).decode
_decode_part = msgspec.json.Decoder(_Message).decode

_DECODERS: dict[bytes, Callable[[bytes], _Prompt]] = {
    b"/v1/chat/completions": _decode_chat,
    b"/v1/messages": _decode_chat,
    b"/v1/completions": _decode_completion,
    b"/v1/responses": _decode_response,
}


class Affinity:
    """Computes the key of a request. Requests with the same key belong on the same engine."""

    __slots__ = ("_chars", "_header")

    def __init__(self, session_header: str, prefix_chars: int) -> None:
        """`session_header`: the header that takes precedence over the prompt, empty for none. The first `prefix_chars`
        characters of a prompt count."""
        self._header = session_header.lower().encode() + b":" if session_header else b""
        self._chars = prefix_chars

    def key(self, path: bytes, header_lines: Iterable[bytes], body: bytes) -> int | None:
        """64 bits, the same in every process. None for a path or body without a prompt, and for a body of the wrong
        shape, which the engine will refuse."""
        decode = _DECODERS.get(path)
        if decode is None:
            return None
        header = self._header
        if header:
            size = len(header)
            for line in header_lines:
                if line[:size].lower() == header and (session := line[size:].strip()):
                    return _digest(session)
        if not self._chars:
            return None
        try:
            text = _beginning(decode(body), self._chars)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        return _digest(text.encode("utf-8", "surrogatepass")) if text else None


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def _beginning(prompt: _Prompt, room: int) -> str:
    """The prompt's first `room` characters. Of a conversation only the messages up to the first user message count,
    because the next turn appends to the rest."""
    if isinstance(prompt, _Completion):
        return _text(memoryview(prompt.prompt), room)
    if isinstance(prompt, _Response):
        text, rest = _text(memoryview(prompt.instructions), room), memoryview(prompt.input)
        if len(text) >= room:
            return text
        if _holds(rest, b"{"):
            return text + _conversation(_decode_messages(rest), room - len(text))
        return text + _text(rest, room - len(text))
    text = _text(memoryview(prompt.system), room)
    return text if prompt.messages is None else text + _conversation(prompt.messages, room - len(text))


def _conversation(messages: _Messages, room: int) -> str:
    text = ""
    for message in (
        messages.first,
        messages.second,
        messages.third,
        messages.fourth,
        messages.fifth,
        messages.sixth,
    ):
        if message is None or len(text) >= room:
            break
        text += _text(memoryview(message.content), room - len(text))
        role = memoryview(message.role)
        if len(role) == len(_USER) and role == _USER:
            break
    return text


def _text(value: memoryview, room: int) -> str:
    """The first `room` characters of a string, of an array of strings or parts, or of the JSON of anything else (token
    ids). `value` is valid JSON, or empty."""
    if room <= 0 or value in _NO_VALUE:
        return ""
    first = value[0]
    if first == _QUOTE:
        return _string(value, room)
    if first != _LIST or not (_holds(value, b'"') or _holds(value, b"{")):
        return _raw(value, room)
    text = ""
    items = _decode_items(value)
    for item in (items.first, items.second, items.third, items.fourth):
        element = memoryview(item)
        if element:
            text += _part(element, room - len(text))
    return text


def _part(part: memoryview, room: int) -> str:
    """The first `room` characters of a string or of a part's text; for an image or the like, characters from its
    inside, because images of one camera begin alike. The place stays the same if a client adds a few bytes to the part
    in the next turn."""
    if room <= 0:
        return ""
    if part[0] == _QUOTE:
        return _string(part, room)
    if part[0] == ord("{"):
        text = memoryview(_decode_part(part).text)
        if text and text[0] == _QUOTE:
            return _string(text, room)
    if len(part) <= room:
        return _raw(part, room)
    return _raw(part[1 << (len(part).bit_length() - 2) :], room)


def _string(string: memoryview, room: int) -> str:
    """The first characters of a JSON string, without decoding all of it."""
    inside = string[1:-1]
    text = ""
    for longest in (2, _LONGEST_CHARACTER):  # most texts escape line ends and quotes only
        text = str(inside[: room * longest], "utf-8", "ignore")
        if "\\" in text:
            whole = _WHOLE_ESCAPES.match(text)
            text = "" if whole is None else _unescaped(f'"{whole[0]}"')[0]
        if len(text) >= room:
            break
    return text[:room]


def _raw(value: memoryview, room: int) -> str:
    return str(value[:room], "latin-1")


def _holds(value: memoryview, first: bytes) -> bool:
    """True for an array whose first element begins with `first`."""
    return bytes(value[:64]).lstrip(b"[ \t\r\n").startswith(first) and value[0] == _LIST
