"""How far a request is: waiting for an engine, or at one."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Final

from cortex.proxy.relay import Relay
from cortex.routing.control import Control
from cortex.routing.replica import Failure, FailureKind, Replica, lost, stopped
from shared.request_ids import request_scope

log = logging.getLogger(__name__)

STAGES: Final = {
    "admission of": "waiting for its limits",
    "resolve": "waiting for an engine",
    "maker for": "looking for the previous response",
    "owner for": "looking for the response",
    "end": "asking why its engine ended",
    "engine": "waiting for the first byte",
    "answer": "answering",
}
"""By the name of the task that works on the request, or what the relay does."""
SPANS: Final = {"admission of": "admission", "maker for": "response", "owner for": "response"}
"""Of waits in traces, by the same names."""


class Resolving:
    """The state of a request that waits for the control to name an engine."""

    __slots__ = ("since", "task")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.since = monotonic()


class Sent:
    """The state of a request at an engine. `compared`: the replica was chosen among several. `spoke_at` is when silence
    was last broken. `plain`: the answer cannot begin before the engine's. `ending` asks why the engine was lost, before
    the answer ends."""

    __slots__ = ("compared", "ending", "plain", "relay", "replica", "spoke_at")

    def __init__(self, replica: Replica, relay: Relay, *, compared: bool) -> None:
        self.replica = replica
        self.relay = relay
        self.compared = compared
        self.spoke_at = 0.0
        self.plain = False
        self.ending: asyncio.Task[None] | None = None

    def is_silent(self, now: float, secs: float) -> bool:
        """Whether the client has heard nothing for `secs`; then it is about to. `now`: monotonic seconds."""
        if now - max(self.relay.silent_since, self.spoke_at) < secs:
            return False
        self.spoke_at = now
        return True

    def give_up(self, request_id: str) -> bool:
        """Ends the answer after a fault of cortex. False if the client has nothing of it."""
        self.ending = None
        if self.relay.status:
            self.end_lost(request_id)
            return True
        self.relay.abandon()
        return False

    def failed(self, request_id: str, reason: str, kind: FailureKind) -> Failure:
        """The engine did not answer: it is logged."""
        replica = self.replica
        with request_scope(request_id):
            log.warning("%s on %s did not answer the request (%s): %s", replica.model_id, replica.name, kind, reason)
        return Failure(replica=replica, reason=reason, kind=kind)

    def end_lost(self, request_id: str, engine_end: str | None = None) -> None:
        """Ends the answer of an engine that was lost. `engine_end` is what the neuron says of it."""
        error = lost(self.replica, self.relay.lost_because or "", engine_end)
        with request_scope(request_id):
            log.warning("%s", error.message)
        self.relay.end_lost(error, self.replica.model_id)

    def end_stopped(self) -> None:
        """Ends the answer because cortex stops."""
        self.relay.end_lost(stopped(self.replica), self.replica.model_id)

    async def end_explained(self, request_id: str, control: Control) -> None:
        """As `end_lost`, after asking the neuron."""
        engine_end = await control.engine_end(self.replica)
        self.ending = None
        self.end_lost(request_id, engine_end)
