"""One model of this host: decides what its engine does next, and sees to it.

Every decision is made between two `await`s, so that none can be based on a state that has passed; everything that
takes time happens in one task, `_drive`, which alone changes the state (but for the steps that only tell what was
asked: a stop, a new load).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from neuron import errors as failures
from neuron.engine.engine import Engine
from neuron.engine.output import EngineOutput
from neuron.engine.state_dir import EngineDir, FoundEngine
from neuron.lifecycle.engine_life import EngineLife
from neuron.lifecycle.exit_kind import ExitKind
from neuron.lifecycle.failure_cause import cause_of
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.load_request import LoadRequest, SleepRequest
from neuron.lifecycle.restarts import Restarts
from neuron.lifecycle.states import Condition, State
from neuron.memory.placement import EnginePlacement
from neuron.spec import EngineSpec
from shared.errors import ServiceError
from shared.protocol import FailureCause, Progress, Transition
from shared.tasks import first_of, timeout

log = logging.getLogger(__name__)

LAUNCHES = 3  # of one load: each with another port, when something else took the port before the engine did
TRANSITIONS_KEPT = 20


@dataclass(frozen=True)
class Ended:
    """How an engine's life ended. `error` None: as asked. `served_secs` None: it never came up."""

    error: ServiceError | None = None
    served_secs: float | None = None
    again: bool = False  # at once: nothing was wrong with the engine


