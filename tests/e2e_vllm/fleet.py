"""A cortex and a neuron as processes, configured by files, with a real vLLM behind them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.processes import Process, engines_of, eventually, of_session

TINY, PAIR, BROKEN, MINILM = "test/tiny", "test/tiny-on-two", "test/broken", "test/minilm"
NODE = "cpuhost"
TOKEN = "a token of the tests"


@dataclass(frozen=True)
class Answer:
    """A JSON answer, whatever its status."""

    status: int
    body: Any
    headers: dict[str, str]


class Service:
    """A command of ours as a child process, its output in a file."""

    def __init__(self, directory: Path, package: str, config: Path, url: str) -> None:
        self.url = url
        self._name = package
        self._log = directory / f"{package}.log"
        with self._log.open("wb") as output:
            command = [sys.executable, "-m", package, "serve", "--config", str(config)]
            environment = {**os.environ, "NEURON_TOKEN": TOKEN}
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def request(self, path: str, body: dict[str, Any] | None = None, *, timeout: float = 240) -> Answer:
        """GET, or POST when there is a body."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return Answer(response.status, json.load(response), _lower(response.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, json.load(error), _lower(error.headers))

    def answers(self) -> bool:
        """Whether `/health` answers 200; fails if the process has exited."""
        assert self._child.poll() is None, f"{self._name} ended: {self.log_tail()}"
        try:
            return self.request("/health", timeout=5).status == 200
        except OSError:
            return False

    def stop(self) -> int:
        """Sends SIGTERM; the exit code. Kills a process that does not exit in time, and its engines."""
        self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait(60)
        finally:
            if self._child.poll() is None:
                for leader in engines_of(self.pid):
                    os.killpg(leader, signal.SIGKILL)
                self._child.kill()
                self._child.wait()

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


@dataclass(frozen=True)
class Fleet:
    """Both services, with the questions that tests ask."""

    cortex: Service
    neuron: Service

    def status_of(self, model: str) -> dict[str, Any] | None:
        """The neuron's entry for a model; None if it has none."""
        return next((entry for entry in self.neuron.request("/models").body if entry["id"] == model), None)

    def engine_of(self, model: str) -> list[Process]:
        """The processes of a loaded model's engine, its leader first."""
        path = f"/models/{quote(model, safe='')}/endpoint"
        port = self.neuron.request(path).body["url"].rpartition(":")[2]
        for leader, members in engines_of(self.neuron.pid).items():
            if any(process.pid == leader and f"--port {port} " in f"{process.command} " for process in members):
                return sorted(members, key=lambda process: process.pid != leader)
        raise AssertionError(f"no engine of {self.neuron.pid} listens on {port}: {engines_of(self.neuron.pid)}")

    def unload(self, model: str) -> Answer:
        return self.cortex.request("/fleet/unload", {"model": model})


@contextmanager
def running_fleet(directory: Path, vllm_command: list[str], tiny: Path, minilm: Path) -> Iterator[Fleet]:
    """The fleet, with a healthy neuron. Afterwards checks that both services exit with 0 and no engine is left."""
    ports = _free_ports(3)
    neuron_toml, cortex_toml = directory / "neuron.toml", directory / "cortex.toml"
    neuron_toml.write_text(_neuron_toml(ports[0], directory / "state", vllm_command), encoding="utf-8")
    cortex_toml.write_text(_cortex_toml(*ports), encoding="utf-8")
    (directory / "models.toml").write_text(_models_toml(tiny, minilm, directory / "nothing-here"), encoding="utf-8")
    neuron = Service(directory, "neuron", neuron_toml, f"http://127.0.0.1:{ports[0]}")
    sessions: set[int] = set()
    codes: list[int] = []
    try:
        cortex = Service(directory, "cortex", cortex_toml, f"http://127.0.0.1:{ports[1]}")
        try:
            for service in (neuron, cortex):
                eventually(service.answers, f"{service.url} answers", within_secs=30)
            yield Fleet(cortex, neuron)
            sessions = set(engines_of(neuron.pid))
        finally:
            codes.append(cortex.stop())
    finally:
        codes.append(neuron.stop())
    assert codes == [0, 0], f"exit codes of cortex and neuron\n{cortex.log_tail()}\n{neuron.log_tail()}"
    assert [process for session in sessions for process in of_session(session)] == []


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _neuron_toml(port: int, state: Path, command: list[str]) -> str:
    return f"""
name = "{NODE}"
port = {port}
token_env = "NEURON_TOKEN"
state_dir = "{state}"
drain_timeout_secs = 5
[[harnesses]]
name = "vllm"
[harness.vllm]
command = {json.dumps(command)}
startup_timeout_secs = 240
# Two cores: no compilation, and a key-value cache of a fixed size instead of most of the memory.
extra_args = ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M"]
[harness.vllm.env]
HF_HUB_OFFLINE = "1"
VLLM_NO_USAGE_STATS = "1"
VLLM_ENABLE_V1_MULTIPROCESSING = "0"
[simulate]
devices = ["RTX 5090", "RTX 5090"]
"""


def _cortex_toml(neuron_port: int, port: int, metrics_port: int) -> str:
    return f"""
[gateway]
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics_port}"
drain_timeout_secs = 5
[poll]
interval_secs = 0.5
[[neurons]]
name = "{NODE}"
endpoint = "http://127.0.0.1:{neuron_port}"
token_env = "NEURON_TOKEN"
"""


def _models_toml(tiny: Path, minilm: Path, nothing: Path) -> str:
    return f"""
[[models]]
id = "{TINY}"
source = "{tiny}"
vram_mb = 2000
args = ["--max-model-len", "512"]
[[models]]
id = "{PAIR}"
source = "{tiny}"
min_devices = 2
vram_mb = 4000
args = ["--max-model-len", "512"]
[[models]]
id = "{BROKEN}"
source = "{nothing}"
vram_mb = 2000
[[models]]
id = "{MINILM}"
source = "{minilm}"
vram_mb = 2000
args = ["--runner", "pooling", "--convert", "embed"]
[aliases]
"tiny" = "{TINY}"
"""
