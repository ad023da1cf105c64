"""A cortex that finds neurons by the labels of their pods, with the API of a cluster in another process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cortex.cli.doctor.findings import Verdict
from cortex.cli.doctor.found import find_neurons
from cortex.cli.doctor.this_host import DeploymentFiles
from cortex.cli.serve import run_check
from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from cortex.fleet.members import found
from cortex.fleet.members.kubernetes import discovery, pod_api
from cortex.fleet.members.kubernetes.pods import NO_PODS, Pod, PodMetadata, PodSpec, PodStatus, after_change, endpoints
from shared.system import cluster
from tests.certificates import authority_file, pair
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.fleet.members import cluster_api
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.helm import helm_environment

LABELS = {"app.kubernetes.io/name": "neuron"}
SELECTOR = "app.kubernetes.io/name=neuron"
VALIDATE = """
import json, sys, kubernetes_validate
for each in json.load(sys.stdin):
    kubernetes_validate.validate(each, "1.37", strict=True)
"""


def pod(name: str, ip: str | None, *, node: str = "gpu-node-1", **labels: str) -> dict[str, Any]:
    """A pod as the API shows it."""
    meta = {"name": name, "namespace": cluster_api.NAMESPACE, "uid": f"uid-{name}", "labels": {**LABELS, **labels}}
    status = {"phase": "Pending"} if ip is None else {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}
    spec = {"nodeName": node, "containers": [{"name": "neuron", "image": "images/neuron:7"}]}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": meta, "spec": spec, "status": status}


@dataclass
class ClusterProcess:
    """A running `cluster_api`, and the files of a service account that it accepts."""

    directory: Path
    port: int
    process: asyncio.subprocess.Process

    async def tell(self, **command: Any) -> None:
        """Returns when the API has carried it out."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        assert await self.process.stdout.readline() == b"done\n"

    def renew_token(self, token: str) -> None:
        """The API accepts no other from now on."""
        for name in ("accepted", "token"):
            (self.directory / name).write_text(token, encoding="ascii")


@pytest.fixture
async def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClusterProcess]:
    """A cluster whose pod this process seems to be."""
    _ = pair(tmp_path)
    authority_file(tmp_path).rename(tmp_path / "ca.crt")
    (tmp_path / "namespace").write_text(cluster_api.NAMESPACE, encoding="ascii")
    command = (sys.executable, "-m", cluster_api.__name__, str(tmp_path))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    api = ClusterProcess(tmp_path, int(await process.stdout.readline()), process)
    api.renew_token("first")
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    monkeypatch.setattr(discovery, "PAUSE_SECS", 0.01)
    for module in (found, pod_api):
        monkeypatch.setattr(module, "TIMEOUT_SECS", 60.0)
    yield api
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    _ = await process.wait()


def table(neuron: V1Neuron, **keys: Any) -> dict[str, Any]:
    """`[discovery]` for a pod whose address has this neuron."""
    return {"kind": "kubernetes", "selector": SELECTOR, "port": int(neuron.url.rpartition(":")[2]), **keys}


async def has(cortex: RunningCortex, *names: str) -> None:
    await cortex.until(lambda: set(cortex.parts.fleet.snapshot().nodes) == set(names))


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    while text not in caplog.text:  # noqa: ASYNC110 - a log has no event to wait for
        await asyncio.sleep(0.01)


async def test_neurons_come_and_go_with_their_pods(
    start_cortex: StartCortex, kubernetes: ClusterProcess, benjy: V1Neuron
) -> None:
    """At the start and while cortex runs, named after their nodes; a watch that ends, is cut in the middle or has
    expired loses nothing, and each uses the newest token."""
    ip = benjy.url.split(":")[1].strip("/")
    await kubernetes.tell(put=pod("neuron-a", ip))
    await kubernetes.tell(put=pod("other", "127.0.0.2", **{"app.kubernetes.io/name": "x"}))
    # Only events of a watch change anything here: the next list would be in an hour.
    cortex = await start_cortex([], [{"id": "org/small"}], discovery=table(benjy, interval_secs=3600))
    assert list(cortex.parts.clients) == ["gpu-node-1"]

    await kubernetes.tell(delete="neuron-a")
    await has(cortex)
    await kubernetes.tell(put=pod("neuron-b", None, node="gpu-node-2"))
    await kubernetes.tell(put=pod("neuron-b", ip, node="gpu-node-2"))
    await has(cortex, "gpu-node-2")

    kubernetes.renew_token("second")
    await kubernetes.tell(delete="neuron-b", cut=True)
    await has(cortex)
    await kubernetes.tell(put=pod("neuron-c", ip, node="gpu-node-3"), forget=True)
    await has(cortex, "gpu-node-3")
    await kubernetes.tell(delete="neuron-c")
    await has(cortex)


