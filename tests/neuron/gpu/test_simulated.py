"""Simulated GPUs: their facts, and memory that fills and empties with processes."""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path

import pytest

from neuron.config import NeuronConfig, SimulatedDevice, SimulateSettings
from neuron.gpu import simulated_vram as vram
from neuron.gpu.simulated import SimulatedTopologySource, links_of, resolve_device, resolve_devices
from shared.gpus import PRESETS, find_preset
from shared.protocol import Device, LinkKind
from shared.settings import SettingsError, validate_settings


@pytest.mark.parametrize(
    "spelling", ["RTX 5090", "RTX5090", "rtx 5090", "rtx-5090", "NVIDIA GeForce RTX 5090", "GeForce RTX 5090"]
)
def test_spellings_of_a_preset(spelling: str) -> None:
    """Different spellings of a card's name are the same preset."""
    device = resolve_device(spelling, index=0, host="beast")
    assert (device.name, device.vram_total_mb, device.compute_capability) == ("RTX 5090", 32607, "12.0")


@pytest.mark.parametrize(
    ("reported", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
    ],
)
def test_names_that_nvml_reports_are_presets(reported: str, preset: str) -> None:
    """A name copied from nvidia-smi works."""
    found = find_preset(reported)
    assert found is not None
    assert found.name == preset


def test_every_preset_is_found_by_its_own_name() -> None:
    """No two presets share a spelling."""
    assert [find_preset(preset.name) for preset in PRESETS] == list(PRESETS)


def test_a_table_overrides_its_preset() -> None:
    """Values in the table override those of its preset."""
    table = SimulatedDevice(name="RTX 4090", vram_total_mb=8000, numa_node=1, uuid="GPU-mine")
    device = resolve_device(table, index=3, host="benjy")
    assert (device.vram_total_mb, device.compute_capability) == (8000, "8.9")
    assert (device.numa_node, device.uuid, device.index) == (1, "GPU-mine", 3)


def test_a_card_without_a_preset() -> None:
    """It only needs a memory size."""
    device = resolve_device(SimulatedDevice(name="RTX 6090", vram_total_mb=48000), index=0, host="x")
    assert (device.name, device.vram_total_mb, device.compute_capability) == ("RTX 6090", 48000, "8.0")


def test_every_unknown_device_is_reported_at_construction(tmp_path: Path) -> None:
    """One line for each wrong name, with key, value and the known presets."""
    settings = SimulateSettings(devices=["RTX 5090", "RTX 9999", SimulatedDevice(name="Abacus")])
    with pytest.raises(SettingsError) as raised:
        SimulatedTopologySource(settings, tmp_path)
    first, second = raised.value.problems
    assert "simulate.devices[1] = 'RTX 9999'" in first
    assert "RTX 5090, RTX 5080" in first
    assert "simulate.devices[2].name = 'Abacus'" in second


def test_two_devices_with_one_uuid_are_refused(tmp_path: Path) -> None:
    """Memory is counted by uuid, so two devices with one uuid would share it."""
    table = SimulatedDevice(name="L4", uuid="GPU-same")
    with pytest.raises(SettingsError, match=r"devices\[1\].uuid = 'GPU-same'"):
        SimulatedTopologySource(SimulateSettings(devices=[table, table]), tmp_path)


async def test_uuids_are_stable_and_distinct(tmp_path: Path) -> None:
    """They survive restarts, differ between devices and neurons, and look like a real GPU's."""
    settings = SimulateSettings(devices=["RTX 5090", "RTX 5090"])
    beast, again, benjy = [
        [device.uuid for device in (await SimulatedTopologySource(settings, tmp_path, name=name).discover()).devices]
        for name in ("beast", "beast", "benjy")
    ]
    assert beast == again
    assert len({*beast, *benjy}) == 4
    assert all(value and uuid.UUID(value.removeprefix("GPU-")) for value in beast)


@pytest.mark.parametrize(("nvlink", "kind", "count"), [(True, LinkKind.NVLINK, 4), (False, LinkKind.PHB, 0)])
async def test_links(tmp_path: Path, nvlink: bool, kind: LinkKind, count: int) -> None:
    """Every pair has the configured link, and the topology is marked as simulated."""
    source = SimulatedTopologySource(SimulateSettings(devices=["L4"] * 3, nvlink=nvlink), tmp_path)
    topology = await source.discover()
    assert [(link.a, link.b) for link in topology.links] == [(0, 1), (0, 2), (1, 2)]
    assert {(link.kind, link.nvlinks) for link in topology.links} == {(kind, count)}
    assert topology.simulated
    assert not topology.has_gpu


