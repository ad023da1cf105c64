"""Where a connection goes. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit


class Address(NamedTuple):
    """The other end of a connection. With `port` 0, `host` names a Unix socket, with a leading NUL in Linux's abstract
    namespace."""

    host: str
    port: int
    tls: bool = False

    @property
    def authority(self) -> bytes:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == (443 if self.tls else 80):
            return host.encode()
        return f"{host}:{self.port}".encode()


def parse_url(url: str) -> tuple[Address, bytes]:
    """The address and the path prefix of a base URL.

    Raises:
        ValueError: not an http or https URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not an HTTP URL: {url!r}")
    tls = parts.scheme == "https"
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls), parts.path.rstrip("/").encode("ascii")


@lru_cache(maxsize=4096)
def engine_target(url: str, api_key: str | None) -> tuple[Address, bytes, bytes, tuple[bytes, ...]]:
    """(address, Host header, path prefix, header lines with credentials) of an engine. Raises as `parse_url`."""
    address, prefix = parse_url(url)
    credentials = () if api_key is None else (b"authorization: Bearer " + api_key.encode(),)
    return address, address.authority, prefix, credentials
