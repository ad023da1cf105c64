"""What control and workers exchange about the routing of one request. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from shared.errors import UpstreamError
from shared.protocol import ErrorCode

ReplicaKey: TypeAlias = tuple[str, str]
"""Identifies a replica: (model id, node name)."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that has the model. `url` is its base URL; `others` is its work for other clients of the engine, by the
    neuron's last report (`choice.beyond_ours`).

    `fresh`: the neuron has just been asked for the endpoint. A cached one may have moved since.
    """

    model_id: str
    node: str
    url: str
    api_key: str | None = None
    others: int = 0
    fresh: bool = False


FailureKind: TypeAlias = Literal["refused", "timeout", "reset", "status"]
"""refused: nothing listens there, the engine is dead. timeout: no connection in time, it may only be busy. reset: lost
before a byte of its answer. status: it answered 502 or 503, and the answer was not passed on."""

TIMEOUTS_BEFORE_GIVING_UP = 2


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that had no answer for the client."""

    replica: Replica
    reason: str
    kind: FailureKind


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes. `cold`: it waited for the model to load."""

    replica: Replica
    cold: bool = False


class WaitNote(msgspec.Struct, frozen=True, kw_only=True):
    """One line of progress for a waiting client. `node` is where the model loads, None while it has no placement."""

    text: str
    node: str | None = None


def given_up(failures: Sequence[Failure]) -> set[str]:
    """The neurons that a request is not sent to again: no answer at a fresh endpoint, or two connection timeouts. A
    neuron whose engine answered 502 or 503 is alive."""
    nodes = [failure.replica.node for failure in failures if failure.kind == "timeout"]
    slow = {node for node in nodes if nodes.count(node) >= TIMEOUTS_BEFORE_GIVING_UP}
    lost = {f.replica.node for f in failures if f.replica.fresh and f.kind in ("refused", "reset")}
    return slow | lost


def untried_first(nodes: Sequence[str], failures: Sequence[Failure]) -> list[str]:
    """The neurons in their order, but those that this request has tried come last."""
    tried = {failure.replica.node for failure in failures}
    return sorted(nodes, key=lambda node: node in tried)


def lost(replica: Replica, reason: str, engine_end: str | None) -> UpstreamError:
    """The error for an answer that began and whose engine was lost. `engine_end` is what the neuron says of it."""
    why = reason if engine_end is None else f"{reason}; {replica.node} reports: {engine_end}"
    message = f"{replica.model_id!r} on {replica.node} was lost while it answered: {why}"
    return UpstreamError(message, code=ErrorCode.UPSTREAM_LOST)


def unreachable(model_id: str, failures: Sequence[Failure]) -> UpstreamError:
    """The error when no replica is left to try."""
    reasons = {failure.replica.node: failure.reason for failure in failures}
    tried = "; ".join(f"{node}: {reason}" for node, reason in reasons.items()) or "the fleet keeps changing"
    return UpstreamError(f"no engine with {model_id!r} can be reached ({tried})", code=ErrorCode.UPSTREAM_UNREACHABLE)
