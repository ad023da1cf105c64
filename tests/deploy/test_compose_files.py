"""The compose files: what they mount is there, what they name fits together. tests/container runs the dev fleet."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cortex.config.catalogue import load_catalogue
from cortex.config.settings import CortexConfig
from neuron.harness.checks import CheckedConfig
from shared.settings import load_settings
from tests.environment import vllm

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def services(name: str) -> dict[str, Any]:
    found: dict[str, Any] = read(name)["services"]
    return found


@pytest.mark.parametrize("name", FILES)
def test_mounts_exist(name: str) -> None:
    """A missing path would become an empty directory. Named volumes are declared."""
    declared = read(name)["volumes"]
    for service in services(name).values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in declared, volume


@pytest.mark.parametrize("name", FILES)
def test_every_service_is_watched_and_closed_to_the_network(name: str) -> None:
    """It has a health check and comes back after a failure; ports are published on loopback only, as no key is
    needed."""
    for service in services(name).values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", FILES)
def test_images_are_pinned(name: str) -> None:
    """Our own are built here; the others have a version."""
    for service in services(name).values():
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


def test_prometheus_reads_what_the_documented_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same jobs and alerts, with the addresses of the fleet."""
    shown, dev = read("prometheus/prometheus.yml"), read("dev/prometheus.yml")
    by_name = [{job["job_name"]: job for job in file["scrape_configs"]} for file in (shown, dev)]
    assert dev["rule_files"] == shown["rule_files"]
    assert by_name[0].keys() == by_name[1].keys()
    for name, job in by_name[0].items():
        text = yaml.safe_dump(job).replace("127.0.0.1:31314", "cortex:31314")
        assert yaml.safe_load(text) == {key: v for key, v in by_name[1][name].items() if key != "authorization"}
    monkeypatch.setenv("NEURON_TOKEN", "t")
    listen = load_settings(CortexConfig, DEPLOY / "dev" / "cortex.toml", env_prefix="CORTEX_", environ={}).gateway
    assert listen.metrics_listen == "0.0.0.0:31314"
    token = by_name[1]["neurons"]["authorization"]["credentials_file"]
    assert f">{token} " in services("compose.yaml")["prometheus"]["command"][0]
    tool = shutil.which("promtool")
    if tool is not None:  # in CI, and where Debian's prometheus is installed
        checked = [tool, "check", "config", "--syntax-only", str(DEPLOY / "dev" / "prometheus.yml")]
        subprocess.run(checked, check=True, capture_output=True)


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    """The dashboards are mounted where their provisioning looks, and ask for the data source by its id."""
    mounted = dict(volume.split(":")[:2][::-1] for volume in services("compose.yaml")["grafana"]["volumes"])
    (provider,) = read("grafana/provisioning/dashboards/cortex-neuron.yaml")["providers"]
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    (source,) = read("dev/grafana-datasource.yaml")["datasources"]
    (shown,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source == {**shown, "url": "http://prometheus:9090"}


def test_gpu_services_get_what_engines_need() -> None:
    """All GPUs, shared memory, locked memory, and a place that lasts for models; not as root."""
    neuron = services("compose.gpu.yaml")["neuron"]
    (device,) = neuron["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert (neuron["ipc"], neuron["ulimits"]["memlock"]) == ("host", -1)
    assert "neuron-data:/var/lib/neuron" in neuron["volumes"]
    assert neuron["cap_drop"] == ["ALL"]
    dockerfile = (DEPLOY / "Dockerfile.gpu").read_text(encoding="utf-8")
    assert "\nUSER 10001:10001\n" in dockerfile
    assert "CORTEX_COMPILE=no uv pip install" in dockerfile  # it runs neuron only
    (base,) = re.findall(r"^ARG BASE=(.+)$", dockerfile, re.MULTILINE)
    assert neuron["build"]["args"]["BASE"] == f"${{VLLM:-{base}}}"
    assert base.endswith(f":v{vllm._VERSION}")  # the version that the tests run


def test_gpu_configuration_is_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    """cortex reaches the neuron under the service's name, and its model runs there."""
    monkeypatch.setenv("NEURON_TOKEN", "t")
    cortex = load_settings(CortexConfig, DEPLOY / "gpu" / "cortex.toml", env_prefix="CORTEX_", environ={})
    neuron = load_settings(CheckedConfig, DEPLOY / "gpu" / "neuron.toml", env_prefix="NEURON_", environ={})
    (entry,) = cortex.neurons
    assert (entry.name, entry.endpoint) == (neuron.name, f"http://neuron:{neuron.port}")
    harnesses = {model.harness for model in load_catalogue(DEPLOY / "gpu" / "models.toml").models}
    assert harnesses <= set(neuron.harness_names)
