"""Where a connection goes. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import urlsplit

DIAL: Final = "dial"
"""The scheme of URLs on the host of a neuron with `dial = "out"`."""
USED_SHARE: Final = 0.6
"""Of the time that an engine keeps an idle connection: it must not close one that is just being used."""


class Address(NamedTuple):
    """The other end of a connection. With `port` 0, `host` names a Unix socket, with a leading NUL in Linux's abstract
    namespace. `idle_secs`: how long an idle connection can be used again, None for the pool's default. `dialled`: this
    is a port on the host of the neuron that is called `host`, 0 for neuron's own, and cortex's broker has its
    connections."""

    host: str
    port: int
    tls: bool = False
    idle_secs: float | None = None
    dialled: bool = False

    @property
    def authority(self) -> bytes:
        """The Host header."""
        if self.dialled:
            return f"localhost:{self.port}".encode() if self.port else b"localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == (443 if self.tls else 80):
            return host.encode()
        return f"{host}:{self.port}".encode()


def parse_url(url: str) -> tuple[Address, bytes]:
    """The address and the path prefix of a base URL. `dial://NAME:PORT` is a port on the host of a neuron that keeps
    connections to cortex, without a port neuron's own.

    Raises:
        ValueError: not an http, https or dial URL.
    """
    parts = urlsplit(url)
    if parts.scheme == DIAL:
        name, _, port = parts.netloc.partition(":")  # not `hostname`, which is in lower case
        if not name or not (port or "0").isdigit():
            raise ValueError(f"not the URL of a neuron that dials: {url!r}")
        return Address(name, int(port or 0), dialled=True), parts.path.rstrip("/").encode("ascii")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not an HTTP URL: {url!r}")
    tls = parts.scheme == "https"
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls), parts.path.rstrip("/").encode("ascii")


@lru_cache(maxsize=4096)
def engine_target(
    url: str, api_key: str | None, keep_alive_secs: float | None = None
) -> tuple[Address, bytes, bytes, tuple[bytes, ...]]:
    """(address, Host header, path prefix, header lines with credentials) of an engine that keeps idle connections for
    `keep_alive_secs`. Raises as `parse_url`."""
    address, prefix = parse_url(url)
    if keep_alive_secs is not None:
        address = address._replace(idle_secs=keep_alive_secs * USED_SHARE)
    credentials = () if api_key is None else (b"authorization: Bearer " + api_key.encode(),)
    return address, address.authority, prefix, credentials
