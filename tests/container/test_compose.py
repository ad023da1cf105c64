"""deploy/Dockerfile and deploy/compose.yaml: built, started, used and stopped."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container.base_image import BASE_IMAGE, import_base_image
from tests.container.podman import Podman, private_podman, why_not
from tests.ports import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES = ("cortex", "beast", "benjy", "quadbrat")
IMAGE = "cortex-neuron:dev"
BUILD = "--podman-build-args=--layers=false --volume /etc/ssl/certs:/etc/ssl/certs:ro"  # the host's CAs, for pip

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """A Podman with the base image."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the containers: {reason}")
        pytest.skip(reason)
    with private_podman() as podman:
        import_base_image(podman)
        yield podman


def network_interfaces() -> set[str]:
    """Names of this host's network interfaces, including bridges and the host's ends of veth pairs."""
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


class Fleet:
    """The compose fleet as a user sees it: compose commands, and cortex's address on this host."""

    def __init__(self, podman: Podman) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.interfaces_before = network_interfaces()
        self._podman = podman
        self._env = {"BASE": BASE_IMAGE, "CORTEX_PORT": str(port), "NEURON_TOKEN": "a token of the test"}

    def compose(self, *arguments: str) -> str:
        return self._podman.compose("--file", DEPLOY / "compose.yaml", *arguments, env=self._env, timeout=600)

    def request(self, path: str, body: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
        """The JSON body and the headers, names in lower case."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return json.load(response), headers

    def wait_until_healthy(self, deadline_secs: float = 60) -> None:
        """Returns once cortex sees every neuron as healthy."""
        deadline = time.monotonic() + deadline_secs
        seen: object = None
        while time.monotonic() < deadline:
            try:
                seen = self.request("/health")[0]
                if seen["nodes"] == {"healthy": 3, "total": 3}:
                    return
            except (OSError, urllib.error.HTTPError) as error:
                seen = error
            time.sleep(0.2)
        pytest.fail(f"the fleet is not healthy after {deadline_secs:.0f} s: {seen}\n{self.compose('logs')}")


@pytest.fixture(scope="module")
def fleet(podman: Podman) -> Iterator[Fleet]:
    """The running fleet; stopped afterwards unless a test has stopped it."""
    fleet = Fleet(podman)
    fleet.compose(BUILD, "build", "cortex")
    fleet.compose("up", "--detach", "--no-build", *SERVICES)  # the images of the others cannot be had everywhere
    try:
        yield fleet
    finally:
        fleet.compose("down", "--timeout", "5")


def test_image_runs_as_an_unprivileged_user(podman: Podman, fleet: Fleet) -> None:
    """An exploit of the service is not root in the container and cannot change the code."""
    assert podman("image", "inspect", "--format", "{{.Config.User}}", IMAGE).strip() == "10001:10001"
    writable = ["find", "/opt/cortex-neuron", "-writable", "-not", "-type", "l"]
    assert podman("run", "--rm", "--network", "none", IMAGE, *writable).strip() == ""


def test_image_has_its_request_path_compiled(podman: Podman, fleet: Fleet) -> None:
    """The image runs the build that the benchmarks measure."""
    where = "import cortex.upstream.connection as engine; print(engine.__file__)"
    found = podman("run", "--rm", "--network", "none", IMAGE, "/opt/cortex-neuron/bin/python", "-c", where)
    assert found.strip().endswith(".so")


def test_image_is_small(podman: Podman, fleet: Fleet) -> None:
    """The image contains no compiler, no vLLM and no test tools."""
    sizes = [int(podman("image", "inspect", "--format", "{{.Size}}", image)) for image in (IMAGE, BASE_IMAGE)]
    assert sizes[0] - sizes[1] < 190 * 2**20  # SQLAlchemy and the drivers are 45 MiB of it, OpenTelemetry 9


def test_fleet_starts_answers_and_stops_without_leftovers(podman: Podman, fleet: Fleet) -> None:
    """The first two minutes of a user without a GPU: up, the catalogue, a cold-loaded chat, down."""
    fleet.wait_until_healthy()
    containers = {service: f"cortex-neuron_{service}_1" for service in SERVICES}
    assert podman.names("ps", "--all") == set(containers.values())
    for container in containers.values():
        podman("healthcheck", "run", container)  # fails unless healthy

    models = {model["id"]: model for model in fleet.request("/v1/models")[0]["data"]}
    assert models["Qwen/Qwen3.6-27B"]["feasible_on"] == ["beast"]

    question = {"model": "Qwen/Qwen3.6-27B", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    answer, headers = fleet.request("/v1/chat/completions", question)
    assert answer["choices"][0]["message"]["content"]
    assert headers["x-cortex-node"] == "beast"
    locations = fleet.request("/v1/models/Qwen%2FQwen3.6-27B")[0]["locations"]
    assert [(place["node"], place["status"]) for place in locations] == [("beast", "loaded")]

    pids = [int(podman("inspect", "--format", "{{.State.Pid}}", container)) for container in containers.values()]
    fleet.compose("down")
    assert podman.names("ps", "--all") == set()
    assert podman.names("network", "ls") == {"podman"}  # the default one
    assert network_interfaces() <= fleet.interfaces_before
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert podman.processes() == {}
