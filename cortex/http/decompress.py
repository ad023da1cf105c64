"""Compressed request bodies. Pure."""

from __future__ import annotations

import zlib

from shared.errors import InvalidRequest, RequestTooLarge

MAX_LAYERS = 4
"""Codings stacked on one body: each costs us a pass over it, and the sender one word."""
MAX_MEMBERS = 64
"""Members of a gzip body: we copy the rest after each, and an empty one costs the sender 20 bytes."""


def unpack(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """The body without its Content-Encoding.

    Raises:
        InvalidRequest: the encoding is unsupported, or the body is not in it.
        RequestTooLarge: the result exceeds `max_bytes`.
    """
    names = [token.strip().lower() for token in encoding.split(b",")]
    if len(names) > MAX_LAYERS:
        raise InvalidRequest(f"Content-Encoding has more than {MAX_LAYERS} layers")
    for name in reversed(names):
        if name in (b"gzip", b"x-gzip"):
            body = _inflate(body, zlib.MAX_WBITS | 16, max_bytes)
        elif name == b"deflate":
            raw = (body[:1] or b"\0")[0] & 0x0F != 8  # some clients omit the zlib wrapper that the RFC requires
            body = _inflate(body, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS, max_bytes)
        elif name not in (b"", b"identity"):
            raise InvalidRequest(f"unsupported Content-Encoding {name.decode('latin-1')!r}; use gzip or deflate")
    return body


def _inflate(body: bytes, wbits: int, max_bytes: int) -> bytes:
    """Decompresses zlib, raw deflate or gzip data (of several members: RFC 1952, section 2.2)."""
    members: list[bytes] = []
    left = max_bytes
    for _ in range(MAX_MEMBERS):
        inflater = zlib.decompressobj(wbits)
        try:
            unpacked = inflater.decompress(body, left + 1)
        except zlib.error as error:
            raise InvalidRequest(f"cannot decompress the body: {error}") from error
        left -= len(unpacked)
        if left < 0:
            raise RequestTooLarge(f"the decompressed request body exceeds {max_bytes} bytes")
        if not inflater.eof:
            raise InvalidRequest("cannot decompress the body: it is truncated")
        members.append(unpacked)
        body = inflater.unused_data
        if not body:
            return b"".join(members)
    raise InvalidRequest(f"cannot decompress the body: it has more than {MAX_MEMBERS} gzip members")
