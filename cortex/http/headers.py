"""Which headers the proxy reads, drops or passes on. Pure."""

from __future__ import annotations

from typing import Final

PASS: Final = 0
"""The header goes to the other side unchanged."""
DROP: Final = 1
HOST: Final = 2
CONTENT_LENGTH: Final = 3
CONTENT_TYPE: Final = 4
CONTENT_ENCODING: Final = 5
TRANSFER_ENCODING: Final = 6
CONNECTION: Final = 7
AUTHORIZATION: Final = 8
API_KEY: Final = 9
COOKIE: Final = 10
EXPECT: Final = 11
REQUEST_ID: Final = 12
FORWARDED_FOR: Final = 13
ORIGIN: Final = 14
FETCH_SITE: Final = 15
UPGRADE: Final = 16
CACHE_CONTROL: Final = 17
ACCEL_BUFFERING: Final = 18

CALLER_NAME: Final = b"x-cortex-caller"
"""Tells the control app who a worker has found a request to be from. Clients cannot send it."""

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
"""RFC 9110, section 7.6.1: these belong to one connection, as do those that `Connection` names."""

_MAX_KNOWN: Final = 4096
_MAX_LINE_BYTES: Final = 256

Meaning = tuple[int, bytes]
"""One of the constants above, and the header's value."""


class Names(dict[bytes, Meaning]):
    """A bounded cache from header lines to their meaning: clients repeat most lines, so each is parsed once."""

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


OF_REQUESTS: Final = Names(
    {
        **dict.fromkeys(HOP_BY_HOP, DROP),
        b"upgrade": UPGRADE,
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
        b"origin": ORIGIN,  # cortex decides about origins; an engine would answer as if every page were allowed
        b"sec-fetch-site": FETCH_SITE,
        CALLER_NAME: DROP,
    }
)
OF_RESPONSES: Final = Names(
    {
        **dict.fromkeys(HOP_BY_HOP, DROP),
        b"content-length": CONTENT_LENGTH,
        b"content-type": CONTENT_TYPE,
        b"content-encoding": CONTENT_ENCODING,
        b"transfer-encoding": TRANSFER_ENCODING,
        b"connection": CONNECTION,
        b"cache-control": CACHE_CONTROL,
        b"x-accel-buffering": ACCEL_BUFFERING,
        b"x-request-id": DROP,  # cortex sets these itself
        b"request-id": DROP,
        b"x-cortex-node": DROP,
        b"x-cortex-cold-start": DROP,
    }
)


def without_named(lines: list[bytes], connection: bytes) -> list[bytes]:
    """Removes the header lines that `Connection` names."""
    named = {token.strip().lower() for token in connection.split(b",")}
    return [line for line in lines if line.partition(b":")[0].lower() not in named]


def forwarded_https(value: bytes) -> bool:
    """Whether this value of X-Forwarded-Proto says that the client uses https. Of several proxies each appends its own,
    so the client's is the first."""
    return value.partition(b",")[0].strip().lower() == b"https"
