"""Carries loads out: one for each model however many ask, outliving every asker, with a back-off after failures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cortex.fleet import Fleet
from cortex.live_config import LiveConfig
from cortex.metrics import Metrics
from cortex.neuron_client import NeuronClient, NeuronLeft, NeuronRefused, NeuronUnreachable
from cortex.routing import Load
from cortex.snapshot import Reservation
from shared.errors import Unavailable
from shared.protocol import ModelStatus, ModelView
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

LOAD_IN_PROGRESS = "load_in_progress"
"""What a neuron answers, with 409, when it is loading the model with another spec."""
BACKOFF_FIRST_SECS = 10.0
BACKOFF_MAX_SECS = 300.0


@dataclass(frozen=True)
class LoadInProgress:
    """A load under way; `started` is Unix time."""

    model_id: str
    node: str
    started: float
    reason: str


@dataclass(frozen=True)
class _Failure:
    message: str
    count: int
    until: float  # monotonic


class Loader:
    """Owns the loads that this cortex has asked for."""

    def __init__(
        self,
        fleet: Fleet,
        clients: Mapping[str, NeuronClient],
        metrics: Metrics,
        live: LiveConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._clients = clients
        self._metrics = metrics
        self._live = live
        self._clock = clock
        self._tasks = TaskSet()
        self._jobs: dict[str, dict[str, tuple[LoadInProgress, asyncio.Task[None]]]] = {}  # model -> node -> job
        self._failures: dict[str, _Failure] = {}

    @property
    def timeout_secs(self) -> float:
        """How long a cold load may take."""
        return self._live.config.cold_load.timeout_secs

    def in_progress(self) -> list[LoadInProgress]:
        return [job for jobs in self._jobs.values() for job, _ in jobs.values()]

    def node_of(self, model_id: str) -> str | None:
        """Where a load of this model is under way, None when none is."""
        return next(iter(self._jobs.get(model_id, {})), None)

    async def join(self, model_id: str) -> bool:
        """Waits for a load of this model that is under way; False when there is none.

        Raises:
            Unavailable: the load failed.
        """
        jobs = self._jobs.get(model_id)
        if not jobs:
            return False
        _, task = next(iter(jobs.values()))
        await asyncio.shield(task)
        return True

    async def load(self, load: Load, *, after_failure: bool = False) -> None:
        """Carries the load out, or joins it when it is under way on that neuron; the caller's leaving cancels nothing.
        Afterwards the model is there, or on its way there by somebody else's doing.

        `after_failure` True starts it in spite of a back-off: an operator asked.

        Raises:
            Unavailable: it failed, or failed so recently that it is not tried again yet.
        """
        await asyncio.shield(self.start(load, after_failure=after_failure))

    def start(self, load: Load, *, after_failure: bool = False) -> asyncio.Task[None]:
        """As `load`, but gives the task instead of waiting for it. Raises Unavailable inside a back-off."""
        model_id = load.command.model_id
        jobs = self._jobs.setdefault(model_id, {})
        if load.node in jobs:
            return jobs[load.node][1]
        try:
            if not after_failure:
                self.check_backoff(model_id)
            job = LoadInProgress(model_id, load.node, time.time(), load.reason)
            task = self._tasks.spawn(self._carry_out(load), name=f"load {model_id} on {load.node}")
            jobs[load.node] = job, task
        finally:
            if not jobs:
                del self._jobs[model_id]
        task.add_done_callback(lambda _: self._done(model_id, load.node))
        return task

    def check_backoff(self, model_id: str) -> None:
        """Raises Unavailable while a model that failed to load is not to be tried again."""
        failure = self._failures.get(model_id)
        if failure is not None and failure.until > self._clock():
            raise _failed(failure.message, failure.until - self._clock())

    def failed(self, model_id: str, message: str) -> Unavailable:
        """Notes a failed load and gives the error for its askers; each failure in a row doubles the back-off."""
        earlier = self._failures.get(model_id)
        count = 1 if earlier is None else earlier.count + 1
        pause = min(BACKOFF_FIRST_SECS * 2 ** min(count - 1, 10), BACKOFF_MAX_SECS)
        self._failures[model_id] = _Failure(message, count, self._clock() + pause)
        return _failed(message, pause)

    def succeeded(self, model_id: str) -> None:
        """The model serves: its failures are forgotten."""
        self._failures.pop(model_id, None)

    async def close(self) -> None:
        """Lets go of the loads; the neurons carry them on."""
        await self._tasks.close()

    def _done(self, model_id: str, node: str) -> None:
        jobs = self._jobs[model_id]
        del jobs[node]
        if not jobs:
            del self._jobs[model_id]

    async def _carry_out(self, load: Load) -> None:
        client = self._clients.get(load.node)
        if client is None:  # it has left the configuration since the decision
            return
        command, started = load.command, self._clock()
        model_id = command.model_id
        devices = tuple(command.devices or ())
        reservation = Reservation(model_id, load.node, devices, load.share_mb)
        log.info("loading %s on %s, devices %s (%s)", model_id, load.node, list(devices), load.reason)
        self._fleet.reserve(reservation)
        try:
            await client.load(command, timeout_secs=self.timeout_secs)
        except NeuronLeft:
            log.info("%s is loaded on by %s, which has left the configuration", model_id, load.node)
            return  # whoever waits for the model is decided anew
        except (NeuronRefused, NeuronUnreachable) as error:
            if isinstance(error, NeuronRefused) and error.code == LOAD_IN_PROGRESS:
                # Somebody else's load, begun a moment ago: no failure, but a thing to wait for.
                self._fleet.tell(load.node, ModelView(id=model_id, status=ModelStatus.LOADING.value))
                return
            log.warning("loading %s on %s failed: %s", model_id, load.node, error)
            raise self.failed(model_id, f"loading {model_id!r} on {load.node} failed: {error}") from error
        finally:
            self._fleet.release(reservation)
        took = self._clock() - started
        self.succeeded(model_id)
        self._fleet.loaded(load.node, model_id, harness=command.harness, devices=devices)
        self._metrics.cold_start(model_id, load.node, took)
        log.info("loaded %s on %s in %.1f s", model_id, load.node, took)

    async def wait_until_settled(self, model_id: str, node: str, *, timeout_secs: float) -> None:
        """Waits until a model that is on its way on a neuron is so no more: loaded, gone, failed, or out of reach; or
        until the neuron has left the configuration.

        Raises:
            Unavailable: it failed, or did not settle within `timeout_secs`.
        """
        try:
            async with timeout(timeout_secs):
                await self._settled(model_id, node)
        except asyncio.TimeoutError:
            raise self._failed_elsewhere(
                model_id, f"{model_id!r} did not come up on {node} in {timeout_secs:g} s"
            ) from None
        there = self._fleet.snapshot().nodes.get(node)
        view = None if there is None else there.models.get(model_id)
        if view is not None and view.known_status is ModelStatus.FAILED:
            reason = view.error or "no reason given"
            raise self._failed_elsewhere(model_id, f"loading {model_id!r} on {node} failed: {reason}")

    def _failed_elsewhere(self, model_id: str, message: str) -> Unavailable:
        """Many requests may wait for one load that somebody else started: its failure counts once."""
        failure = self._failures.get(model_id)
        if failure is not None and failure.until > self._clock():
            return _failed(failure.message, failure.until - self._clock())
        return self.failed(model_id, message)

    async def _settled(self, model_id: str, node: str) -> None:
        version = self._fleet.version
        while True:
            snapshot = self._fleet.snapshot().nodes.get(node)
            status = None if snapshot is None else snapshot.status_of(model_id)
            if snapshot is None or not snapshot.healthy or status is None or not status.coming:
                return
            version = await self._fleet.changed_since(version)


def _failed(message: str, retry_after: float) -> Unavailable:
    return Unavailable(message, code="cold_load_failed", retry_after=retry_after)
