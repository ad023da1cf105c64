"""The state of one instance of a model, as `/models` and the events show it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import Field

from neuron.config import RecoverySettings
from neuron.engine.engine import Engine
from neuron.engine.output import EngineOutput
from neuron.gpu.energy.sharing import Resident
from neuron.lifecycle.events import ModelEvents
from neuron.lifecycle.load_request import LoadRequest
from neuron.lifecycle.states import Condition, Restarts, State
from neuron.memory.ledger import Ledger
from neuron.spec import EngineSpec, InstanceKey
from shared.protocol import EndpointReply, FailureCause, ModelView, Progress, Transition

log = logging.getLogger(__name__)

TRANSITIONS_KEPT = 20
_STOPPING = 5
_PREFERENCE = {
    State.LOADED: 0,
    State.WAKING: 1,
    State.LOADING: 1,
    State.RECOVERING: 1,
    State.STARTING: 2,
    State.SLEEPING: 3,
    State.FAILED: 4,
    State.UNLOADED: 4,
    State.DRAINING: _STOPPING,
    State.STOPPING: _STOPPING,
}
"""How soon an instance in this state can serve, in ranks."""


class NeuronModelView(ModelView):
    """An instance in `/models` and the events, with what only operators read: the engine's `pid`, consecutive
    `failures`, `placement` (why it is on these devices), and `transitions` (its last states, newest first)."""

    pid: int | None = None
    failures: int = 0
    placement: str | None = None
    transitions: list[Transition] = Field(default_factory=list)


class InstanceState:
    """Written only by the instance's supervisor and by the engine life that it runs. Every change is published."""

    def __init__(self, key: InstanceKey, recovery: RecoverySettings, ledger: Ledger, events: ModelEvents) -> None:
        self.key = key
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
        """The last spec that was loaded: a command without a spec asks for it again."""
        self.restarts = Restarts(recovery)
        self._ledger = ledger
        self._events = events

    @property
    def model_id(self) -> str:
        return self.key.model_id

    @property
    def state(self) -> State:
        return self.condition.state

    def preference(self) -> tuple[int, int, float]:
        """Sorts the instances of a model, the one to use first: by how soon it serves, then by its requests, then by
        when it was last chosen."""
        if self.request is not None and not (self.request.joinable and self.request.spec.serves):
            return _STOPPING, 0, 0.0
        health = None if self.engine is None else self.engine.health
        outstanding, told_at = (0, 0.0) if health is None else (health.outstanding, health.told_at)
        return _PREFERENCE[self.state], outstanding, told_at

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
            # An engine that is being adopted recovers too, from `unloaded`.
            died = state is State.FAILED or (state is State.RECOVERING and self.state is not State.UNLOADED)
            level = logging.WARNING if died else logging.INFO
            log.log(level, "%s: %s (%s)%s", self.key, state.value, reason, f": {error}" if error else "")
            self.transitions.append(Transition(state=state.value, at=now, reason=reason))
        self.condition = Condition(state, now, reason, progress, error, cause, retry_at, permanent)
        self.publish()

    def show(self, progress: Progress) -> None:
        """Reports a step of a load: the state and its `since` stay."""
        self.condition = replace(self.condition, progress=progress)
        self.publish()

    def show_leaving(self, others: Sequence[str]) -> None:
        """Its engine starts, or wakes, once these engines are gone."""
        message = f"waiting until {', '.join(others)} is gone from the same device"
        if self.condition.progress is None or self.condition.progress.message != message:
            log.info("%s: %s", self.key, message)
            self.show(Progress(phase="waiting", message=message))

    def loaded(self, engine: Engine, reason: str, *, load_secs: float | None = None) -> None:
        """The engine serves. `load_secs`: how long its load took; None when it was adopted or woken."""
        self.proven_spec = engine.spec
        if load_secs is not None:
            self._events.loaded(self.model_id, load_secs)
        self.become(State.LOADED, reason)

    def restarted(self) -> None:
        self._events.restarted(self.model_id)

    def remove(self) -> None:
        """It leaves the list of models."""
        self._events.removed(self.key)

    def resident(self) -> Resident | None:
        """The instance as one that has devices, with its requests, which are about a second old; None if it has
        none."""
        placement = None if self.request is None else self.request.placement
        if placement is None:
            return None
        if self.engine is None or self.state is not State.LOADED:
            return Resident(self.key, placement.indices)
        sample = self.engine.health.sample
        if sample is None:
            return Resident(self.key, placement.indices, requests=None)
        return Resident(self.key, placement.indices, sample.running, sample.marks)

    def device_memory_mb(self) -> Mapping[int, int]:
        """What its engine holds on each device, as last measured; without devices whose driver does not report it."""
        placement = None if self.request is None else self.request.placement
        return {} if placement is None else self._ledger.held_mb(placement.number)

    def publish(self) -> None:
        self._events.changed(self.view())

    def view(self) -> NeuronModelView:
        """`vram_used_mb` is as last measured."""
        condition, engine, spec = self.condition, self.engine, self.spec
        placement = None if self.request is None else self.request.placement
        return NeuronModelView(
            id=self.model_id,
            instance=self.key.instance,
            variant=None if spec is None else spec.variant,
            harness=None if spec is None else spec.harness,
            status=condition.state.status.value,
            devices=[] if placement is None else list(placement.indices),
            vram_used_mb=0 if engine is None else engine.vram_used_mb,
            progress=condition.progress,
            error=condition.error,
            since=condition.since,
            tensor_parallel=None if spec is None else spec.tensor_parallel,
            parallel=None if spec is None or spec.parallel.tensor_only else spec.parallel,
            group=None if spec is None or condition.state is State.UNLOADED else spec.group,
            state=condition.state.value,
            reason=condition.reason,
            cause=None if condition.cause is None else condition.cause.value,
            pid=None if engine is None else engine.process.pid,
            failures=self.restarts.failures,
            retry_at=condition.retry_at,
            permanent=condition.permanent or None,
            vram_booked_mb=0 if placement is None else self._ledger.promised_mb(placement.number),
            ram_used_mb=None if engine is None or engine.ram is None else engine.ram.used_mb,
            ram_booked_mb=None if placement is None else self._ledger.promised_ram_mb(placement.number),
            slept_mb=0 if engine is None else engine.slept_mb,
            endpoint=EndpointReply(url=engine.api_url, api_key=engine.api_key)
            if engine is not None and condition.state is State.LOADED and engine.spec.serves
            else None,
            keep_alive_secs=None if engine is None else engine.record.keep_alive_secs,
            engine_version=None if engine is None else engine.record.engine_version,
            max_model_len=None if engine is None else engine.max_model_len,
            paths=None if engine is None or engine.harness.paths is None else list(engine.harness.paths),
            missing_paths=[] if engine is None else list(engine.harness.missing_paths),
            max_loras=None if engine is None or not engine.takes_adapters else engine.spec.max_loras,
            adapters=[] if engine is None or not engine.takes_adapters else list(engine.adapters),
            placement=None if placement is None else placement.why or None,
            transitions=list(reversed(self.transitions)),
        )
