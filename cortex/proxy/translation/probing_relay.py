"""A relay for paths that an engine may lack: holds an answer back that may say so until it is clear what it means."""

from __future__ import annotations

from typing import Final, Protocol

from cortex.http.framing import SizedBody
from cortex.http.heads import ResponseHead
from cortex.proxy.answers.held_answer import HeldAnswer
from cortex.proxy.relay import Relay
from cortex.proxy.translation.lacking import lacks_path
from cortex.upstream.connection import Body

MAX_EXCUSE_BYTES: Final = 512
"""Of a 200 that says that the path is unknown; a message is rarely as short."""


class ProbeListener(Protocol):
    def lacks_path(self, held: HeldAnswer) -> None:
        """The engine does not know the request's path, says the answer `held`. Ends the relay; nothing was sent to the
        client."""


class ProbingRelay(Relay):
    """Only the head of an answer and its end cost more than those of a Relay. `probe` must be set before `start`."""

    __slots__ = ("probe",)

    probe: ProbeListener

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        if head.status in (404, 405) or (
            head.status == 200 and isinstance(body, SizedBody) and len(first) + body.left <= MAX_EXCUSE_BYTES
        ):
            self._hold(head, body, first)
        else:
            super().began(head, body, first)

    def ended(self) -> None:
        held = self.answer
        if (
            isinstance(held, HeldAnswer)
            and held.head.status in (200, 404, 405)
            and lacks_path(self.status, held.contents())
        ):
            self._connection = None
            self.probe.lacks_path(held)
        else:
            super().ended()
