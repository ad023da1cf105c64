"""A simulated neuron: the commands the loader sends, carried out in virtual time, and reported to the fleet at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from cortex.fleet.neuron_client import NeuronRefused
from cortex.fleet.snapshot import EngineName
from cortex.fleet.state import Fleet
from cortex.simulator.engine import SimulatedEngine
from cortex.simulator.fleet_file import SimulatedFleet, SimulatedNode
from shared.gpus import DEVICE_MARGIN_MB, ram_reserve_mb
from shared.protocol import (
    FIRST_INSTANCE,
    RAM,
    AdapterCommand,
    DeviceHealth,
    Discovery,
    EndpointReply,
    ErrorCode,
    GroupPart,
    HostMemoryHealth,
    HostResources,
    ListenReply,
    LoadCommand,
    LoadReply,
    ModelStatus,
    ModelView,
    NeuronHealth,
    ReachCommand,
    ReachReply,
)

DRAIN_STEP_SECS = 0.05
"""A request that begins meanwhile may delay the others."""

GROUP_PORT = 1
"""Where each part of a group is said to listen. No part connects to it."""

OnMemory = Callable[[int], None]
"""Called with the change in MiB that engines hold."""


class GroupStarts:
    """The parts of engines that span several neurons, while they load: none has loaded before all have."""

    def __init__(self) -> None:
        self._ready: dict[str, dict[int, Callable[[], None]]] = {}

    def ready(self, part: GroupPart, serve: Callable[[], None]) -> None:
        """The part waits for the others; the last one has all of them call `serve`, the one that takes the requests
        last."""
        waiting = self._ready.setdefault(part.id, {})
        waiting[part.rank] = serve
        if len(waiting) == part.size:
            for rank in sorted(self._ready.pop(part.id), reverse=True):
                waiting[rank]()

    def left(self, part: GroupPart) -> None:
        """The part was unloaded, so that the others wait for nothing until they are unloaded too."""
        waiting = self._ready.get(part.id, {})
        _ = waiting.pop(part.rank, None)
        if not waiting:
            _ = self._ready.pop(part.id, None)


class SimulatedNeuron:
    """Owns the engines of one node. Satisfies `NeuronCommands` and `Refreshable` of
    `cortex.fleet.members.membership`."""

    def __init__(
        self,
        node: SimulatedNode,
        simulated: SimulatedFleet,
        fleet: Fleet,
        starts: GroupStarts,
        on_memory: OnMemory,
        *,
        with_activity: bool = False,
    ) -> None:
        """`starts` is the same for all neurons of a fleet. `with_activity`: reports say what the engines do."""
        self._with_activity = with_activity
        self.node = node
        self.engines: dict[EngineName, SimulatedEngine] = {}
        self.loads: list[str] = []  # model ids, in order of their start
        self._simulated = simulated
        self._fleet = fleet
        self._starts = starts
        self._on_memory = on_memory
        self._views: dict[EngineName, ModelView] = {}
        self._discovery = Discovery(
            hostname=node.name,
            devices=list(node.gpus),
            harnesses=list(node.harnesses),
            links=node.paths,
            simulated=True,
            instance_id=node.name,
            instances=True,
            groups=True,
            host=None if node.ram is None else HostResources(ram_total_mb=node.ram.vram_total_mb),
        )
        self._in_ram = {RAM, *(gpu.index for gpu in node.gpus if gpu.unified)}
        self.report()

    def bookable_mb(self, device: int) -> int:
        """Memory of the device, or of RAM, that a new engine could book, in MiB."""
        if device in self._in_ram:
            total = 0 if self.node.ram is None else self.node.ram.vram_total_mb
            return total - ram_reserve_mb(total) - self._booked_mb(self._in_ram)
        return self.node.gpus[device].vram_total_mb - DEVICE_MARGIN_MB - self._booked_mb({device})

    def _booked_mb(self, devices: set[int]) -> int:
        return sum(
            engine.device_share_mb * len(devices.intersection(engine.devices)) for engine in self.engines.values()
        )

    async def load(self, command: LoadCommand, *, timeout_secs: float, wait: bool = True) -> LoadReply:
        """Books the memory and starts the load.

        Raises:
            NeuronRefused: there is not enough memory.
        """
        model_id, devices = command.model_id, tuple(command.devices or (RAM,))
        device_share_mb = -(-(command.vram_mb or 0) // max(1, len(devices)))
        for index in devices:
            if self.bookable_mb(index) < device_share_mb:
                where = "RAM" if index == RAM else f"device {index}"
                text = f"{model_id!r} needs {device_share_mb} MiB, {where} has {self.bookable_mb(index)} MiB"
                raise NeuronRefused(409, text, ErrorCode.INSUFFICIENT_VRAM)
        instance, parallel = command.instance or FIRST_INSTANCE, self._simulated.parallel(model_id)
        engine = SimulatedEngine(
            model_id,
            devices,
            device_share_mb,
            parallel,
            instance=instance,
            variant=command.variant,
            group=command.group,
            max_loras=command.max_loras,
        )
        self.engines[model_id, instance] = engine
        if engine.serves:
            self.loads.append(model_id)
        self._on_memory(engine.booked_mb)
        self._set_status(engine, ModelStatus.LOADING)
        secs = self._simulated.load_secs(model_id, self.node, command.vram_mb)
        asyncio.get_running_loop().call_later(secs, self._loaded, engine)
        return LoadReply(status=ModelStatus.LOADING.value)

    def _loaded(self, engine: SimulatedEngine) -> None:
        if not self._runs(engine):
            return
        if engine.group is None:
            self._set_status(engine, ModelStatus.LOADED)
        else:
            self._starts.ready(engine.group, partial(self._set_status, engine, ModelStatus.LOADED))

    def _runs(self, engine: SimulatedEngine) -> bool:
        return self.engines.get((engine.model_id, engine.instance)) is engine

    async def unload(self, model_id: str, instance: str, *, timeout_secs: float, drain_secs: float = 0) -> None:
        """Waits for the engine's requests, for at most `drain_secs`. Frees the memory after the fleet file's `unload`
        seconds. Does nothing if there is no such engine.

        Raises:
            NeuronRefused: it still has requests. Simulated ones are not cut.
        """
        engine, loop = self.engines.get((model_id, instance)), asyncio.get_running_loop()
        if engine is None:
            return
        until = loop.time() + drain_secs
        while engine.in_flight and loop.time() < until:
            ends_at = engine.next_end() or until
            await asyncio.sleep(max(DRAIN_STEP_SECS, min(ends_at, until) - loop.time()))
        if engine.in_flight:
            text = f"{model_id!r} still has {engine.in_flight} requests after {drain_secs:g} s"
            raise NeuronRefused(409, text, ErrorCode.MODEL_BUSY)
        await asyncio.sleep(self._simulated.file.load_secs.unload)
        if not self._runs(engine):  # another caller has unloaded it meanwhile
            return
        if engine.group is not None:
            self._starts.left(engine.group)
        del self.engines[model_id, instance]
        self._on_memory(-engine.booked_mb)
        self._set_status(engine, ModelStatus.UNLOADED)

    async def sleep(self, model_id: str, instance: str, *, timeout_secs: float) -> None:
        """Always refuses, so that the loader unloads instead."""
        raise NeuronRefused(409, "simulated engines do not sleep", ErrorCode.SLEEP_UNSUPPORTED)

    async def load_adapter(self, command: AdapterCommand, *, timeout_secs: float) -> None:
        """Takes no time.

        Raises:
            NeuronRefused: the engine is not loaded, or has as many adapters as it can have.
        """
        engine = self.engines.get((command.model_id, command.instance or FIRST_INSTANCE))
        if engine is None or engine.status is not ModelStatus.LOADED:
            raise NeuronRefused(404, f"{command.model_id!r} is not loaded", ErrorCode.MODEL_NOT_FOUND)
        if command.adapter in engine.adapters:
            return
        if len(engine.adapters) >= (engine.max_loras or 0):
            displaced = next((name for name in command.displaceable if name in engine.adapters), None)
            if displaced is None:
                raise NeuronRefused(409, f"{command.model_id!r} has no room", ErrorCode.ADAPTERS_FULL)
            engine.adapters.remove(displaced)
        engine.adapters.append(command.adapter)
        self._set_status(engine, engine.status)

    async def unload_adapter(self, command: AdapterCommand, *, timeout_secs: float) -> None:
        """Takes no time. Does nothing if the engine does not have it."""
        engine = self.engines.get((command.model_id, command.instance or FIRST_INSTANCE))
        if engine is not None and command.adapter in engine.adapters:
            engine.adapters.remove(command.adapter)
            self._set_status(engine, engine.status)

    async def endpoint(self, model_id: str, instance: str) -> EndpointReply:
        return EndpointReply(url=f"http://{self.node.name}")

    async def listen_for_group(self, group: str) -> ListenReply:
        """Answers at once: there is no network."""
        return ListenReply(address="127.0.0.1", port=GROUP_PORT)

    async def reach_group(self, command: ReachCommand) -> ReachReply:
        """Reaches every peer."""
        return ReachReply()

    async def refresh(self) -> None:
        """Does nothing: every change has been reported already."""

    def _set_status(self, engine: SimulatedEngine, status: ModelStatus) -> None:
        engine.status = status
        held = status is not ModelStatus.UNLOADED
        # As in a real neuron, the last engine of a model stays listed when it is unloaded.
        for name, view in list(self._views.items()):
            if name[0] == engine.model_id and view.status == ModelStatus.UNLOADED.value:
                del self._views[name]
        others = any(name[0] == engine.model_id and name[1] != engine.instance for name in self._views)
        self._views[engine.model_id, engine.instance] = ModelView(
            id=engine.model_id,
            instance=engine.instance,
            variant=engine.variant,
            group=engine.group if held else None,
            status=status.value,
            devices=[index for index in engine.devices if index != RAM] if held else [],
            vram_booked_mb=engine.booked_mb if held and RAM not in engine.devices else None,
            ram_booked_mb=engine.booked_mb if held and RAM in engine.devices else None,
            max_loras=engine.max_loras,
            adapters=list(engine.adapters),
            since=asyncio.get_running_loop().time(),
            endpoint=EndpointReply(url=f"http://{self.node.name}") if status is ModelStatus.LOADED else None,
        )
        if others and not held:
            del self._views[engine.model_id, engine.instance]
        self.report()

    def report(self) -> None:
        """Reports the current state to the fleet, like a poll response."""
        serving = [engine for engine in self.engines.values() if engine.status is ModelStatus.LOADED and engine.serves]
        self._fleet.record_poll(
            self.node.name,
            started=asyncio.get_running_loop().time(),
            health=NeuronHealth(
                devices=[self._health(index) for index in range(len(self.node.gpus))],
                host=self._host_health(),
                models=[engine.activity for engine in serving] if self._with_activity else [],
            ),
            models=list(self._views.values()),
            discovery=self._discovery,
        )

    def _host_health(self) -> HostMemoryHealth | None:
        if self.node.ram is None:
            return None
        total, booked = self.node.ram.vram_total_mb, self._booked_mb(self._in_ram)
        return HostMemoryHealth(
            ram_total_mb=total,
            ram_used_mb=booked,
            ram_free_mb=total - booked,
            ram_booked_mb=booked,
            ram_bookable_mb=self.bookable_mb(RAM),
        )

    def _health(self, index: int) -> DeviceHealth:
        total = self.node.gpus[index].vram_total_mb
        bookable = self.bookable_mb(index)
        booked = self._booked_mb(self._in_ram if index in self._in_ram else {index})
        return DeviceHealth(
            index=index,
            vram_used_mb=booked,
            vram_free_mb=total - booked,
            vram_booked_mb=booked,
            vram_foreign_mb=0,
            vram_bookable_mb=bookable,
            vram_asleep_mb=0,
        )
