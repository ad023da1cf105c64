"""The states of a model. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shared.protocol import FailureCause, ModelStatus, Progress


class State(str, Enum):
    """Of a model. Several states share one `status` on the wire."""

    UNLOADED = "unloaded"
    STARTING = "starting"  # waits for other starts on its devices, for memory, or for its process
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"  # its weights are in the host's memory
    WAKING = "waking"
    DRAINING = "draining"  # takes no new requests, and stops when the running ones are finished
    STOPPING = "stopping"
    RECOVERING = "recovering"  # its engine died, or an earlier neuron did: it is restarted or adopted
    FAILED = "failed"  # until it is loaded again or unloaded

    @property
    def status(self) -> ModelStatus:
        """The protocol's name. A draining or stopping model counts as unloaded: a new load waits for the end of the
        stop and then starts a new engine."""
        return _STATUS[self]


_STATUS = {
    State.UNLOADED: ModelStatus.UNLOADED,
    State.STARTING: ModelStatus.LOADING,
    State.LOADING: ModelStatus.LOADING,
    State.LOADED: ModelStatus.LOADED,
    State.SLEEPING: ModelStatus.SLEEPING,
    State.WAKING: ModelStatus.LOADING,
    State.DRAINING: ModelStatus.UNLOADED,
    State.STOPPING: ModelStatus.UNLOADED,
    State.RECOVERING: ModelStatus.RECOVERING,
    State.FAILED: ModelStatus.FAILED,
}


@dataclass(frozen=True)
class Condition:
    """A state and its details. `since` is Unix time; `error` is why the engine failed, `cause` whose fault that is,
    `permanent` whether it would fail again, `retry_at` (Unix time) when it is restarted."""

    state: State
    since: float
    reason: str
    progress: Progress | None = None
    error: str | None = None
    cause: FailureCause | None = None
    retry_at: float | None = None
    permanent: bool = False
