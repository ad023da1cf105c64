"""All models of this host: finds or creates the supervisor of each, and acts on all of them together."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter

from neuron import errors as failures
from neuron.config import NeuronConfig
from neuron.engine import records, session
from neuron.engine.engine import Engine
from neuron.engine.records import RunRecord
from neuron.engine.state_dir import FoundEngine
from neuron.harness.checks import spec_of
from neuron.lifecycle.admission import Admission
from neuron.lifecycle.engine_memory import EngineMemory, MemoryReading
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.load_request import LoadRequest
from neuron.lifecycle.model_state import ModelState, NeuronModelView
from neuron.lifecycle.model_supervisor import ModelSupervisor
from neuron.lifecycle.states import State
from neuron.memory.capacity import InsufficientVram
from neuron.memory.ledger import EnginePlacement
from neuron.spec import EngineSpec
from shared.protocol import MAX_DRAIN_SECS, LoadCommand, ModelActivity


class Registry:
    """The supervisors by model id. A model that was loaded once stays known, with its spec, while this process lives.

    `new_supervisor` makes one from a model id.
    """

    def __init__(
        self,
        config: NeuronConfig,
        *,
        admission: Admission,
        memory: EngineMemory,
        launcher: Launcher,
        new_supervisor: Callable[[str], ModelSupervisor],
    ) -> None:
        self._config = config
        self._admission = admission
        self._memory = memory
        self._launcher = launcher
        self._new_supervisor = new_supervisor
        self._supervisors: dict[str, ModelSupervisor] = {}
        self._numbers = itertools.count(1)
        self._stopping = False

    @property
    def models(self) -> Sequence[ModelState]:
        """Every known model."""
        return [supervisor.model for supervisor in self._supervisors.values()]

    def get(self, model_id: str) -> ModelState:
        """Raises NotFound: the model is unknown."""
        return self._supervisor(model_id).model

    async def load(self, command: LoadCommand, *, carries_keys: bool, displace: bool = False) -> LoadRequest:
        """The request that loads the model, joined or new; wait with `LoadRequest.loaded`. `carries_keys`: the caller
        can send a key to the engine. `displace`: where memory lacks, idle engines without a key end for it, the one
        that has been idle for longest first.

        Raises:
            InvalidRequest: a value is refused. Conflict: loaded with another spec. NotFound: a command with only a
            model id, for a model that was never loaded. Unavailable: this neuron is stopping, or its GPUs do not work.
            InsufficientVram: not enough free memory.
        """
        self._refuse_when_stopping()
        wanted = None if command.bare else spec_of(command, self._config)
        supervisor = self._known_or_new(command.model_id)
        request = supervisor.join(wanted)
        if request is not None:
            return request
        spec = wanted or supervisor.remembered_spec()
        await self._admission.check(spec)
        share_mb = await self._admission.share_of(spec)
        reading = await self._memory.read()
        if displace:
            await self._look_who_is_idle()
        # Nothing is awaited from here on, so the decision rests on the present state. During the awaits above another
        # caller may have begun this load, or a stop may have begun.
        self._refuse_when_stopping()
        supervisor = self._known_or_new(command.model_id)
        request = supervisor.join(wanted)
        if request is None:
            placement = self._book(spec, share_mb, reading, displace=displace)
            self._supervisors[command.model_id] = supervisor
            request = supervisor.begin(spec, placement, carries_keys=carries_keys)
        return request

    async def unload(self, model_id: str, *, drain_secs: float = 0) -> None:
        """Returns when the model's processes are gone and their memory is released. Running requests get `drain_secs`
        to finish.

        Raises:
            NotFound: the model is unknown. VramNotReleased: the driver still counts its memory as used.
        """
        cancelled = failures.load_cancelled(model_id)
        request = self._supervisor(model_id).stop(cancelled, why="unload requested", drain_secs=drain_secs)
        if request is not None:
            await request.gone()

    def room_may_come(self) -> bool:
        """True while an engine without a key has requests or is not loaded yet: once it is idle, a load that displaces
        may end it."""
        return any(model.state is not State.LOADED or engine.health.busy for model, engine in self._without_key())

    def restart(self, model_id: str, why: str) -> None:
        """Begins to stop the model's engine once its requests have finished; the next `load` starts a new one.

        Raises:
            NotFound: the model is unknown.
        """
        self._supervisor(model_id).stop(failures.load_cancelled(model_id), why=why, drain_secs=MAX_DRAIN_SECS)

    async def sleep(self, model_id: str, level: int) -> None:
        """Returns when the model sleeps; at once when it already does.

        Raises:
            NotFound: it is not loaded. Conflict: it cannot sleep, or has requests. SleepFailed: it did not.
        """
        await self._supervisor(model_id).sleep_request(level).fulfilled()

    async def wake(self, model_id: str) -> None:
        """Returns when the model serves; at once when it is awake.

        Raises:
            NotFound: it is not loaded. InsufficientVram: others use its memory. WakeFailed: its engine is restarted.
        """
        await self._supervisor(model_id).sleep_request(0).fulfilled()

    async def adopt(self, found: Sequence[FoundEngine]) -> None:
        """Takes over from an earlier neuron: running engines are adopted, models whose engine died meanwhile are
        restarted, and every other process of that neuron's engines is killed.
        """
        newest: dict[str, tuple[FoundEngine, RunRecord]] = {}
        for each in found:
            record = each.record
            # Pids of another boot mean nothing. A record without a pid is of an engine that never started.
            if (
                record is not None
                and record.boot_id == records.boot_id()
                and record.pid is not None
                and not record.stopping
            ):
                newest[record.engine_spec.model_id] = each, record
        alive = [record.engine_id for _, record in newest.values() if await asyncio.to_thread(_is_alive, record)]
        await self._launcher.remove_leftovers(found, keep=[each.directory for each, _ in newest.values()], alive=alive)
        devices = await self._memory.devices()
        for each, record in newest.values():
            spec = record.engine_spec
            placed = tuple(devices[index] for index in record.devices if index in devices)
            number, booked = next(self._numbers), tuple(record.booked_mb)
            placement = EnginePlacement(number, placed, booked, record.share_mb, "chosen by an earlier neuron")
            self._memory.ledger.adopt(number, spec.model_id, placement.indices, max(booked, default=None))
            supervisor = self._supervisors[spec.model_id] = self._new_supervisor(spec.model_id)
            supervisor.adopt(each, placement)

    async def views(self) -> list[NeuronModelView]:
        """Every known model, its memory measured now."""
        await self._memory.measure_all()
        return self.views_now()

    def views_now(self) -> list[NeuronModelView]:
        """Every known model, its memory as last measured."""
        return [model.view() for model in self.models]

    def activity(self) -> list[ModelActivity]:
        """Requests in the loaded models' engines, about a second old. An engine that never reported is left out: no
        figure is not the same as idle."""
        found = []
        for model in self.models:
            sample = None if model.engine is None else model.engine.health.sample
            if sample is not None and model.state is State.LOADED:
                found.append(
                    ModelActivity(
                        id=model.model_id,
                        in_flight=sample.running,
                        queue_depth=sample.waiting,
                        ended=round(sample.ended),
                    )
                )
        return found

    def begin_stop(self) -> None:
        """Refuses new loads and cancels running ones. Loaded models drain, or stay for the next neuron, as configured
        in `on_stop`. Callers that wait for a load get an error at once."""
        if self._stopping:
            return
        self._stopping = True
        for supervisor in self._supervisors.values():
            if self._config.on_stop == "leave_engines":
                supervisor.leave(failures.stopping())
            else:
                supervisor.stop(failures.stopping(), drain_secs=self._config.drain_timeout_secs)

    async def stop_all(self) -> None:
        """`begin_stop`, then returns when every engine is gone or left."""
        self.begin_stop()
        requests = [model.request for model in self.models]
        await asyncio.gather(*(request.gone() for request in requests if request is not None), return_exceptions=True)

    def kill_all_now(self) -> None:
        """For an exit that must not wait."""
        if self._config.on_stop == "stop_engines":
            self._launcher.kill_all_now()

    def _book(
        self, spec: EngineSpec, share_mb: int | None, reading: MemoryReading, *, displace: bool
    ) -> EnginePlacement:
        number = next(self._numbers)
        try:
            return self._memory.book(number, spec, share_mb, reading)
        except InsufficientVram:
            idle = {model.request.placement.number: model for model in self._idle_without_key() if model.request}
            displaced = self._memory.to_displace(list(idle), spec, share_mb, reading) if displace else []
            if not displaced:
                raise
        for each in displaced:
            self.restart(idle[each].model_id, f"makes room for {spec.model_id}")
        return self._memory.book(number, spec, share_mb, reading)

    def _idle_without_key(self) -> list[ModelState]:
        """Loaded models whose engine has no key and no requests, the one idle for longest first."""
        found = [
            (engine.health.active_at, model)
            for model, engine in self._without_key()
            if model.state is State.LOADED and not engine.health.busy
        ]
        return [model for _, model in sorted(found, key=itemgetter(0))]

    def _without_key(self) -> list[tuple[ModelState, Engine]]:
        return [
            (model, model.engine) for model in self.models if model.engine is not None and model.engine.api_key is None
        ]

    async def _look_who_is_idle(self) -> None:
        """Samples the engines that tell how many requests they have."""
        health = [engine.health for _, engine in self._without_key()]
        await asyncio.gather(*(each.take_sample() for each in health if each.sample is not None))

    def _supervisor(self, model_id: str) -> ModelSupervisor:
        supervisor = self._supervisors.get(model_id)
        if supervisor is None:
            raise failures.unknown_model(model_id)
        return supervisor

    def _known_or_new(self, model_id: str) -> ModelSupervisor:
        """A new one is kept only when its load begins: a refused request does not make a model known."""
        return self._supervisors.get(model_id) or self._new_supervisor(model_id)

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise failures.stopping()


def _is_alive(record: RunRecord) -> bool:
    assert record.pid is not None
    return session.Leader(record.pid, record.start_ticks or 0, record.engine_id).alive