class ModelSupervisor:
    """Single owner of one model's engine. `on_change` is called after every change of `condition`, `on_loaded` with
    the seconds each successful load took, `on_restart` whenever an engine is started again after it died."""

    def __init__(
        self,
        model_id: str,
        launcher: Launcher,
        *,
        on_change: Callable[[ModelSupervisor], None],
        on_loaded: Callable[[ModelSupervisor, float], None],
        on_restart: Callable[[ModelSupervisor], None],
    ) -> None:
        self.model_id = model_id
        self.condition = Condition(State.UNLOADED, time.time(), "not loaded yet")
        self.transitions: deque[Transition] = deque(maxlen=TRANSITIONS_KEPT)
        self.engine: Engine | None = None
        """The engine while there is one, also while it stops."""
        self.output: EngineOutput | None = None
        """What the present engine says, or what the last one said before it failed or was stopped."""
        self.spec: EngineSpec | None = None
        """What it was last asked to be."""
        self.restarts = Restarts(launcher.config.recovery)
        self._proven_spec: EngineSpec | None = None  # the last that was loaded: what a bare command asks for again
        self._launcher = launcher
        self._on_change = on_change
        self._on_loaded = on_loaded
        self._on_restart = on_restart
        self._run: LoadRequest | None = None
        self._next: LoadRequest | None = None  # begins when `_run`, which is stopping, is gone
        self._task: asyncio.Task[None] | None = None  # kept, since the loop alone would not keep it alive
        self._last_dir: EngineDir | None = None

    @property
    def run(self) -> LoadRequest | None:
        return self._run

    @property
    def booked_mb(self) -> int:
        """MiB that are booked for it now, on all its devices together."""
        return 0 if self._run is None else self._launcher.ledger.promised_mb(self._run.placement.number)

    def remembered_spec(self) -> EngineSpec:
        """What a bare command asks for.

        Raises:
            NotFound: there is nothing to remember.
        """
        run = self._joinable()
        spec = run.spec if run is not None else self._proven_spec or self.spec
        if spec is None:
            raise failures.unknown_model(self.model_id, "was never loaded here: say with which harness")
        return spec

    def joined(self, spec: EngineSpec | None) -> LoadRequest | None:
        """The run that a load for `spec` (None: whatever it is) joins; None when a new one has to `begin`.

        Raises:
            Conflict: the model is loaded, or being loaded, with another spec.
        """
        run = self._joinable()
        if run is not None:
            self._check_same(run, spec)
            state = self.condition.state
            if state in (State.SLEEPING, State.WAKING):
                run.reopen()
            if state is State.SLEEPING:
                run.sleep_request(0)
        return run

    def begin(self, spec: EngineSpec, placement: EnginePlacement) -> LoadRequest:
        """A new run; only when there is none to be joined. It begins as soon as what stops at present is gone."""
        assert self._joinable() is None
        self.spec = spec
        self.restarts = Restarts(self._launcher.config.recovery)
        new = LoadRequest(spec, placement)
        if self._run is not None:
            self._next = new
        else:
            self._begin(new, State.STARTING, "asked to load")
        return new

    def adopt(self, found: FoundEngine, placement: EnginePlacement) -> LoadRequest:
        """A run with the engine that an earlier neuron left."""
        assert found.record is not None
        self.spec = spec = found.record.engine_spec
        run = LoadRequest(spec, placement)
        self._last_dir = found.directory
        self._begin(run, State.RECOVERING, "found at neuron's start", found)
        return run

    def sleep_request(self, level: int) -> SleepRequest:
        """Asks the engine to sleep (`level` 1), or to wake up (0).

        Raises:
            NotFound: the model is not loaded.
        """
        state, run = self.condition.state, self._joinable()
        if run is None or run is not self._run or state not in (State.LOADED, State.SLEEPING, State.WAKING):
            raise failures.unknown_model(self.model_id, f"is not loaded: it is {state.value}")
        return run.sleep_request(level)

    def stop(self, reason: ServiceError, *, why: str | None = None, drain_secs: float = 0) -> LoadRequest | None:
        """Ends whatever runs or is about to, and clears a failure. The run that has to be gone then, if any. `reason`
        is for callers that wait for the model, `why` for the state that operators see (default: the same)."""
        why = why or reason.message
        if self._next is not None:
            self._next.stop(reason)
            self._release(self._next)
            self._next.finish()
            self._next = None
        run = self._run
        if run is None:
            if self.condition.state is State.FAILED:
                self.become(State.UNLOADED, "unloaded after it failed")
            return None
        run.stop(reason, drain_secs=drain_secs)
        self._launcher.ledger.leaving(run.placement.number)
        state = self.condition.state
        if state is State.LOADED and drain_secs > 0:
            self.become(State.DRAINING, why)
        elif state is not State.STOPPING and not (state is State.DRAINING and drain_secs > 0):
            self.become(State.STOPPING, why)
        return run

    def leave(self, reason: ServiceError) -> None:
        """Ends the run and leaves its engine running, for the next neuron: nothing is told of it, since requests go on.
        An engine that stops already goes on stopping, and finishes what it works on as it would without this."""
        run = self._run
        if run is None or run.stop_wanted.is_set():
            self.stop(reason, drain_secs=self._launcher.config.drain_timeout_secs)
        else:
            run.leave_engine = True
            run.stop(reason)

    def _joinable(self) -> LoadRequest | None:
        run = self._next or self._run
        return run if run is not None and run.joinable else None

    def _check_same(self, run: LoadRequest, wanted: EngineSpec | None) -> None:
        if wanted is None:
            return
        running = run.spec
        if running.devices is None and run is self._run and run.placement.devices:
            running = replace(running, devices=run.placement.indices)
        difference = running.difference(wanted)
        if difference is not None:
            loaded = run is self._run and self.condition.state is State.LOADED
            conflict = failures.already_loaded if loaded else failures.load_in_progress
            raise conflict(self.model_id, difference)

    def _begin(self, run: LoadRequest, state: State, reason: str, found: FoundEngine | None = None) -> None:
        self._run = run
        self.become(state, reason, progress=Progress(phase="starting"))
        self._task = asyncio.create_task(self._drive(run, found), name=f"engine of {self.model_id}")

    def become(
        self,
        state: State,
        reason: str,
        *,
        progress: Progress | None = None,
        error: str | None = None,
        cause: FailureCause | None = None,
        retry_at: float | None = None,
    ) -> None:
        """For this module and the present engine life; all others only read `condition`."""
        now = time.time()
        if state is not self.condition.state:
            log.info("%s: %s (%s)%s", self.model_id, state.value, reason, f": {error}" if error else "")
            self.transitions.append(Transition(state=state.value, at=now, reason=reason))
        self.condition = Condition(state, now, reason, progress, error, cause, retry_at)
        self._on_change(self)

    def show(self, progress: Progress) -> None:
        """A step of a load: no change of state, and `since` stays."""
        self.condition = replace(self.condition, progress=progress)
        self._on_change(self)

    def loaded(self, engine: Engine, why: str, seconds: float | None) -> None:
        """The engine serves. `seconds`: what its load took; None when it was not loaded just now."""
        self._proven_spec = engine.spec
        if seconds is not None:
            self._on_loaded(self, seconds)
        self.become(State.LOADED, why)

    def _release(self, run: LoadRequest) -> None:
        self._launcher.ledger.release(run.placement.number)

    async def _drive(self, run: LoadRequest, found: FoundEngine | None) -> None:
        error: ServiceError | None
        try:
            error = await self._live(run, found)
        except ServiceError as failure:
            error = failure
        except Exception:
            log.exception("%s: its engine could not be supervised", self.model_id)
            error = ServiceError("internal error; neuron's log has the details")
        self.engine = None
        self._release(run)
        self._run, following, self._next = None, self._next, None
        if following is not None:
            self._begin(following, State.STARTING, "asked to load while it stopped")
        elif run.stop_wanted.is_set() or error is None:
            self.become(State.UNLOADED, "left running for the next neuron" if run.leave_engine else "stopped")
        else:
            reason = error.message.partition("\n")[0]
            row = self.restarts.failures
            why = f"given up after {row} failures in a row" if self.restarts.given_up else "its engine did not come up"
            self.become(State.FAILED, why, error=reason, cause=cause_of(error))
        run.settle(error or run.stop_reason)
        run.finish()

    async def _live(self, run: LoadRequest, found: FoundEngine | None) -> ServiceError | None:
        """The whole life of a run, through all its engines; why it failed, None when it ended as asked."""
        launches = 0
        came_up = again = found is not None
        while True:
            launches += 1
            if found is not None:
                ended, found = await self._found_engine(run, found), None
            else:
                ended, again = await self._new_engine(run, again=again), True
            if run.stop_wanted.is_set():
                return None
            came_up = came_up or ended.served_secs is not None
            if ended.again and launches < LAUNCHES:
                continue
            assert ended.error is not None
            if not came_up:
                return ended.error
            launches = 0
            self.restarts = self.restarts.after_failure(ended.served_secs)
            if self.restarts.given_up:
                return ended.error
            await self._pause(run, ended.error)
            if run.stop_wanted.is_set():
                return None
            self._on_restart(self)

    async def _pause(self, run: LoadRequest, error: ServiceError) -> None:
        """Between the end of an engine and the start of the next."""
        pause = self.restarts.pause_secs
        run.reopen()
        cause = error.message.partition("\n")[0]
        reason = f"its engine died, failure {self.restarts.failures} in a row: {cause}"
        self.become(State.RECOVERING, reason, retry_at=time.time() + pause, progress=Progress(phase="starting"))
        if pause:
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(pause):
                    await run.stop_wanted.wait()

    async def _new_engine(self, run: LoadRequest, *, again: bool) -> Ended:
        """One engine from its start to its end. `again`: not the run's first."""
        if self._last_dir is not None:
            directory, self._last_dir, self.output = self._last_dir, None, None
            await asyncio.to_thread(directory.remove)
        async with contextlib.AsyncExitStack() as turn:
            try:
                if again:
                    await self._place_again(run)
                if not await self._until_its_turn(run, turn):
                    return Ended()
                async with self._launcher.engine(run.spec, run.placement) as engine:
                    life = EngineLife(self._launcher, engine, run, self)
                    await self._through(life, turn)
            except ServiceError as error:
                return Ended(error)
            return await self._account(life)

    async def _place_again(self, run: LoadRequest) -> None:
        """For the next engine of a run. What cannot be booked any more is not told as booked either."""
        before = run.placement
        try:
            run.placement = await self._launcher.book_again(before, run.spec)
        except ServiceError:
            run.placement = EnginePlacement(before.number, share_mb=before.share_mb)
            raise

    async def _found_engine(self, run: LoadRequest, found: FoundEngine) -> Ended:
        """The rest of the life of an engine that an earlier neuron started."""
        assert found.record is not None
        async with self._launcher.adopted(found.record, found.directory, run.placement) as engine:
            if engine is None:
                return Ended(failures.LoadFailed("its engine had ended when neuron came back"), served_secs=0.0)
            life = EngineLife(self._launcher, engine, run, self)
            await self._through(life, contextlib.AsyncExitStack())
        return await self._account(life)

    async def _until_its_turn(self, run: LoadRequest, turn: contextlib.AsyncExitStack) -> bool:
        """Waits until no other engine starts on its devices and their memory is free. False if stopped before that."""
        devices = run.placement.indices
        if self._launcher.turns.busy(devices):
            self.show(Progress(phase="waiting", message="another engine is starting on one of its devices"))
        begun = await first_of({ExitKind.STOPPED: run.stop_wanted.wait(), ExitKind.READY: self._turn(run, turn)})
        return begun is ExitKind.READY

    async def _turn(self, run: LoadRequest, turn: contextlib.AsyncExitStack) -> None:
        await turn.enter_async_context(self._launcher.turns.turn(run.placement.indices))
        await self._launcher.admission.until_memory_is_back(run.placement.number)

    async def _through(self, life: EngineLife, turn: contextlib.AsyncExitStack) -> None:
        self.engine, self.output, self._last_dir = life.engine, life.engine.output, life.engine.directory
        if self.condition.state is State.STARTING:
            self.become(State.LOADING, "its engine is started", progress=Progress(phase="starting"))
        else:
            self._on_change(self)  # the devices and the process are known now
        if await life.bring_up():
            await turn.aclose()  # others may start on its devices now
            await life.serve()

    async def _account(self, life: EngineLife) -> Ended:
        """Why the engine, which is gone now, came to its end."""
        engine, run = life.engine, life.run
        self.engine = None  # its pid may be another's before the next one starts
        if not engine.vram_released:
            run.vram_error = failures.VramNotReleased(f"{self.model_id}: its memory is still in use after its end")
        if life.ending is ExitKind.STOPPED:
            return Ended()
        error, port_was_taken = await life.explain()
        return Ended(error, life.served_secs, again=port_was_taken and life.served_secs is None)
