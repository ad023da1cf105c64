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
from shared.protocol import LoadCommand
from shared.settings import load_settings

TOP = Path(__file__).parents[2]
DEPLOY = TOP / "deploy"
NEURONS = ("beast", "benjy", "quadbrat")


def uncommented(text: str) -> str:
    """The file with every setting that is only shown switched on: `# key = value` and `# [table]`."""
    return re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE)


def models_within(annotation: object) -> Iterator[type[BaseModel]]:
    """The pydantic models that a field's annotation speaks of, however deep in lists, unions and dicts."""
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
    """The keys and table names in a file, those in comments included."""
    return set(re.findall(r"\w+(?= = )|\w+(?=[\].])", path.read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def _tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("BEAST_TOKEN", "NEURON_TOKEN"):
        monkeypatch.setenv(variable, "a token")


@pytest.mark.parametrize("shown_too", [False, True], ids=["as it is", "with everything it shows"])
def test_cortex_example_is_valid(tmp_path: Path, shown_too: bool) -> None:
    """Whoever copies the example has a cortex that starts."""
    text = (DEPLOY / "cortex.example.toml").read_text(encoding="utf-8")
    path = tmp_path / "cortex.toml"
    path.write_text(uncommented(text) if shown_too else text, encoding="utf-8")
    config = load_settings(CortexConfig, path, env_prefix="CORTEX_", environ={})
    assert [entry.name for entry in config.neurons] == ["beast", "benjy"]


@pytest.mark.parametrize("shown_too", [False, True], ids=["as it is", "with everything it shows"])
def test_neuron_example_is_valid(tmp_path: Path, shown_too: bool) -> None:
    """Whoever copies the example has a neuron that starts."""
    text = (DEPLOY / "neuron.example.toml").read_text(encoding="utf-8")
    path = tmp_path / "neuron.toml"
    path.write_text(uncommented(text) if shown_too else text, encoding="utf-8")
    config = load_settings(NeuronConfig, path, env_prefix="NEURON_", environ={})
    assert config.harnesses == [HarnessEntry(name="vllm")]
    assert (config.simulate is not None) is shown_too


def test_cortex_example_explains_every_key() -> None:
    """A key nobody reads about does not exist: a new one must come with its explanation."""
    assert keys_of(CortexConfig) - mentioned(DEPLOY / "cortex.example.toml") == set()


def test_neuron_example_explains_every_key() -> None:
    """As above; of the tables that describe a simulated device only the usual keys are shown."""
    rarely = set(SimulatedDevice.model_fields) - {"name", "vram_total_mb", "compute_capability"}
    assert keys_of(NeuronConfig) - mentioned(DEPLOY / "neuron.example.toml") - rarely == set()
    assert set(LoadCommand.model_fields) <= mentioned(DEPLOY / "neuron.example.toml")


def test_example_defaults_are_the_defaults() -> None:
    """What an example says leaving a key out means is what it means."""
    shown = load_settings(CortexConfig, DEPLOY / "cortex.example.toml", env_prefix="CORTEX_", environ={})
    assert shown.model_copy(update={"neurons": []}) == CortexConfig()
    host = load_settings(NeuronConfig, DEPLOY / "neuron.example.toml", env_prefix="NEURON_", environ={})
    given = {"name", "token_env", "harnesses", "harness", "default_models"}
    assert host.model_dump(exclude=given) == NeuronConfig().model_dump(exclude=given)
    engine, default = host.harness_settings("vllm"), NeuronConfig().harness_settings("vllm")
    assert engine.model_copy(update={"command": None, "env": {}}) == default


def test_dev_fleet_is_the_example_fleet_simulated() -> None:
    """The compose fleet shows the same models as models.example.toml, differing only in how they are run."""
    example, dev = load_catalogue(TOP / "models.example.toml"), load_catalogue(DEPLOY / "dev" / "models.toml")
    assert dev.aliases == example.aliases
    expected = [profile.model_copy(update={"harness": "sim", "args": ()}) for profile in example.models]
    assert list(dev.models) == expected


def test_dev_configurations_fit_together() -> None:
    """cortex knows exactly the neurons that compose starts, by the names and ports they have."""
    cortex = load_settings(CortexConfig, DEPLOY / "dev" / "cortex.toml", env_prefix="CORTEX_", environ={})
    assert cortex.models_path(DEPLOY / "dev" / "cortex.toml") == DEPLOY / "dev" / "models.toml"
    for entry, name in zip(cortex.neurons, NEURONS, strict=True):
        neuron = load_settings(NeuronConfig, DEPLOY / "dev" / f"{name}.toml", env_prefix="NEURON_", environ={})
        assert (entry.name, entry.endpoint) == (neuron.name, f"http://{name}:{neuron.port}")
        assert entry.bearer_token == neuron.bearer_token
        assert neuron.harness_names == ["sim"]
