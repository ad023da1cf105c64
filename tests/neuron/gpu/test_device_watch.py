"""What neuron tells of a GPU that becomes unfit for use."""

from __future__ import annotations

import json

import pytest

from neuron.config import AcceleratorEntry
from neuron.gpu.device_watch import DeviceWatch
from neuron.gpu.energy.meter import EnergyMeter
from neuron.gpu.sources.configured import ConfiguredTopologySource
from neuron.gpu.topology import DeviceReading, Topology
from neuron.memory.host import HostTopologySource, RealRam
from shared.protocol import Device, DeviceHealth
from shared.protocol.topology import AMD


def test_advice_fits_the_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Of a fault the log says how to reset an NVIDIA GPU; of a lost one, AMD's for example, its source has said what to
    do. Listeners are told of both, and of their end."""
    told: list[tuple[int, str | None]] = []

    def publish(name: str, data: str) -> None:
        told.append((json.loads(data)["index"], json.loads(data)["fault"]))

    watch = DeviceWatch(ConfiguredTopologySource([]), publish, EnergyMeter(None, ""))
    fit, sick = DeviceHealth(index=0), DeviceHealth(index=0, fault="Xid 79: the GPU has fallen off the bus")
    watch.observe([Device(index=0), Device(index=1, vendor=AMD)], [fit, DeviceHealth(index=1)])
    watch.observe([Device(index=0), Device(index=1, vendor=AMD, lost="AMD SMI: see `dmesg`")], [sick])
    (message,) = caplog.messages
    assert "GPU 0" in message
    assert "nvidia-smi --gpu-reset" in message
    watch.observe([Device(index=0), Device(index=1, vendor=AMD)], [fit, DeviceHealth(index=1)])
    assert told == [(0, sick.fault), (1, "AMD SMI: see `dmesg`"), (0, None), (1, None)]


def test_a_mig_instance_that_is_gone_has_no_fault() -> None:
    """Listeners are told once; then about another instance that gets its index."""
    told: list[tuple[str, str | None]] = []

    def publish(name: str, data: str) -> None:
        told.append((json.loads(data)["uuid"], json.loads(data)["fault"]))

    watch = DeviceWatch(ConfiguredTopologySource([]), publish, EnergyMeter(None, ""))
    gpu, first, second = Device(index=0), Device(index=101, uuid="MIG-a"), Device(index=101, uuid="MIG-b")
    fit, sick = DeviceHealth(index=0), DeviceHealth(index=101, fault="Xid 95")
    watch.observe([gpu, first], [fit, sick])
    watch.observe([gpu], [fit])
    watch.observe([gpu], [fit])
    watch.observe([gpu, second], [fit, sick])
    assert told == [("MIG-a", "Xid 95"), ("MIG-a", None), ("MIG-b", "Xid 95")]


class CountedSource(ConfiguredTopologySource):
    asked = 0

    async def discover(self) -> Topology:
        self.asked += 1
        return await super().discover()

    async def read(self) -> DeviceReading:
        self.asked += 1
        return await super().read()


async def test_one_look_asks_the_driver_once() -> None:
    """Each time it looks for MIG instances, which takes a while on a host with many GPUs."""
    counted = CountedSource([AcceleratorEntry(name="A", memory_mb=1000)])
    reading = await HostTopologySource(counted, RealRam()).read()
    assert counted.asked == 1
    assert reading.topology.ram is not None
    assert {each.index for each in reading.health} == {0, reading.topology.ram.index}
