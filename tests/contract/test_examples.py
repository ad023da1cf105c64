"""The programs accept the examples in documents and the example files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from cortex.config.catalogue import Catalogue, load_catalogue
from cortex.config.settings import CortexConfig
from cortex.simulator.fleet_file import FleetFile
from cortex.simulator.workload import Workload
from neuron.config import NeuronConfig
from neuron.gpu.simulated import resolve_devices
from shared.settings import load_settings
from tests.contract.documents import TOP, Example, examples

LOADERS: dict[str, tuple[type[BaseModel], str]] = {
    "cortex.toml": (CortexConfig, "CORTEX_"),
    "neuron.toml": (NeuronConfig, "NEURON_"),
    "models.toml": (Catalogue, "MODELS_"),
}
SIMULATION: dict[str, tuple[type[BaseModel], str]] = {
    "fleet.toml": (FleetFile, "FLEET_"),
    "workload.toml": (Workload, "WORKLOAD_"),
}


@pytest.fixture(autouse=True)
def _tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("BEAST_TOKEN", "NEURON_TOKEN"):
        monkeypatch.setenv(variable, "a token")


@pytest.mark.parametrize("example", examples(), ids=str)
def test_documents_show_valid_files(example: Example, tmp_path: Path) -> None:
    """Every toml block names its file and is valid as that file."""
    model, prefix = (LOADERS | SIMULATION)[example.file]
    path = tmp_path / example.file
    path.write_text(example.text, encoding="utf-8")
    config = load_settings(model, path, env_prefix=prefix, environ={})
    if isinstance(config, NeuronConfig) and config.simulate is not None:
        assert resolve_devices(config.simulate, host="host")


def test_documents_show_every_file() -> None:
    """The README has the two services' files, docs/configuration.md all three."""
    shown = {(example.document, example.file) for example in examples()}
    assert {("README.md", "cortex.toml"), ("README.md", "neuron.toml")} <= shown
    assert {("configuration.md", file) for file in LOADERS} <= shown


@pytest.mark.parametrize("path", sorted((TOP / "deploy").rglob("*.toml")), ids=lambda path: str(path.relative_to(TOP)))
def test_deployed_files_are_valid(path: Path) -> None:
    """The services accept every file in deploy/. A package's catalogue is empty: only the operator knows the models."""
    text = path.read_text(encoding="utf-8")
    if path.name == "models.toml":
        assert bool(load_catalogue(path).models) == ("debian" not in path.parts)
    elif re.search(r"^\[\[neurons\]\]", text, re.MULTILINE):
        assert load_settings(CortexConfig, path, env_prefix="CORTEX_", environ={}).neurons
    else:
        assert load_settings(NeuronConfig, path, env_prefix="NEURON_", environ={}).harnesses


def test_example_catalogue_fits_the_example_fleet() -> None:
    """Three models: a 27B on two GPUs of beast, an 8B on any GPU of 16 GB, a 0.6B anywhere."""
    catalogue = load_catalogue(TOP / "models.example.toml")
    assert [profile.id for profile in catalogue.models] == ["Qwen/Qwen3.6-27B", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"]
    large, middle, small = catalogue.models
    assert (large.min_devices, large.min_device_vram_mb, large.pinned_on) == (2, 24000, ("beast",))
    assert (large.quant, large.vram_mb, large.residency_priority, large.tensor_parallel) == ("fp8", 54000, 300, 2)
    assert large.limit is not None
    assert (large.limit.context, large.limit.output) == (32768, 4096)
    assert (middle.min_devices, middle.min_device_vram_mb, middle.pinned_on) == (1, 16000, ())
    assert (small.min_devices, small.min_device_vram_mb, small.pinned_on) == (1, None, ())
    assert {profile.harness for profile in catalogue.models} == {"vllm"}
    assert catalogue.resolve("large") == large.id


def test_example_catalogue_explains_every_field() -> None:
    """Each key of a model is shown, with a comment that has its default."""
    from cortex.config.profile import ModelProfile

    text = (TOP / "models.example.toml").read_text(encoding="utf-8")
    for key in set(ModelProfile.model_fields) - {"id", "limit"}:
        comment = re.search(rf"((?:^# .*\n)+)(?:# )?{key} = ", text, re.MULTILINE)
        assert comment is not None, key
        assert "Default:" in comment[1] or "Default:" in text.partition(comment[0])[2][:300], key
    assert "Default:" in text.partition("[models.limit]")[0].rpartition("\n\n")[2]
