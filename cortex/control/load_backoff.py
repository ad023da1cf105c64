"""Backoffs: after a failed load, the model is not loaded there for a while."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from cortex.config.profile import RequestedModel
from cortex.placement.inputs import Backoff
from cortex.routing.replica import ANY_NODE, ModelOnNode, ReplicaKey

FIRST_SECS = 10.0
MAX_SECS = 300.0
QUIET_SECS = 3600.0
"""A failure is forgotten after this time without another one. Longer than a load may take to fail."""
TEMPORARY_SECS = 1.0
"""For a temporary cause: a neuron restarts, or memory was just given to another load."""
MAX_TEMPORARY = 5
"""Consecutive temporary failures; after that the node is at fault."""
UNKNOWN_NODES = 2
"""After unexplained failures on this many nodes, the model is considered at fault."""


class BackoffCause(str, Enum):
    """Whose fault a failed load is."""

    NODE = "node"  # another node may do better
    MODEL = "model"  # it would fail everywhere: a bad path, a bad flag
    TEMPORARY = "temporary"
    BUSY = "busy"  # another load goes first; not a failure
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Failure:
    backoff: Backoff
    count: int = 0  # consecutive, temporary ones excluded
    temporary: int = 0  # consecutive, since the last one that was not temporary
    cause: BackoffCause = BackoffCause.TEMPORARY  # of the last failure that was not temporary
    at: float = -math.inf  # when it was recorded


_NONE = _Failure(Backoff(-math.inf, ""))


class Backoffs:
    """Failures by model, or `id@variant`, and node. The first pause is 10 s; it doubles with each consecutive failure,
    up to 5 min, and is 10 s again after an hour without a failure."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[ModelOnNode, _Failure] = {}

    def record_failure(
        self, model_id: str, node: str, cause: BackoffCause, reason: str, *, permanent: bool = False
    ) -> None:
        """Notes a failed load. `permanent`: another one there would fail too."""
        self._forget_old()
        if cause is BackoffCause.BUSY:
            self._pause((model_id, node), reason)
            return
        key = model_id, node
        if cause is BackoffCause.UNKNOWN and len(self._failed_on(model_id) | {node}) >= UNKNOWN_NODES:
            cause = BackoffCause.MODEL
        if cause is BackoffCause.MODEL:
            key = model_id, ANY_NODE
        now, before = self._clock(), self._failures.get(key, _NONE)
        if before.backoff.until > now and before.backoff.temporary == (cause is BackoffCause.TEMPORARY):
            # Instances that load side by side fail side by side, which counts once.
            backoff = replace(before.backoff, reason=reason, permanent=before.backoff.permanent or permanent)
            self._failures[key] = replace(before, backoff=backoff, at=now)
            return
        if cause is BackoffCause.TEMPORARY and before.temporary < MAX_TEMPORARY:
            backoff = Backoff(now + TEMPORARY_SECS, reason, temporary=True)
            self._failures[key] = replace(before, backoff=backoff, temporary=before.temporary + 1, at=now)
            return
        pause = min(FIRST_SECS * 2 ** min(before.count, 10), MAX_SECS)
        cause = BackoffCause.NODE if cause is BackoffCause.TEMPORARY else cause
        backoff = Backoff(now + pause, reason, permanent=permanent)
        self._failures[key] = _Failure(backoff, before.count + 1, 0, cause, now)

    def record_load_elsewhere(self, model_id: str, node: str) -> None:
        """Another cortex is loading the model on this node: look again in a moment. Not a failure."""
        self._pause((model_id, ANY_NODE), f"another cortex is loading it on {node}")

    def _pause(self, key: ModelOnNode, reason: str) -> None:
        backoff = Backoff(self._clock() + TEMPORARY_SECS, reason, temporary=True)
        before = self._failures.get(key, replace(_NONE, at=self._clock()))
        self._failures[key] = replace(before, backoff=backoff)

    def record_refused_endpoint(self, key: ReplicaKey, reason: str) -> None:
        """Notes that a neuron lists a model as loaded but gives no endpoint for it: it would be asked forever."""
        model_id, node, _ = key
        self.record_failure(model_id, node, BackoffCause.TEMPORARY, f"{node} has lost {model_id!r}: {reason}")

    def record_success(self, requested: RequestedModel, node: str) -> None:
        """The model is up on this node: forgets its failures there, and those blamed on the model itself."""
        for name in (requested.model_id, requested.name):
            self._failures.pop((name, node), None)
            self._failures.pop((name, ANY_NODE), None)

    def clear(self, names: Collection[str]) -> None:
        """Ends all backoffs of a model, given with its variants: an operator wants it tried now."""
        for key in [key for key in self._failures if key[0] in names]:
            failure = self._failures[key]
            self._failures[key] = replace(
                failure, backoff=Backoff(-math.inf, failure.backoff.reason), cause=BackoffCause.NODE
            )

    def current(self) -> Mapping[ModelOnNode, Backoff]:
        """The backoffs in effect now."""
        now = self._clock()
        return {key: failure.backoff for key, failure in self._failures.items() if failure.backoff.until > now}

    def _forget_old(self) -> None:
        oldest = self._clock() - QUIET_SECS
        self._failures = {key: failure for key, failure in self._failures.items() if failure.at > oldest}

    def _failed_on(self, model_id: str) -> set[str]:
        """Where it failed recently for what may be its own fault. A load may take longer to fail than the
        previous backoff lasted."""
        now = self._clock()
        return {
            node
            for (model, node), failure in self._failures.items()
            if model == model_id
            and failure.backoff.until + MAX_SECS > now
            and failure.cause in (BackoffCause.UNKNOWN, BackoffCause.MODEL)
        }
