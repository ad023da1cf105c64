"""Supervises one instance of a model: starts, restarts, adopts and stops its engine.

Decisions are made without an `await` between reading the state and acting on it, so a decision never rests on a stale
state. Everything that takes time happens in one task, `_supervise`; other callers only record what was asked for: a
stop, a new load, a sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from neuron import errors as failures
from neuron.config import NeuronConfig
from neuron.engine.state_dir import EngineDir, FoundEngine
from neuron.lifecycle.engine_life import EngineEvent, EngineLife, EngineTools
from neuron.lifecycle.events import ModelEvents
from neuron.lifecycle.failure_cause import cause_of, is_permanent
from neuron.lifecycle.instance_state import InstanceState
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.load_request import LoadRequest, SleepRequest
from neuron.lifecycle.states import Restarts, State
from neuron.memory.ledger import EnginePlacement
from neuron.spec import EngineSpec, InstanceKey
from shared.errors import ServiceError
from shared.protocol import Progress
from shared.request_ids import current_request_id, request_scope
from shared.tasks import first_of, timeout

log = logging.getLogger(__name__)

PORT_ATTEMPTS = 3
"""Starts of one load when another process takes the engine's port first; each start uses another port."""


@dataclass(frozen=True)
class EngineResult:
    """How an engine ended. `error` None: it was asked to stop. `served_secs` None: it never came up. `port_taken`:
    nothing is wrong with it, so it is started again at once. `spare_failed`: it was a spare process and may be at fault
    for that, so it is started again without one."""

    error: ServiceError | None = None
    served_secs: float | None = None
    port_taken: bool = False
    spare_failed: bool = False


