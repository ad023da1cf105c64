"""Which model was where, as spans of time. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import msgspec

from cortex.fleet.snapshot import NodeSnapshot, instance_of
from cortex.routing.replica import ReplicaKey
from shared.protocol import ModelStatus

DOWN, DRAINING = "down", "draining"
"""The statuses of nodes."""
_SHOWN = frozenset(ModelStatus) - {ModelStatus.UNLOADED}
SAME_START_SECS = 2.0
"""Two reports of one start differ by less."""


StatusSpanId: TypeAlias = tuple[ReplicaKey, str, float]
"""Names a span: what it is about, the status, and when it began."""


class Phase(NamedTuple):
    """A phase of a load began at this Unix time."""

    name: str
    since: float


class StatusSpan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What held for an engine, or with `model` "" for a node, from `since` until `until`, in Unix time; None: still.

    `why`: what a load was for. `displaces`: the models that had to go for a load; `displaced_by`: for which load an
    engine had to go. `evicted_since`: when its eviction began. `told_since`: as `since` by the neuron's clock, None if
    it does not tell.
    """

    node: str
    model: str = ""
    instance: str = ""
    status: str
    since: float
    until: float | None = None
    told_since: float | None = None
    variant: str | None = None
    devices: tuple[int, ...] = ()
    why: str | None = None
    error: str | None = None
    displaces: tuple[str, ...] = ()
    displaced_by: str | None = None
    evicted_since: float | None = None
    phases: tuple[Phase, ...] = ()

    @property
    def key(self) -> ReplicaKey:
        return ReplicaKey(self.model, self.node, self.instance)

    @property
    def id(self) -> StatusSpanId:
        return self.key, self.status, self.since


class Minute(msgspec.Struct, frozen=True, omit_defaults=True):
    """The minute that ended at this Unix time, by model: the most requests that waited at once, and the requests that
    were answered, with and without an error."""

    at: float
    waiting: dict[str, int] = {}
    requests: dict[str, int] = {}
    errors: dict[str, int] = {}


class Seen(NamedTuple):
    """What holds now for an engine or a node. `since` None: not known."""

    status: str
    since: float | None = None
    variant: str | None = None
    devices: tuple[int, ...] = ()
    error: str | None = None
    phase: str | None = None


class Cause(NamedTuple):
    """Why an engine is loaded, and which engines have to go for it."""

    key: ReplicaKey
    why: str
    displaces: tuple[ReplicaKey, ...]


def seen(node: NodeSnapshot) -> dict[ReplicaKey, Seen]:
    """A node's engines, and the node itself (with the model "") if it is down or draining. Nothing is known about the
    engines of a node that is down."""
    found: dict[ReplicaKey, Seen] = {}
    if node.healthy:
        for view in node.views:
            status = view.known_status
            if status in _SHOWN:
                phase = view.progress.phase if view.progress is not None and status is ModelStatus.LOADING else None
                key = ReplicaKey(view.id, node.name, instance_of(view))
                found[key] = Seen(status.value, view.since, view.variant, tuple(view.devices), view.error, phase)
        if node.draining:
            found[ReplicaKey("", node.name, "")] = Seen(DRAINING)
    elif node.misses:
        found[ReplicaKey("", node.name, "")] = Seen(DOWN, node.silent_since, error=node.last_error)
    return found


def follow(
    open_spans: Mapping[ReplicaKey, StatusSpan],
    now_seen: Mapping[ReplicaKey, Seen],
    now: float,
    causes: Callable[[], Iterable[Cause]],
) -> tuple[list[StatusSpan], dict[ReplicaKey, StatusSpan]]:
    """The spans that have ended, and those that are open now. `causes` are asked for only if a span begins or ends."""
    ended: list[StatusSpan] = []
    still: dict[ReplicaKey, StatusSpan] = {}
    for key, span in open_spans.items():
        what = now_seen.get(key)
        if what is not None and continues(span, what):
            still[key] = _updated(span, what, now)
        else:
            ended.append(msgspec.structs.replace(span, until=now, displaced_by=_displaced_by(key, causes)))
    for key, what in now_seen.items():
        if key not in still:
            still[key] = _begun(key, what, now, causes)
    return ended, still


def evicted(
    span: StatusSpan, evicting: Collection[ReplicaKey], now: float, causes: Callable[[], Iterable[Cause]]
) -> StatusSpan:
    """The open span of an engine, with the begin of its eviction and for what it has to go; without if it stays."""
    if (span.key in evicting) == (span.evicted_since is not None):
        return span
    if span.evicted_since is not None:
        return msgspec.structs.replace(span, evicted_since=None, displaced_by=None)
    return msgspec.structs.replace(span, evicted_since=now, displaced_by=_displaced_by(span.key, causes))


def _displaced_by(key: ReplicaKey, causes: Callable[[], Iterable[Cause]]) -> str | None:
    return next((cause.key.model_id for cause in causes() if key in cause.displaces), None)


def continues(span: StatusSpan, what: Seen) -> bool:
    """Whether what is seen is still this span. An engine that was loaded again in the meantime has another."""
    told, tells = span.told_since, what.since
    same_start = told is None or tells is None or abs(tells - told) < SAME_START_SECS
    return span.status == what.status and span.devices == what.devices and same_start


def _begun(key: ReplicaKey, what: Seen, now: float, causes: Callable[[], Iterable[Cause]]) -> StatusSpan:
    since = now if what.since is None else min(what.since, now)
    cause = None
    if what.status == ModelStatus.LOADING:
        cause = next((cause for cause in causes() if cause.key == key), None)
    span = StatusSpan(
        node=key.node,
        model=key.model_id,
        instance=key.instance,
        status=what.status,
        since=since,
        told_since=what.since,
        variant=what.variant,
        devices=what.devices,
        why=None if cause is None else cause.why,
        displaces=() if cause is None else tuple(each.model_id for each in cause.displaces),
    )
    return _updated(span, what, since)


def _updated(span: StatusSpan, what: Seen, now: float) -> StatusSpan:
    """With the phase and the error as they are now."""
    phases = span.phases
    if what.phase and (not phases or phases[-1].name != what.phase):
        phases = (*phases, Phase(what.phase, now))
    if phases is span.phases and what.error == span.error:
        return span
    return msgspec.structs.replace(span, phases=phases, error=what.error)
