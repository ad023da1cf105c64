"""What only a real driver can say. Needs a GPU and no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pynvml
import pytest

from neuron.gpu.device_condition import NO_XIDS, fault_of, warnings_of
from neuron.gpu.nvml_condition import XidEvents, read_condition
from neuron.gpu.nvml_device import Handle
from neuron.gpu.topology import TopologySource
from tests.e2e_vllm.gpu import gpus

__all__ = ["gpus"]

pytestmark = [pytest.mark.gpu]

Record = Callable[[str, object], None]


@pytest.fixture
def handles() -> Iterator[dict[int, Handle]]:
    """NVML's handle of each GPU."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.skip(f"no NVIDIA driver here: {error}")
    try:
        count = pynvml.nvmlDeviceGetCount()
        if not count:
            pytest.skip("no NVIDIA GPU here")
        yield {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)}
    finally:
        pynvml.nvmlShutdown()


async def test_every_gpu_tells_its_facts(gpus: TopologySource, record_property: Record) -> None:
    """UUID, compute capability and memory of each; the figures of those that are not lost."""
    topology = await gpus.discover()
    live = {each.index: each for each in (await gpus.read()).health}
    for device in topology.devices:
        record_property(f"device {device.index}", device.model_dump(mode="json"))
        if device.lost is None:
            assert device.uuid
            assert device.compute_capability
            figures = live[device.index]
            if device.vram_total_mb and not device.mig_mode:
                assert 0 < figures.vram_used_mb + figures.vram_free_mb <= device.vram_total_mb
    record_property("links", [link.model_dump(mode="json") for link in topology.links])


def test_xid_events_can_be_listened_to(handles: dict[int, Handle], record_property: Record) -> None:
    """The event set takes each GPU, and its thread ends within the time of one wait."""
    events = XidEvents()
    try:
        events.start(handles)
        record_property("watched", sorted(events.watched))
        assert events.watched == handles.keys()
        record_property("events so far", events.take())
    finally:
        assert events.close()


def test_flags_of_the_driver(handles: dict[int, Handle], record_property: Record) -> None:
    """No error, whatever the driver knows; a GPU that works has no fault."""
    for index, handle in handles.items():
        condition = read_condition(handle)
        record_property(f"condition of GPU {index}", condition)
        record_property(f"warnings of GPU {index}", warnings_of(NO_XIDS, condition))
        assert fault_of(NO_XIDS, condition) is None
