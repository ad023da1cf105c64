"""Compressed request bodies. Pure."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import brotli

from shared.errors import InvalidRequest, RequestTooLarge

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_LAYERS: Final = 4
"""Codings stacked on one body: each costs us a pass over it, and the sender one word."""
MAX_MEMBERS: Final = 64
"""Members of a gzip body, frames of a zstd one: we copy the rest after each, and an empty one costs the sender 20
bytes."""
SUPPORTED: Final = "gzip, deflate, br, zstd"

_ZSTD_WINDOW_LOG: Final = 23  # 8 MiB, the limit for this content coding (RFC 9659)
_BROTLI_STEP: Final = 1 << 20  # bytes of output; brotli exceeds it by half


class _Decompressor(Protocol):
    """One member or frame. `eof` is set at its end; `unused_data` is what followed it."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _TooLongError(Exception):
    """More output than asked for."""


class _Brotli:
    """brotli with the interface of zlib. It refuses bytes after the end itself."""

    unused_data = b""

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._decoder.is_finished())

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        decoder = self._decoder
        pieces = [decoder.process(data, output_buffer_limit=_BROTLI_STEP)]
        size = len(pieces[0])
        while size < max_length and not decoder.is_finished() and not decoder.can_accept_more_data():
            pieces.append(decoder.process(b"", output_buffer_limit=_BROTLI_STEP))
            size += len(pieces[-1])
        if size >= max_length:
            raise _TooLongError  # joining would take as much memory again
        return b"".join(pieces)


def unpack(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """The body without its Content-Encoding.

    Raises:
        InvalidRequest: the encoding is unsupported (status 415), or the body is not in it.
        RequestTooLarge: the result, or that of one layer, exceeds `max_bytes`.
    """
    names = [token.strip().lower() for token in encoding.split(b",")]
    if len(names) > MAX_LAYERS:
        raise InvalidRequest(f"Content-Encoding has more than {MAX_LAYERS} layers")
    unknown = next((name for name in names if name not in _CODINGS), None)
    if unknown is not None:
        shown = unknown[:64].decode("latin-1")
        raise InvalidRequest(
            f"unsupported Content-Encoding {shown!r}; use one of {SUPPORTED}",
            status=415,
            headers={"accept-encoding": SUPPORTED},
        )
    for name in reversed(names):
        coding = _CODINGS[name]
        if coding is not None:
            body = _decompressed(coding(body), body, max_bytes)
    return body


def _decompressed(create: Callable[[], _Decompressor], body: bytes, max_bytes: int) -> bytes:
    """The contents of all members (gzip: RFC 1952, section 2.2) or frames (zstd: RFC 8878, section 3)."""
    members: list[bytes] = []
    left = max_bytes
    for _ in range(MAX_MEMBERS):
        decompressor = create()
        try:
            member = decompressor.decompress(body, left + 1)
            if len(member) > left:
                raise _TooLongError
        except _TooLongError:
            raise RequestTooLarge(f"the decompressed request body exceeds {max_bytes} bytes") from None
        except (zlib.error, zstd.ZstdError, brotli.error) as error:
            raise InvalidRequest(f"cannot decompress the body: {error}") from error
        left -= len(member)
        if not decompressor.eof:
            raise InvalidRequest("cannot decompress the body: it is truncated")
        members.append(member)
        body = decompressor.unused_data
        if not body:
            return b"".join(members)
    raise InvalidRequest(f"cannot decompress the body: it has more than {MAX_MEMBERS} members or frames")


def _gzip(_: bytes) -> Callable[[], _Decompressor]:
    return partial(zlib.decompressobj, zlib.MAX_WBITS | 16)


def _deflate(body: bytes) -> Callable[[], _Decompressor]:
    raw = (body[:1] or b"\0")[0] & 0x0F != 8  # some clients omit the zlib wrapper that the RFC requires
    return partial(zlib.decompressobj, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS)


def _zstd(_: bytes) -> Callable[[], _Decompressor]:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    return partial(zstd.ZstdDecompressor, options=options)


def _brotli(_: bytes) -> Callable[[], _Decompressor]:
    return _Brotli


_CODINGS: Final[dict[bytes, Callable[[bytes], Callable[[], _Decompressor]] | None]] = {
    b"gzip": _gzip,
    b"x-gzip": _gzip,
    b"deflate": _deflate,
    b"br": _brotli,
    b"zstd": _zstd,
    b"identity": None,
    b"": None,
}
"""By name: the function that, given a body, returns how to create a decompressor for each of its members."""
