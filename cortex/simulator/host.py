"""One host of the fleet, and what its neuron would say of it."""

from __future__ import annotations

from types import MappingProxyType

from cortex.fleet.snapshot import NodeSnapshot
from cortex.simulator.engine import Engine
from cortex.simulator.fleet_file import SimulatedNode
from shared.gpu_memory import DEVICE_MARGIN_MB
from shared.protocol import DeviceHealth, Discovery, ModelStatus, ModelView, NeuronHealth


class NoRoom(Exception):
    """A neuron would refuse the load."""


class Host:
    """Owner of the engines of one node. What it says is always fresh, as if polls took no time."""

    def __init__(self, node: SimulatedNode) -> None:
        self.node = node
        self.engines: dict[str, Engine] = {}
        self._known: dict[str, ModelView] = {}  # that were here: a neuron goes on listing them
        self._discovery = Discovery(
            hostname=node.name,
            devices=list(node.gpus),
            harnesses=list(node.harnesses),
            links=node.paths,
            simulated=True,
            instance_id=node.name,
        )
        self._snapshot: NodeSnapshot | None = None

    @property
    def name(self) -> str:
        return self.node.name

    def bookable_mb(self, device: int) -> int:
        """What another engine could be promised there."""
        booked = sum(engine.share_mb for engine in self.engines.values() if device in engine.devices)
        return self.node.gpus[device].vram_total_mb - DEVICE_MARGIN_MB - booked

    def add(self, engine: Engine, now: float) -> None:
        """An engine is started: from now on its memory is booked.

        Raises:
            NoRoom: there is not enough.
        """
        assert engine.model_id not in self.engines
        short = [index for index in engine.devices if self.bookable_mb(index) < engine.share_mb]
        if short:
            device = f"device {short[0]} of {self.name}"
            raise NoRoom(f"{engine.model_id!r} needs {engine.share_mb} MiB, {device} has {self.bookable_mb(short[0])}")
        self.engines[engine.model_id] = engine
        self.changed(engine, now)

    def changed(self, engine: Engine, now: float) -> None:
        """The engine has another status."""
        self._known[engine.model_id] = ModelView(
            id=engine.model_id,
            status=engine.status.value,
            devices=list(engine.devices),
            vram_booked_mb=engine.booked_mb,
            since=now,
        )
        self._snapshot = None

    def remove(self, model_id: str, now: float) -> None:
        """The engine is gone and its memory is free."""
        del self.engines[model_id]
        self._known[model_id] = ModelView(id=model_id, status=ModelStatus.UNLOADED.value, since=now)
        self._snapshot = None

    def snapshot(self) -> NodeSnapshot:
        if self._snapshot is None:
            self._snapshot = NodeSnapshot(
                self.name,
                f"http://{self.name}",
                healthy=True,
                discovery=self._discovery,
                health=NeuronHealth(devices=[self._health(index) for index in range(len(self.node.gpus))]),
                models=MappingProxyType(dict(self._known)),
            )
        return self._snapshot

    def _health(self, index: int) -> DeviceHealth:
        total = self.node.gpus[index].vram_total_mb
        booked = sum(engine.share_mb for engine in self.engines.values() if index in engine.devices)
        return DeviceHealth(
            index=index,
            vram_used_mb=booked,
            vram_free_mb=total - booked,
            vram_booked_mb=booked,
            vram_foreign_mb=0,
            vram_bookable_mb=self.bookable_mb(index),
            vram_asleep_mb=0,
        )
