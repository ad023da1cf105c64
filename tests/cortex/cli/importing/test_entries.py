"""Entries as people write them: numbers in quotes, variables, containers, secrets, names with line breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cortex.cli.importing.import_command import about, imported


def litellm(tmp_path: Path, *entries: dict[str, Any]) -> tuple[Any, dict[str, Any], list[tuple[str | None, str]]]:
    """What becomes of these entries of `model_list`. JSON is YAML."""
    return imported(tmp_path, "litellm", json.dumps({"model_list": entries}))


def deployment(name: str = "small", **parameters: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": "hosted_vllm/org/m", **parameters}}


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    """PyYAML takes 1e-06, the usual way to write a price, for a string."""
    text = """
        model_list:
          - model_name: small
            litellm_params: {model: hosted_vllm/org/m, rpm: "60", tpm: lots, max_parallel_requests: 0}
            model_info: {input_cost_per_token: 1e-06, output_cost_per_token: 2e-6, max_input_tokens: "4096"}
    """
    _, models, notes = imported(tmp_path, "litellm", text)
    assert models["org/m"]["limit"] == {"rpm": 60, "context": 4096}
    assert models["org/m"]["prices"] == {"input": 1, "output": 2}
    assert "tpm = 'lots': left out; it must be a number of at least 1" in about(notes, "org/m")
    assert "max_parallel_requests = 0: left out" in about(notes, "org/m")


def test_an_address_in_a_variable(tmp_path: Path) -> None:
    """It may be that of an own engine; a note names the variable."""
    _, models, notes = litellm(tmp_path, deployment(model="openai/org/m", api_base="os.environ/VLLM_BASE"))
    assert set(models) == {"org/m"}
    assert "its address is in the variable VLLM_BASE: delete this model if that is a service" in about(notes, "org/m")


def test_a_provider_in_a_key_of_its_own(tmp_path: Path) -> None:
    """Then `model` need not begin with it."""
    _, models, _ = litellm(
        tmp_path,
        deployment("one", model="Qwen/Qwen3-8B", custom_llm_provider="hosted_vllm"),
        deployment("two", model="infinity/BAAI/bge-m3", custom_llm_provider="infinity"),
    )
    assert {key: table["harness"] for key, table in models.items()} == {
        "Qwen/Qwen3-8B": "vllm",
        "BAAI/bge-m3": "infinity",
    }


def test_a_bad_address_costs_only_its_entry(tmp_path: Path) -> None:
    _, models, notes = litellm(tmp_path, deployment("bad", api_base="http://[::1"), deployment("good"))
    assert set(models) == {"org/m"}
    assert about(notes, "bad") == "left out: its api_base is not an address"
    text = "models: {a: {cmd: llama-server -m /a.gguf, proxy: 'http://[::1'}, b: {cmd: llama-server -m /b.gguf}}"
    (tmp_path / "models.toml").unlink()
    _, models, _ = imported(tmp_path, "llama-swap", text)
    assert set(models) == {"a", "b"}


@pytest.mark.parametrize(
    ("first", "second", "kept", "noted"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}, {"temperature": 0.5}, False),
        ({"temperature": 0.5}, {"temperature": 0.9}, {"temperature": 0.5}, True),
        ({}, {"temperature": 0.9}, {}, True),
        ({"temperature": 0.5}, {}, {"temperature": 0.5}, True),
    ],
)
def test_several_deployments_of_one_model(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], kept: dict[str, Any], noted: bool
) -> None:
    """They share an alias, with the changes of the first. A note says when another had others."""
    catalogue, models, notes = litellm(tmp_path, deployment(**first), deployment(**second))
    assert models["org/m"]["replicas"] == {"max": 2}
    assert catalogue.targets == {"small": "org/m"}
    alias = catalogue.alias_of("small")
    assert (alias.default if alias is not None else {}) == kept
    assert about(notes, "small") == (
        "its entries change requests differently: only the changes of the first are kept" if noted else ""
    )


def test_one_name_for_several_models(tmp_path: Path) -> None:
    """LiteLLM shares its requests among them. The note says which one it is now, and how to reach the other."""
    catalogue, models, notes = litellm(tmp_path, deployment(), deployment(model="hosted_vllm/org/n"))
    assert (set(models), catalogue.targets) == ({"org/m", "org/n"}, {"small": "org/m"})
    assert about(notes, "small") == (
        "LiteLLM sends some of its requests to 'org/n': left out, as a name stands for one model in cortex; 'small' "
        "stays 'org/m', and clients can request 'org/n' by its id"
    )


def test_an_alias_that_is_the_id_of_a_later_model(tmp_path: Path) -> None:
    """models.toml allows no such alias."""
    catalogue, models, notes = litellm(tmp_path, deployment("org/n"), deployment(model="hosted_vllm/org/n"))
    assert (set(models), catalogue.targets) == ({"org/m", "org/n"}, {"small": "org/n"})
    assert about(notes, "org/n") == "the alias for 'org/m' is left out: the name is taken"


@pytest.mark.parametrize("entry", ["a\nid = 1\n[[models]]\nid = 'mine'", "a\0\x1b[2Jb"])
def test_a_name_cannot_write_into_the_file(tmp_path: Path, entry: str) -> None:
    """A line break would end the comment, and a control character makes the file invalid."""
    models = {entry: {"cmd": "llama-server -m /a.gguf"}, "good": {"cmd": "llama-server -m /b.gguf"}}
    _, read, notes = imported(tmp_path, "llama-swap", json.dumps({"models": models}))
    assert set(read) == {"good"}
    assert "left out" in about(notes, entry)


@pytest.mark.parametrize(
    ("command", "harness", "source"),
    [
        ("docker run --mount type=bind,src=/opt/vllm,dst=/m -it vllm/vllm-openai:v1 org/m", "vllm", "org/m"),
        ("docker run --env-file /etc/vllm.env -w /vllm vllm/vllm-openai --model org/m", "vllm", "org/m"),
        ("docker run --rm -dv /srv/vllm:/m -p8000:8000 vllm/vllm-openai --model=org/m", "vllm", "org/m"),
        ("docker run --entrypoint vllm -l vllm=1 vllm/vllm-openai serve org/m", "vllm", "org/m"),
        ("docker run --entrypoint=python3 sglang -m sglang.launch_server --model-path org/m", "sglang", "org/m"),
        ("podman run --replace --name vllm my/engines vllm serve org/m", "vllm", "org/m"),
        ("docker container run --gpus all ghcr.io/ggml-org/llama.cpp:server -m /a.gguf", "llama", "/a.gguf"),
    ],
)
def test_the_image_of_a_container(tmp_path: Path, command: str, harness: str, source: str) -> None:
    """Values of options may contain the name of an engine too."""
    _, models, notes = imported(tmp_path, "llama-swap", json.dumps({"models": {"m": {"cmd": command}}}))
    assert (models["m"]["harness"], models["m"]["source"]) == (harness, source)
    assert "args" not in models["m"]
    assert "container" in about(notes, "m")


@pytest.mark.parametrize(
    "arguments",
    [
        "llama-server -m /a.gguf -hft hf_secret",
        "vllm serve org/m --hf-token=hf_secret",
        "vllm serve org/m --hf_token hf_secret",
        "python -m sglang.launch_server --model-path org/m --ssl-keyfile-password hf_secret --admin-api-key hf_secret",
    ],
)
def test_secrets_are_neither_carried_over_nor_shown(tmp_path: Path, arguments: str) -> None:
    _, models, notes = imported(tmp_path, "llama-swap", json.dumps({"models": {"m": {"cmd": arguments}}}))
    assert "args" not in models["m"]
    assert "left out" in about(notes, "m")
    assert "hf_secret" not in json.dumps(notes) + (tmp_path / "models.toml").read_text(encoding="utf-8")


def test_a_flag_whose_value_is_optional(tmp_path: Path) -> None:
    """vLLM's --hf-token alone means the stored token; the next flag is not its value."""
    command = "vllm serve org/m --hf-token --max-model-len 4096"
    _, models, _ = imported(tmp_path, "llama-swap", json.dumps({"models": {"m": {"cmd": command}}}))
    assert models["m"]["max_model_len"] == 4096
