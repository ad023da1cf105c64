"""Authentication of clients. `Gateway` calls `authenticate` for every request before it is handled. Pure."""

from __future__ import annotations

from cortex.accounts.caller import ANONYMOUS, Caller


def authenticate(api_key: bytes | None) -> Caller:
    """The caller with this key (None: the request has no key).

    cortex has no API keys yet, so every caller is anonymous.

    Raises:
        ServiceError: the client gets this error as its answer.
    """
    return ANONYMOUS
