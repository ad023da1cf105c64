"""Compressed request bodies. Pure."""

from __future__ import annotations

import zlib

from shared.errors import InvalidRequest, RequestTooLarge

MAX_LAYERS = 4
"""Each costs a pass over the whole body, and its sender a word."""
MAX_MEMBERS = 64
"""Of a gzip body: behind each the rest is copied, and an empty one costs its sender 20 bytes."""


def unpack(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """The body behind a Content-Encoding.

    Raises:
        InvalidRequest: an encoding that is not understood, or a body that is not in it.
        RequestTooLarge: there would be more than `max_bytes` of it.
    """
    names = [token.strip().lower() for token in encoding.split(b",")]
    if len(names) > MAX_LAYERS:
        raise InvalidRequest(f"Content-Encoding has more than {MAX_LAYERS} layers")
    for name in reversed(names):
        if name in (b"gzip", b"x-gzip"):
            body = _inflate(body, zlib.MAX_WBITS | 16, max_bytes)
        elif name == b"deflate":
            raw = (body[:1] or b"\0")[0] & 0x0F != 8  # some send it without the zlib wrapper that the RFC wants
            body = _inflate(body, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS, max_bytes)
        elif name not in (b"", b"identity"):
            raise InvalidRequest(f"Content-Encoding {name.decode('latin-1')!r} is not understood; gzip and deflate are")
    return body


def _inflate(body: bytes, wbits: int, max_bytes: int) -> bytes:
    """A gzip body may have several members, one behind the other (RFC 1952, section 2.2)."""
    members: list[bytes] = []
    left = max_bytes
    for _ in range(MAX_MEMBERS):
        inflater = zlib.decompressobj(wbits)
        try:
            unpacked = inflater.decompress(body, left + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the body cannot be unpacked: {error}") from error
        left -= len(unpacked)
        if left < 0:
            raise RequestTooLarge(f"the unpacked request body is larger than {max_bytes} bytes")
        if not inflater.eof:
            raise InvalidRequest("the body cannot be unpacked: it ends too early")
        members.append(unpacked)
        body = inflater.unused_data
        if not body:
            return b"".join(members)
    raise InvalidRequest(f"the body cannot be unpacked: it has more than {MAX_MEMBERS} members")
