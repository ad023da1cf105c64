"""Refuses what a web page of another site makes a browser send: cross-site requests and DNS rebinding. Pure.

A page can send POST requests to every address its visitor's browser reaches, loopback included, without being allowed
to read the answers. Three signs tell such a request from a client's:

- `Origin` and `Sec-Fetch-Site`, which browsers set themselves and pages cannot change;
- a body that is not JSON: to send JSON a page needs a preflight, which only allowed origins pass;
- a `Host` that is a public DNS name. With DNS rebinding a page's own name resolves to this machine, so to the browser
  the request is same-origin. Public DNS cannot answer for an IP address, `localhost`, a name without a dot or a name
  below a private domain, so these are always accepted.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import NamedTuple

from shared.errors import Forbidden, InvalidRequest, ServiceError

PRIVATE_DOMAINS = (".localhost", ".local", ".lan", ".home", ".internal", ".home.arpa")
"""Reserved for private use (RFC 6761, RFC 6762, RFC 8375, ICANN), but for .lan and .home, which routers use and public
DNS does not delegate. Names below them cannot be registered."""

_DEFAULT_PORTS = {"http": "80", "https": "443"}
_STATE_CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_JSON_TYPES = frozenset({"application/json", "application/octet-stream", ""})
"""HTTP libraries call bytes octet-stream; a page needs a preflight for it, as for JSON. Scripts without a type are
common, as are requests without a body; a page can send both, but not without its Origin."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_HOST_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_MAX_SHOWN = 100


@dataclass(frozen=True)
class CrossSitePolicy:
    """What a service accepts. The keys are where an operator allows more, for messages.

    `hosts` are names, or `*.` and a domain for the names below it. None: the Host header is not checked, as each
    request proves by a token that no page made it.
    """

    origins_key: str
    hosts_key: str
    origins: frozenset[str] = frozenset()  # scheme://host[:port] in lower case; "*" for all
    hosts: frozenset[str] | None = frozenset()  # in lower case; "*" for all


class Sender(NamedTuple):
    """What a request's headers say about its sender, as received; None without the header."""

    host: str | None
    origin: str | None
    fetch_site: str | None


def checked_origins(values: list[str]) -> list[str]:
    """Origins of a configuration, as a policy takes them.

    Raises:
        ValueError: one is not an origin.
    """
    origins = [value.lower().rstrip("/") for value in values]
    for origin in origins:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise ValueError(f'{origin!r} is not an origin such as https://chat.example.com, nor "*"')
    return origins


def checked_hosts(values: list[str]) -> list[str]:
    """Host names of a configuration, as a policy takes them.

    Raises:
        ValueError: one is not a name.
    """
    names = [value.lower().removesuffix(".") for value in values]
    for name in names:
        if name != "*" and not _HOST_NAME.fullmatch(name):
            raise ValueError(f'{name!r} is not a name such as ai.example.com or *.example.com, nor "*"')
    return names


def refused_sender(sender: Sender, policy: CrossSitePolicy) -> ServiceError | None:
    """Why a request is refused for where it comes from; None if it is not."""
    return _refused_host(sender.host, policy) or _refused_site(sender, policy)


def is_other_page(sender: Sender) -> bool:
    """Whether a page of another origin than the service's own sent the request. A proxy in front may have changed the
    Host: browsers also say by Sec-Fetch-Site that a page is the service's own."""
    if sender.origin is None or (sender.fetch_site or "").lower() == "same-origin":
        return False
    return not _same_origin(sender.origin, sender.host)


def refused_media_type(method: str, content_type: str | None) -> ServiceError | None:
    """Why a request that changes state is refused for its media type; None if it is not, or changes nothing."""
    if method not in _STATE_CHANGING:
        return None
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind in _JSON_TYPES or kind.endswith("+json"):
        return None
    return InvalidRequest(
        f"the body must be JSON, sent with Content-Type: application/json, not {_shown(kind)}", status=415
    )


def _refused_host(host: str | None, policy: CrossSitePolicy) -> ServiceError | None:
    if policy.hosts is None or not host or _accepted_host(host, policy.hosts):
        return None
    return Forbidden(
        f"the Host header {_shown(host)} is neither an IP address nor a name of this service: "
        f"add the name to {policy.hosts_key} if it is one"
    )


def _accepted_host(authority: str, hosts: frozenset[str]) -> bool:
    name = _split(authority.lower())[0].removesuffix(".")
    if "." not in name or name.endswith(PRIVATE_DOMAINS) or _is_address(name):
        return True
    labels = name.split(".")
    below = {f"*.{'.'.join(labels[number:])}" for number in range(1, len(labels))}
    return not hosts.isdisjoint({name, "*", *below})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _refused_site(sender: Sender, policy: CrossSitePolicy) -> ServiceError | None:
    origin = sender.origin
    if origin is not None and ("*" in policy.origins or origin.lower() in policy.origins):
        return None
    if origin is not None and not _same_origin(origin, sender.host):
        page = f"from {_shown(origin)}"
    elif sender.fetch_site is not None and sender.fetch_site.lower() == "cross-site":
        page = "of another site (Sec-Fetch-Site: cross-site)"
    else:
        return None
    return Forbidden(f"a web page {page} sent this request: add its origin to {policy.origins_key} if you trust it")


def _same_origin(origin: str, host: str | None) -> bool:
    """A proxy in front may have ended TLS, so the scheme only says which port an authority without one has."""
    scheme, separator, authority = origin.lower().partition("://")
    default = _DEFAULT_PORTS.get(scheme)
    if not separator or default is None or not host:
        return False
    (name, port), (own_name, own_port) = _split(authority), _split(host.lower())
    return name == own_name and (port or default) == (own_port or default)


def _split(authority: str) -> tuple[str, str]:
    """Host and port; the port is empty without one."""
    if authority.endswith("]"):
        return authority, ""
    name, colon, port = authority.rpartition(":")
    return (name, port) if colon else (port, "")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")
