"""One model of this host: decides what its engine does next, and sees to it.

Every decision is made between two `await`s, so that none can be based on a state that has passed; everything that
takes time happens in one task, `_drive`, which alone changes the state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from neuron import failures
from neuron.ending import Ending, first_of
from neuron.engine import Engine
from neuron.engine_log import EngineLog, LogFollower
from neuron.launcher import Launcher
from neuron.readiness import until_ready
from neuron.run import Run
from neuron.spec import EngineSpec
from neuron.state_dir import EngineDir
from shared.errors import ServiceError
from shared.protocol import ModelStatus, Progress
from shared.tasks import cancel_all, timeout

log = logging.getLogger(__name__)

LAUNCHES = 3  # of one load: each with another port, when something else took the port before the engine did
_LOG_POLL_SECS = 0.2
_LOG_TRIM_SECS = 60.0
_MEASURE_SECS = 2.0
_CAUSE_BYTES = 128 * 1024  # of the log's end, searched for the cause of an unexpected end


class State(str, Enum):
    """What a worker is at. Stopping counts as unloaded: a load that comes then waits for its end and starts anew."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    STOPPING = "stopping"
    FAILED = "failed"

    @property
    def status(self) -> ModelStatus:
        return ModelStatus.UNLOADED if self is State.STOPPING else ModelStatus(self.value)


@dataclass(frozen=True)
class Condition:
    """A worker's state and what belongs to it. `since` is Unix time; `error` is why it failed."""

    state: State
    since: float
    progress: Progress | None = None
    error: str | None = None


