"""The chart, rendered by Helm: valid for Kubernetes, its parts fit together, wrong values are refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cortex.config.catalogue import load_catalogue
from cortex.config.settings import CortexConfig
from neuron.harness.checks import CheckedConfig
from shared.settings import load_settings
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.helm import helm_environment

TOP = Path(__file__).parents[3]
CHART = TOP / "deploy" / "helm"
Object = Mapping[str, Any]

USUAL: dict[str, Any] = {
    "secret": {"neuronToken": "t", "databaseUrl": "postgresql://u:p@db/cortex", "apiKeys": "ops:sk-0123456789"},
    "cortex": {"image": {"repository": "images/cortex"}},
    "neuron": {"image": {"repository": "images/neuron", "tag": "7"}},
}
PEER = {"namespaceSelector": {"matchLabels": {"team": "ops"}}}
EVERYTHING: dict[str, Any] = {
    "secret": {"existing": "fleet-secrets"},
    "imagePullSecrets": ["pull"],
    "clusterDomain": "example.internal",
    "discovery": {"kind": "kubernetes"},
    "cortex": {
        "image": {"repository": "images/cortex"},
        "replicas": 3,
        "workers": 2,
        "allowedHosts": ["ai.example.com"],
        "extraConfig": '[usage]\ncurrency = "USD"\n',
        "env": [{"name": "CORTEX_GATEWAY__MAX_BODY_MIB", "value": "64"}],
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"pool": "front"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "service": {"type": "LoadBalancer", "port": 8080, "annotations": {"a": "b"}},
    },
    "neuron": {
        "image": {"repository": "images/neuron"},
        "runtimeClassName": "",
        "resources": {"limits": {"nvidia.com/gpu": 8}},
        "extraConfig": '[[harnesses]]\nname = "vllm"\n\n[harness.vllm]\nport_range = [20000, 20099]\n',
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "podAnnotations": {"a": "b"},
    },
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"clients": [PEER], "monitoring": [PEER]},
}
WRONG: dict[str, dict[str, Any]] = {
    "replicaCount": {**USUAL, "replicaCount": 2},
    "replicas": {**USUAL, "cortex": {**USUAL["cortex"], "replicas": "two"}},
    "neuronToken": {**USUAL, "secret": {"databaseUrl": "postgresql://db/x", "apiKeys": "a:b"}},
    "databaseUrl": {**USUAL, "secret": {**USUAL["secret"], "databaseUrl": "sqlite:///x"}},
    "apiKeys": {**USUAL, "secret": {**USUAL["secret"], "apiKeys": ""}},
    "/discovery/kind": {**USUAL, "discovery": {"kind": "register"}},
    "neuron.image.repository": {**USUAL, "neuron": {}},
}


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """What Helm makes of USUAL, EVERYTHING and WRONG, in this order."""
    try:
        python = helm_environment()
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must render the chart: {error}")
        pytest.skip(str(error))
    values = json.dumps([USUAL, EVERYTHING, *WRONG.values()])
    script = Path(__file__).with_name("render.py")
    done = subprocess.run([python, script, CHART], input=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made: list[Any] = json.loads(done.stdout)
    return made


def found(objects: list[Object], kind: str, name: str) -> Any:
    (one,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return one


pytestmark = pytest.mark.timeout(1500)  # the environment may have to be built: 120 + 900 s at most


@pytest.mark.parametrize("number", [0, 1])
def test_kubernetes_accepts_what_is_rendered(results: list[Any], number: int) -> None:
    """By the strict schemas of the oldest and the newest version; Helm's lint has no complaint."""
    assert results[number].get("error") is None
    assert results[number]["problems"] == []
    kinds = {each["kind"] for each in results[number]["objects"]}
    assert {"DaemonSet", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"} <= kinds
    assert ({"PodMonitor", "ScrapeConfig"} <= kinds) == (number == 1)
    assert ("Secret" in kinds) == (number == 0)


@pytest.mark.parametrize(("number", "wrong"), list(enumerate(WRONG, 2)))
def test_wrong_values_are_refused(results: list[Any], number: int, wrong: str) -> None:
    """An unknown key, a wrong type, or something that is missing: the message names it."""
    assert wrong in results[number].get("error", "")


@pytest.mark.parametrize("number", [0, 1])
def test_services_accept_their_files(
    results: list[Any], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cortex looks the neurons up at the name of the headless Service, or selects the DaemonSet's pods."""
    monkeypatch.setenv("NEURON_TOKEN", "t")
    objects, domain = results[number]["objects"], ("cluster.local", "example.internal")[number]
    for component in ("cortex", "neuron"):
        for name, text in found(objects, "ConfigMap", f"prod-cortex-neuron-{component}")["data"].items():
            (tmp_path / name).write_text(text, encoding="utf-8")
    cortex = load_settings(CortexConfig, tmp_path / "cortex.toml", env_prefix="CORTEX_", environ={})
    neuron = load_settings(CheckedConfig, tmp_path / "neuron.toml", env_prefix="NEURON_", environ={})
    assert load_catalogue(cortex.models_path(tmp_path / "cortex.toml")).models
    service = found(objects, "Service", "prod-cortex-neuron-neurons")
    assert service["spec"]["clusterIP"] == "None"
    if number == 0:
        assert cortex.discovery.host == f"{service['metadata']['name']}.gpu.svc.{domain}"
    else:
        wanted = dict(each.split("=") for each in (cortex.discovery.selector or "").split(","))
        assert wanted == found(objects, "DaemonSet", "prod-cortex-neuron-neuron")["spec"]["selector"]["matchLabels"]
    ports = {port["containerPort"] for port in container(objects, "DaemonSet", "neuron")["ports"]}
    assert ports == {service["spec"]["ports"][0]["port"]} == {cortex.discovery.port} == {neuron.port}
    assert (cortex.gateway.workers, cortex.gateway.allowed_hosts) == ((1, []), (2, ["ai.example.com"]))[number]


def container(objects: list[Object], kind: str, component: str) -> Any:
    (one,) = found(objects, kind, f"prod-cortex-neuron-{component}")["spec"]["template"]["spec"]["containers"]
    return one


@pytest.mark.parametrize("number", [0, 1])
def test_selectors_find_their_pods(results: list[Any], number: int) -> None:
    """Each selector matches the pods of the workload that it is for, and no others."""
    objects = results[number]["objects"]
    labels = {
        component: found(objects, kind, f"prod-cortex-neuron-{component}")["spec"]["template"]["metadata"]["labels"]
        for kind, component in (("Deployment", "cortex"), ("DaemonSet", "neuron"))
    }
    selected = {}
    for each in objects:
        spec = each.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector:
            wanted = selector.get("matchLabels", selector).items()
            selected[each["kind"], each["metadata"]["name"]] = [c for c in labels if wanted <= labels[c].items()]
    assert all(len(pods) == 1 for pods in selected.values()), selected
    assert selected["Service", "prod-cortex-neuron"] == ["cortex"]
    assert selected["Service", "prod-cortex-neuron-neurons"] == ["neuron"]
    assert selected["NetworkPolicy", "prod-cortex-neuron-neuron"] == ["neuron"]
    assert selected["PodDisruptionBudget", "prod-cortex-neuron-cortex"] == ["cortex"]


@pytest.mark.parametrize("number", [0, 1])
def test_containers_run_with_few_rights(results: list[Any], number: int) -> None:
    """Not as root, without capabilities, and with a file system that they cannot change. Every variable of a Secret
    comes from the one Secret."""
    objects = results[number]["objects"]
    for kind, component in (("Deployment", "cortex"), ("DaemonSet", "neuron")):
        one = container(objects, kind, component)
        pod = found(objects, kind, f"prod-cortex-neuron-{component}")["spec"]["template"]["spec"]
        may_use_api = number == 1 and component == "cortex"
        assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, may_use_api)
        security = one["securityContext"]
        assert (security["runAsNonRoot"], security["readOnlyRootFilesystem"]) == (True, True)
        assert security["capabilities"] == {"drop": ["ALL"]}
        keys = {
            each["name"]: each["valueFrom"]["secretKeyRef"]["name"]
            for each in one["env"]
            if "secretKeyRef" in each.get("valueFrom", {}) and each["name"] != "HF_TOKEN"
        }
        assert set(keys.values()) == {("prod-cortex-neuron", "fleet-secrets")[number]}
        assert "NEURON_TOKEN" in keys


def test_cortex_may_read_pods_only_where_it_has_to(results: list[Any]) -> None:
    """The role is bound to the account of cortex's pod, and allows no more than listing and watching pods."""
    roles = [each for each in results[0]["objects"] if each["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    assert roles == []
    objects = results[1]["objects"]
    pod = found(objects, "Deployment", "prod-cortex-neuron-cortex")["spec"]["template"]["spec"]
    account = found(objects, "ServiceAccount", pod["serviceAccountName"])["metadata"]["name"]
    (binding,) = (each for each in objects if each["kind"] == "RoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "gpu"}]
    role = found(objects, "Role", binding["roleRef"]["name"])
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
