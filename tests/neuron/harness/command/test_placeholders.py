"""The command line and environment of a described engine, as the table says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neuron.config import HarnessSettings
from neuron.harness.base import EngineCommand, LaunchFacts, LaunchPlan
from neuron.harness.command.harness import CommandHarness
from neuron.harness.command.placeholders import PLACEHOLDERS, filled, matching_flag, unknown_placeholder, values_of
from neuron.spec import EngineSpec
from shared.protocol import Device

GPUS = (
    Device(index=1, name="A", vram_total_mb=24000, uuid="GPU-one"),
    Device(index=3, name="B", vram_total_mb=48000, uuid="GPU-three"),
)


def planned(settings: HarnessSettings, spec: EngineSpec | None = None, **changes: object) -> LaunchPlan:
    plan = LaunchPlan(
        spec=spec or EngineSpec("org/m", "x", "/models/m.gguf", tensor_parallel=2, args=("--own", "{port}")),
        settings=settings,
        devices=GPUS,
        host="127.0.0.1",
        port=20001,
        tmp_dir=Path("/tmp/e1"),
        api_key="secret",
        engine_id="0-x/1",
        share_mb=12000,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


FACTS = LaunchFacts(
    has_gpu=True, cpus=(0, 1, 2), environ={"PATH": "/bin", "X_KEY": "neuron's own"}, vram_dir=Path("/v")
)


def made(plan: LaunchPlan, facts: LaunchFacts = FACTS) -> EngineCommand:
    return CommandHarness(plan.settings).command(plan, facts)


def table(**keys: object) -> HarnessSettings:
    return HarnessSettings.model_validate({"kind": "command", "command": ["serve"], **keys})


def test_every_placeholder_has_its_value() -> None:
    """All of them, for an engine with two GPUs, a share and a key. The share is of the smallest GPU."""
    spec = EngineSpec("org/m", "x", "/models/m.gguf", quant="q4", tensor_parallel=2, served_names=("alias",))
    values = values_of(planned(table(), spec), FACTS, by="uuid")
    assert set(values) == set(PLACEHOLDERS)
    assert {name: value for name, value in values.items() if name != "context"} == {
        "model": "/models/m.gguf",
        "model_path": "/models/m.gguf",
        "model_repo": None,
        "id": "org/m",
        "names": "org/m,alias",
        "quant": "q4",
        "host": "127.0.0.1",
        "port": "20001",
        "key": "secret",
        "devices": "GPU-one,GPU-three",
        "device_count": "2",
        "tensor_parallel": "2",
        "pipeline_parallel": "1",
        "data_parallel": "1",
        "memory_share": "0.5000",
        "memory_mb": "12000",
        "cpu_count": "3",
        "tmp_dir": "/tmp/e1",
    }
    by_index = values_of(planned(table(), replace(spec, source="org/repo")), FACTS, by="index")
    assert (by_index["devices"], by_index["model_path"], by_index["model_repo"]) == ("1,3", None, "org/repo")


@pytest.mark.parametrize(
    ("parts", "argv"),
    [
        (["--key", "{key}", "-v"], ["-v"]),
        (["-v", "--key={key}"], ["-v"]),
        (["run", "{key}"], ["run"]),
        (["--a", "--key={key}"], ["--a"]),
        (["--port", "{port}", "--address={host}:{port}"], ["--port", "1", "--address=h:1"]),
        (['{"json": {"a": 1}}', "{key}"], ['{"json": {"a": 1}}']),
    ],
)
def test_a_part_without_its_value_is_left_out(parts: list[str], argv: list[str]) -> None:
    """With its flag, if that is a part of its own; nothing else is."""
    assert filled(parts, {"key": None, "port": "1", "host": "h"}) == argv


def test_unknown_placeholders_are_named() -> None:
    reason = unknown_placeholder("--model={modle}")
    assert str(reason).startswith("unknown placeholder {modle}, did you mean {model}? (known: {model}")
    assert unknown_placeholder('{"json": [1], "x": {}}') is None


@pytest.mark.parametrize(("written", "meant"), [("{PORT}", "port"), ("{ id }", "id"), ("{model-path}", "model_path")])
def test_misspelt_placeholders_are_named(written: str, meant: str) -> None:
    """They would reach the engine as they are. A shell's `${PORT}` is its own."""
    assert unknown_placeholder(f"--x={written}") == f"unknown placeholder {written}, did you mean {{{meant}}}?"
    assert unknown_placeholder("echo ${PORT}") is None


def test_arguments_of_model_and_operator_follow() -> None:
    """First the model's, word for word, then the operator's `extra_args`, which may have placeholders."""
    settings = table(command=["serve", "{model}"], arguments=["--port", "{port}"], extra_args=["--n={device_count}"])
    assert made(planned(settings)).argv == (
        *("serve", "/models/m.gguf", "--port", "20001"),
        *("--own", "{port}", "--n=2"),
    )


def test_environment_has_devices_and_key() -> None:
    """A variable whose value is not known is absent, even if neuron's own environment has it: it may be another key."""
    settings = table(env={"X_KEY": "{key}", "Y": "{port}"})
    env = made(planned(settings)).env
    assert (env["X_KEY"], env["Y"], env["CUDA_VISIBLE_DEVICES"]) == ("secret", "20001", "GPU-one,GPU-three")
    assert "X_KEY" not in made(planned(settings, api_key=None)).env


@pytest.mark.parametrize(
    ("keys", "variable", "value"),
    [
        ({"device_ids": "index"}, "CUDA_VISIBLE_DEVICES", "1,3"),
        ({"devices": "HIP_VISIBLE_DEVICES", "device_ids": "index"}, "HIP_VISIBLE_DEVICES", "1,3"),
        ({"devices": "none"}, "CUDA_VISIBLE_DEVICES", None),
    ],
)
def test_devices_are_told_as_the_table_says(keys: dict[str, str], variable: str, value: str | None) -> None:
    assert made(planned(table(**keys))).env.get(variable) == value


def test_an_engine_without_gpus_sees_none() -> None:
    """On a host with GPUs the variable hides them; on one without there is nothing to hide."""
    without = planned(table(), devices=())
    assert made(without).env["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in made(without, replace(FACTS, has_gpu=False)).env


@pytest.mark.parametrize(
    ("arg", "flag"),
    [
        ("--port", "--port"),
        ("--port=1", "--port"),
        ("--por", "--port"),
        ("--api_key", "--api-key"),
        ("--ssl-cert-file", "--ssl-*"),
        ("-m", "-m"),
        ("-md", None),
        ("--ports", None),
        ("--", None),
        ("port", None),
    ],
)
def test_reserved_arguments_match_as_parsers_read(arg: str, flag: str | None) -> None:
    found = matching_flag(["--x", arg], ["--port", "--api-key", "--ssl-*", "-m"])
    assert (found and found[1]) == flag


def test_what_the_command_line_cannot_express_is_refused() -> None:
    """Splits and names for which it has no placeholder."""
    harness = CommandHarness(table(arguments=["--port", "{port}", "--pp={pipeline_parallel}"]))
    spec = EngineSpec("m", "x", "m", pipeline_parallel=2)
    assert harness.refused_spec(spec) is None
    refused = harness.refused_spec(replace(spec, data_parallel=2))
    assert refused == ("parallel", "data_parallel is 2, but the command line has no {data_parallel}")
    assert harness.refused_spec(replace(spec, served_names=("a",))) == (
        "served_names",
        "its command line has no {names}",
    )
