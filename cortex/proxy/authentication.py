"""Authentication of clients. `Gateway` calls `authenticate` for every request before it is handled. Pure."""

from __future__ import annotations

from typing import Final

ANONYMOUS: Final = "anonymous"


def authenticate(api_key: bytes | None) -> str:
    """The name of the caller with this key (None: the request has no key), for the access log.

    cortex has no API keys yet, so every caller is anonymous.

    Raises:
        ServiceError: the client gets this error as its answer.
    """
    return ANONYMOUS
