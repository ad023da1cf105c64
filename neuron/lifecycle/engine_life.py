"""One engine from the start of its process to its end: coming up, serving, sleeping, draining, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from enum import Enum

import aiohttp

from neuron import errors as failures
from neuron.engine.drain import DrainWatch
from neuron.engine.engine import Engine
from neuron.engine.keys import EngineKeys
from neuron.engine.output import LOADED_PAUSE_SECS, LOADING_PAUSE_SECS
from neuron.engine.readiness import until_ready
from neuron.lifecycle.admission import is_missing_path
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.failure_cause import because, error_of_end
from neuron.lifecycle.instance_state import InstanceState
from neuron.lifecycle.load_request import LoadRequest, SleepRequest
from neuron.lifecycle.serving.engine_adapters import EngineAdapters
from neuron.lifecycle.serving.engine_sleep import EngineSleep
from neuron.lifecycle.spare.spares import Spares
from neuron.lifecycle.states import State
from neuron.progress.history import LoadHistory
from neuron.progress.load_times import LoadKey, LoadTimes
from neuron.progress.progress import LoadProgress
from shared.errors import ServiceError
from shared.protocol import FailureCause, Progress
from shared.tasks import cancel_all, first_of, timeout

log = logging.getLogger(__name__)

ADOPT_SECS = 5.0
"""How long an adopted engine that served before may take to answer."""
_HOUSEKEEPING_SECS = 60.0
_MEASURE_SECS = 2.0
_CAUSE_BYTES = 128 * 1024  # of the log's end, searched for the cause of an unexpected end
_DRAIN_POLL_SECS = 0.03
_LONG_DRAIN_SECS = 1.0  # after which a drain looks less often: each look takes the engine's own time
_LONG_DRAIN_POLL_SECS = 0.1
_DRAIN_NEWS_SECS = 1.0  # between two reports on what a drain waits for
_IDLE_POLLS = 2


class EngineEvent(Enum):
    """What a phase of an engine's life waits for."""

    READY = "ready"
    EXITED = "exited"  # its main process ended by itself
    STOP_REQUESTED = "stop requested"
    SLEEP_REQUESTED = "sleep requested"  # or a wake
    TIMED_OUT = "timed out"
    STALLED = "stalled"  # it neither works nor ends while it loads
    UNHEALTHY = "unhealthy"  # its process runs but does not serve


@dataclass(frozen=True)
class EngineTools:
    """What the life of an engine works with; the same for every engine of this host."""

    memory: EngineMemory
    sleep: EngineSleep
    adapters: EngineAdapters
    history: LoadHistory
    keys: EngineKeys
    http: aiohttp.ClientSession
    spares: Spares


