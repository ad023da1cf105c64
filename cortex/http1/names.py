"""What the names of headers mean to a proxy. Pure."""

from __future__ import annotations

PASS = 0
"""Nothing: the header goes on as it came."""
DROP = 1
HOST = 2
CONTENT_LENGTH = 3
CONTENT_TYPE = 4
CONTENT_ENCODING = 5
TRANSFER_ENCODING = 6
CONNECTION = 7
AUTHORIZATION = 8
API_KEY = 9
COOKIE = 10
EXPECT = 11
REQUEST_ID = 12
FORWARDED_FOR = 13

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, section 7.6.1: they belong to one connection, as does whatever `Connection` names."""

_MAX_KNOWN = 4096
_MAX_LINE_BYTES = 256

Meaning = tuple[int, bytes]
"""What a header line means here, and its value."""


class Names(dict[bytes, Meaning]):
    """Header lines seen, with their meaning: a client sends most of its lines again and again, and each is taken apart
    once. Bounded, as others choose the lines."""

    def __init__(self, known: dict[bytes, int]) -> None:
        super().__init__()
        self._known = known

    def __missing__(self, line: bytes) -> Meaning:
        name, _, value = line.partition(b":")
        meaning = self._known.get(name.lower(), PASS), value.strip(b" \t")
        if len(line) <= _MAX_LINE_BYTES:
            if len(self) >= _MAX_KNOWN:
                self.clear()
            self[line] = meaning
        return meaning


OF_REQUESTS = Names(
    {
        **dict.fromkeys(HOP_BY_HOP, DROP),
        b"host": HOST,
        b"content-length": CONTENT_LENGTH,
        b"content-type": CONTENT_TYPE,
        b"content-encoding": CONTENT_ENCODING,
        b"transfer-encoding": TRANSFER_ENCODING,
        b"connection": CONNECTION,
        b"authorization": AUTHORIZATION,
        b"x-api-key": API_KEY,
        b"cookie": COOKIE,
        b"expect": EXPECT,
        b"x-request-id": REQUEST_ID,
        b"x-forwarded-for": FORWARDED_FOR,
    }
)
OF_RESPONSES = Names(
    {
        **dict.fromkeys(HOP_BY_HOP, DROP),
        b"content-length": CONTENT_LENGTH,
        b"content-type": CONTENT_TYPE,
        b"content-encoding": CONTENT_ENCODING,
        b"transfer-encoding": TRANSFER_ENCODING,
        b"connection": CONNECTION,
        b"x-request-id": DROP,  # these are set by cortex
        b"x-cortex-node": DROP,
        b"x-cortex-cold-start": DROP,
    }
)


def without_named(lines: list[bytes], connection: bytes) -> list[bytes]:
    """The header lines without those that `Connection` names."""
    named = {token.strip().lower() for token in connection.split(b",")}
    return [line for line in lines if line.partition(b":")[0].lower() not in named]
