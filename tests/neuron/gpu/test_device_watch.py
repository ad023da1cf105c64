"""What neuron tells of a GPU that becomes unfit for use."""

from __future__ import annotations

import json

import pytest

from neuron.gpu.device_watch import DeviceWatch
from neuron.gpu.sources.configured import ConfiguredTopologySource
from shared.protocol import Device, DeviceHealth
from shared.protocol.topology import AMD


def test_advice_fits_the_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Of a fault the log says how to reset an NVIDIA GPU; of a lost one, AMD's for example, its source has said what to
    do. Listeners are told of both, and of their end."""
    told: list[tuple[int, str | None]] = []

    def publish(name: str, data: str) -> None:
        told.append((json.loads(data)["index"], json.loads(data)["fault"]))

    watch = DeviceWatch(ConfiguredTopologySource([]), publish)
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

    watch = DeviceWatch(ConfiguredTopologySource([]), publish)
    gpu, first, second = Device(index=0), Device(index=101, uuid="MIG-a"), Device(index=101, uuid="MIG-b")
    fit, sick = DeviceHealth(index=0), DeviceHealth(index=101, fault="Xid 95")
    watch.observe([gpu, first], [fit, sick])
    watch.observe([gpu], [fit])
    watch.observe([gpu], [fit])
    watch.observe([gpu, second], [fit, sick])
    assert told == [("MIG-a", "Xid 95"), ("MIG-a", None), ("MIG-b", "Xid 95")]
