"""Request ids: a client's own where it is safe, else a new one. Both services echo and log them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

# The id appears in a header and in logs, so an id from a client must match.
_SAFE: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PREFIX: Final = os.urandom(10).hex()
_NUMBERS: Final = itertools.count()
_CURRENT: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)


def request_id(given: bytes | None) -> str:
    """The `x-request-id` that a client gave if it is safe to echo and log, else a new id of 32 hex digits."""
    if given is not None and _SAFE.fullmatch(given):
        return given.decode()
    return _PREFIX + format(next(_NUMBERS), "012x")


def current_request_id() -> str | None:
    """The request that the current task works for, None outside of one. Log records carry it."""
    return _CURRENT.get()


@contextlib.contextmanager
def request_scope(own: str | None) -> Iterator[None]:
    """Work inside the body, and tasks started there, belong to the request with this id."""
    token = _CURRENT.set(own)
    try:
        yield
    finally:
        _CURRENT.reset(token)
