"""NVML's facts and live figures: the real nvidia-ml-py in a real process, against a real shared library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.nvml.library import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    HOST_BRIDGE,
    LONE_4090,
    MIB,
    NOT_SUPPORTED,
    NVLINKED_PAIR,
    UNKNOWN,
    Gpu,
    build_library,
    pci_bus_id_of,
    uuid_of,
    write_scenario,
)
from tests.nvml.probe import probing

RESET_REQUIRED = 16


@pytest.fixture(scope="module")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_library(tmp_path_factory.getbasetemp() / "nvml", old_driver=True)


def test_facts_of_a_device(library: dict[str, str], hardware: Path) -> None:
    """Every fact of a GPU reaches the topology, in the units of the protocol."""
    with probing(library | write_scenario(hardware, LONE_4090)) as probe:
        assert probe.ask("discover") == {
            "devices": [
                {
                    "index": 0,
                    "kind": "gpu",
                    "parent": None,
                    "profile": None,
                    "vendor": "nvidia",
                    "name": "NVIDIA GeForce RTX 4090",
                    "vram_total_mb": 24564,
                    "compute_capability": "8.9",
                    "uuid": uuid_of(0),
                    "pci_bus_id": "00000000:C1:00.0",
                    "numa_node": 0,
                    "unified": False,
                    "mig_mode": None,
                    "lost": None,
                }
            ],
            "links": [],
            "driver_version": "580.95.05",
            "cuda_version": "13.0",
            "cuda_unavailable_reason": None,
            "simulated": False,
            "ram": None,
            "ram_reserve_mb": 0,
            "device_variable": None,
        }


def test_each_call_reads_health_again(library: dict[str, str], hardware: Path) -> None:
    """Used memory is what all processes hold now; the driver's reserve is neither used nor free."""
    with probing(library | write_scenario(hardware, LONE_4090)) as probe:
        assert probe.ask("health") == [
            {
                "index": 0,
                "vram_used_mb": 512,
                "vram_free_mb": 24564 - 512 - 512,
                # Not the driver's to say.
                "vram_booked_mb": None,
                "vram_foreign_mb": None,
                "vram_bookable_mb": None,
                "vram_asleep_mb": None,
                "utilization_pct": 7,
                "temp_c": 41,
                "power_w": 65.5,
                "energy_wh": None,
                "fault": None,
                "warnings": [],
                "xids": {},
            }
        ]
        write_scenario(hardware, (replace(LONE_4090[0], used_mib=20000),))
        assert [(device["vram_used_mb"], device["vram_free_mb"]) for device in probe.ask("health")] == [(20000, 4052)]


@pytest.mark.parametrize("code", [GPU_IS_LOST, RESET_REQUIRED, UNKNOWN])
def test_a_gpu_lost_while_running(library: dict[str, str], hardware: Path, code: int) -> None:
    """It is missing in health and marked, and keeps its facts; the other GPU is unaffected. It may return."""
    with probing(library | write_scenario(hardware, NVLINKED_PAIR)) as probe:
        before = probe.ask("discover")
        write_scenario(hardware, NVLINKED_PAIR, gpu1__error=code)
        assert [device["index"] for device in probe.ask("health")] == [0]
        lost = probe.ask("discover")["devices"]
        assert lost[0] == before["devices"][0]
        assert f"({code})" in lost[1].pop("lost")
        assert {**lost[1], "lost": None} == before["devices"][1]
        assert 0 in {int(index) for index in probe.ask("processes")}
        write_scenario(hardware, NVLINKED_PAIR)
        assert [device["index"] for device in probe.ask("health")] == [0, 1]
        assert probe.ask("discover") == before


def test_a_gpu_lost_before_the_start_is_listed_and_marked(library: dict[str, str], hardware: Path) -> None:
    """Without a handle only the index and the reason are known. The others have links and health."""
    gpus = (*NVLINKED_PAIR, Gpu(figures={"handle_error": GPU_IS_LOST}))
    with probing(library | write_scenario(hardware, gpus)) as probe:
        topology = probe.ask("discover")
        assert [device["index"] for device in topology["devices"]] == [0, 1, 2]
        assert topology["devices"][2]["uuid"] is None
        assert "fell off the bus" in topology["devices"][2]["lost"]
        assert [(link["a"], link["b"]) for link in topology["links"]] == [(0, 1)]
        assert topology["cuda_unavailable_reason"] is None
        assert [device["index"] for device in probe.ask("health")] == [0, 1]


def test_a_lost_gpu_keeps_known_facts(library: dict[str, str], hardware: Path) -> None:
    """A GPU with a handle but without memory is unusable, and listed with what the driver reports."""
    gpus = (Gpu(figures={"error.nvmlDeviceGetMemoryInfo_v2": UNKNOWN}),)
    with probing(library | write_scenario(hardware, gpus)) as probe:
        (device,) = probe.ask("discover")["devices"]
        assert (device["uuid"], device["pci_bus_id"]) == (uuid_of(0), pci_bus_id_of(0))
        assert "Xid" in device["lost"]
        assert probe.ask("health") == []


