"""How far a request is: waiting for an engine, or at one."""

from __future__ import annotations

import asyncio
from time import monotonic

from cortex.proxy.relay import Relay
from cortex.routing.replica import Replica


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
