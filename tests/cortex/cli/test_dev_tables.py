"""The services accept the configurations that `cortex dev` generates."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cortex.cli.commands import DEFAULT_FLEET
from cortex.cli.dev.command import example_catalogue
from cortex.cli.dev.fleet import DevEngine, cortex_table, models_table, neuron_table, parse_fleet
from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from neuron.config import NeuronConfig, SimulateSettings
from neuron.gpu.simulated import resolve_devices

VLLM = DevEngine("vllm", ("/opt/vllm/bin/vllm",), "/srv/tiny")


@pytest.mark.parametrize("engine", [DevEngine(), VLLM])
def test_tables_are_valid(engine: DevEngine) -> None:
    """The services accept the tables; engines of different hosts never share a port range."""
    hosts = parse_fleet(DEFAULT_FLEET)
    ranges = []
    for number, host in enumerate(hosts):
        config = NeuronConfig.model_validate(neuron_table(host, number, engine))
        assert config.harness_names == [engine.harness]
        ranges.append(config.harness_settings(config.harness_names[0]).port_range)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(ranges))
    neurons = [(host.name, 1000 + number) for number, host in enumerate(hosts)]
    table = cortex_table(
        neurons, models_config="models.toml", metrics_listen="127.0.0.1:0", state_dir=Path("/var/state")
    )
    cortex = CortexConfig.model_validate(table)
    assert next(entry.endpoint for entry in cortex.neurons) == "http://127.0.0.1:1000"
    assert cortex.state_dir == Path("/var/state")


@pytest.mark.parametrize(("fleet", "pins"), [(DEFAULT_FLEET, ("beast",)), ("other=2xRTX5090", ())])
def test_example_catalogue_for_a_fleet(fleet: str, pins: tuple[str, ...]) -> None:
    """The engine gets the same models, without the other engine's arguments or pins on missing hosts."""
    found = Catalogue.model_validate(models_table(example_catalogue(), parse_fleet(fleet), VLLM))
    assert [profile.id for profile in found.models] == [profile.id for profile in example_catalogue().models]
    assert found.aliases == example_catalogue().aliases
    for profile in found.models:
        assert (profile.harness, profile.source, profile.args, profile.quant) == ("vllm", "/srv/tiny", (), None)
    assert found.models[0].pinned_on == pins
    assert found.models[0].residency_priority == 300


def test_simulated_engines_get_the_arguments_of_the_catalogue() -> None:
    """Their context is the one that the catalogue promises."""
    found = Catalogue.model_validate(models_table(example_catalogue(), parse_fleet(DEFAULT_FLEET), DevEngine()))
    for profile, example in zip(found.models, example_catalogue().models, strict=True):
        assert profile.args == example.args
        assert example.limit is not None
        assert profile.max_model_len == example.limit.context


def test_a_host_of_mig_instances() -> None:
    """All of one GPU; neuron accepts the table."""
    (host,) = parse_fleet("a=7xA100-1g.10gb")
    settings = SimulateSettings.model_validate(neuron_table(host, 0, DevEngine())["simulate"])
    found = resolve_devices(settings, host="a")
    assert [device.index for device in found] == [0, *range(101, 108)]
    assert {device.profile for device in found[1:]} == {"1g.10gb"}
    with pytest.raises(ValueError, match="at most 7 MIG instances"):
        parse_fleet("a=8xA100-1g.10gb")


def test_fleets_are_parsed() -> None:
    """A count of one may be left out; names of GPUs may have spaces."""
    hosts = parse_fleet("a=2xRTX5090, b=RTX 4090,")
    assert [(host.name, host.devices) for host in hosts] == [("a", ("RTX5090",) * 2), ("b", ("RTX 4090",))]


def test_a_host_without_gpus() -> None:
    """It has RAM, and the catalogue a model for it."""
    hosts = parse_fleet("box=cpu,beast=2xRTX5090")
    box = SimulateSettings.model_validate(neuron_table(hosts[0], 0, DevEngine())["simulate"])
    assert (box.devices, box.ram_mb) == ([], 64_000)
    assert neuron_table(hosts[1], 1, DevEngine())["simulate"] == {"devices": ["RTX5090", "RTX5090"]}
    found = Catalogue.model_validate(models_table(example_catalogue(), hosts, DevEngine()))
    assert [profile.id for profile in found.models if profile.on_cpu] == ["BAAI/bge-m3"]
