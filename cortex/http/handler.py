"""What answers one request of a client's connection."""

from __future__ import annotations

from typing import Protocol


class Handler(Protocol):
    """Answers one request. Calls `connection.ClientConnection.finished` at the end, unless it is abandoned."""

    def begin(self) -> None: ...

    def abandon(self) -> None:
        """The client disconnected: write nothing more."""

    def stop(self) -> None:
        """The drain timeout is over: send an error if that is still possible, and finish."""

    def pause(self) -> None:
        """The client reads too slowly: stop reading from the engine."""

    def resume(self) -> None:
        """The client has caught up."""

    def tick(self, now: float) -> None:
        """Called about once a second. `now` is monotonic seconds."""
