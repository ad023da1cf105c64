"""The example and dev configuration files are valid, complete, and agree with each other."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from cortex.config.catalogue import load_catalogue
from cortex.config.settings import CortexConfig
from neuron.config import HarnessEntry, NeuronConfig, SimulatedDevice
from neuron.harness.checks import CheckedConfig
from shared.protocol import LoadCommand
from shared.settings import load_settings

TOP = Path(__file__).parents[2]
DEPLOY = TOP / "deploy"
NEURONS = ("beast", "benjy", "quadbrat")


def uncommented(text: str) -> str:
    """The file with its commented settings enabled: `# key = value` and `# [table]`."""
    return re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE)


def models_within(annotation: object) -> Iterator[type[BaseModel]]:
    """The pydantic models in an annotation, also nested in lists, unions and dicts."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            yield from models_within(argument)


def keys_of(model: type[BaseModel]) -> set[str]:
    """Every key of a configuration class and of the classes inside it."""
    keys = set(model.model_fields)
    for field in model.model_fields.values():
        for inner in models_within(field.annotation):
            keys |= keys_of(inner)
    return keys


def mentioned(path: Path) -> set[str]:
    """The keys and table names in a file, including comments."""
    return set(re.findall(r"\w+(?= = )|\w+(?=[\].])", path.read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def _tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("BEAST_TOKEN", "NEURON_TOKEN"):
        monkeypatch.setenv(variable, "a token")


@pytest.mark.parametrize("with_comments", [False, True], ids=["as it is", "with commented settings"])
def test_cortex_example_is_valid(tmp_path: Path, with_comments: bool) -> None:
    """cortex starts with a copy of the example."""
    text = (DEPLOY / "cortex.example.toml").read_text(encoding="utf-8")
    path = tmp_path / "cortex.toml"
    path.write_text(uncommented(text) if with_comments else text, encoding="utf-8")
    config = load_settings(CortexConfig, path, env_prefix="CORTEX_", environ={})
    assert [entry.name for entry in config.neurons] == ["beast", "benjy"]


@pytest.mark.parametrize("with_comments", [False, True], ids=["as it is", "with commented settings"])
def test_neuron_example_is_valid(tmp_path: Path, with_comments: bool) -> None:
    """neuron starts with a copy of the example."""
    text = (DEPLOY / "neuron.example.toml").read_text(encoding="utf-8")
    path = tmp_path / "neuron.toml"
    path.write_text(uncommented(text) if with_comments else text, encoding="utf-8")
    config = load_settings(CheckedConfig, path, env_prefix="NEURON_", environ={})
    assert config.harnesses == [HarnessEntry(name="vllm")]
    assert (config.simulate is not None) is with_comments


def test_cortex_example_explains_every_key() -> None:
    """A new key must be explained in the example."""
    assert keys_of(CortexConfig) - mentioned(DEPLOY / "cortex.example.toml") == set()


def test_neuron_example_explains_every_key() -> None:
    """For simulated devices the example shows only the common keys."""
    rarely = set(SimulatedDevice.model_fields) - {"name", "vram_total_mb", "compute_capability"}
    assert keys_of(NeuronConfig) - mentioned(DEPLOY / "neuron.example.toml") - rarely == set()
    assert set(LoadCommand.model_fields) <= mentioned(DEPLOY / "neuron.example.toml")


def test_example_defaults_are_the_defaults() -> None:
    """The values shown are the defaults."""
    shown = load_settings(CortexConfig, DEPLOY / "cortex.example.toml", env_prefix="CORTEX_", environ={})
    assert shown.model_copy(update={"neurons": []}) == CortexConfig()
    host = load_settings(NeuronConfig, DEPLOY / "neuron.example.toml", env_prefix="NEURON_", environ={})
    given = {"name", "token_env", "harnesses", "harness", "default_models"}
    assert host.model_dump(exclude=given) == NeuronConfig().model_dump(exclude=given)
    engine, default = host.harness_settings("vllm"), NeuronConfig().harness_settings("vllm")
    assert engine.model_copy(update={"command": None, "env": {}}) == default


def test_dev_fleet_is_the_example_fleet_simulated() -> None:
    """The compose fleet shows the models of models.example.toml, with the simulated harness."""
    example, dev = load_catalogue(TOP / "models.example.toml"), load_catalogue(DEPLOY / "dev" / "models.toml")
    assert dev.aliases == example.aliases
    expected = [profile.model_copy(update={"harness": "sim"}) for profile in example.models]
    assert list(dev.models) == expected


def test_dev_configurations_are_consistent() -> None:
    """cortex.toml lists exactly the neurons that compose starts, with their names and ports."""
    cortex = load_settings(CortexConfig, DEPLOY / "dev" / "cortex.toml", env_prefix="CORTEX_", environ={})
    assert cortex.models_path(DEPLOY / "dev" / "cortex.toml") == DEPLOY / "dev" / "models.toml"
    for entry, name in zip(cortex.neurons, NEURONS, strict=True):
        neuron = load_settings(NeuronConfig, DEPLOY / "dev" / f"{name}.toml", env_prefix="NEURON_", environ={})
        assert (entry.name, entry.endpoint) == (neuron.name, f"http://{name}:{neuron.port}")
        assert entry.bearer_token == neuron.bearer_token
        assert neuron.harness_names == ["sim"]
