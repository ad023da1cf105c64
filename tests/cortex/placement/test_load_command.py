"""The load command sent to a neuron, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.load_plan import load_command
from shared.protocol import HostResources, LinkKind, LoadCommand
from tests.cortex.fleets import On, fleet, host, with_entry
from tests.cortex.views import plan_for, profile, view

SPEC = profile(vram_mb=14000, quant="fp8", args=["--x"], source="/srv/m")


def _command(model: ModelProfile | None, where: NodeSnapshot, model_id: str = "m") -> LoadCommand:
    moment = view(fleet(where), *([] if model is None else [model]))
    return load_command(plan_for(moment, model_id), model, where)


def test_the_catalogues_spec_and_the_plans_devices() -> None:
    """The command has everything that the catalogue says of the engine, and the plan's devices."""
    assert _command(SPEC, host("n", 12000, 24000)).model_dump(exclude_defaults=True) == {
        "model_id": "m",
        "harness": "vllm",
        "quant": "fp8",
        "devices": [1],
        "source": "/srv/m",
        "args": ["--x"],
        "vram_mb": 14000,
    }
    assert _command(profile(vram_mb=14000, tools=True), host("n", 24000)).tools is True


@pytest.mark.parametrize(("min_devices", "tensor_parallel"), [(1, None), (2, 2)])
def test_tensor_parallel_is_null_for_one_device(min_devices: int, tensor_parallel: int | None) -> None:
    """The field is null for a single device, else the number of devices."""
    command = _command(profile(min_devices=min_devices, vram_mb=14000), host("n", 24000, 24000))
    assert (command.tensor_parallel, len(command.devices or [])) == (tensor_parallel, min_devices)


def test_parallel_goes_beside_tensor_parallel() -> None:
    """Devices are in the order of the ranks. A body without `parallel` does not mention it."""
    links = {(0, 3): LinkKind.NVLINK, (1, 2): LinkKind.NVLINK}
    split = profile(vram_mb=14000, parallel={"tensor": 2, "pipeline": 2, "expert": True})
    body = _command(split, host("n", *[24000] * 4, links=links)).body()
    assert body["parallel"] == {"tensor": 2, "pipeline": 2, "data": 1, "expert": True}
    assert (body["tensor_parallel"], body["devices"]) == (2, [0, 3, 1, 2])
    assert "parallel" not in _command(SPEC, host("n", 24000)).body()
    assert LoadCommand(model_id="m").body() == {"model_id": "m"}


ASLEEP = On(500, status="sleeping", wants_mb=13500)


@pytest.mark.parametrize(
    ("models", "protocol_v1", "expected"),
    [
        ({"m": ASLEEP}, False, {"model_id": "m"}),  # with another spec, or on other devices, it would not be woken
        ({"m": ASLEEP}, True, {"model_id": "m", "devices": [0], "vram_mb": 14000, "quant": "fp8"}),
        # its memory was taken: loaded again, on what is free
        ({"m": ASLEEP, "x": On(20000)}, False, {"model_id": "m", "devices": [1], "vram_mb": 14000, "quant": "fp8"}),
    ],
)
def test_a_sleeping_model(models: dict[str, On], protocol_v1: bool, expected: dict[str, Any]) -> None:
    """It is woken where it sleeps, by its id alone; a protocol v1 neuron is sent the whole spec."""
    command = _command(SPEC, host("n", 24000, 24000, models=models, protocol_v1=protocol_v1))
    assert command.bare is (expected == {"model_id": "m"})
    assert expected.items() <= command.model_dump(exclude_defaults=True).items()


@pytest.mark.parametrize(
    ("protocol_v1", "devices", "expected"),
    [
        (False, (0, 1), {"model_id": "own"}),
        (True, (0, 1), {"model_id": "own", "harness": "vllm", "devices": [0, 1], "tensor_parallel": 2}),
        (True, (1,), {"model_id": "own", "harness": "vllm", "devices": [1]}),
        (True, (), {"model_id": "own", "harness": "vllm"}),
    ],
)
def test_a_model_outside_the_catalogue(protocol_v1: bool, devices: tuple[int, ...], expected: dict[str, Any]) -> None:
    """Its neuron remembers its spec; a protocol v1 neuron is sent what it listed."""
    where = host("n", 24000, 24000, models={"own": On(0, devices, status="unloaded")}, protocol_v1=protocol_v1)
    where = with_entry(where, where.views[0].model_copy(update={"harness": "vllm"}))
    assert _command(None, where, "own").model_dump(exclude_defaults=True) == expected


@pytest.mark.parametrize(
    ("harness", "length", "args"),
    [
        ("vllm", 5000, ["--x", "--max-model-len", "5000"]),
        ("vllm", "auto", ["--x"]),
        ("vllm", None, ["--x"]),
        ("llama.cpp", 5000, ["--x"]),
    ],
)
def test_context_length_is_a_field_or_an_argument(harness: str, length: int | str | None, args: list[str]) -> None:
    """A neuron that tells its host's RAM knows the field. For an earlier one a number is vLLM's argument."""
    old = host("n", 24000)
    assert old.discovery is not None
    resources = HostResources(ram_total_mb=1000, cores=1)
    new = replace(old, discovery=old.discovery.model_copy(update={"host": resources}))
    moment = view(fleet(old), profile(vram_mb=14000))
    model = profile(vram_mb=14000, harness=harness, args=["--x"], max_model_len=length)
    made = load_command(plan_for(moment, "m"), model, new)
    assert (made.args, made.max_model_len) == (["--x"], length)
    assert load_command(plan_for(moment, "m"), model, old).args == args
    assert ("max_model_len" in made.body()) == (length is not None)
