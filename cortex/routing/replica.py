"""What control and workers exchange about the routing of one request. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

from shared.errors import NotFound, UpstreamError, shortened
from shared.protocol import FIRST_INSTANCE, ErrorCode


class ReplicaKey(NamedTuple):
    """Identifies a replica: one engine of the model on the node. `instance` is its name among those of the model there,
    "" on a neuron that has one engine for each model (`Discovery.instances`)."""

    model_id: str
    node: str
    instance: str

    @property
    def name(self) -> str:
        """Tells it from the model's other replicas. The node's name where a single instance runs, so that a cache is
        found again after an upgrade of the neuron."""
        return self.node if self.instance in ("", FIRST_INSTANCE) else f"{self.node}#{self.instance}"


def adapter_key(adapter: str, engine: ReplicaKey) -> ReplicaKey:
    """Identifies a LoRA adapter at an engine of its base. Its requests count for both keys."""
    return ReplicaKey(adapter, engine.node, engine.instance)


ModelOnNode: TypeAlias = tuple[str, str]
"""A model on a node, whatever its instances: (model id, node name)."""

ANY_NODE: Final = "*"
"""As the node name of a key: every node. No neuron has this name."""


class ServedPaths(msgspec.Struct, frozen=True):
    """What engines of these harnesses serve, and nothing else."""

    harnesses: tuple[str, ...]
    paths: tuple[str, ...]

    def has(self, path: bytes) -> bool:
        """True for these paths and those below them."""
        asked = path.decode("latin-1")
        return any(asked == known or asked.startswith(f"{known}/") for known in self.paths)


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that has the model. `name` is that of its `key`, made once and not for each request. `url` is its base
    URL; `others` is its work for other clients of the engine, by the neuron's last report (`choice.beyond_ours`).

    `fresh`: the neuron has just been asked for the endpoint. `may_move`: it was asked earlier, and does not tell when
    the engine moves (protocol v1). `limit`: how many requests it may have at a time (`request_limits`), None for any.
    `missing_paths`: what the neuron says that the engine lacks, such as `/v1/messages`. `served`: all that it serves,
    None if that is not known. `adapter`: the LoRA adapter of the model that requests name. `variant`: which one of the
    model's it runs, "" without variants.
    """

    key: ReplicaKey
    name: str
    url: str
    api_key: str | None = None
    others: int = 0
    fresh: bool = False
    may_move: bool = False
    limit: int | None = None
    keep_alive_secs: float | None = None
    missing_paths: tuple[str, ...] = ()
    served: ServedPaths | None = None
    adapter: str | None = None
    variant: str = ""

    @property
    def model_id(self) -> str:
        return self.key.model_id

    @property
    def requested_id(self) -> str:
        """What requests name: the adapter, or the model itself."""
        return self.adapter or self.key.model_id

    @property
    def node(self) -> str:
        return self.key.node

    @property
    def instance(self) -> str:
        return self.key.instance


FailureKind: TypeAlias = Literal["refused", "timeout", "reset", "status", "dead", "unknown"]
"""refused: nothing listens there, the engine is dead. timeout: no connection in time, it may only be busy. reset: lost
before a byte of its answer. The others gave an answer that was not passed on. status: 502 or 503. dead: its core is
dead, and its server is about to exit. unknown: it does not know the request or its model, and may not be the model's
engine, or not have the adapter, any more."""

LOST: Final = frozenset({"refused", "reset", "dead"})
"""The kinds after which the engine has to be asked for again."""

Refusal: TypeAlias = Literal["unavailable", "asleep", "dead", "strange"]
"""An engine's error that is not about the request. unavailable: it cannot serve now. asleep: it could once woken.
dead, strange: as the failures `dead` and `unknown`."""

UNAVAILABLE: Final = frozenset({502, 503})
"""The statuses of an engine that cannot serve now."""

STRANGE: Final = frozenset({400, 401, 403, 404, 405, 501})
"""The statuses of an engine that does not know the request or its model. Also those of any other server."""

