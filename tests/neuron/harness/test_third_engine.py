"""The seam: an engine that neuron has never heard of is one package and one line in the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron.harness.checks import CheckedConfig
from neuron.harness.registry import HARNESSES
from shared.settings import SettingsError, load_settings
from tests.neuron.harness.echo import EchoHarness
from tests.neuron.neurons import Answer, Neuron, config_of, neuron_here, until

MODEL = "org/echo"


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the engine, which takes one line."""
    monkeypatch.setitem(HARNESSES, "echo", EchoHarness())


async def load(neuron: Neuron, **fields: object) -> Answer:
    return await neuron.call("POST", "/models/load", json={"model_id": MODEL, "harness": "echo", **fields})


async def test_a_new_engine_serves(mark: str, tmp_path: Path) -> None:
    """Loaded, found healthy, reached through its endpoint, restarted after a crash, unloaded."""
    config = config_of(
        tmp_path / "state",
        harnesses=[{"name": "echo"}],
        harness={"echo": {"port_range": [28100, 28899]}},
        recovery={"backoff_secs": 0},
    )
    async with neuron_here(config) as neuron:
        assert (await load(neuron, vram_mb=100)).status == 200
        url = (await neuron.endpoint(MODEL)).body["url"]
        async with neuron.session.post(f"{url}/v1/completions", data=b"hello") as response:
            assert (response.status, await response.read()) == (200, b"hello")
        first = await neuron.model(MODEL)
        assert (first["status"], first["vram_booked_mb"]) == ("loaded", 100)
        assert first["missing_paths"] == ["/v1/messages"]
        neuron.registry.kill_all_now()

        async def restarted() -> bool:
            entry = await neuron.model(MODEL)
            return bool(entry["status"] == "loaded" and entry["pid"] != first["pid"])

        await until(restarted)
        assert (await neuron.unload(MODEL)).status == 200
        assert (await neuron.model(MODEL))["status"] == "unloaded"


async def test_what_a_new_engine_lacks_is_refused(mark: str, tmp_path: Path) -> None:
    """No sleep, no memory estimate; without `vram_mb` it gets a whole device."""
    async with neuron_here(config_of(tmp_path / "state", harnesses=[{"name": "echo"}])) as neuron:
        assert (await load(neuron)).status == 200
        entry = await neuron.model(MODEL)
        assert entry["vram_booked_mb"] == 32_607
        refused = await neuron.call("POST", "/models/sleep", json={"model_id": MODEL})
        assert (refused.status, refused.error["code"]) == (409, "sleep_unsupported")
        estimate = await neuron.call("GET", f"/estimate?model={MODEL}")
        assert (estimate.status, estimate.error["param"]) == (400, "model")


def test_harness_names_are_checked(tmp_path: Path) -> None:
    """An unknown one is reported with file and key, wherever it stands; one that was registered is accepted."""
    path = tmp_path / "neuron.toml"
    path.write_text('[[harnesses]]\nname = "sglang"\n[harness.llama]\nextra_args = []\n')
    with pytest.raises(SettingsError) as refused:
        load_settings(CheckedConfig, path, env_prefix="NEURON_TEST_")
    hint = "for another engine set kind or preset in"
    (problem,) = refused.value.problems
    assert problem == f"{path}: harness: unknown harness 'llama' (known: vllm, sim, echo; {hint} [harness.llama])"
    path.write_text('[[harnesses]]\nname = "sglang"\n')
    with pytest.raises(SettingsError) as refused:
        load_settings(CheckedConfig, path, env_prefix="NEURON_TEST_")
    (problem,) = refused.value.problems
    assert problem.startswith(f"{path}: harnesses")
    assert problem.endswith(f"unknown harness 'sglang' (known: vllm, sim, echo; {hint} [harness.sglang])")
    path.write_text('[[harnesses]]\nname = "echo"\n')
    assert load_settings(CheckedConfig, path, env_prefix="NEURON_TEST_").harness_names == ["echo"]
