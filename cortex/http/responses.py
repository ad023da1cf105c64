"""Answers that cortex gives itself, as bytes. Pure."""

from __future__ import annotations

import json
from http import HTTPStatus

from shared.errors import ServiceError

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def error_answer(
    error: ServiceError, request_id: str, *, anthropic: bool, keep_alive: bool, node: str | None = None
) -> bytes:
    """The whole answer for a failure. `node` is the neuron whose engine caused it."""
    body = json.dumps(error.anthropic_body() if anthropic else error.body()).encode()
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json; charset=utf-8",
        f"content-length: {len(body)}",
        f"x-request-id: {request_id}",
        f"connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if node is not None:
        lines.append(f"x-cortex-node: {node}")
    if error.retry_after is not None:
        lines.append(f"retry-after: {error.retry_after}")
    if error.status == 401:
        lines.append("www-authenticate: Bearer")
    return "\r\n".join([*lines, "", ""]).encode() + body
