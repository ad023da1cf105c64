"""What a dispatcher and a handler of cortex's HTTP server must have, for tests of what happens around them."""

from __future__ import annotations

from cortex.http.request import Request
from shared.errors import ServiceError


class IdleDispatcher:
    """Does nothing. A subclass has `handle` and `begin`."""

    max_body_bytes = 1000
    draining = False

    def rejected(self, request: Request | None, error: ServiceError) -> str:
        raise AssertionError(error)

    def spool(self, request: Request) -> None:
        return None

    def can_begin(self, request: Request, start: bytes) -> bool:
        return False

    def abandon(self) -> None: ...

    def stop(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def tick(self, now: float) -> None: ...