class Worker:
    """Single owner of one model's engine. `on_change` is called after every change of `condition`, `on_loaded` with
    the seconds each successful load took."""

    def __init__(
        self,
        model_id: str,
        launcher: Launcher,
        on_change: Callable[[Worker], None],
        on_loaded: Callable[[str, float], None],
    ) -> None:
        self.model_id = model_id
        self.condition = Condition(State.UNLOADED, time.time())
        self.engine: Engine | None = None
        """The engine while there is one, also while it stops."""
        self.spec: EngineSpec | None = None
        """What it was last asked to be."""
        self._proven_spec: EngineSpec | None = None  # the last that was loaded: what a bare command asks for again
        self._launcher = launcher
        self._on_change = on_change
        self._on_loaded = on_loaded
        self._run: Run | None = None
        self._next: Run | None = None  # begins when `_run`, which is stopping, is gone
        self._task: asyncio.Task[None] | None = None
        self._last_dir: EngineDir | None = None

    @property
    def log(self) -> EngineLog | None:
        """The output of the present engine, or of the last one that failed or was stopped."""
        return None if self._last_dir is None else EngineLog(self._last_dir.log)

    def request(self, spec: EngineSpec | None) -> Run:
        """The run that will have the model loaded: the present one if it fits, else a new one.

        `spec` None takes the present run whatever it is, else the remembered spec.

        Raises:
            Conflict: it is loaded, or being loaded, with another spec.
            NotFound: `spec` is None and there is nothing to remember.
        """
        run = self._next or self._run
        if run is not None and run.joinable:
            self._check_same(run, spec)
            return run
        spec = spec or self._proven_spec or self.spec
        if spec is None:
            raise failures.unknown_model(self.model_id, "was never loaded here: say with which harness")
        self.spec = spec
        new = Run(spec)
        if self._run is not None:
            self._next = new
        else:
            self._begin(new)
        return new

    def stop(self, reason: ServiceError) -> Run | None:
        """Ends whatever runs or is about to, and clears a failure. The run that has to be gone then, if any."""
        if self._next is not None:
            self._next.stop(reason)
            self._next.finish()
            self._next = None
        if self._run is not None:
            self._run.stop(reason)
            if self.condition.state in (State.LOADING, State.LOADED):
                self._become(State.STOPPING)
        elif self.condition.state is State.FAILED:
            self._become(State.UNLOADED)
        return self._run

    def give_up_load(self, reason: ServiceError) -> None:
        """Ends a load that is running or is about to; what is loaded stays."""
        if self._next is not None or self.condition.state is State.LOADING:
            self.stop(reason)

    def _check_same(self, run: Run, wanted: EngineSpec | None) -> None:
        if wanted is None:
            return
        running = run.spec
        if running.devices is None and self.engine is not None and run is self._run:
            running = replace(running, devices=self.engine.devices)
        difference = running.difference(wanted)
        if difference is not None:
            loaded = run is self._run and self.condition.state is State.LOADED
            conflict = failures.already_loaded if loaded else failures.load_in_progress
            raise conflict(self.model_id, difference)

    def _begin(self, run: Run) -> None:
        self._run = run
        self._become(State.LOADING, progress=Progress(phase="starting"))
        self._task = asyncio.create_task(self._drive(run), name=f"engine of {self.model_id}")

    def _become(self, state: State, *, progress: Progress | None = None, error: str | None = None) -> None:
        if state is not self.condition.state:
            log.info("%s: %s%s", self.model_id, state.value, f": {error}" if error else "")
        self.condition = Condition(state, time.time(), progress, error)
        self._on_change(self)

    async def _drive(self, run: Run) -> None:
        error: ServiceError | None
        try:
            error = await self._live(run)
        except ServiceError as failure:
            error = failure
        except Exception:
            log.exception("%s: its engine could not be supervised", self.model_id)
            error = ServiceError("internal error; neuron's log has the details")
        self.engine = None
        self._run, following, self._next = None, self._next, None
        if following is not None:
            self._begin(following)
        elif run.stop_wanted.is_set() or error is None:
            self._become(State.UNLOADED)
        else:
            self._become(State.FAILED, error=error.message.partition("\n")[0])
        run.settle(error or run.stop_reason)
        run.finish()

    async def _live(self, run: Run) -> ServiceError | None:
        """The whole life of a run; why it failed, None when it ended as asked."""
        for launch in range(1, LAUNCHES + 1):
            await self._discard_last()
            if run.stop_wanted.is_set():
                return None
            ending = Ending.STOPPED
            was_ready = False
            async with self._launcher.engine(run.spec) as engine:
                self.engine, self._last_dir = engine, engine.directory
                self._on_change(self)  # the devices are known now
                if not run.stop_wanted.is_set():
                    ending = await self._bring_up(engine, run)
                if ending is Ending.READY:
                    was_ready = True
                    ending = await self._serve(engine, run)
            if not engine.vram_released:
                run.vram_error = failures.VramNotReleased(f"{self.model_id}: its memory is still in use after its end")
            if ending is Ending.STOPPED:
                return None
            error, lines = await self._explain(engine, ending)
            if was_ready or launch == LAUNCHES or not _port_was_taken(lines):
                return error
            log.warning("%s: port %d was taken before the engine had it: once more", self.model_id, engine.port)
        raise AssertionError("the last launch returns")

    async def _bring_up(self, engine: Engine, run: Run) -> Ending:
        started = time.monotonic()
        ready = until_ready(
            self._launcher.http,
            engine.url,
            health_path=engine.harness.health_path,
            api_key=engine.api_key,
            owns_port=engine.owns_port,
        )
        follower = asyncio.create_task(self._follow(engine, run))
        try:
            ending = await first_of(
                {
                    Ending.STOPPED: run.stop_wanted.wait(),
                    Ending.EXITED: engine.process.main_exited.wait(),
                    Ending.READY: ready,
                },
                timeout_secs=engine.startup_timeout_secs,
            )
        finally:
            await cancel_all([follower])
        if ending is Ending.READY:
            seconds = time.monotonic() - started
            with contextlib.suppress(asyncio.TimeoutError):  # a figure is not worth waiting for a stuck driver
                async with timeout(_MEASURE_SECS):
                    await self._launcher.measure([engine])
            if run.stop_wanted.is_set():
                return Ending.STOPPED
            self._proven_spec = run.spec
            self._on_loaded(self.model_id, seconds)
            self._become(State.LOADED)
            run.settle(None)
        return ending

    async def _serve(self, engine: Engine, run: Run) -> Ending:
        while True:
            ending = await first_of(
                {Ending.STOPPED: run.stop_wanted.wait(), Ending.EXITED: engine.process.main_exited.wait()},
                timeout_secs=_LOG_TRIM_SECS,
            )
            if run.stop_wanted.is_set():
                return Ending.STOPPED
            if ending is Ending.EXITED:
                # Told at once: what is left of the engine is swept, and the cause looked for, afterwards.
                run.engine_lost = True
                self._become(State.FAILED, error="the engine ended unexpectedly")
                return ending
            await asyncio.to_thread(engine.log.trim)

    async def _follow(self, engine: Engine, run: Run) -> None:
        """Turns the engine's output into progress while it loads."""
        follower = LogFollower(engine.log)
        while True:
            seen: Progress | None = None
            for line in await asyncio.to_thread(follower.new_lines):
                seen = engine.harness.progress_of(line) or seen
            if seen is not None and seen != self.condition.progress and not run.stop_wanted.is_set():
                # Not through _become: a step of a load is no change of status, and `since` stays.
                self.condition = replace(self.condition, progress=seen)
                self._on_change(self)
            await asyncio.sleep(_LOG_POLL_SECS)

    async def _explain(self, engine: Engine, ending: Ending) -> tuple[ServiceError, list[str]]:
        """The error for an engine that is not there, and the output it was found in."""
        lines = await asyncio.to_thread(engine.log.tail, 2000, max_bytes=_CAUSE_BYTES)
        if ending is Ending.TIMED_OUT:
            reason = f"not ready within {engine.startup_timeout_secs:g} s"
            return failures.LoadTimedOut(failures.with_last_lines(reason, lines)), lines
        reason = failures.exit_reason(engine.harness, await engine.process.wait(), lines)
        return failures.LoadFailed(failures.with_last_lines(reason, lines)), lines

    async def _discard_last(self) -> None:
        if self._last_dir is not None:
            directory, self._last_dir = self._last_dir, None
            await asyncio.to_thread(directory.remove)


def _port_was_taken(lines: list[str]) -> bool:
    return any("Address already in use" in line for line in lines[-50:])