async def test_memory_follows_the_processes_that_hold_it(tmp_path: Path) -> None:
    """Memory of a live process counts; it is free when the process dies, in any way."""
    source = SimulatedTopologySource(SimulateSettings(devices=["RTX 5090", "RTX 3060"]), tmp_path, name="beast")
    first, second = (await source.discover()).devices
    assert first.uuid is not None
    assert second.uuid is not None
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    try:
        vram.hold(tmp_path, {first.uuid: 30000, second.uuid: 99999}, pid=holder.pid)
        figures = [(device.vram_used_mb, device.vram_free_mb) for device in (await source.read()).health]
        assert figures == [(30000, 2607), (12288, 0)]
        assert await source.process_memory_mb() == {0: {holder.pid: 30000}, 1: {holder.pid: 99999}}
    finally:
        holder.kill()
        await holder.communicate()
    assert [device.vram_used_mb for device in (await source.read()).health] == [0, 0]
    assert await source.process_memory_mb() == {0: {}, 1: {}}


async def test_idle_figures_without_a_directory(tmp_path: Path) -> None:
    """A host that never loaded a model has free memory and the figures of an idle card."""
    source = SimulatedTopologySource(SimulateSettings(devices=["L4"]), tmp_path / "not-yet")
    (device,) = (await source.read()).health
    assert (device.vram_used_mb, device.vram_free_mb, device.utilization_pct) == (0, 23034, 0)
    assert device.temp_c is not None
    assert device.power_w is not None


def test_devices_in_neuron_toml() -> None:
    """Names and tables mix in one list."""
    data = {"simulate": {"devices": ["RTX 5090", {"name": "RTX 4090", "numa_node": 1}]}}
    config = validate_settings(NeuronConfig, data, source="neuron.toml")
    assert config.simulate is not None
    names = [resolve_device(entry, index=0, host="").name for entry in config.simulate.devices]
    assert names == ["RTX 5090", "RTX 4090"]


MIG = {"kind": "mig", "parent": 1}


def simulated(*devices: object) -> tuple[Device, ...]:
    return resolve_devices(SimulateSettings.model_validate({"devices": devices}), host="x")


def test_mig_instances() -> None:
    """They are numbered by their GPU, have its facts and the memory of their profile; the GPU is in MIG mode."""
    found = simulated("L4", "A100", {**MIG, "profile": "1g.10gb"}, {**MIG, "vram_total_mb": 40000, "name": "half"})
    assert [(each.index, each.name, each.vram_total_mb, each.parent, each.mig_mode) for each in found] == [
        (0, "L4", 23034, None, None),
        (1, "A100 80GB", 81920, None, True),
        (201, "A100 80GB MIG 1g.10gb", 9850, 1, None),
        (202, "half", 40000, 1, None),
    ]
    assert found[2].is_mig_instance
    assert found[2].compute_capability == "8.0"
    assert str(found[2].uuid).startswith("MIG-")
    assert [(link.a, link.b) for link in links_of(found, nvlink=True)] == [(0, 1)]


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (("L4", MIG), r"devices\[1\].parent = 1: must be the index of an NVIDIA GPU before it"),
        (("L4", "L4", MIG), r"devices\[2\]: must have vram_total_mb, or a profile"),
        (("L4", "L4", {**MIG, "profile": "1g.10gb"}, "L4"), r"devices\[3\]: GPUs come before MIG instances"),
        (("L4", "L4", {**MIG, "profile": "1g.10gb", "index": 2}), r"devices\[2\].index = 2: must be 201"),
    ],
)
def test_impossible_mig_instances(devices: tuple[object, ...], reason: str) -> None:
    """Refused with the key."""
    with pytest.raises(SettingsError, match=reason):
        simulated(*devices)


def test_amd_gpus() -> None:
    """They have XGMI where NVIDIA's have NVLink, and no compute capability."""
    card = {"name": "MI300X", "vram_total_mb": 196592, "vendor": "amd"}
    found = simulated(card, card)
    assert [(each.vendor, each.compute_capability) for each in found] == [("amd", None)] * 2
    assert [link.kind for link in links_of(found, nvlink=True)] == [LinkKind.XGMI]
