"""Errors that the HTTP server and those behind it answer with alike."""

from __future__ import annotations

from shared.errors import Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import SERVICE_STOPPING_SECS


def shutting_down() -> Unavailable:
    """The error for requests refused during shutdown."""
    return Unavailable(
        "cortex is stopping; a load that has started continues",
        code=ErrorCode.CORTEX_STOPPING,
        retry_after=SERVICE_STOPPING_SECS,
    )
