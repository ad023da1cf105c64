"""One engine from the start of its process to its end: coming up, serving, falling ill, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Protocol

from neuron import errors as failures
from neuron.engine.engine import Engine
from neuron.engine.output import LOADED_PAUSE_SECS, LOADING_PAUSE_SECS
from neuron.engine.readiness import until_ready
from neuron.lifecycle.engine_sleep import fall_asleep, found_asleep, wake_up
from neuron.lifecycle.exit_kind import ExitKind
from neuron.lifecycle.failure_cause import because, cause_of_end, exit_reason
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.load_request import LoadRequest, SleepRequest
from neuron.lifecycle.states import Condition, State
from neuron.progress.load_times import LoadKey
from neuron.progress.progress import LoadProgress
from shared.errors import ServiceError
from shared.protocol import FailureCause, Progress
from shared.tasks import cancel_all, first_of, timeout

log = logging.getLogger(__name__)

ADOPT_SECS = 5.0
"""How long an engine that had served has to answer a neuron that finds it."""
_HOUSEKEEPING_SECS = 60.0
_MEASURE_SECS = 2.0
_CAUSE_BYTES = 128 * 1024  # of the log's end, searched for the cause of an unexpected end
_DRAIN_POLL_SECS = 0.1
_IDLE_LOOKS = 2


class Model(Protocol):
    """The worker whose engine this is."""

    @property
    def condition(self) -> Condition: ...

    def become(self, state: State, reason: str, *, progress: Progress | None = None) -> None: ...

    def show(self, progress: Progress) -> None: ...

    def loaded(self, engine: Engine, why: str, seconds: float | None) -> None: ...


class EngineLife:
    """`ending` is how it ended, `served_secs` how long it had served then (None: it never came up). What concerns the
    model is told to `model`; the process itself is ended by the launcher, when this is over."""

    def __init__(self, launcher: Launcher, engine: Engine, run: LoadRequest, model: Model) -> None:
        self.engine = engine
        self.run = run
        self.ending = ExitKind.STOPPED
        self.served_secs: float | None = None
        self._launcher = launcher
        self._model = model
        self._ill = ""  # what is wrong with an engine that still runs
        self._says_it_serves = asyncio.Event()
        self._progress = LoadProgress(
            engine.harness.first_reading(),
            started=time.monotonic() - (time.time() - engine.started_at),
            expected=launcher.history.expected(LoadKey.of(engine.spec)),
        )
        # Ends by itself when the engine is gone and all it said is known.
        self._following = asyncio.create_task(self._follow(), name=f"output of {engine.engine_id}")

    async def bring_up(self) -> bool:
        """True when it serves; False when it ended, or has to be ended, before."""
        engine, run = self.engine, self.run
        if run.stop_wanted.is_set():
            self._end(ExitKind.STOPPED)
            return False
        served_before = engine.ready_at is not None
        ready = until_ready(
            self._launcher.http,
            engine.url,
            health_path=engine.harness.health_path,
            api_key=engine.api_key,
            owns_port=engine.owns_port,
            hint=self._says_it_serves,
        )
        try:
            ending = await first_of(
                {
                    ExitKind.STOPPED: run.stop_wanted.wait(),
                    ExitKind.EXITED: engine.process.main_exited.wait(),
                    ExitKind.READY: ready,
                },
                timeout_secs=ADOPT_SECS if served_before else self._startup_secs_left(),
            )
            if ending is ExitKind.READY:
                # More is checked now: the engine may be gone, or another process may listen on its port.
                ending = await first_of(
                    {
                        ExitKind.READY: self._came_up(served_before),
                        ExitKind.STOPPED: run.stop_wanted.wait(),
                        ExitKind.EXITED: engine.process.main_exited.wait(),
                    }
                )
        except failures.GuardFailed as error:
            self._ill = error.message
            self._end(ExitKind.UNHEALTHY)
            return False
        if ending is not ExitKind.READY:
            if served_before and ending is not ExitKind.STOPPED:
                self.served_secs = 0.0
            self._end(ending or ExitKind.TIMED_OUT)
            return False
        return True

    async def serve(self) -> None:
        """Returns when it has to end, or has ended."""
        since = time.monotonic()
        vitals = asyncio.create_task(self.engine.vitals.until_bad(), name=f"vitals of {self.engine.engine_id}")
        try:
            ending = await self._until_end(vitals)
            while ending is ExitKind.SLEEP_REQUESTED:
                ending = await self._fulfil(self.run.sleep_requests.popleft()) or await self._until_end(vitals)
            if ending is ExitKind.UNHEALTHY:
                self._ill = self._ill or vitals.result()
        finally:
            await cancel_all([vitals])
        self.served_secs = time.monotonic() - since
        if ending is ExitKind.STOPPED:
            await self._drain()
        else:
            # Told at once: what is left of the engine is swept, and the cause looked for, afterwards.
            self._model.become(State.RECOVERING, self._ill or "its engine ended unexpectedly")
            self.run.reopen()
        self._end(ending)

    async def explain(self) -> tuple[ServiceError, bool]:
        """The error for an engine that is gone; True when it ended because its port was taken."""
        engine = self.engine
        await asyncio.wait([self._following])
        lines = await asyncio.to_thread(engine.output.file.tail, 2000, max_bytes=_CAUSE_BYTES)
        if self.ending is ExitKind.TIMED_OUT:
            if self.served_secs is not None:
                reason = f"its engine did not answer neuron within {ADOPT_SECS:g} s"
                return failures.LoadFailed(reason, extra=because(FailureCause.NODE)), False
            reason = f"not ready within {engine.startup_timeout_secs:g} s"
            return failures.LoadTimedOut(failures.with_last_lines(reason, lines)), False
        if self.ending is ExitKind.UNHEALTHY:
            cause = engine.harness.root_cause(lines)
            reason = self._ill if cause is None else f"{self._ill}: {cause}"
            return failures.LoadFailed(failures.with_last_lines(reason, lines)), False
        code = await engine.process.wait()
        reason = exit_reason(engine.harness, code, lines)
        path_missing = await asyncio.to_thread(_is_missing_path, engine.spec.source)
        extra = because(cause_of_end(engine.harness, code, lines, path_missing=path_missing))
        return failures.LoadFailed(failures.with_last_lines(reason, lines), extra=extra), _port_was_taken(lines)

    def _end(self, ending: ExitKind) -> None:
        self.ending = ending
        self.engine.leave = self.run.leave_engine and ending is ExitKind.STOPPED
        self.engine.kill = ending in (ExitKind.UNHEALTHY, ExitKind.TIMED_OUT)

    def _startup_secs_left(self) -> float:
        """Of an engine that an earlier neuron began to load, what is left of its time."""
        return max(self.engine.startup_timeout_secs - (time.time() - self.engine.started_at), ADOPT_SECS)

    async def _came_up(self, served_before: bool) -> None:
        engine = self.engine
        with contextlib.suppress(asyncio.TimeoutError):  # figures are not worth waiting for a stuck driver
            async with timeout(_MEASURE_SECS):
                await asyncio.gather(self._launcher.measure([engine]), engine.vitals.take_sample())
        await engine.note_shared_files()
        control = engine.harness.sleep
        if control is not None and engine.can_sleep and not served_before:
            engine.can_sleep = await control.is_guarded(self._launcher.http, engine.url, engine.control_key)
        seconds = None
        if not served_before:
            engine.ready_at = time.time()
            engine.load_secs = seconds = engine.ready_at - engine.started_at
            await self._launcher.history.record(LoadKey.of(engine.spec), self._progress.times(time.monotonic()))
        await self._launcher.note(engine)
        if self.run.stop_wanted.is_set():
            return
        if served_before and await found_asleep(self._launcher, engine):
            self._model.become(State.SLEEPING, "adopted, asleep")
        else:
            self._model.loaded(engine, "adopted, it answers" if served_before else "it answers", seconds)
        self.run.settle(None)

    async def _until_end(self, vitals: asyncio.Task[str]) -> ExitKind:
        engine, run = self.engine, self.run
        while True:
            ending = await first_of(
                {
                    ExitKind.STOPPED: run.stop_wanted.wait(),
                    ExitKind.EXITED: engine.process.main_exited.wait(),
                    ExitKind.UNHEALTHY: _until_done(vitals),
                    ExitKind.SLEEP_REQUESTED: run.sleep_requested.wait(),
                },
                timeout_secs=_HOUSEKEEPING_SECS,
            )
            if run.stop_wanted.is_set():
                return ExitKind.STOPPED
            if ending is not None:
                return ending
            await engine.note_shared_files()

    async def _fulfil(self, sleep_request: SleepRequest) -> ExitKind | None:
        """Lets the engine sleep or wake. How it ended meanwhile, or has to end because it does neither; else None."""
        run, model = self.run, self._model
        if not run.sleep_requests:
            run.sleep_requested.clear()
        if (model.condition.state is State.SLEEPING) is (sleep_request.level > 0):
            if not sleep_request.level:
                run.settle(None)
            sleep_request.settle(None)
            return None
        ends = {ExitKind.STOPPED: run.stop_wanted.wait(), ExitKind.EXITED: self.engine.process.main_exited.wait()}
        working = self._sleep(sleep_request.level) if sleep_request.level else self._wake()
        try:
            ending = await first_of({**ends, ExitKind.READY: working})
        except (failures.WakeFailed, failures.SleepUnsettled) as error:
            self._ill = error.message
            sleep_request.settle(error)
            return ExitKind.UNHEALTHY
        except ServiceError as error:
            model.become(State.LOADED if sleep_request.level else State.SLEEPING, error.message)
            run.settle(None if sleep_request.level else error)
            sleep_request.settle(error)
            return None
        if ending is ExitKind.READY:
            sleep_request.settle(None)
            return None
        sleep_request.settle(run.stop_reason or failures.LoadFailed("its engine ended"))
        return ending

    async def _sleep(self, level: int) -> None:
        self._model.become(State.SLEEPING, "falling asleep")
        await fall_asleep(self._launcher, self.engine, level)
        reason = f"asleep, with {self.engine.slept_mb} MiB in the host's memory"
        self._model.become(State.SLEEPING, reason)

    async def _wake(self) -> None:
        self._model.become(State.WAKING, "asked to wake", progress=Progress(phase="waking"))
        await wake_up(self._launcher, self.engine)
        self._model.loaded(self.engine, "awake", None)
        self.run.settle(None)

    async def _drain(self) -> None:
        """Lets what the engine works on come to its end, as long as there is time."""
        run, exited = self.run, self.engine.process.main_exited
        if not run.leave_engine:
            await self._launcher.note_stopping(self.engine)
        idle_looks = 0  # two in a row: a request may have been on its way when the first was taken
        while not run.leave_engine and not exited.is_set() and time.monotonic() < run.drain_until:
            sample = await self.engine.vitals.take_sample()
            idle_looks = idle_looks + 1 if sample is not None and not sample.running and not sample.waiting else 0
            if idle_looks == _IDLE_LOOKS:
                break
            await asyncio.sleep(_DRAIN_POLL_SECS)
        if self._model.condition.state is State.DRAINING:
            self._model.become(State.STOPPING, "drained" if time.monotonic() < run.drain_until else "out of time")

    async def _follow(self) -> None:
        """Turns the engine's output into progress while it loads."""
        await self.engine.output.follow(self._on_lines, self._pause)

    def _pause(self) -> float:
        return LOADING_PAUSE_SECS if self.engine.ready_at is None else LOADED_PAUSE_SECS

    def _on_lines(self, lines: list[str]) -> None:
        if self.engine.ready_at is not None or self.run.stop_wanted.is_set():
            return
        now = time.monotonic()
        news = self._progress.feed(lines, now)
        if self._progress.serving:
            self._says_it_serves.set()
        if news:
            self._model.show(self._progress.view(now))


async def _until_done(task: asyncio.Task[str]) -> None:
    """Leaves the task alone when this is cancelled."""
    await asyncio.wait([task])


def _is_missing_path(source: str) -> bool:
    """True for a path that is not on this host; a name is none. Blocks."""
    return source.startswith("/") and not os.path.lexists(source)


def _port_was_taken(lines: list[str]) -> bool:
    return any("Address already in use" in line for line in lines[-50:])