class InstanceSupervisor:
    """Single owner of one engine. `model` is its visible state. `unloaded` is called each time the engine is gone and
    no other follows."""

    def __init__(
        self,
        key: InstanceKey,
        unloaded: Callable[[], None],
        *,
        config: NeuronConfig,
        launcher: Launcher,
        tools: EngineTools,
        events: ModelEvents,
    ) -> None:
        self.model = InstanceState(key, config.recovery, tools.memory.ledger, events)
        self._unloaded = unloaded
        self._config = config
        self._launcher = launcher
        self._tools = tools
        self._memory = tools.memory
        self._next: LoadRequest | None = None  # starts when the present request, which is stopping, is gone
        self._task: asyncio.Task[None] | None = None  # a strong reference: the event loop keeps only weak ones
        self._last_dir: EngineDir | None = None

    @property
    def is_unloaded(self) -> bool:
        """True if it has no engine, none is to come, and it did not fail."""
        return self.model.state is State.UNLOADED and self.model.request is None

    def join(self, spec: EngineSpec | None) -> LoadRequest | None:
        """The request that a load for `spec` (None: any) joins; None when a new one must `begin`. Joining a sleeping
        model wakes it.

        Raises:
            Conflict: the model is loaded, or being loaded, with another spec.
        """
        request = self._joinable()
        if request is not None:
            self._check_same(request, spec)
            if self.model.state in (State.SLEEPING, State.WAKING):
                request.reopen()
            if self.model.state is State.SLEEPING:
                request.sleep_request(0)
        return request

    def begin(self, spec: EngineSpec, placement: EnginePlacement, *, carries_keys: bool) -> LoadRequest:
        """Starts a new request; only when there is none to `join`. It waits until a stopping engine is gone."""
        assert self._joinable() is None
        self.model.spec = spec
        self.model.restarts = Restarts(self._config.recovery)
        request = LoadRequest(spec, placement, carries_keys=carries_keys)
        if self.model.request is not None:
            self._next = request
        else:
            self._start(request, State.STARTING, "load requested")
        return request

    def adopt(self, found: FoundEngine, placement: EnginePlacement) -> LoadRequest:
        """A request that is served by an engine of an earlier neuron."""
        assert found.record is not None
        self.model.spec = spec = found.record.engine_spec
        self._tools.keys.adopt(str(spec.key), found.record.api_key)
        request = LoadRequest(spec, placement, carries_keys=found.record.api_key is not None)
        request.adapters.update(found.record.adapters)
        self._last_dir = found.directory
        self._start(request, State.RECOVERING, "found when neuron started", found)
        return request

    @property
    def starting(self) -> LoadRequest | None:
        """The request whose engine starts, or waits for its devices to start; None if there is none."""
        if self._next is not None:
            return self._next
        return self.model.request if self.model.state.status.coming else None

    @property
    def can_change_sleep(self) -> bool:
        """True if its engine serves or sleeps, so that it can be asked to sleep or to wake."""
        awake_or_asleep = (State.LOADED, State.SLEEPING, State.WAKING)
        request = self.model.request
        return request is not None and request.joinable and self.model.state in awake_or_asleep

    def sleep_request(self, level: int) -> SleepRequest:
        """Asks the engine to sleep (`level` 1) or to wake up (0).

        Raises:
            NotFound: the model is not loaded.
        """
        model = self.model
        if not self.can_change_sleep or model.request is None:
            raise failures.not_loaded(model.key, model.state.value)
        return model.request.sleep_request(level)

    def stop(self, reason: ServiceError, *, why: str | None = None, drain_secs: float = 0) -> LoadRequest | None:
        """Stops the engine and cancels waiting loads; clears a failure. Returns the request to wait for, if there is
        an engine. `reason` is the error for callers that wait for the model, `why` the reason that operators see
        (default: the same)."""
        model = self.model
        why = why or reason.message
        if self._next is not None:
            self._next.stop(reason)
            self._release(self._next)
            self._next.finish()
            self._next = None
        request = model.request
        if request is None:
            if model.state is State.FAILED:
                model.become(State.UNLOADED, "unloaded after a failure")
                self._unloaded()
            return None
        request.stop(reason, drain_secs=drain_secs)
        self._memory.ledger.mark_stopping(request.placement.number)
        if model.state is State.LOADED and drain_secs > 0:
            model.become(State.DRAINING, why)
        elif model.state is not State.STOPPING and not (model.state is State.DRAINING and drain_secs > 0):
            model.become(State.STOPPING, why)
        return request

    def remove(self) -> EngineDir | None:
        """An unloaded instance leaves the list; it is not used again. Returns the directory of its last engine, which
        the caller removes."""
        directory, self._last_dir = self._last_dir, None
        self.model.remove()
        return directory

    def leave(self, reason: ServiceError) -> None:
        """Ends supervision and leaves the engine running for the next neuron. The state does not change, since the
        engine keeps serving. An engine that is already stopping drains and stops as usual."""
        request = self.model.request
        if request is None or request.stop_requested.is_set():
            self.stop(reason, drain_secs=self._config.drain_timeout_secs)
        else:
            request.leave_engine = True
            request.stop(reason)

    def _joinable(self) -> LoadRequest | None:
        request = self._next or self.model.request
        return request if request is not None and request.joinable else None

    def _check_same(self, request: LoadRequest, wanted: EngineSpec | None) -> None:
        if wanted is None:
            return
        current = request is self.model.request
        spec = request.spec
        placement = request.placement
        if spec.devices is None and current and (placement.devices or placement.ram_mb is not None):
            spec = replace(spec, devices=placement.indices)
        difference = spec.difference(wanted)
        if difference is not None:
            loaded = current and self.model.state is State.LOADED
            conflict = failures.already_loaded if loaded else failures.load_in_progress
            raise conflict(self.model.key, difference)

    def _start(self, request: LoadRequest, state: State, reason: str, found: FoundEngine | None = None) -> None:
        self.model.request = request
        self.model.become(state, reason, progress=Progress(phase="starting"))
        self._task = asyncio.create_task(self._supervise(request, found), name=f"engine of {self.model.key}")

    def _release(self, request: LoadRequest) -> None:
        self._memory.release(request.placement.number)

    async def _supervise(self, request: LoadRequest, found: FoundEngine | None) -> None:
        model = self.model
        error: ServiceError | None
        try:
            error = await self._run_engines(request, found)
        except ServiceError as failure:
            error = failure
        except Exception:
            log.exception("%s: its engine could not be supervised", model.key)
            error = ServiceError("internal error; neuron's log has the details")
        model.engine = None
        self._release(request)
        model.request, following, self._next = None, self._next, None
        if following is not None:
            self._start(following, State.STARTING, "load requested while stopping")
        elif request.stop_requested.is_set() or error is None:
            model.become(State.UNLOADED, "left running for the next neuron" if request.leave_engine else "stopped")
        else:
            reason = error.message.partition("\n")[0]
            group = request.spec.group
            why = "engine failed to start" if group is None else f"{group} ended"
            if model.restarts.given_up:
                why = f"given up after {model.restarts.failures} failures in a row"
            model.become(State.FAILED, why, error=reason, cause=cause_of(error), permanent=is_permanent(error))
        request.settle(error or request.stop_reason)
        request.finish()
        if self.is_unloaded:
            self._unloaded()

    async def _run_engines(self, request: LoadRequest, found: FoundEngine | None) -> ServiceError | None:
        """Runs the request's engine, and its successors after crashes. Returns why the request failed, None when it
        ended as asked."""
        starts = 0
        came_up = restart = found is not None
        use_spare = True
        while True:
            starts += 1
            if found is not None:
                result, found = await self._adopted_engine(request, found), None
            else:
                with request_scope(None if restart else current_request_id()):
                    result, restart = await self._new_engine(request, restart=restart, use_spare=use_spare), True
            if request.stop_requested.is_set():
                return None
            if request.spec.group is not None:  # its other parts must start again too
                return result.error
            came_up = came_up or result.served_secs is not None
            if result.port_taken and starts < PORT_ATTEMPTS:
                continue
            use_spare = not result.spare_failed
            if result.spare_failed and result.error is not None:
                reason = result.error.message.partition("\n")[0]
                self._tools.spares.failed(request.spec.harness, f"{self.model.key}: {reason}")
                continue
            assert result.error is not None
            if not came_up:
                return result.error
            unusable = await self._memory.unusable(request.spec.devices or ())
            if unusable is not None:  # a restart on the devices that the load names would fail
                return failures.device_unusable(unusable, result.error)
            starts = 0
            self.model.restarts = self.model.restarts.after_failure(result.served_secs)
            if self.model.restarts.given_up:
                return result.error
            await self._pause(request, result.error)
            if request.stop_requested.is_set():
                return None
            self.model.restarted()

    async def _pause(self, request: LoadRequest, error: ServiceError) -> None:
        """Waits between the end of an engine and the start of the next; a stop ends the wait."""
        pause = self.model.restarts.pause_secs
        request.reopen()
        cause = error.message.partition("\n")[0]
        reason = f"engine died, failure {self.model.restarts.failures} in a row: {cause}"
        retry_at = time.time() + pause
        self.model.become(State.RECOVERING, reason, retry_at=retry_at, progress=Progress(phase="starting"))
        if pause:
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(pause):
                    await request.stop_requested.wait()

    async def _new_engine(self, request: LoadRequest, *, restart: bool, use_spare: bool) -> EngineResult:
        """One engine from its start to its end. `restart`: not the first of this request."""
        async with contextlib.AsyncExitStack() as start_lock:
            if self._last_dir is not None:
                directory, self._last_dir, self.model.output = self._last_dir, None, None
                # Beside the start: its log may be long.
                removal = asyncio.create_task(asyncio.to_thread(directory.remove), name=f"remove {directory.path}")
                start_lock.push_async_callback(asyncio.wait, [removal])
            try:
                if restart:
                    await self._rebook(request)
                if not await self._may_start(request, start_lock):
                    return EngineResult()
                await start_lock.enter_async_context(self._tools.spares.paused())
                api_key = self._tools.keys.new_key(carries_keys=request.carries_keys)
                async with self._launcher.engine(
                    request.spec, request.placement, api_key=api_key, use_spare=use_spare
                ) as engine:
                    life = EngineLife(engine, request, self.model, self._tools)
                    await self._live(life, start_lock)
            except ServiceError as error:
                return EngineResult(error)
            return await self._result_of(life)

    async def _adopted_engine(self, request: LoadRequest, found: FoundEngine) -> EngineResult:
        """The rest of the life of an engine that an earlier neuron started."""
        assert found.record is not None
        async with self._launcher.adopted(found.record, found.directory, request.placement) as engine:
            if engine is None:
                error = failures.LoadFailed("engine exited while neuron was down")
                return EngineResult(error, served_secs=0.0)
            life = EngineLife(engine, request, self.model, self._tools)
            await self._live(life, contextlib.AsyncExitStack())
        return await self._result_of(life)

    async def _rebook(self, request: LoadRequest) -> None:
        """Books memory for the next engine. When that fails, the placement shows no devices either."""
        before = request.placement
        try:
            request.placement = await self._memory.rebook(before, request.spec)
        except ServiceError:
            request.placement = EnginePlacement(before.number, share_mb=before.share_mb)
            raise

    async def _may_start(self, request: LoadRequest, start_lock: contextlib.AsyncExitStack) -> bool:
        """Waits until no other engine starts on the devices and their memory is free. False if stopped before that."""
        if self._memory.start_locks.busy(request.placement.indices):
            message = "waiting for another engine to start on the same device"
            self.model.show(Progress(phase="waiting", message=message))
        event = await first_of(
            {
                EngineEvent.STOP_REQUESTED: request.stop_requested.wait(),
                EngineEvent.READY: self._lock_devices(request, start_lock),
            }
        )
        return event is EngineEvent.READY

    async def _lock_devices(self, request: LoadRequest, start_lock: contextlib.AsyncExitStack) -> None:
        await start_lock.enter_async_context(self._memory.start_locks.held(request.placement.indices))
        await self._memory.until_available(request.placement.number, self.model.show_leaving)

    async def _live(self, life: EngineLife, start_lock: contextlib.AsyncExitStack) -> None:
        model, engine = self.model, life.engine
        engine.adapters = life.request.adapters
        model.engine, model.output, self._last_dir = engine, engine.output, engine.directory
        if model.state is State.STARTING:
            model.become(State.LOADING, "engine started", progress=Progress(phase="starting"))
        else:
            model.publish()  # with the engine's devices and pid
        if await life.bring_up():
            await start_lock.aclose()  # other engines may start on its devices now
            self._tools.spares.loaded(engine)
            with request_scope(None):  # the request that caused the load has its answer
                await life.serve()

    async def _result_of(self, life: EngineLife) -> EngineResult:
        """Why an engine that is gone ended."""
        engine, request = life.engine, life.request
        self.model.engine = None  # its pid may be reused before the next engine starts
        if not engine.vram_released:
            message = f"{self.model.key}: its memory is still in use after its end"
            request.vram_error = failures.VramNotReleased(message)
        if life.ended_by is EngineEvent.STOP_REQUESTED:
            return EngineResult()
        error, port_taken = await life.explain()
        early = life.served_secs is None
        spare_failed = engine.from_spare and early and life.ended_by is EngineEvent.EXITED and not is_permanent(error)
        return EngineResult(error, life.served_secs, port_taken=port_taken and early, spare_failed=spare_failed)
