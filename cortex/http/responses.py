"""cortex's own answers as bytes. Pure."""

from __future__ import annotations

from http import HTTPStatus

from shared.errors import ServiceError, render

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def error_answer(
    error: ServiceError, request_id: str, *, anthropic: bool, keep_alive: bool, node: str | None = None
) -> bytes:
    """The complete answer for an error. `node` is the neuron whose engine caused it."""
    status, headers, body = render(error, request_id, anthropic=anthropic)
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"content-length: {len(body)}",
        f"connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if node is not None:
        lines.append(f"x-cortex-node: {node}")
    return "\r\n".join([*lines, "", ""]).encode() + body
