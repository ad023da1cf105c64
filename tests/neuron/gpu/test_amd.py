"""AMD's GPUs: the real amdsmi in a real process, against a real shared library."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.amdsmi.library import (
    API_FAILED,
    DRIVER_NOT_LOADED,
    PCIE,
    XGMI,
    AmdGpu,
    amd_uuid_of,
    build_library,
    linked,
    write_scenario,
)
from tests.neuron.neurons import REPOSITORY, neuron_process
from tests.neuron.recording_vllm import calls, vllm_config
from tests.nvml.library import LONE_4090
from tests.nvml.library import build_library as build_nvml
from tests.nvml.library import write_scenario as write_nvml
from tests.nvml.probe import probing

PAIR = (AmdGpu(), AmdGpu())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_library(tmp_path_factory.getbasetemp() / "amdsmi")


def test_facts_and_figures(library: dict[str, str], hardware: Path) -> None:
    """Every fact and figure of a GPU, in the units of the protocol; processes with their memory."""
    gpus = (replace(PAIR[0], used_mib=5000, processes=((101, 4000), (102, 7))), PAIR[1])
    with probing(library | write_scenario(hardware, gpus, **linked(2))) as probe:
        topology = probe.ask("discover")
        assert topology["devices"][1] == {
            "index": 1,
            "kind": "gpu",
            "parent": None,
            "profile": None,
            "vendor": "amd",
            "name": "AMD Instinct MI300X",
            "vram_total_mb": 196592,
            "compute_capability": None,
            "uuid": amd_uuid_of(1),
            "pci_bus_id": "0000:06:00.0",
            "numa_node": 0,
            "mig_mode": None,
            "unified": False,
            "lost": None,
        }
        assert topology["links"] == [{"a": 0, "b": 1, "kind": "xgmi", "nvlinks": 0}]
        assert (topology["driver_version"], topology["cuda_version"]) == ("6.14.14", None)
        first = probe.ask("health")[0]
        assert (first["vram_used_mb"], first["vram_free_mb"]) == (5000, 196592 - 5000)
        assert (first["utilization_pct"], first["temp_c"], first["power_w"]) == (3, 48, 132)
        assert first["energy_wh"] == 2.5
        assert probe.ask("processes") == {"0": {"101": 4000, "102": 7}, "1": {}}


def test_index_is_the_number_for_hip(library: dict[str, str], hardware: Path) -> None:
    """Engines get their GPUs by HIP's numbers, which may differ from the order of amdsmi; an old library has none."""
    swapped = (replace(PAIR[0], figures={"hip_id": 1}), replace(PAIR[1], figures={"hip_id": 0}))
    with probing(library | write_scenario(hardware, swapped)) as probe:
        assert [each["uuid"] for each in probe.ask("discover")["devices"]] == [amd_uuid_of(1), amd_uuid_of(0)]
    unknown = tuple(replace(each, figures={"hip_id": None}) for each in PAIR)
    with probing(library | write_scenario(hardware, unknown)) as probe:
        assert [each["uuid"] for each in probe.ask("discover")["devices"]] == [amd_uuid_of(0), amd_uuid_of(1)]


@pytest.mark.parametrize(("numa", "kind"), [(0, "node"), (1, "sys")])
def test_links_over_pcie(library: dict[str, str], hardware: Path, numa: int, kind: str) -> None:
    """Within one NUMA node they are better than between two."""
    gpus = (PAIR[0], replace(PAIR[1], figures={"numa_node": numa}))
    with probing(library | write_scenario(hardware, gpus, **linked(2, PCIE))) as probe:
        assert [link["kind"] for link in probe.ask("discover")["links"]] == [kind]


def test_links_with_an_older_package(library: dict[str, str], hardware: Path, tmp_path: Path) -> None:
    """Its class of link types has another name and other members."""
    (tmp_path / "sitecustomize.py").write_text(
        "import enum, amdsmi\n"
        "del amdsmi.AmdSmiLinkType\n"
        f"amdsmi.AmdSmiIoLinkType = enum.IntEnum('AmdSmiIoLinkType', {{'PCIEXPRESS': {PCIE}, 'XGMI': {XGMI}}})\n"
    )
    older = library | {"PYTHONPATH": str(tmp_path)}
    for kind, expected in ((XGMI, "xgmi"), (PCIE, "node")):
        with probing(older | write_scenario(hardware, PAIR, **linked(2, kind))) as probe:
            assert [link["kind"] for link in probe.ask("discover")["links"]] == [expected]