class EngineLife:
    """Reports to `model` and to the callers of `request`. Decides that the engine must stop; `Launcher` stops it.

    `ended_by` is why it ended, `served_secs` how long it served (None: it never came up).
    """

    def __init__(self, engine: Engine, request: LoadRequest, model: InstanceState, tools: EngineTools) -> None:
        self.engine = engine
        self.request = request
        self.ended_by = EngineEvent.STOP_REQUESTED
        self.served_secs: float | None = None
        self._model = model
        self._memory = tools.memory
        self._sleep = tools.sleep
        self._adapters = tools.adapters
        self._history = tools.history
        self._http = tools.http
        self._fault = ""  # of an engine whose process still runs
        self._log_says_ready = asyncio.Event()  # cleared by each health check
        self._said_serving = asyncio.Event()
        self._weights_loaded = asyncio.Event()
        self._load_times: LoadTimes | None = None
        self._progress = LoadProgress(
            engine.harness.first_reading(),
            started=time.monotonic() - (time.time() - engine.started_at),
            expected=tools.history.expected(LoadKey.of(engine.spec)),
        )
        # Ends by itself when the engine has ended and its output is read.
        self._following = asyncio.create_task(self._follow_output(), name=f"output of {engine.engine_id}")

    async def bring_up(self) -> bool:
        """True when the engine serves; False when it ended, or must be stopped, before that."""
        engine, request = self.engine, self.request
        if request.stop_requested.is_set():
            self._end(EngineEvent.STOP_REQUESTED)
            return False
        served_before = engine.ready_at is not None
        ready = self._until_ready() if engine.spec.serves else self._until_part_is_loaded()
        try:
            event = await first_of(
                {
                    EngineEvent.STOP_REQUESTED: request.stop_requested.wait(),
                    EngineEvent.EXITED: engine.process.main_exited.wait(),
                    EngineEvent.READY: ready,
                    EngineEvent.STALLED: self._until_stalled(),
                },
                timeout_secs=ADOPT_SECS if served_before else self._startup_secs_left(),
            )
            if event is EngineEvent.READY:
                # The engine may end during these steps, and another process may take over its port.
                event = await first_of(
                    {
                        EngineEvent.READY: self._came_up(served_before),
                        EngineEvent.STOP_REQUESTED: request.stop_requested.wait(),
                        EngineEvent.EXITED: engine.process.main_exited.wait(),
                    }
                )
        except failures.GuardFailed as error:
            self._fault = error.message
            self._end(EngineEvent.UNHEALTHY)
            return False
        if event is not EngineEvent.READY:
            if served_before and event is not EngineEvent.STOP_REQUESTED:
                self.served_secs = 0.0
            self._end(event or EngineEvent.TIMED_OUT)
            return False
        return True

    async def _until_ready(self) -> None:
        engine, harness = self.engine, self.engine.harness
        if harness.waits_for_line and engine.ready_at is None:
            await self._said_serving.wait()
        await until_ready(
            self._http,
            engine.url,
            health_path=harness.health_path,
            api_prefix=harness.api_prefix,
            api_key=engine.api_key,
            model_id=engine.spec.model_id,
            owns_port=engine.owns_port,
            hint=self._log_says_ready,
            on_answer=engine.answered_check,
        )

    async def _until_part_is_loaded(self) -> None:
        """A part of a group without a server tells only by its output how far it is. Whether the whole engine works is
        rank 0's to say."""
        if self.engine.ready_at is None:
            await self._weights_loaded.wait()

    async def _until_stalled(self) -> None:
        self._fault = await self.engine.until_stalled(self._progress.tell_idle)

    async def serve(self) -> None:
        """Returns when the engine has ended or must be stopped."""
        since = time.monotonic()
        await self._account()
        health = asyncio.create_task(self.engine.health.until_unhealthy(), name=f"health of {self.engine.engine_id}")
        try:
            event = await self._next_event(health)
            while event is EngineEvent.SLEEP_REQUESTED:
                event = await self._fulfil(self.request.sleep_requests.popleft()) or await self._next_event(health)
            if event is EngineEvent.UNHEALTHY:
                self._fault = self._fault or health.result()
        finally:
            await cancel_all([health])
        self.served_secs = time.monotonic() - since
        hung = False
        if event is EngineEvent.STOP_REQUESTED:
            hung = await self._drain() is EngineEvent.UNHEALTHY
        else:
            # Reported before the processes are cleaned up and the cause is searched for: cortex must reroute now.
            # A part of a group does not come back alone.
            state = State.RECOVERING if self.engine.spec.group is None else State.STOPPING
            self._model.become(state, self._fault or "engine exited unexpectedly")
            self.request.reopen()
        self._end(event, hung=hung)

    async def explain(self) -> tuple[ServiceError, bool]:
        """Why an engine that is gone failed; True when its port was taken by another process."""
        engine = self.engine
        await asyncio.wait([self._following])
        lines = await asyncio.to_thread(engine.output.file.tail, 2000, max_bytes=_CAUSE_BYTES)
        if self.ended_by is EngineEvent.TIMED_OUT:
            if self.served_secs is not None:
                reason = f"engine did not answer neuron within {ADOPT_SECS:g} s"
                return failures.LoadFailed(reason, extra=because(FailureCause.NODE)), False
            silent = engine.harness.waits_for_line and not self._said_serving.is_set()
            why = ": no line of its output matched ready_pattern" if silent else ""
            reason = f"not ready within {engine.startup_timeout_secs:g} s{why}"
            return failures.not_ready(reason, lines), False
        if self.ended_by is EngineEvent.STALLED:
            return failures.stalled(self._fault, lines), False
        if self.ended_by is EngineEvent.UNHEALTHY:
            cause = engine.harness.root_cause(lines)
            reason = self._fault if cause is None else f"{self._fault}: {cause}"
            return failures.LoadFailed(failures.with_last_lines(reason, lines)), False
        code = await engine.process.wait()
        path_missing = await asyncio.to_thread(is_missing_path, engine.spec.source)
        error = error_of_end(engine.harness, code, lines, path_missing=path_missing)
        return error, engine.harness.port_was_taken(lines)

    def _end(self, event: EngineEvent, *, hung: bool = False) -> None:
        """`hung`: it stopped answering while it drained, so asking it to stop is useless."""
        self.ended_by = event
        self.engine.end_with(
            # A part without a server has nothing to finish, and may take ten seconds to end when asked to.
            kill=hung
            or event in (EngineEvent.UNHEALTHY, EngineEvent.TIMED_OUT, EngineEvent.STALLED)
            or not self.engine.spec.serves,
            leave=self.request.leave_engine and event is EngineEvent.STOP_REQUESTED,
        )

    def _startup_secs_left(self) -> float:
        """An adopted engine that was still loading has used part of its time."""
        return max(self.engine.startup_timeout_secs - (time.time() - self.engine.started_at), ADOPT_SECS)

    async def _came_up(self, served_before: bool) -> None:
        """Publishes that the engine serves; `_account` does the rest, because a request waits for this."""
        engine = self.engine
        load_secs = None
        if not served_before:
            await self._sleep.check_guard(engine)
            await self._adapters.restore(engine)
            load_secs = engine.came_up()
            self._load_times = self._progress.times(time.monotonic())
        if self.request.stop_requested.is_set():
            return
        if served_before and await self._sleep.found_asleep(engine):
            self._model.become(State.SLEEPING, "adopted, asleep")
        else:
            reason = "adopted, engine ready" if served_before else "engine ready"
            self._model.loaded(engine, reason, load_secs=load_secs)

    async def _account(self) -> None:
        """Measures and records an engine that has just come up, then answers the callers of the load."""
        engine = self.engine
        if self._load_times is not None:
            await self._history.record(LoadKey.of(engine.spec), self._load_times)
        await asyncio.gather(self._measure(), self._learn_context_length(), engine.record_shared_files())
        await engine.save_record()
        if not self.request.stop_requested.is_set():
            self._model.publish()  # with the memory that it takes
            self.request.settle(None)

    async def _measure(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # a stuck driver must not delay a stop
            async with timeout(_MEASURE_SECS):
                await self._memory.measure([self.engine])

    async def _learn_context_length(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # nor must an engine that is slow to answer
            async with timeout(_MEASURE_SECS):
                await self.engine.learn_context_length(self._http)

    async def _next_event(self, health: asyncio.Task[str]) -> EngineEvent:
        engine, request = self.engine, self.request
        while True:
            event = await first_of(
                {
                    EngineEvent.STOP_REQUESTED: request.stop_requested.wait(),
                    EngineEvent.EXITED: engine.process.main_exited.wait(),
                    EngineEvent.UNHEALTHY: _until_done(health),
                    EngineEvent.SLEEP_REQUESTED: request.sleep_requested.wait(),
                },
                timeout_secs=_HOUSEKEEPING_SECS,
            )
            if request.stop_requested.is_set():
                return EngineEvent.STOP_REQUESTED
            if event is not None:
                return event
            await engine.record_shared_files()

    async def _fulfil(self, sleep_request: SleepRequest) -> EngineEvent | None:
        """Puts the engine to sleep or wakes it. Returns the event that ends its life meanwhile, None if it lives on."""
        request, model = self.request, self._model
        if not request.sleep_requests:
            request.sleep_requested.clear()
        if (model.state is State.SLEEPING) is (sleep_request.level > 0):
            if not sleep_request.level:
                request.settle(None)
            sleep_request.settle(None)
            return None
        change = self._fall_asleep(sleep_request.level) if sleep_request.level else self._wake()
        try:
            event = await first_of(
                {
                    EngineEvent.STOP_REQUESTED: request.stop_requested.wait(),
                    EngineEvent.EXITED: self.engine.process.main_exited.wait(),
                    EngineEvent.READY: change,
                }
            )
        except (failures.WakeFailed, failures.SleepUnsettled) as error:
            self._fault = error.message
            sleep_request.settle(error)
            return EngineEvent.UNHEALTHY
        except ServiceError as error:
            model.become(State.LOADED if sleep_request.level else State.SLEEPING, error.message)
            request.settle(None if sleep_request.level else error)
            sleep_request.settle(error)
            return None
        if event is EngineEvent.READY:
            sleep_request.settle(None)
            return None
        sleep_request.settle(request.stop_reason or failures.LoadFailed("engine exited"))
        return event

    async def _fall_asleep(self, level: int) -> None:
        self._model.become(State.SLEEPING, "falling asleep")
        await self._sleep.fall_asleep(self.engine, level)
        self._model.become(State.SLEEPING, f"asleep, with {self.engine.slept_mb} MiB in host memory")

    async def _wake(self) -> None:
        self._model.become(State.WAKING, "wake requested", progress=Progress(phase="waking"))
        await self._sleep.wake_up(self.engine, self._model.show_leaving)
        self._model.loaded(self.engine, "awake")
        self.request.settle(None)

    async def _drain(self) -> EngineEvent | None:
        """Waits until the engine has finished its requests, hangs or has ended, or the drain time is over."""
        request, engine = self.request, self.engine
        if not request.leave_engine:
            await engine.record_stop()
        event = await first_of(
            {
                EngineEvent.STOP_REQUESTED: self._until_idle(),
                EngineEvent.EXITED: engine.process.main_exited.wait(),
                EngineEvent.UNHEALTHY: engine.health.until_unhealthy(),
            }
        )
        if self._model.state is State.DRAINING:
            in_time = time.monotonic() < request.drain_until
            reason = "drained" if in_time else "drain timed out"
            self._model.become(State.STOPPING, "unhealthy" if event is EngineEvent.UNHEALTHY else reason)
        return event

    async def _until_idle(self) -> None:
        """Returns when the engine has no requests, is to be left, or the drain time is over."""
        request, watch = self.request, DrainWatch(self.engine)
        idle_polls = 0  # two in a row: a request may have been on its way during the first
        told, told_at = "", 0.0
        long_since = time.monotonic() + _LONG_DRAIN_SECS
        while not request.leave_engine and time.monotonic() < request.drain_until:
            waits_for = await watch.waits_for()
            idle_polls = 0 if waits_for else idle_polls + 1
            if idle_polls == _IDLE_POLLS:
                return
            now = time.monotonic()
            if waits_for and waits_for != told and now - told_at >= _DRAIN_NEWS_SECS:
                if not told:
                    log.info("%s: stops later: %s", self._model.key, waits_for)
                told, told_at = waits_for, now
                self._model.show(Progress(phase="draining", message=waits_for))
            await asyncio.sleep(_LONG_DRAIN_POLL_SECS if waits_for and now >= long_since else _DRAIN_POLL_SECS)

    async def _follow_output(self) -> None:
        """Turns the engine's output into progress while it loads."""
        await self.engine.output.follow(self._on_lines, self._poll_secs, at_once=self._is_loading)

    def _is_loading(self) -> bool:
        return self.engine.ready_at is None

    def _poll_secs(self) -> float:
        return LOADING_PAUSE_SECS if self._is_loading() else LOADED_PAUSE_SECS

    def _on_lines(self, lines: list[str]) -> None:
        if self.engine.ready_at is not None or self.request.stop_requested.is_set():
            return
        now = time.monotonic()
        changed = self._progress.feed(lines, now)
        if lines and self._progress.serving:
            self._log_says_ready.set()
            self._said_serving.set()
        if self._progress.weights_loaded:
            self._weights_loaded.set()
        if changed:
            self._model.show(self._progress.view(now))


async def _until_done(task: asyncio.Task[str]) -> None:
    """Cancelling this does not cancel the task."""
    await asyncio.wait([task])