async def test_a_missing_role_is_named(
    start_cortex: StartCortex, kubernetes: ClusterProcess, benjy: V1Neuron, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the rule that is missing. Listing alone does; once that fails, the neurons that are known stay."""
    ip = benjy.url.split(":")[1].strip("/")
    await kubernetes.tell(put=pod("neuron-a", ip), allow=[])
    cortex = await start_cortex([], [], discovery=table(benjy, interval_secs=0.05))
    assert cortex.parts.clients == {}
    assert "pods of the namespace 'gpu' cannot be listed: HTTP 403: pods is forbidden: User" in caplog.text
    assert 'Role with the rule {apiGroups: [""], resources: [pods], verbs: [list, watch]}' in caplog.text

    await kubernetes.tell(allow=["list"])
    await has(cortex, "gpu-node-1")
    await logged(caplog, "cannot be watched: HTTP 403")
    kubernetes.renew_token("second")
    (kubernetes.directory / "token").write_text("first", encoding="ascii")
    await logged(caplog, "the API refuses the token in")
    kubernetes.process.kill()
    await logged(caplog, "Cannot connect to host 127.0.0.1")
    assert list(cortex.parts.clients) == ["gpu-node-1"]


async def test_doctor_finds_pods_too(kubernetes: ClusterProcess, tmp_path: Path) -> None:
    """While cortex does not run; the neuron's own name is asked for afterwards."""
    await kubernetes.tell(put=pod("neuron-a", "10.0.0.1"))
    config = CortexConfig.model_validate({"discovery": {"kind": "kubernetes", "selector": SELECTOR}})
    files = DeploymentFiles(tmp_path, config, Catalogue())
    asked, (finding,) = await find_neurons(files, None)
    (one,) = asked or []
    assert (one.entry.endpoint, one.node, one.named) == ("http://10.0.0.1:13131", "gpu-node-1", False)
    assert (finding.verdict, "10.0.0.1" in finding.text) == (Verdict.OK, True)
    await kubernetes.tell(allow=[])
    asked, (finding,) = await find_neurons(files, None)
    assert (asked, finding.verdict) == (None, Verdict.FAULT)


def test_only_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`cortex check` says what is missing: the cluster, or the service account's token."""
    path = tmp_path / "cortex.toml"
    path.write_text(f"discovery = {{kind = 'kubernetes', selector = '{SELECTOR}'}}", encoding="utf-8")
    (tmp_path / "models.toml").touch()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert run_check(path) == 1
    assert "works only in a pod: this is not a pod of Kubernetes" in capsys.readouterr().err
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    assert run_check(path) == 1
    assert "automountServiceAccountToken: true" in capsys.readouterr().err
    for name in ("ca.crt", "token", "namespace"):
        (tmp_path / name).write_text(name, encoding="ascii")
    assert run_check(path) == 0
    assert cluster.cluster_here(os.environ) == cluster.Cluster("https://[fd00::1]:443", "namespace", tmp_path)


def test_which_pods_are_neurons() -> None:
    """Those with an address that have not ended, ready or not; by IPv4 and IPv6."""

    def known(uid: str, address: str | None, phase: str) -> Pod:
        return Pod(PodMetadata(uid), PodSpec(f"node-{uid}"), PodStatus(phase, address))

    pods = NO_PODS
    for each in (known("a", "10.0.0.1", "Running"), known("b", "fd00::2", "Pending"), known("c", None, "Pending")):
        pods = after_change(pods, "ADDED", each)
    pods = after_change(pods, "ADDED", known("d", "10.0.0.4", "Failed"))
    at = partial(endpoints, port=13131, tls=True)
    assert at(pods) == {"https://10.0.0.1:13131": "node-a", "https://[fd00::2]:13131": "node-b"}
    pods = after_change(pods, "DELETED", known("a", "10.0.0.1", "Failed"))
    pods = after_change(pods, "MODIFIED", known("c", "10.0.0.3", "Running"))
    assert at(pods) == {"https://[fd00::2]:13131": "node-b", "https://10.0.0.3:13131": "node-c"}


@pytest.mark.timeout(1500)  # the environment may have to be built
async def test_the_tests_cluster_speaks_like_kubernetes(kubernetes: ClusterProcess) -> None:
    """What it serves is valid by Kubernetes' own schemas: a list, and a pod in an event."""
    try:
        python = await asyncio.to_thread(helm_environment)
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must validate the objects: {error}")
        pytest.skip(str(error))
    await kubernetes.tell(put=pod("neuron-a", None))
    tls = ssl.create_default_context(cafile=str(kubernetes.directory / "ca.crt"))
    url = f"https://127.0.0.1:{kubernetes.port}/api/v1/namespaces/gpu/pods"
    query, headers = {"labelSelector": SELECTOR}, {"Authorization": "Bearer first"}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.get(url, params=query, ssl=tls) as answer:
            listed = await answer.json()
        await kubernetes.tell(put=pod("neuron-a", "10.0.0.1"))
        later = {**query, "watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
        async with http.get(url, params=later, ssl=tls) as answer:
            event = json.loads(await answer.content.readline())
    assert event["type"] == "MODIFIED"
    objects = json.dumps([listed, event["object"]]).encode()
    check: Callable[..., Any] = partial(subprocess.run, input=objects, capture_output=True, check=False)
    done = await asyncio.to_thread(check, [python, "-c", VALIDATE])
    assert done.returncode == 0, done.stderr.decode()
