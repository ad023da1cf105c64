"""MIG instances as devices: the real nvidia-ml-py in a real process, against a real shared library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.nvml.library import (
    A100_SLICED,
    GPU_IS_LOST,
    MIB,
    NOT_SUPPORTED,
    UNKNOWN,
    Gpu,
    Slice,
    mig_uuid_of,
    pci_bus_id_of,
    write_scenario,
)
from tests.nvml.probe import Probe, probing


def devices(probe: Probe) -> dict[int, dict[str, Any]]:
    return {device["index"]: device for device in probe.ask("discover")["devices"]}


def test_each_instance_is_a_device(library: dict[str, str], hardware: Path) -> None:
    """It has its own index, UUID, size and memory; the GPU stays listed, in MIG mode, and other GPUs are as before."""
    with probing(library | write_scenario(hardware, (A100_SLICED, Gpu(name="NVIDIA H100")))) as probe:
        found = devices(probe)
        assert list(found) == [0, 1, 102, 109, 110]
        assert found[102] == {
            "index": 102,
            "kind": "mig",
            "parent": 0,
            "profile": "3g.40gb",
            "vendor": "nvidia",
            "name": "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
            "vram_total_mb": 40192,
            "compute_capability": "8.0",
            "uuid": mig_uuid_of(0, 2),
            "pci_bus_id": pci_bus_id_of(0),
            "numa_node": 0,
            "mig_mode": None,
            "unified": False,
            "lost": None,
        }
        assert (found[0]["kind"], found[0]["mig_mode"], found[0]["parent"]) == ("gpu", True, None)
        assert (found[1]["kind"], found[1]["mig_mode"]) == ("gpu", None)


def test_instances_have_their_own_figures(library: dict[str, str], hardware: Path) -> None:
    """Memory and processes are those of the instance. The GPU lists no processes: they would count twice."""
    busy = replace(A100_SLICED.slices[0], used_mib=4000, processes=((101, 3900), (102, None)))
    gpu = replace(A100_SLICED, slices=(busy, *A100_SLICED.slices[1:]), processes=((101, 3900),))
    with probing(library | write_scenario(hardware, (gpu,))) as probe:
        figures = {each["index"]: (each["vram_used_mb"], each["vram_free_mb"]) for each in probe.ask("health")}
        assert figures[109] == (4000, 5856)
        assert figures[110] == (0, 9856)
        assert probe.ask("processes") == {"0": {}, "102": {}, "109": {"101": 3900}, "110": {}}


def test_processes_by_gpu_instance(library: dict[str, str], hardware: Path) -> None:
    """A driver that lists processes only for the whole GPU says in which GPU instance each of them is."""
    unlisted = {"error.nvmlDeviceGetComputeRunningProcesses_v3": NOT_SUPPORTED}
    unlisted |= {"error.nvmlDeviceGetComputeRunningProcesses_v2": NOT_SUPPORTED}
    slices = tuple(replace(each, figures=unlisted) for each in A100_SLICED.slices)
    listed = {"process.0": f"101 {3000 * MIB} 9", "process.1": f"102 {20 * MIB} 2", "process.2": f"101 {MIB} 9"}
    with probing(library | write_scenario(hardware, (replace(A100_SLICED, slices=slices, figures=listed),))) as probe:
        assert probe.ask("processes") == {"0": {}, "102": {"102": 20}, "109": {"101": 3001}, "110": {}}


def test_instances_come_and_go(library: dict[str, str], hardware: Path) -> None:
    """What `nvidia-smi mig` does is seen without a restart, in discovery and health, also when MIG mode changes."""
    with probing(library | write_scenario(hardware, (replace(A100_SLICED, slices=(), figures={"mig": 0}),))) as probe:
        assert [(each["index"], each["mig_mode"]) for each in devices(probe).values()] == [(0, False)]
        write_scenario(hardware, (A100_SLICED,))
        assert [each["index"] for each in probe.ask("health")] == [0, 102, 109, 110]
        assert devices(probe)[0]["mig_mode"] is True
        larger = Slice(9, "2g.20gb", 19968, figures={"uuid": "MIG-another"})
        write_scenario(hardware, (replace(A100_SLICED, slices=(larger,)),))
        (_, recreated) = devices(probe).values()
        assert (recreated["index"], recreated["uuid"], recreated["vram_total_mb"]) == (109, "MIG-another", 19968)
        assert [each["index"] for each in probe.ask("health")] == [0, 109]
        write_scenario(hardware, (replace(A100_SLICED, slices=(), figures={"mig": 1}),))
        assert list(devices(probe)) == [0]
        assert probe.ask("processes") == {"0": {}}


@pytest.mark.parametrize("code", [GPU_IS_LOST, UNKNOWN])
def test_a_lost_gpu_takes_its_instances_along(library: dict[str, str], hardware: Path, code: int) -> None:
    """They stay listed with the reason, and come back with it."""
    with probing(library | write_scenario(hardware, (A100_SLICED, Gpu()))) as probe:
        before = devices(probe)
        write_scenario(hardware, (A100_SLICED, Gpu()), gpu0__error=code)
        assert [each["index"] for each in probe.ask("health")] == [1]
        lost = devices(probe)
        assert list(lost) == list(before)
        assert all(f"({code})" in lost[index]["lost"] for index in (0, 102, 109, 110))
        assert lost[1]["lost"] is None
        write_scenario(hardware, (A100_SLICED, Gpu()))
        probe.ask("health")
        assert devices(probe) == before


def test_a_fault_of_the_gpu_is_one_of_its_instances(library: dict[str, str], hardware: Path) -> None:
    """Nothing is placed on the instances of a GPU that needs a reset."""
    failed = replace(A100_SLICED, figures={"recovery_action": 1})
    with probing(library | write_scenario(hardware, (failed, Gpu()))) as probe:
        faults = {each["index"]: each["fault"] for each in probe.ask("health")}
        assert faults[0]
        assert faults == {0: faults[0], 1: None, 102: faults[0], 109: faults[0], 110: faults[0]}


def test_compute_instances_share_a_memory(library: dict[str, str], hardware: Path) -> None:
    """Only the first compute instance of a GPU instance is a device: a second one has no memory of its own."""
    pair = (Slice(3, "1c.2g.20gb", 19968, compute_instance=1), Slice(3, "1c.2g.20gb", 19968), Slice(5))
    with probing(library | write_scenario(hardware, (replace(A100_SLICED, slices=pair),))) as probe:
        found = devices(probe)
        assert list(found) == [0, 103, 105]
        assert (found[103]["uuid"], found[103]["profile"]) == (mig_uuid_of(0, 3, 0), "1c.2g.20gb")


def test_a_driver_that_does_not_name_profiles(library: dict[str, str], hardware: Path) -> None:
    """Before 470 the instance's name is the GPU's; its profile follows from its attributes."""
    plain = Slice(9, figures={"name": A100_SLICED.name})
    with probing(library | write_scenario(hardware, (replace(A100_SLICED, slices=(plain,)),))) as probe:
        named = devices(probe)[109]
        assert (named["profile"], named["name"]) == ("1g.10gb", f"{A100_SLICED.name} MIG 1g.10gb")