TIMEOUTS_BEFORE_GIVING_UP = 2


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that had no answer for the client."""

    replica: Replica
    reason: str
    kind: FailureKind


class LoadPhase(NamedTuple):
    """A phase of a load, in seconds of this host's monotonic clock."""

    name: str
    since: float
    until: float

    @property
    def secs(self) -> float:
        return self.until - self.since


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes. `cold`: it waited for the model to load, in these `phases` if they are known."""

    replica: Replica
    cold: bool = False
    phases: tuple[LoadPhase, ...] = ()


class WaitNote(msgspec.Struct, frozen=True, kw_only=True):
    """One line of progress for a waiting client. `node` is where the model loads, None while it has no placement."""

    text: str
    node: str | None = None


def given_up(failures: Sequence[Failure]) -> set[ReplicaKey]:
    """The engines that a request is not sent to again: no answer at a fresh endpoint, or two connection timeouts. One
    that answered 502 or 503 is alive."""
    keys = [failure.replica.key for failure in failures if failure.kind == "timeout"]
    slow = {key for key in keys if keys.count(key) >= TIMEOUTS_BEFORE_GIVING_UP}
    lost = {f.replica.key for f in failures if f.replica.fresh and f.kind in ("refused", "reset")}
    return slow | lost


def failure_of(
    refusal: Refusal, replica: Replica, failures: Sequence[Failure], others: Sequence[Replica]
) -> FailureKind | None:
    """The kind of failure if the request is to be retried after this answer, None if the client gets it. `others`: the
    replicas that the request has not been sent to.

    Dead: once per request, because the request may be what kills the core. Strange: it may come from another server
    than the model's engine, or from one that has lost the adapter, unless the control named that URL again after such
    an answer. Unavailable: not again from the only engine left, which the control named again after such an answer.
    """
    if refusal == "dead":
        return None if any(each.kind == "dead" for each in failures) else "dead"
    if refusal == "strange":
        confirmed = any(each.kind == "unknown" and each.replica.url == replica.url for each in failures)
        doubtful = replica.may_move or replica.adapter is not None
        return "unknown" if doubtful and not confirmed else None
    again = any(each.replica.key == replica.key and each.kind == "status" for each in failures)
    return None if again and not others and refusal == "unavailable" else "status"


def untried_first(keys: Sequence[ReplicaKey], failures: Sequence[Failure]) -> list[ReplicaKey]:
    """The replicas in their order, but those that this request has tried come last, and before them those on the same
    nodes: a host may have failed as a whole, and a request is sent to few engines."""
    tried = {failure.replica.key for failure in failures}
    nodes = {key.node for key in tried}
    return sorted(keys, key=lambda key: (key in tried, key.node in nodes))


def untried(replicas: tuple[Replica, ...], failures: Sequence[Failure], current: Replica | None) -> tuple[Replica, ...]:
    """The replicas except `current` and those that failed; only those on other nodes, if there are any."""
    tried = {failure.replica.key for failure in failures}
    if current is not None:
        tried.add(current.key)
    nodes = {key.node for key in tried}
    left = tuple(replica for replica in replicas if replica.key not in tried)
    return tuple(replica for replica in left if replica.node not in nodes) or left


def lost(replica: Replica, reason: str, engine_end: str | None) -> UpstreamError:
    """The error for an answer that began and whose engine was lost. `engine_end` is what the neuron says of it."""
    why = reason if engine_end is None else f"{reason}; {replica.node} reports: {engine_end}"
    message = f"{replica.model_id!r} on {replica.name} was lost while it answered: {why}"
    return UpstreamError(message, code=ErrorCode.UPSTREAM_LOST)


def stopped(replica: Replica) -> UpstreamError:
    """The error for an answer that began and that cortex cannot wait for, because it stops."""
    message = f"the answer of {replica.model_id!r} on {replica.name} was cut off: cortex is stopping"
    return UpstreamError(message, code=ErrorCode.UPSTREAM_LOST)


def not_served(model_id: str, path: bytes, served: ServedPaths) -> NotFound:
    """The error for a path that no engine of the model serves."""
    engines = " and ".join(served.harnesses)
    shown, paths = shortened(path.decode("latin-1")), ", ".join(served.paths) or "nothing"
    return NotFound(f"{model_id!r} does not answer {shown!r}: its engine ({engines}) serves only {paths}")


def unreachable(model_id: str, failures: Sequence[Failure]) -> UpstreamError:
    """The error when no replica is left to try."""
    reasons = {failure.replica.name: failure.reason for failure in failures}
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "the fleet keeps changing"
    return UpstreamError(f"no engine with {model_id!r} can be reached ({tried})", code=ErrorCode.UPSTREAM_UNREACHABLE)
