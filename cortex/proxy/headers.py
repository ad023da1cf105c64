"""Which headers pass the proxy. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from multidict import CIMultiDict, CIMultiDictProxy

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110, section 7.6.1: they belong to one connection, as does whatever `Connection` names."""

_REPLACED = frozenset(
    {"host", "content-length", "authorization", "x-api-key", "cookie", "expect", "x-request-id", "content-encoding"}
)
"""Of a request: ours to set, undone on the way in (content-encoding), or the client's credentials to cortex, which are
no business of an engine."""

_OURS = frozenset({"x-request-id", "x-cortex-node", "x-cortex-cold-start"})


def request_headers(
    given: CIMultiDictProxy[str], *, api_key: str | None, request_id: str, peer: str | None
) -> CIMultiDict[str]:
    """The client's headers as the engine gets them."""
    named = _named_by_connection(given)
    headers: CIMultiDict[str] = CIMultiDict(
        (name, value)
        for name, value in given.items()
        if (low := name.lower()) not in HOP_BY_HOP and low not in _REPLACED and low not in named
    )
    headers["x-request-id"] = request_id
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    if peer:
        earlier = headers.get("X-Forwarded-For")
        headers["X-Forwarded-For"] = f"{earlier}, {peer}" if earlier else peer
    return headers


def response_headers(given: CIMultiDictProxy[str], *, node: str, cold: bool, request_id: str) -> CIMultiDict[str]:
    """The engine's headers as the client gets them, with ours."""
    named = _named_by_connection(given)
    headers: CIMultiDict[str] = CIMultiDict(
        (name, value)
        for name, value in given.items()
        if (low := name.lower()) not in HOP_BY_HOP and low not in _OURS and low not in named
    )
    headers.update(our_headers(node=node, cold=cold, request_id=request_id))
    return headers


def our_headers(*, node: str, cold: bool, request_id: str) -> dict[str, str]:
    """What cortex tells about how it served a request."""
    return {"x-request-id": request_id, "x-cortex-node": node, "x-cortex-cold-start": "true" if cold else "false"}


def _named_by_connection(headers: Mapping[str, str]) -> set[str]:
    return {token.strip().lower() for token in headers.get("Connection", "").split(",")}
