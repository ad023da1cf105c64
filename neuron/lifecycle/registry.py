"""All models of this host: finds or creates the supervisor of each instance, and acts on all of them together."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from neuron import errors as failures
from neuron.config import NeuronConfig
from neuron.engine import records, session
from neuron.engine.engine import Engine
from neuron.engine.records import RunRecord
from neuron.engine.state_dir import FoundEngine
from neuron.gpu.topology import DeviceReading
from neuron.harness.checks import spec_of
from neuron.harness.registry import is_known
from neuron.lifecycle.admission import Admission
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.instance_state import InstanceState, NeuronModelView
from neuron.lifecycle.instance_supervisor import InstanceSupervisor
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.load_request import LoadRequest
from neuron.lifecycle.states import State
from neuron.memory.capacity import InsufficientVram
from neuron.memory.ledger import EnginePlacement
from neuron.spec import EngineSpec, InstanceKey
from shared.errors import Conflict
from shared.protocol import FIRST_INSTANCE, MAX_DRAIN_SECS, LoadCommand, ModelActivity
from shared.tasks import TaskSet


class Registry:
    """The supervisors by model and instance.

    A model that was loaded once stays known, with its spec, while this process lives: an unloaded instance leaves the
    list only while another one of its model is in it. `new_supervisor` makes a supervisor from the instance and what
    it calls when its engine is gone.
    """

    def __init__(
        self,
        config: NeuronConfig,
        *,
        admission: Admission,
        memory: EngineMemory,
        launcher: Launcher,
        new_supervisor: Callable[[InstanceKey, Callable[[], None]], InstanceSupervisor],
    ) -> None:
        self._config = config
        self._admission = admission
        self._memory = memory
        self._launcher = launcher
        self._new_supervisor = new_supervisor
        self._instances: dict[str, dict[str, InstanceSupervisor]] = {}
        self._specs: dict[str, EngineSpec] = {}  # of each model: what an instance that left the list was loaded with
        self._tasks = TaskSet()
        self._numbers = itertools.count(1)
        self._stopping = False

    @property
    def models(self) -> list[InstanceState]:
        """Every known instance, model by model."""
        return [supervisor.model for supervisor in self._supervisors]

    def instances(self, model_id: str, instance: str | None = None) -> list[InstanceState]:
        """The instances of a model in the order of their names, or only the named one.

        Raises:
            NotFound: the model or the instance is unknown.
        """
        return [supervisor.model for supervisor in self._named(model_id, instance)]

    def get(self, model_id: str, instance: str | None = None) -> InstanceState:
        """The named instance; without a name the one to use: loaded, and of those the one with the fewest requests.

        Raises:
            NotFound: the model or the instance is unknown.
        """
        return min(self.instances(model_id, instance), key=InstanceState.preference)

    async def load(self, command: LoadCommand, *, carries_keys: bool, displace: bool = False) -> LoadRequest:
        """The request that loads the model, joined or new; wait with `LoadRequest.loaded`. `carries_keys`: the caller
        can send a key to the engine. `displace`: where memory lacks, idle engines without a key end for it, the one
        that has been idle for longest first.

        Raises:
            InvalidRequest: a value is refused. Conflict: loaded with another spec. NotFound: a command without a spec,
            for a model that was never loaded. Unavailable: this neuron is stopping, or its GPUs do not work.
            InsufficientVram: not enough free memory.
        """
        self._refuse_when_stopping()
        wanted = None if command.bare else spec_of(command, self._config)
        supervisor, request = self._join(command, wanted)
        if request is not None:
            return request
        spec = wanted or self._remembered_spec(supervisor.model)
        await self._admission.check(spec)
        spec = await self._admission.fitted(spec)
        share_mb = await self._admission.share_of(spec)
        reading = await self._memory.read()
        if displace:
            await self._look_who_is_idle()
        # Nothing is awaited from here on, so the decision rests on the present state. During the awaits above another
        # caller may have begun this load, or a stop may have begun.
        self._refuse_when_stopping()
        supervisor, request = self._join(command, wanted)
        if request is None:
            spec = replace(spec, instance=supervisor.model.key.instance)
            placement = self._book(spec, share_mb, reading, displace=displace)
            self._refuse_crossing_groups(spec, placement)
            self._list(supervisor)
            request = supervisor.begin(spec, placement, carries_keys=carries_keys)
            self._drop_unloaded(command.model_id)
        return request

    async def unload(self, model_id: str, instance: str | None = None, *, drain_secs: float = 0) -> None:
        """Returns when the processes of the named instance, or of all of them, are gone and their memory is released.
        Running requests get `drain_secs` to finish.

        Raises:
            NotFound: the model or the instance is unknown. VramNotReleased: the driver still counts its memory as used.
        """
        requests = []
        for supervisor in self._named(model_id, instance):
            cancelled = failures.load_cancelled(supervisor.model.key)
            requests.append(supervisor.stop(cancelled, why="unload requested", drain_secs=drain_secs))
        await _all_done([request.gone() for request in requests if request is not None])

    def room_may_come(self) -> bool:
        """True while an engine without a key has requests or is not loaded yet: once it is idle, a load that displaces
        may end it."""
        return any(model.state is not State.LOADED or engine.health.busy for model, engine in self._without_key())

    def restart(self, key: InstanceKey, why: str) -> None:
        """Begins to stop the instance's engine once its requests have finished; the next `load` starts a new one.

        Raises:
            NotFound: the instance is unknown.
        """
        (supervisor,) = self._named(*key)
        supervisor.stop(failures.load_cancelled(key), why=why, drain_secs=MAX_DRAIN_SECS)

    async def sleep(self, model_id: str, instance: str | None = None, *, level: int) -> None:
        """Returns when the named instance, or every loaded one, sleeps; at once when they already do. `level` 0: wakes
        it, or every one that sleeps.

        Raises:
            NotFound: none is loaded. Conflict: one cannot sleep, or has requests. SleepFailed: one did not.
            InsufficientVram: others use the memory of one. WakeFailed: its engine is restarted.
        """
        named = self._named(model_id, instance)
        able = [supervisor for supervisor in named if supervisor.can_change_sleep]
        requests = [supervisor.sleep_request(level) for supervisor in able or named[:1]]
        await _all_done([request.fulfilled() for request in requests])

    async def adopt(self, found: Sequence[FoundEngine]) -> None:
        """Takes over from an earlier neuron: running engines are adopted, models whose engine died meanwhile are
        restarted, and every other process of that neuron's engines is killed.
        """
        newest: dict[InstanceKey, tuple[FoundEngine, RunRecord]] = {}
        for each in found:
            record = each.record
            # Pids of another boot mean nothing. A record without a pid is of an engine that never started.
            if (
                record is not None
                and record.boot_id == records.boot_id()
                and record.pid is not None
                and not record.stopping
                and is_known(record.engine_spec.harness, self._config)
            ):
                newest[record.engine_spec.key] = each, record
        alive = [record.engine_id for _, record in newest.values() if await asyncio.to_thread(_is_alive, record)]
        await self._launcher.remove_leftovers(found, keep=[each.directory for each, _ in newest.values()], alive=alive)
        devices = await self._memory.devices()
        for each, record in newest.values():
            spec = record.engine_spec
            placed = tuple(devices[index] for index in record.devices if index in devices)
            number, booked = next(self._numbers), tuple(record.booked_mb)
            placement = EnginePlacement(
                number,
                placed,
                booked,
                record.share_mb,
                "chosen by an earlier neuron",
                record.ram_mb,
                tuple(record.cores),
            )
            self._memory.adopt(spec, placement)
            supervisor = self._new(spec.key)
            self._list(supervisor)
            supervisor.adopt(each, placement)

    async def views(self) -> list[NeuronModelView]:
        """Every known instance, its memory measured now."""
        await self._memory.measure_all()
        return self.views_now()

    def views_now(self) -> list[NeuronModelView]:
        """Every known instance, its memory as last measured."""
        return [model.view() for model in self.models]

    def activity(self) -> list[ModelActivity]:
        """Requests in the loaded engines, about a second old. An engine that never reported is left out: no
        figure is not the same as idle."""
        found = []
        for model in self.models:
            sample = None if model.engine is None else model.engine.health.sample
            if sample is not None and model.state is State.LOADED:
                found.append(
                    ModelActivity(
                        id=model.model_id,
                        instance=model.key.instance,
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
        for supervisor in self._supervisors:
            if self._config.on_stop == "leave_engines":
                supervisor.leave(failures.stopping())
            else:
                supervisor.stop(failures.stopping(), drain_secs=self._config.drain_timeout_secs)

    async def stop_all(self) -> None:
        """`begin_stop`, then returns when every engine is gone or left."""
        self.begin_stop()
        requests = [model.request for model in self.models]
        await asyncio.gather(*(request.gone() for request in requests if request is not None), return_exceptions=True)
        await self._tasks.close()

    def kill_all_now(self) -> None:
        """For an exit that must not wait."""
        if self._config.on_stop == "stop_engines":
            self._launcher.kill_all_now()

    def _book(
        self, spec: EngineSpec, share_mb: int | None, reading: DeviceReading, *, displace: bool
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
            self.restart(idle[each].key, f"makes room for {spec.key}")
        return self._memory.book(number, spec, share_mb, reading)

    def _refuse_crossing_groups(self, spec: EngineSpec, placement: EnginePlacement) -> None:
        """Two groups whose parts start on the same devices of two hosts in opposite order would wait for each other: a
        part of one holds the devices until the whole engine serves. So a group waits only for groups whose names come
        after its own.

        Raises:
            Unavailable: it would have to wait, perhaps for another group; its booking is released.
        """
        if spec.group is None:
            return
        starting = [each for each in self._supervisors if each.starting is not None]
        requests = {each.model.key: each.starting for each in starting}
        before = [
            key for key, each in requests.items() if each and each.spec.group and each.spec.group.id < spec.group.id
        ]
        devices = {index for each in requests.values() if each for index in each.placement.indices}
        if before and not devices.isdisjoint(placement.indices):
            self._memory.release(placement.number)
            raise failures.group_starting(spec.key, spec.group, before)

    def _idle_without_key(self) -> list[InstanceState]:
        """Loaded instances whose engine has no key and no requests, the one idle for longest first."""
        found = [
            (engine.health.active_at, model)
            for model, engine in self._without_key()
            if model.state is State.LOADED and not engine.health.busy
        ]
        return [model for _, model in sorted(found, key=itemgetter(0))]

    def _without_key(self) -> list[tuple[InstanceState, Engine]]:
        return [
            (model, model.engine) for model in self.models if model.engine is not None and model.engine.api_key is None
        ]

    async def _look_who_is_idle(self) -> None:
        """Samples the engines that tell how many requests they have."""
        health = [engine.health for _, engine in self._without_key()]
        await asyncio.gather(*(each.take_sample() for each in health if each.sample is not None))

    def _join(self, command: LoadCommand, wanted: EngineSpec | None) -> tuple[InstanceSupervisor, LoadRequest | None]:
        """The instance that a load is for, and its request that the load joins; None when a new one must begin. A new
        supervisor is listed only then: a refused request does not make an instance known.

        Raises:
            Conflict: the named instance, or every one that is loaded or will be, has another spec than `wanted`.
        """
        known = self._instances.get(command.model_id, {})
        if command.instance is not None:
            supervisor = known.get(command.instance) or self._new(InstanceKey(command.model_id, command.instance))
            return supervisor, supervisor.join(wanted)
        ranked = sorted(known.values(), key=lambda each: each.model.preference())
        conflict: Conflict | None = None
        for supervisor in ranked:
            try:
                request = supervisor.join(wanted)
            except Conflict as error:
                conflict = conflict or error
            else:
                if request is not None:
                    return supervisor, request
        if conflict is not None:
            raise conflict
        first = next((each for each in ranked if each.model.state is State.FAILED), known.get(FIRST_INSTANCE))
        return first or self._new(InstanceKey(command.model_id)), None

    def _remembered_spec(self, model: InstanceState) -> EngineSpec:
        """The spec for a command that has none: the instance's, else the model's; rather one that was loaded than one
        that was only asked for.

        Raises:
            NotFound: the model was never loaded here.
        """
        all_ = [model, *(each.model for each in self._instances.get(model.model_id, {}).values())]
        loaded = [*(each.proven_spec for each in all_), self._specs.get(model.model_id)]
        asked_for = [each.spec for each in all_]
        specs = [spec for spec in (*loaded, *asked_for) if spec is not None]
        alone = next((spec for spec in specs if spec.group is None), None)
        if alone is None:
            why = "was never loaded here" if not specs else "is not loaded, and spans several neurons"
            raise failures.unknown_model(str(model.key), f"{why}; specify a harness")
        return alone

    @property
    def _supervisors(self) -> list[InstanceSupervisor]:
        return [supervisor for known in self._instances.values() for supervisor in known.values()]

    def _named(self, model_id: str, instance: str | None) -> list[InstanceSupervisor]:
        known = self._instances.get(model_id)
        if known is None:
            raise failures.unknown_model(model_id)
        if instance is None:
            return list(known.values())
        if instance not in known:
            raise failures.unknown_instance(InstanceKey(model_id, instance), list(known))
        return [known[instance]]

    def _new(self, key: InstanceKey) -> InstanceSupervisor:
        return self._new_supervisor(key, functools.partial(self._drop_unloaded, key.model_id))

    def _list(self, supervisor: InstanceSupervisor) -> None:
        key = supervisor.model.key
        known = [*self._instances.get(key.model_id, {}).values(), supervisor]
        known.sort(key=lambda each: each.model.key.order)
        self._instances[key.model_id] = {each.model.key.instance: each for each in known}

    def _drop_unloaded(self, model_id: str) -> None:
        """Takes the model's unloaded instances off the list, except the last of all."""
        known = self._instances[model_id]
        for instance, supervisor in list(known.items()):
            # A neuron that stops keeps the files of the engines that it leaves.
            if not supervisor.is_unloaded or len(known) == 1 or self._stopping:
                continue
            del known[instance]
            proven = supervisor.model.proven_spec
            if proven is not None and proven.group is None:
                self._specs[model_id] = proven
            directory = supervisor.remove()
            if directory is not None:
                _ = self._tasks.spawn(asyncio.to_thread(directory.remove), name=f"remove {directory.path}")

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise failures.stopping()


async def _all_done(outcomes: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Waits for all, then raises the first error."""
    for outcome in await asyncio.gather(*outcomes, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _is_alive(record: RunRecord) -> bool:
    assert record.pid is not None
    return session.Leader(record.pid, record.start_ticks or 0, record.engine_id).alive
