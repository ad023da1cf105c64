"""What is told of one request, without anything that its client has written. Not compiled: mypyc does not know
msgspec's structs."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from cortex.accounts.usage.record import UsageRecord

Wait: TypeAlias = tuple[float, float]
"""From and to, in seconds since the request came."""


class FailedAttempt(msgspec.Struct, frozen=True, gc=False):
    """An engine that had no answer for a request. `kind` as of `routing.replica.Failure`; `at`: seconds since the
    request came."""

    node: str
    instance: str
    kind: str
    reason: str
    at: float


class EndedRequest(msgspec.Struct, frozen=True):
    """A request that was answered or refused, or whose client left.

    `asked`: the model as the client named it. `error`: cortex's code, "" without one, with the `message`. `choice`: why
    this engine (`proxy.context.Choice`). `attempts`: the engines before it. `waits`: for an engine, or for a limit.
    """

    record: UsageRecord
    asked: str
    error: str
    message: str
    streamed: bool
    choice: str
    attempts: list[FailedAttempt] | None
    waits: list[Wait] | None


class LiveRequest(msgspec.Struct, frozen=True):
    """A request that goes on, as it is now. `since`: Unix time. `stage`: what it waits for, or what its engine does;
    `note`: how far a load is. `secs` as of now, and as in EndedRequest, the wait that goes on included."""

    since: float
    request_id: str
    key_id: str
    key: str
    asked: str
    model: str
    variant: str
    node: str
    instance: str
    path: str
    stage: str
    note: str
    secs: float
    first_byte_secs: float | None
    cold: bool
    streamed: bool
    choice: str
    attempts: list[FailedAttempt]
    waits: list[Wait]


class SeenRequests(msgspec.Struct, frozen=True):
    """What one worker has: requests that ended after a place, oldest first, and of the live ones that fit the oldest.
    `place`: how many have ended until now. `live_count`: how many live ones fit."""

    place: int
    ended: list[EndedRequest]
    live: list[LiveRequest]
    live_count: int
