"""cortex's own answers as bytes. Pure."""

from __future__ import annotations

from http import HTTPStatus

from cortex.http.request import Request
from shared.errors import ServiceError, render

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def error_answer(
    error: ServiceError, request_id: str, *, request: Request | None, keep_alive: bool, node: str | None = None
) -> bytes:
    """The complete answer for an error. `request` is None if it has no valid head; `node` is the neuron whose engine
    caused the error."""
    status, headers, body = render(error, request_id, anthropic=request is not None and request.anthropic)
    connection = "keep-alive" if keep_alive else "close"
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"content-length: {len(body)}",
        f"connection: {connection}, upgrade" if "upgrade" in headers else f"connection: {connection}",
    ]
    if node is not None:
        lines.append(f"x-cortex-node: {node}")
    if request is not None and request.cors:
        lines.append(request.cors.decode("latin-1"))
    if request is not None and request.rates:
        lines.append(request.rates.decode("latin-1").removeprefix("\r\n"))
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if request is not None and request.method == b"HEAD" else head + body
