"""`neuron discover` as a real process, against the test NVML library and against none."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from neuron.config import NeuronConfig, SimulateSettings
from neuron.gpu.discovery import discovery_of, topology_source
from neuron.gpu.discovery_table import table_of
from shared import __version__
from shared.protocol import Device, Discovery, Link, LinkKind
from tests.nvml.library import (
    A100_SLICED,
    DRIVER_NOT_LOADED,
    HOST_BRIDGE,
    LONE_4090,
    NO_PERMISSION,
    NVLINKED_PAIR,
    ONE_LOST,
    REPOSITORY,
    UNKNOWN,
    VERSION_MISMATCH,
    Gpu,
    uuid_of,
    write_scenario,
)

COMMAND = ("-m", "neuron", "discover")


def discover(environment: Mapping[str, str], *arguments: str) -> str:
    """The output of `neuron discover`, which must exit with status 0 and without a traceback."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    result = subprocess.run(
        [sys.executable, *COMMAND, *arguments],
        cwd=REPOSITORY,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def discovered(environment: Mapping[str, str]) -> dict[str, Any]:
    answer = json.loads(discover(environment, "--json"))
    assert isinstance(answer, dict)
    return answer


def test_nvlinked_pair(library: dict[str, str], tmp_path: Path) -> None:
    """The answer has two NVLinked GPUs and the facts of their host."""
    answer = discovered(library | write_scenario(tmp_path / "hardware", NVLINKED_PAIR, topology__0__1=HOST_BRIDGE))
    assert [(device["index"], device["uuid"]) for device in answer["devices"]] == [(0, uuid_of(0)), (1, uuid_of(1))]
    assert answer["links"] == [{"a": 0, "b": 1, "kind": "nvlink", "nvlinks": 4}]
    assert (answer["driver_version"], answer["cuda_version"]) == ("580.95.05", "13.0")
    assert (answer["hostname"], answer["kernel"]) == (socket.gethostname(), platform.release())
    assert (answer["version"], answer["simulated"], answer["harnesses"]) == (__version__, False, ["vllm"])
    assert answer["os"]


def test_single_gpu(library: dict[str, str], tmp_path: Path) -> None:
    """A single GPU has no links."""
    answer = discovered(library | write_scenario(tmp_path / "hardware", LONE_4090))
    assert [device["name"] for device in answer["devices"]] == ["NVIDIA GeForce RTX 4090"]
    assert answer["links"] == []


def test_a_driver_without_a_gpu(library: dict[str, str], tmp_path: Path) -> None:
    """The answer has no devices and no error."""
    answer = discovered(library | write_scenario(tmp_path / "hardware"))
    assert (answer["devices"], answer["cuda_unavailable_reason"]) == ([], None)
    assert answer["driver_version"] == "580.95.05"


def test_no_nvidia_library(tmp_path: Path) -> None:
    """A host without an NVIDIA stack has no devices and no error."""
    # Found before a real library, and no library.
    (tmp_path / "libnvidia-ml.so.1").touch()
    answer = discovered({"LD_LIBRARY_PATH": str(tmp_path)})
    assert (answer["devices"], answer["links"], answer["cuda_unavailable_reason"]) == ([], [], None)
    assert answer["driver_version"] is None


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (VERSION_MISMATCH, "reboot"),
        (DRIVER_NOT_LOADED, "modprobe nvidia"),
        (NO_PERMISSION, "/dev/nvidia"),
        (UNKNOWN, "dmesg"),
        (777, "dmesg"),  # a code that this nvidia-ml-py does not know
    ],
)
def test_an_unusable_driver(library: dict[str, str], tmp_path: Path, code: int, advice: str) -> None:
    """The answer has no devices, and a reason that says what happened and what to do."""
    answer = discovered(library | write_scenario(tmp_path / "hardware", NVLINKED_PAIR, init=code))
    assert answer["devices"] == []
    assert f"({code})" in answer["cuda_unavailable_reason"]
    assert advice in answer["cuda_unavailable_reason"]


