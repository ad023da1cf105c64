"""What the control tells a worker about where a request may go, and what it hears back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from shared.errors import UpstreamError
from shared.protocol import ErrorCode


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that has the model. `url` is its base URL; `others` is the work there that is not this cortex's, by its
    neuron's last report (`choice.beyond_ours`).

    `fresh`: the neuron has just been asked for the endpoint. A remembered one may have moved since.
    """

    model_id: str
    node: str
    url: str
    api_key: str | None = None
    others: int = 0
    fresh: bool = False


FailureKind: TypeAlias = Literal["refused", "timeout", "reset", "status"]
"""refused: nobody listens there, the engine is dead. timeout: no connection in time, it may just be busy. reset: lost
before a byte of its answer. status: it answered 502 or 503, and the answer was not passed on."""

TIMEOUTS_BEFORE_GIVING_UP = 2


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that gave no answer for the client."""

    replica: Replica
    reason: str
    kind: FailureKind


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes. `cold`: it had to wait for the model to be loaded."""

    replica: Replica
    cold: bool = False


class WaitNote(msgspec.Struct, frozen=True, kw_only=True):
    """What a client that waits may be told, in one line. `node` is where its model is on its way, None while it has no
    place."""

    text: str
    node: str | None = None


def given_up(failures: Sequence[Failure]) -> set[str]:
    """The neurons that one request is not sent to again: those that gave no answer at an endpoint which had just been
    asked for, and those that let it wait for a connection twice. One that answered 502 or 503 is alive."""
    nodes = [failure.replica.node for failure in failures if failure.kind == "timeout"]
    slow = {node for node in nodes if nodes.count(node) >= TIMEOUTS_BEFORE_GIVING_UP}
    lost = {f.replica.node for f in failures if f.replica.fresh and f.kind in ("refused", "reset")}
    return slow | lost


def untried_first(nodes: Sequence[str], failures: Sequence[Failure]) -> list[str]:
    """The neurons in their order, those that this request was sent to in vain behind all others."""
    tried = {failure.replica.node for failure in failures}
    return sorted(nodes, key=lambda node: node in tried)


def unreachable(model_id: str, failures: Sequence[Failure]) -> UpstreamError:
    """The error when no replica is left to try."""
    reasons = {failure.replica.node: failure.reason for failure in failures}
    tried = "; ".join(f"{node}: {reason}" for node, reason in reasons.items()) or "the fleet keeps changing"
    return UpstreamError(f"no engine with {model_id!r} can be reached ({tried})", code=ErrorCode.UPSTREAM_UNREACHABLE)