def test_absent_figures_are_none(library: dict[str, str], hardware: Path) -> None:
    """Missing figures are None; newer GPUs have more. An unknown error for an optional figure (WSL, virtual GPUs) does
    not lose the GPU."""
    absent = dict.fromkeys(("temp_c", "utilization_pct", "numa_node"))
    gpu = Gpu(figures={**absent, "error.nvmlDeviceGetPowerUsage": UNKNOWN})
    with probing(library | write_scenario(hardware, (gpu,))) as probe:
        (device,) = probe.ask("health")
        assert [device[key] for key in ("utilization_pct", "temp_c", "power_w")] == [None, None, None]
        (known,) = probe.ask("discover")["devices"]
        assert (known["lost"], known["numa_node"]) == (None, None)
        write_scenario(hardware, (replace(gpu, figures={**gpu.figures, "energy_mj": 9_000_000}),))
        assert [device["energy_wh"] for device in probe.ask("health")] == [2.5]


def test_a_gpu_that_shares_host_memory(library: dict[str, str], hardware: Path) -> None:
    """Its memory figures are 0, and it is not lost."""
    with probing(library | write_scenario(hardware, (Gpu(name="NVIDIA GB10", figures={"total": None}),))) as probe:
        (device,) = probe.ask("discover")["devices"]
        assert (device["name"], device["unified"], device["lost"]) == ("NVIDIA GB10", True, None)
        (health,) = probe.ask("health")
        assert (health["vram_used_mb"], health["vram_free_mb"], health["temp_c"]) == (0, 0, 41)


@pytest.mark.parametrize(("mode", "expected"), [(1, True), (0, False), (None, None)])
def test_mig_mode(library: dict[str, str], hardware: Path, mode: int | None, expected: bool | None) -> None:
    """MIG on, MIG off and a card without MIG differ."""
    with probing(library | write_scenario(hardware, (Gpu(figures={"mig": mode}),))) as probe:
        assert probe.ask("discover")["devices"][0]["mig_mode"] is expected


def test_memory_by_process(library: dict[str, str], hardware: Path) -> None:
    """MiB of every process on a GPU; two entries of one process (MIG) add up; unknown figures are missing."""
    gpus = (Gpu(processes=((101, 4000), (102, None), (101, 500))), Gpu(processes=((103, 9),)), Gpu())
    with probing(library | write_scenario(hardware, gpus)) as probe:
        assert probe.ask("processes") == {"0": {"101": 4500}, "1": {"103": 9}, "2": {}}


def test_an_old_driver(old_library: dict[str, str], hardware: Path) -> None:
    """If the library lacks a function, an older one is used, or the figure is None."""
    gpus = tuple(replace(gpu, used_mib=100, processes=((7, 3),)) for gpu in NVLINKED_PAIR)
    with probing(
        old_library | write_scenario(hardware, gpus, **{"error.nvmlDeviceGetMigMode": NOT_SUPPORTED})
    ) as probe:
        topology = probe.ask("discover")
        assert [device["vram_total_mb"] for device in topology["devices"]] == [32607, 32607]
        assert [device["lost"] for device in topology["devices"]] == [None, None]
        assert topology["links"][0]["nvlinks"] == 4
        health = probe.ask("health")[0]
        assert (health["vram_used_mb"], health["vram_free_mb"]) == (612, 32607 - 612)  # the reserve counts as used
        assert health["temp_c"] == 41
        assert probe.ask("processes") == {"0": {"7": 3}, "1": {"7": 3}}


def test_a_slow_driver_does_not_block_the_loop(library: dict[str, str], hardware: Path) -> None:
    """The event loop runs during an NVML call, however long it takes."""
    with probing(library | write_scenario(hardware, LONE_4090)) as probe:
        probe.ask("health")
        write_scenario(hardware, LONE_4090, delay_ms__nvmlDeviceGetMemoryInfo_v2=3000)
        gap = probe.ask("gap")
        assert gap["call_secs"] >= 3
        assert gap["longest_secs"] < gap["call_secs"] / 2


def test_a_driver_that_fails_at_the_start_leaves_no_devices(library: dict[str, str], hardware: Path) -> None:
    """Without a driver the live figures are empty too, and the process exits normally."""
    with probing(library | write_scenario(hardware, LONE_4090, init=DRIVER_NOT_LOADED)) as probe:
        assert probe.ask("health") == []
        assert probe.ask("processes") == {}
        topology = probe.ask("discover")
        assert topology["devices"] == []
        assert "not loaded" in topology["cuda_unavailable_reason"]


def test_figures_larger_than_32_bits(library: dict[str, str], hardware: Path) -> None:
    """The bytes of a GPU of 180 GB are 64-bit everywhere."""
    gpu = Gpu(name="NVIDIA B200", total_mib=183359, used_mib=150000, processes=((5, 150000),))
    assert 150000 * MIB > 2**32
    with probing(library | write_scenario(hardware, (gpu,), topology__0__1=HOST_BRIDGE)) as probe:
        assert probe.ask("health")[0]["vram_used_mb"] == 150000
        assert probe.ask("processes") == {"0": {"5": 150000}}