def test_a_gpu_that_stops_answering_is_lost(library: dict[str, str], hardware: Path) -> None:
    """It keeps its facts and is missing in health until it answers again; the other GPU is unaffected."""
    with probing(library | write_scenario(hardware, PAIR)) as probe:
        before = probe.ask("discover")
        write_scenario(hardware, PAIR, gpu1__error=API_FAILED)
        assert [each["index"] for each in probe.ask("health")] == [0]
        lost = probe.ask("discover")["devices"][1]
        assert "AMDSMI_STATUS_API_FAILED" in lost["lost"]
        assert {**lost, "lost": None} == before["devices"][1]
        write_scenario(hardware, PAIR)
        assert [each["index"] for each in probe.ask("health")] == [0, 1]
        assert probe.ask("discover") == before


def test_absent_figures_are_none(library: dict[str, str], hardware: Path) -> None:
    """A GPU without sensors, name and UUID is a device too."""
    figures = dict.fromkeys(("name", "uuid", "bdf", "numa_node", "hotspot_c", "utilization_pct", "power_w"))
    with probing(library | write_scenario(hardware, (AmdGpu(figures=figures),))) as probe:
        (device,) = probe.ask("discover")["devices"]
        assert (device["name"], device["uuid"], device["lost"]) == ("", None, None)
        (health,) = probe.ask("health")
        assert [health[key] for key in ("utilization_pct", "temp_c", "power_w")] == [None, None, None]


def test_an_unusable_driver_is_told(library: dict[str, str], hardware: Path) -> None:
    """There are no devices, and a reason."""
    with probing(library | write_scenario(hardware, PAIR, init=DRIVER_NOT_LOADED)) as probe:
        topology = probe.ask("discover")
        assert topology["devices"] == []
        assert "Driver not loaded" in topology["cuda_unavailable_reason"]
        assert probe.ask("health") == []


def test_without_its_library_amdsmi_is_ignored(tmp_path: Path) -> None:
    """The package prints that it lacks its library: that must not get between the lines of `neuron discover --json`."""
    (tmp_path / "libnvidia-ml.so.1").touch()
    found = subprocess.run(
        [sys.executable, "-m", "neuron", "discover", "--json"],
        cwd=REPOSITORY,
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin", "ROCM_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout)["devices"] == []


def test_nvidia_comes_first(library: dict[str, str], tmp_path: Path) -> None:
    """A host with GPUs of both vendors has NVIDIA's only; without one of those, AMD's."""
    nvml = build_nvml(tmp_path / "nvml")["LD_LIBRARY_PATH"]
    both = {"LD_LIBRARY_PATH": f"{nvml}:{library['LD_LIBRARY_PATH']}"} | write_scenario(tmp_path / "amd", PAIR)
    with probing(both | write_nvml(tmp_path / "nvidia", LONE_4090)) as probe:
        assert [each["vendor"] for each in probe.ask("discover")["devices"]] == ["nvidia"]
    with probing(both | write_nvml(tmp_path / "nvidia")) as probe:
        assert [each["vendor"] for each in probe.ask("discover")["devices"]] == ["amd", "amd"]


async def test_a_model_over_an_xgmi_pair(library: dict[str, str], tmp_path: Path) -> None:
    """An engine gets its GPUs by HIP's numbers, and none of the variables that would renumber them."""
    config = vllm_config(tmp_path, (29400, 29449))
    apart = {f"link__{a}__{b}": f"1 {PCIE}" for a in (0, 1) for b in (2, 3)}
    pairs = {"link__0__1": f"1 {PCIE}", "link__2__3": "1 2"}
    scenario = write_scenario(tmp_path / "hardware", (*PAIR, *PAIR), **apart, **pairs)
    environment = {**library, **scenario, "PYTHONPATH": str(REPOSITORY), "ROCR_VISIBLE_DEVICES": "0,1,2,3"}
    async with neuron_process(config, env=environment) as neuron:
        command = {"model_id": "m", "harness": "vllm", "tensor_parallel": 2, "vram_mb": 100_000}
        assert (await neuron.call("POST", "/models/load", json=command)).status == 200
        live = (await neuron.call("GET", "/health")).body["devices"]
        assert [each["vram_booked_mb"] for each in live] == [0, 0, 50_000, 50_000]
    given = calls(tmp_path)[-1].variables
    assert given["HIP_VISIBLE_DEVICES"] == "2,3"
    assert not {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"} & given.keys()
