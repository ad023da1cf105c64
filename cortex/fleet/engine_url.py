"""Where an engine is, as seen from here. Pure."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit, urlunsplit

from cortex.upstream.address import DIAL, parse_url
from shared.protocol import EndpointReply


@lru_cache(maxsize=4096)
def reachable(endpoint: EndpointReply, neuron_url: str) -> EndpointReply:
    """The endpoint with `reachable_url`. Raises ValueError if it cannot be connected to."""
    url = reachable_url(endpoint.url, neuron_url)
    parse_url(url)
    return endpoint.model_copy(update={"url": url})


def reachable_url(url: str, neuron_url: str) -> str:
    """An engine's URL with a loopback or wildcard host replaced by the neuron's, unless that is loopback too. The
    engines of a neuron that dials are reached through it.

    Raises:
        ValueError: `url` is not an absolute http URL, or cannot be reached so.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an absolute URL")
    neuron = urlsplit(neuron_url)
    if neuron.scheme == DIAL:  # only there can it be connected to, whichever address it has
        if parts.scheme != "http" or parts.port is None:
            raise ValueError(f"{url!r} cannot be reached through a neuron that dials: it needs http:// and a port")
        return urlunsplit((DIAL, f"{neuron.netloc}:{parts.port}", parts.path, "", "")).rstrip("/")
    neuron_host = neuron.hostname or ""
    if not _is_local(parts.hostname) or _reaches_itself(neuron_host, parts.hostname):
        return url.rstrip("/")
    host = f"[{neuron_host}]" if ":" in neuron_host else neuron_host
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, netloc, parts.path, "", "")).rstrip("/")


def dials(neuron_url: str) -> bool:
    """Whether the neuron keeps connections to cortex: nothing else can be expected to reach its host."""
    return neuron_url.startswith(f"{DIAL}:")


def _reaches_itself(neuron_host: str, engine_host: str) -> bool:
    """True if the neuron is on this host under a name or another address family. The engine's own loopback address then
    works, while it may not listen on the neuron's."""
    if not _is_local(neuron_host) or _is_wildcard(engine_host):
        return False
    try:
        return ipaddress.ip_address(neuron_host).version != ipaddress.ip_address(engine_host).version
    except ValueError:
        return neuron_host == "localhost"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
