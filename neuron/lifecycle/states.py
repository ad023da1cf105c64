"""The states of a model, and when an engine that failed is restarted. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from neuron.config import RecoverySettings
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


@dataclass(frozen=True)
class Restarts:
    """Consecutive failures of a model's engine, and what follows from them."""

    settings: RecoverySettings
    failures: int = 0

    def after_failure(self, served_secs: float | None) -> Restarts:
        """Counts one more failure. `served_secs`: how long the engine served, None when it never came up. The count
        starts over after an engine that served for `stable_secs`."""
        stable = served_secs is not None and served_secs >= self.settings.stable_secs
        return Restarts(self.settings, 1 if stable else self.failures + 1)

    @property
    def given_up(self) -> bool:
        return self.failures >= self.settings.max_failures

    @property
    def pause_secs(self) -> float:
        """Delay before the next start: 0 after the first failure, then `backoff_secs`, doubled up to
        `max_backoff_secs`."""
        if self.failures <= 1:
            return 0.0
        doublings = min(self.failures - 2, 32)  # 2**32 is above any maximum, and more would overflow a float
        return min(self.settings.backoff_secs * 2.0**doublings, self.settings.max_backoff_secs)
