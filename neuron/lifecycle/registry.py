"""All models of this host: finds or makes the worker of each, and speaks of all of them together."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from pydantic import Field

from neuron import errors as failures
from neuron.config import NeuronConfig
from neuron.engine import records, session
from neuron.engine import shared_memory as litter
from neuron.engine.records import RunRecord
from neuron.engine.state_dir import FoundEngine
from neuron.harness.checks import spec_of
from neuron.lifecycle.events import EventHub
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.load_request import LoadRequest
from neuron.lifecycle.model_supervisor import ModelSupervisor
from neuron.lifecycle.states import State
from neuron.memory.placement import EnginePlacement
from shared.protocol import EndpointReply, LoadCommand, ModelActivity, ModelView, Transition

log = logging.getLogger(__name__)

_SWEEP_SECS = 10.0
_SWEEP_PAUSE_SECS = 0.05


class NeuronModelView(ModelView):
    """What this neuron says beyond what a cortex reads: `transitions` is how its state came to be (the last first);
    `pid` leads to the engine. `failures` in a row. `placement` says why it is on these devices."""

    pid: int | None = None
    failures: int = 0
    placement: str | None = None
    transitions: list[Transition] = Field(default_factory=list)


class LifecycleMetrics(Protocol):
    """What the registry counts."""

    def loaded(self, model_id: str, seconds: float) -> None: ...

    def restarted(self, model_id: str) -> None: ...

    def known(self, model_id: str) -> None: ...


class Registry:
    """The workers by model id. A model once asked for stays known, with its spec, while this process lives."""

    def __init__(self, config: NeuronConfig, launcher: Launcher, hub: EventHub, metrics: LifecycleMetrics) -> None:
        self._config = config
        self._launcher = launcher
        self._hub = hub
        self._metrics = metrics
        self._workers: dict[str, ModelSupervisor] = {}
        self._numbers = itertools.count(1)
        self._stopping = False

    @property
    def all(self) -> Sequence[ModelSupervisor]:
        return list(self._workers.values())

    def get(self, model_id: str) -> ModelSupervisor:
        """The worker of a known model.

        Raises:
            NotFound: the model is unknown.
        """
        worker = self._workers.get(model_id)
        if worker is None:
            raise failures.unknown_model(model_id)
        return worker

    async def load(self, command: LoadCommand) -> LoadRequest:
        """The run that loads the model, joined or new; wait with `LoadRequest.loaded`.

        Raises:
            InvalidRequest: a value is refused. Conflict: there with another spec. NotFound: a bare command for a
            model that was never loaded. Unavailable: this neuron is stopping, or its GPUs cannot be used.
            InsufficientVram: its memory is not to be had.
        """
        self._refuse_when_stopping()
        wanted = None if command.bare else spec_of(command, harnesses=self._config.harness_names)
        worker = self._known_or_new(command.model_id)
        run = worker.joined(wanted)
        if run is not None:
            return run
        spec = wanted or worker.remembered_spec()
        await self._launcher.admission.check(spec)
        source = self._launcher.source
        share_mb = await self._launcher.admission.share_of(spec, await source.discover())
        await self._measure()  # what still loads has not all of its memory yet: strangers' use is what is left over
        topology, health = await asyncio.gather(source.discover(), source.health())
        # From here on nothing is awaited: what is decided is so when it takes effect. The worker is looked up again,
        # and a stop may have come meanwhile, after which nothing may start.
        self._refuse_when_stopping()
        worker = self._known_or_new(command.model_id)
        run = worker.joined(wanted)
        if run is None:
            run = worker.begin(
                spec, self._launcher.admission.book(next(self._numbers), spec, share_mb, topology, health)
            )
        return run

    async def unload(self, model_id: str, *, drain_secs: float = 0) -> None:
        """Returns when the model's processes are gone and their memory is back. What it works on may go on for
        `drain_secs`.

        Raises:
            NotFound: the model is not known. VramNotReleased: the driver still counts memory as its own.
        """
        cancelled = failures.load_cancelled(model_id)
        run = self.get(model_id).stop(cancelled, why="asked to unload", drain_secs=drain_secs)
        if run is not None:
            await run.gone()

    async def sleep(self, model_id: str, level: int) -> None:
        """Returns when the model sleeps; at once when it does already.

        Raises:
            NotFound: it is not loaded. Conflict: it cannot sleep, or has requests. SleepFailed: it did not.
        """
        await self.get(model_id).sleep_request(level).fulfilled()

    async def wake(self, model_id: str) -> None:
        """Returns when the model serves; at once when it is awake.

        Raises:
            NotFound: it is not loaded. InsufficientVram: others have its memory. WakeFailed: it is loaded anew now.
        """
        await self.get(model_id).sleep_request(0).fulfilled()

    async def adopt(self, found: Sequence[FoundEngine]) -> None:
        """Takes over what an earlier neuron left: engines that run get their worker back, models whose engine died
        meanwhile come back by themselves, and every other process of that neuron's engines is killed.
        """
        newest: dict[str, tuple[FoundEngine, RunRecord]] = {}
        for each in found:
            record = each.record
            # Pids of another boot mean nothing; without a pid the engine was not started, as far as is known.
            if (
                record is not None
                and record.boot_id == records.boot_id()
                and record.pid is not None
                and not record.stopping
            ):
                newest[record.engine_spec.model_id] = each, record
        alive = [record.engine_id for _, record in newest.values() if await asyncio.to_thread(_is_alive, record)]
        await self._sweep(alive)
        # Of engines that are gone; what one that runs has mapped stays.
        left = [litter.recorded(each.record.shared_files) for each in found if each.record is not None]
        await asyncio.to_thread(litter.remove, frozenset().union(*left))
        state = self._launcher.state
        await asyncio.to_thread(state.clear_but, [each.directory for each, _ in newest.values()])
        by_index = {device.index: device for device in (await self._launcher.source.discover()).devices}
        for each, record in newest.values():
            spec = record.engine_spec
            devices = tuple(by_index[index] for index in record.devices if index in by_index)
            number, booked = next(self._numbers), tuple(record.booked_mb)
            placement = EnginePlacement(number, devices, booked, record.share_mb, "chosen by an earlier neuron")
            self._launcher.ledger.adopt(number, spec.model_id, placement.indices, max(booked, default=None))
            self._known_or_new(spec.model_id).adopt(each, placement)

    async def _sweep(self, spared: Sequence[str]) -> None:
        """Kills every process that carries the id of an engine of this state directory, but for those in `spared`."""
        deadline = time.monotonic() + _SWEEP_SECS
        while strays := await asyncio.to_thread(self._strays, spared):
            if time.monotonic() >= deadline:
                log.error("processes %s, left of engines that are gone, survive SIGKILL", sorted(strays))
                return
            log.warning("killing processes %s: they are left of engines that are gone", sorted(strays))
            for pid in strays:
                session.kill(pid)
            await asyncio.sleep(_SWEEP_PAUSE_SECS)

    def _strays(self, spared: Sequence[str]) -> list[int]:
        carriers = session.marked(self._launcher.state.engine_id_prefix)
        return [pid for pid, engine_id in carriers.items() if engine_id not in spared]

    async def views(self) -> list[NeuronModelView]:
        """Every known model, its memory measured now."""
        await self._measure()
        return self.views_now()

    def views_now(self) -> list[NeuronModelView]:
        """Every known model, its memory as last measured."""
        return [view_of(worker) for worker in self.all]

    def activity(self) -> list[ModelActivity]:
        """How busy the loaded models' engines were when they last said so, about a second ago. One that never did is
        left out: no figure is not the same as idle."""
        found = []
        for worker in self.all:
            sample = None if worker.engine is None else worker.engine.vitals.sample
            if sample is not None and worker.condition.state is State.LOADED:
                found.append(
                    ModelActivity(
                        id=worker.model_id,
                        in_flight=sample.running,
                        queue_depth=sample.waiting,
                        ended=round(sample.ended),
                    )
                )
        return found

    def begin_stop(self) -> None:
        """From now on no load begins, and those that are running end; loaded models take no new work, or are left as
        they are for the next neuron, as configured. Who waits for a load is told at once."""
        if self._stopping:
            return
        self._stopping = True
        for worker in self.all:
            if self._config.on_stop == "leave_engines":
                worker.leave(failures.stopping())
            else:
                worker.stop(failures.stopping(), drain_secs=self._config.drain_timeout_secs)

    async def stop_all(self) -> None:
        """`begin_stop`, and then returns when every engine is gone or left."""
        self.begin_stop()
        runs = [worker.run for worker in self.all]
        await asyncio.gather(*(run.gone() for run in runs if run is not None), return_exceptions=True)

    def kill_all_now(self) -> None:
        """For an exit that waits for nothing."""
        if self._config.on_stop == "stop_engines":
            self._launcher.kill_all_now()

    async def _measure(self) -> None:
        await self._launcher.measure([worker.engine for worker in self.all if worker.engine is not None])

    def _known_or_new(self, model_id: str) -> ModelSupervisor:
        return self._workers.get(model_id) or ModelSupervisor(
            model_id,
            self._launcher,
            on_change=self._changed,
            on_loaded=lambda worker, secs: self._metrics.loaded(worker.model_id, secs),
            on_restart=lambda worker: self._metrics.restarted(worker.model_id),
        )

    def _changed(self, worker: ModelSupervisor) -> None:
        if worker.model_id not in self._workers:  # known from its first change on, not from a request that was refused
            self._workers[worker.model_id] = worker
            self._metrics.known(worker.model_id)
        self._hub.publish("model", view_of(worker).model_dump_json())

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise failures.stopping()


def view_of(worker: ModelSupervisor) -> NeuronModelView:
    """A worker as `/models` and the events show it. `vram_used_mb` is as last measured."""
    condition, engine, run = worker.condition, worker.engine, worker.run
    spec = worker.spec
    placement = None if run is None else run.placement
    return NeuronModelView(
        id=worker.model_id,
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
        failures=worker.restarts.failures,
        retry_at=condition.retry_at,
        vram_booked_mb=worker.booked_mb,
        slept_mb=0 if engine is None else engine.slept_mb,
        endpoint=EndpointReply(url=engine.url, api_key=engine.api_key)
        if engine is not None and condition.state is State.LOADED
        else None,
        placement=None if placement is None else placement.why or None,
        transitions=list(reversed(worker.transitions)),
    )


def _is_alive(record: RunRecord) -> bool:
    assert record.pid is not None
    return session.Leader(record.pid, record.start_ticks or 0, record.engine_id).alive