def test_one_lost_gpu(library: dict[str, str], tmp_path: Path) -> None:
    """The lost GPU is marked; the other one can be used."""
    answer = discovered(library | write_scenario(tmp_path / "hardware", ONE_LOST))
    assert [bool(device["lost"]) for device in answer["devices"]] == [False, True]
    assert answer["cuda_unavailable_reason"] is None


def test_table_output(library: dict[str, str], tmp_path: Path) -> None:
    """Without --json it prints the devices, the matrix of their links, and problems."""
    environment = library | write_scenario(tmp_path / "hardware", (*NVLINKED_PAIR, ONE_LOST[1]))
    text = discover(environment)
    assert "driver  580.95.05, CUDA 13.0" in text
    assert text.count("NVIDIA GeForce RTX 5090  32607 MiB  12.0") == 2
    assert "GPU 2 cannot be used: NVML: GPU is lost (15)" in text
    assert text.endswith(
        "      GPU0  GPU1  GPU2\n"
        "GPU0  X     NV4   ?\n"
        "GPU1  NV4   X     ?\n"
        "GPU2  ?     ?     X\n"
        "\n"
        "  NV#  # NVLinks\n"
        "  ?    the driver does not say\n"
    )


def test_table_of_mig_instances(library: dict[str, str], tmp_path: Path) -> None:
    """Each is a row that names its GPU; the matrix has GPUs only."""
    text = discover(library | write_scenario(tmp_path / "hardware", (A100_SLICED, Gpu()), topology__0__1=HOST_BRIDGE))
    assert re.search(r"109  NVIDIA A100-SXM4-80GB MIG 1g\.10gb +9856 MiB .* of GPU 0 +MIG-", text)
    assert "GPU109" not in text
    assert "GPU0  X     PHB" in text


def test_table_of_a_host_with_unusable_gpus() -> None:
    """The reason is printed first."""
    text = table_of(Discovery(hostname="beast", cuda_unavailable_reason="reboot it"))
    assert "CUDA is unavailable: reboot it" in text
    assert text.endswith("\nno GPU\n")


def test_table_of_pcie_links() -> None:
    """Link kinds are named as in `nvidia-smi topo -m`; the legend explains those that occur."""
    devices = [Device(index=index) for index in range(2)]
    text = table_of(Discovery(devices=devices, links=[Link(a=0, b=1, kind=LinkKind.PHB)]))
    assert "GPU1  PHB   X\n" in text
    assert text.endswith("\n\n  PHB  a PCIe host bridge\n")


async def test_a_simulated_host_has_the_neurons_name(tmp_path: Path) -> None:
    """The hosts of a simulated fleet share one machine, but each shows its own name."""
    simulate = SimulateSettings(devices=["RTX 5090", "RTX 5090"], nvlink=True)
    config = NeuronConfig(name="beast", simulate=simulate)
    source = topology_source(config, tmp_path)
    discovery = await discovery_of(config, source, instance_id="one")
    assert (discovery.hostname, discovery.simulated, discovery.instance_id) == ("beast", True, "one")
    assert [device.name for device in discovery.devices] == ["RTX 5090", "RTX 5090"]
    assert discovery.links == [Link(a=0, b=1, kind=LinkKind.NVLINK, nvlinks=4)]


async def test_it_tells_the_paths_of_harnesses(tmp_path: Path) -> None:
    """Only of those for which they are known: cortex refuses others before a load."""
    simulate = SimulateSettings(devices=["RTX 5090"])
    embed = {"preset": "infinity", "paths": ["/v1/embeddings"]}
    tables = {"sim": {}, "embed": embed, "llama": {"preset": "llama.cpp"}}
    config = NeuronConfig.model_validate({"simulate": simulate, "harness": tables})
    discovery = await discovery_of(config, topology_source(config, tmp_path), instance_id="one")
    assert discovery.harness_paths == {"embed": ["/v1/embeddings"]}
