"""What a model of this host is at, and how it came to be there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shared.protocol import FailureCause, ModelStatus, Progress


class State(str, Enum):
    """Of a worker. On the wire (`status`) several of them look alike."""

    UNLOADED = "unloaded"
    STARTING = "starting"  # waits for its turn, for memory, or for its process
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"  # its weights are in the host's memory
    WAKING = "waking"
    DRAINING = "draining"  # takes no new work, and will stop when what it has is done
    STOPPING = "stopping"
    RECOVERING = "recovering"  # its engine died, or a neuron before this one did: it comes back by itself
    FAILED = "failed"  # until it is loaded again or unloaded

    @property
    def status(self) -> ModelStatus:
        """As the protocol has it. A draining or stopping model counts as unloaded: a load that comes then waits for the
        end and starts anew."""
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
    """A worker's state and what belongs to it. `since` is Unix time, `reason` why it is so; `error` is why the engine
    failed and `cause` whose doing that is, `retry_at` (Unix time) when it is started again."""

    state: State
    since: float
    reason: str
    progress: Progress | None = None
    error: str | None = None
    cause: FailureCause | None = None
    retry_at: float | None = None
