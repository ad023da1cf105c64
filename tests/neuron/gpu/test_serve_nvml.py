"""`neuron serve` with GPUs from NVML: real command, real nvidia-ml-py, a test library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.gpus import DEVICE_MARGIN_MB
from tests.neuron.neurons import REPOSITORY, neuron_process, until
from tests.neuron.recording_vllm import calls, vllm_config
from tests.nvml.library import (
    A100_SLICED,
    GPU_IS_LOST,
    LONE_4090,
    NVLINKED_PAIR,
    ONE_LOST,
    VERSION_MISMATCH,
    Gpu,
    mig_uuid_of,
    uuid_of,
    write_scenario,
)


def configuration(directory: Path) -> Path:
    return vllm_config(directory, (29100, 29199))


def environment(library: Mapping[str, str], scenario: Mapping[str, str]) -> dict[str, str]:
    return {**library, **scenario, "PYTHONPATH": str(REPOSITORY)}


async def test_model_over_an_nvlinked_pair(library: dict[str, str], tmp_path: Path) -> None:
    """Topology and live figures come from NVML; the engine gets its GPUs by UUID, its share of them, and no secret in
    its arguments."""
    busy = (Gpu(nvlinks=NVLINKED_PAIR[0].nvlinks, used_mib=2048), NVLINKED_PAIR[1])
    scenario = write_scenario(tmp_path / "gpus", busy)
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:
        discovery = (await neuron.call("GET", "/discovery")).body
        assert [device["uuid"] for device in discovery["devices"]] == [uuid_of(0), uuid_of(1)]
        assert discovery["links"] == [{"a": 0, "b": 1, "kind": "nvlink", "nvlinks": 4}]
        assert discovery["harnesses"] == ["vllm"]
        assert not discovery["simulated"]
        live = (await neuron.call("GET", "/health")).body["devices"]
        assert live[0]["vram_used_mb"] - live[1]["vram_used_mb"] == 2048
        assert live[1]["temp_c"] == 42
        command = {"model_id": "org/large", "harness": "vllm", "tensor_parallel": 2, "vram_mb": 54000, "quant": "fp8"}
        assert (await neuron.call("POST", "/models/load", json=command)).status == 200
        endpoint = (await neuron.call("GET", "/models/org%2Flarge/endpoint")).body
    arguments, variables = calls(tmp_path)[-1]
    assert variables["CUDA_VISIBLE_DEVICES"] == f"{uuid_of(0)},{uuid_of(1)}"
    assert variables["VLLM_API_KEY"] == endpoint["api_key"]
    assert endpoint["api_key"] not in " ".join(arguments)
    given = {name: arguments[place + 1] for place, name in enumerate(arguments) if name.startswith("--")}
    assert given["--tensor-parallel-size"] == "2"
    assert given["--quantization"] == "fp8"
    assert float(given["--gpu-memory-utilization"]) == pytest.approx(27000 / 32607, abs=0.02)


async def test_models_on_mig_instances(library: dict[str, str], tmp_path: Path) -> None:
    """Each engine gets an instance by its UUID, its share of it, and its memory booked there; an instance created
    meanwhile takes the next one."""
    gpu = replace(A100_SLICED, slices=A100_SLICED.slices[:1])
    scenario = write_scenario(tmp_path / "gpus", (gpu,))
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:

        async def load(model: str, **more: object) -> Any:
            command = {"model_id": model, "harness": "vllm", "vram_mb": 8000, **more}
            return await neuron.call("POST", "/models/load", json=command)

        def given() -> tuple[str, float]:
            arguments, variables = calls(tmp_path)[-1]
            share = float(arguments[arguments.index("--gpu-memory-utilization") + 1])
            return variables["CUDA_VISIBLE_DEVICES"], share

        assert (await load("first")).status == 200
        uuid, share = given()
        assert uuid == mig_uuid_of(0, 9)
        assert share == pytest.approx(8000 / 9856, abs=0.02)
        assert (await load("second")).status == 409
        write_scenario(tmp_path / "gpus", (A100_SLICED,))
        assert (await load("second", devices=[110])).status == 200
        assert given()[0] == mig_uuid_of(0, 10)
        live = {each["index"]: each for each in (await neuron.call("GET", "/health")).body["devices"]}
        assert {index: each["vram_booked_mb"] for index, each in live.items()} == {0: 0, 102: 0, 109: 8000, 110: 8000}
        assert live[0]["vram_bookable_mb"] == 0
        both = await load("both", tensor_parallel=2, devices=[102, 110])
        assert (both.status, both.error["param"]) == (400, "devices")
        assert "MIG instance" in both.error["message"]
        assert (await load("both", tensor_parallel=2)).status == 400


async def test_two_models_share_one_gpu(library: dict[str, str], tmp_path: Path) -> None:
    """Each gets the fraction that is booked for it; a third is refused with the figures."""
    scenario = write_scenario(tmp_path / "gpus", LONE_4090)  # 512 MiB in use, and as many the driver's own
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:
        fractions = []
        for model in ("first", "second"):
            command = {"model_id": model, "harness": "vllm", "vram_mb": 11_000}
            assert (await neuron.call("POST", "/models/load", json=command)).status == 200
            arguments, _ = calls(tmp_path)[-1]
            fractions.append(float(arguments[arguments.index("--gpu-memory-utilization") + 1]))
        assert fractions == [0.4478, 0.4478]
        third = await neuron.call("POST", "/models/load", json={"model_id": "third", "harness": "vllm"})
        (device,) = (await neuron.call("GET", "/health")).body["devices"]
    assert (third.status, third.error["code"]) == (409, "insufficient_vram")
    assert "11000 booked for 'first', 11000 booked for 'second', 512 used by" in third.error["message"]
    assert (device["vram_booked_mb"], device["vram_foreign_mb"]) == (22_000, 512)
    assert device["vram_bookable_mb"] == 24_564 - 22_000 - 512 - 512 - DEVICE_MARGIN_MB


async def test_driver_mismatch_is_reported(library: dict[str, str], tmp_path: Path) -> None:
    """neuron runs and reports the problem; loads are refused immediately with the reason."""
    scenario = write_scenario(tmp_path / "gpus", init=VERSION_MISMATCH)
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:
        discovery = (await neuron.call("GET", "/discovery")).body
        assert discovery["devices"] == []
        assert discovery["cuda_unavailable_reason"]
        refused = await neuron.call("POST", "/models/load", json={"model_id": "m", "harness": "vllm"})
        assert refused.status == 503
        assert refused.error["code"] == "cuda_unavailable"


async def test_a_fatal_xid_takes_its_gpu_out_of_use(library: dict[str, str], tmp_path: Path) -> None:
    """From the driver's event to the refusal of a load, and back after a reset; the other GPU serves meanwhile."""
    scenario = write_scenario(tmp_path / "gpus", NVLINKED_PAIR, gpu0__energy_mj=9000)
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:

        async def fault() -> str | None:
            device = (await neuron.call("GET", "/health")).body["devices"][0]
            return str(device["fault"]) if device["fault"] else None

        assert await fault() is None
        write_scenario(tmp_path / "gpus", NVLINKED_PAIR, gpu0__energy_mj=9000, event__0="0 79")
        assert await until(fault) == "Xid 79: the GPU has fallen off the bus"
        command = {"model_id": "m", "harness": "vllm", "vram_mb": 8000}
        refused = await neuron.call("POST", "/models/load", json={**command, "devices": [0]})
        assert (refused.status, refused.error["code"]) == (409, "insufficient_vram")
        assert "Xid 79" in refused.error["message"]
        assert (await neuron.call("POST", "/models/load", json=command)).status == 200
        assert (await neuron.model("m"))["devices"] == [1]
        page = (await neuron.call("GET", "/metrics")).body
        assert (
            f'neuron_device_fault{{index="0",reason="Xid 79: the GPU has fallen off the bus",uuid="{uuid_of(0)}"}}'
            in page
        )
        assert "GPU 0 cannot be used: Xid 79" in neuron.log.read_text()
        write_scenario(tmp_path / "gpus", NVLINKED_PAIR, gpu0__energy_mj=100, event__0="0 79")
        assert await fault() is None
        command = {"model_id": "n", "harness": "vllm", "vram_mb": 8000, "devices": [0]}
        assert (await neuron.call("POST", "/models/load", json=command)).status == 200


async def test_lost_gpu_is_marked_and_not_used(library: dict[str, str], tmp_path: Path) -> None:
    """One GPU is lost before the start and one later; the others keep serving."""
    scenario = write_scenario(tmp_path / "gpus", ONE_LOST)
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:
        devices = (await neuron.call("GET", "/discovery")).body["devices"]
        assert devices[0]["lost"] is None
        assert devices[1]["lost"]
        wanted = {"model_id": "m", "harness": "vllm", "devices": [1]}
        assert (await neuron.call("POST", "/models/load", json=wanted)).status == 400
        write_scenario(tmp_path / "gpus", (Gpu(figures={"error": GPU_IS_LOST}),) * 2)

        async def all_lost() -> bool:
            await neuron.call("GET", "/health")
            found = (await neuron.call("GET", "/discovery")).body["devices"]
            return all(device["lost"] for device in found)

        await until(all_lost)
        assert (await neuron.call("GET", "/health")).status == 200
