"""A cortex and a neuron as processes, configured by files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import tomli_w

from tests.ports import free_port
from tests.processes import Process, engines_of, eventually, of_session

NODE = "cpuhost"
TOKEN = "a token of the tests"
Config: TypeAlias = Mapping[str, Any]
"""What a TOML file says."""


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
        self._command = [sys.executable, "-m", package, "serve", "--config", str(config)]
        self._child = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "NEURON_TOKEN": TOKEN}
        with self._log.open("ab") as output:
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
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

    def kill_and_restart(self) -> None:
        """kill -9, then the same command again; its engines survive."""
        self._child.kill()
        self._child.wait()
        self._child = self._started()

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

    def log(self) -> str:
        """Its output so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-40:])


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
def running_fleet(directory: Path, neuron: Config, cortex: Config, catalogue: Config) -> Iterator[Fleet]:
    """The fleet, with a healthy neuron. Afterwards checks that both services exit with 0 and no engine is left.

    `neuron` and `cortex` are the contents of neuron.toml and cortex.toml without addresses, tokens and directories.
    """
    ports = [free_port() for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    _write(
        directory / "neuron.toml",
        {
            "name": NODE,
            "port": ports[0],
            "token_env": "NEURON_TOKEN",
            "state_dir": str(directory / "state"),
            "drain_timeout_secs": 5,
            **neuron,
        },
    )
    gateway = {
        "listen": f"127.0.0.1:{ports[1]}",
        "metrics_listen": f"127.0.0.1:{ports[2]}",
        "drain_timeout_secs": 5,
        **cortex.get("gateway", {}),
    }
    node = {"name": NODE, "endpoint": urls[0], "token_env": "NEURON_TOKEN"}
    _write(directory / "cortex.toml", {**cortex, "gateway": gateway, "neurons": [node]})
    _write(directory / "models.toml", catalogue)
    agent = Service(directory, "neuron", directory / "neuron.toml", urls[0])
    sessions: set[int] = set()
    codes: list[int] = []
    try:
        front = Service(directory, "cortex", directory / "cortex.toml", urls[1])
        try:
            for service in (agent, front):
                eventually(service.answers, f"{service.url} answers", within_secs=30)
            yield Fleet(front, agent)
            sessions = set(engines_of(agent.pid))
        finally:
            codes.append(front.stop())
    finally:
        codes.append(agent.stop())
    assert codes == [0, 0], f"exit codes of cortex and neuron\n{front.log_tail()}\n{agent.log_tail()}"
    assert [process for session in sessions for process in of_session(session)] == []


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _write(file: Path, config: Config) -> None:
    file.write_text(tomli_w.dumps(config), encoding="utf-8")
