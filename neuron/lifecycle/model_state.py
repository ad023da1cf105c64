"""The state of one model on this host, as `/models` and the events show it."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from enum import Enum

from pydantic import Field

from neuron.config import RecoverySettings
from neuron.engine.engine import Engine
from neuron.engine.output import EngineOutput
from neuron.lifecycle.events import ModelEvents
from neuron.lifecycle.load_request import LoadRequest
from neuron.memory.ledger import Ledger
from neuron.spec import EngineSpec
from shared.protocol import EndpointReply, FailureCause, ModelStatus, ModelView, Progress, Transition

log = logging.getLogger(__name__)

TRANSITIONS_KEPT = 20


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
    """Consecutive failures of a model's engine, and what follows from them. Pure."""

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


class NeuronModelView(ModelView):
    """A model in `/models` and the events, with what only operators read: the engine's `pid`, consecutive `failures`,
    `placement` (why it is on these devices), and `transitions` (its last states, newest first)."""

    pid: int | None = None
    failures: int = 0
    placement: str | None = None
    transitions: list[Transition] = Field(default_factory=list)


class ModelState:
    """Written only by the model's supervisor and by the engine life that it runs. Every change is published."""

    def __init__(self, model_id: str, recovery: RecoverySettings, ledger: Ledger, events: ModelEvents) -> None:
        self.model_id = model_id
        self.condition = Condition(State.UNLOADED, time.time(), "not loaded yet")
        self.transitions: deque[Transition] = deque(maxlen=TRANSITIONS_KEPT)
        self.request: LoadRequest | None = None
        """The load request that holds memory now; it may be stopping."""
        self.engine: Engine | None = None
        """The running engine, also while it stops."""
        self.output: EngineOutput | None = None
        """Output of the running engine, or of the last one."""
        self.spec: EngineSpec | None = None
        """The last spec that was asked for."""
        self.proven_spec: EngineSpec | None = None
        """The last spec that was loaded: a command with only a model id asks for it again."""
        self.restarts = Restarts(recovery)
        self._ledger = ledger
        self._events = events

    @property
    def state(self) -> State:
        return self.condition.state

    def become(
        self,
        state: State,
        reason: str,
        *,
        progress: Progress | None = None,
        error: str | None = None,
        cause: FailureCause | None = None,
        retry_at: float | None = None,
        permanent: bool = False,
    ) -> None:
        now = time.time()
        if state is not self.state:
            log.info("%s: %s (%s)%s", self.model_id, state.value, reason, f": {error}" if error else "")
            self.transitions.append(Transition(state=state.value, at=now, reason=reason))
        self.condition = Condition(state, now, reason, progress, error, cause, retry_at, permanent)
        self.publish()

    def show(self, progress: Progress) -> None:
        """Reports a step of a load: the state and its `since` stay."""
        self.condition = replace(self.condition, progress=progress)
        self.publish()

    def loaded(self, engine: Engine, reason: str, *, load_secs: float | None = None) -> None:
        """The engine serves. `load_secs`: how long its load took; None when it was adopted or woken."""
        self.proven_spec = engine.spec
        if load_secs is not None:
            self._events.loaded(self.model_id, load_secs)
        self.become(State.LOADED, reason)

    def restarted(self) -> None:
        self._events.restarted(self.model_id)

    def publish(self) -> None:
        self._events.changed(self.view())

    def view(self) -> NeuronModelView:
        """`vram_used_mb` is as last measured."""
        condition, engine, spec = self.condition, self.engine, self.spec
        placement = None if self.request is None else self.request.placement
        return NeuronModelView(
            id=self.model_id,
            harness=None if spec is None else spec.harness,
            status=condition.state.status.value,
            devices=[] if placement is None else list(placement.indices),
            vram_used_mb=0 if engine is None else engine.vram_used_mb,
            progress=condition.progress,
            error=condition.error,
            since=condition.since,
            tensor_parallel=None if spec is None else spec.tensor_parallel,
            state=condition.state.value,
            reason=condition.reason,
            cause=None if condition.cause is None else condition.cause.value,
            pid=None if engine is None else engine.process.pid,
            failures=self.restarts.failures,
            retry_at=condition.retry_at,
            permanent=condition.permanent or None,
            vram_booked_mb=0 if placement is None else self._ledger.promised_mb(placement.number),
            slept_mb=0 if engine is None else engine.slept_mb,
            endpoint=EndpointReply(url=engine.url, api_key=engine.api_key)
            if engine is not None and condition.state is State.LOADED
            else None,
            placement=None if placement is None else placement.why or None,
            transitions=list(reversed(self.transitions)),
        )
