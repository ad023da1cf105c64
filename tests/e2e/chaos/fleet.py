"""Four real neurons and two real cortexes on fixed ports, which can be killed and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import tomli_w

from neuron.engine import session
from neuron.engine.state_dir import StateDir
from shared.system.process_stat import stat_of
from tests.e2e.chaos.models import HOSTS, ChaosModel, HostShape
from tests.neuron.neurons import MARK_VARIABLE, REPOSITORY

START_SECS = STOP_SECS = 60.0  # as all limits here, many times what an idle machine needs
POLL_SECS, POLL_TIMEOUT_SECS, UNHEALTHY_AFTER = 0.4, 10.0, 2
_PORTS = (21_000, 25_900)  # below the kernel's range for outgoing connections
_ENGINE_PORTS = 400  # for each host
_GROUP_PORTS = 50  # of them
_SUCCEEDED = re.compile(r" cortex\.access: \S+ \S+ 200 ")
_CALL = aiohttp.ClientTimeout(total=20)


@dataclass(frozen=True)
class Down:
    """When (monotonic) a service was down or suspended. At `until` it works again, after a start of `start_secs`."""

    since: float
    until: float
    start_secs: float = 0.0


@dataclass(frozen=True)
class EngineServer:
    """A live engine's main process, the leader of its session."""

    host: str
    model_id: str
    pid: int


@dataclass
class Service:
    """A process that is restarted repeatedly on one port. `downs` lists when it was unavailable."""

    name: str
    port: int
    argv: tuple[str, ...]
    ready_path: str
    log: Path
    http: aiohttp.ClientSession
    downs: list[Down] = field(default_factory=list)
    busy: bool = False
    """It has a fault at the moment, so other faults choose another target."""
    process: asyncio.subprocess.Process | None = None
    _down_since: float | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Starts it; returns when it answers."""
        with self.log.open("ab") as sink:
            sink.write(b"--- started\n")
            sink.flush()
            self.process = await asyncio.create_subprocess_exec(
                *self.argv,
                cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
            )
        began = time.monotonic()
        while not await self.answers():
            assert self.process.returncode is None, f"{self.name} exited: {self.process.returncode}\n{self.tail()}"
            assert time.monotonic() < began + START_SECS, f"{self.name} does not answer\n{self.tail()}"
            await asyncio.sleep(0.02)
        self.is_back(time.monotonic() - began)

    async def answers(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
            async with self.http.get(self.url + self.ready_path, timeout=_CALL) as response:
                return response.status == 200
        return False

    async def end(self, number: signal.Signals) -> int:
        """Sends the signal and waits for the exit; the exit status. It counts as down from just before the signal."""
        assert self.process is not None
        self.is_down()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), STOP_SECS)

    def is_down(self) -> None:
        self._down_since = time.monotonic()

    def is_back(self, start_secs: float = 0.0) -> None:
        if self._down_since is not None:
            self.downs.append(Down(self._down_since, time.monotonic(), start_secs))
            self._down_since = None

    def was_down(self, since: float, until: float, *, recovery_secs: float = 0) -> bool:
        """Whether it was down at any moment from `since` to `until`, or had been back for less than `recovery_secs`.
        The time of its start is added: where that took long, all else does."""
        if self._down_since is not None and self._down_since <= until:
            return True
        recovered = [down.until + (recovery_secs + down.start_secs if recovery_secs else 0) for down in self.downs]
        return any(down.since <= until and end >= since for down, end in zip(self.downs, recovered, strict=True))

    async def get(self, path: str) -> Any:
        """The JSON of a GET. Raises aiohttp.ClientError and asyncio.TimeoutError."""
        async with self.http.get(self.url + path, timeout=_CALL) as response:
            response.raise_for_status()
            return await response.json()

    def tail(self, lines: int = 40) -> str:
        """The last lines of its log, without those of successful requests."""
        shown = [line for line in self.log.read_text(errors="replace").splitlines() if not _SUCCEEDED.search(line)]
        return "\n".join(shown[-lines:])


@dataclass
class NeuronHost(Service):
    """A simulated GPU host with its neuron."""

    shape: HostShape = HOSTS[0]
    id_prefix: str = ""
    """Prefix of the ids of all its engines."""


class Fleet:
    """`mark` is in the environment of every process that it starts, and of their descendants."""

    def __init__(self, directory: Path, mark: str, models: Sequence[ChaosModel], http: aiohttp.ClientSession) -> None:
        assert os.environ[MARK_VARIABLE] == mark
        self.mark = mark
        self.models = models
        self.http = http
        ports = _free_ports(len(HOSTS) + 4, _ENGINE_PORTS * len(HOSTS))
        self.neurons = [_neuron(directory, shape, port, http) for shape, port in zip(HOSTS, ports, strict=False)]
        for number, neuron in enumerate(self.neurons):
            first = ports[-1] + 1 + number * _ENGINE_PORTS
            _write(directory / neuron.name / "neuron.toml", _neuron_table(neuron, directory, first))
        _write(directory / "models.toml", {"models": [model.profile() for model in models]})
        self.cortexes = [
            _cortex(directory, f"cortex-{number}", ports[len(HOSTS) + 2 * number :], self.neurons, http)
            for number in range(2)
        ]

    @property
    def services(self) -> list[Service]:
        return [*self.neurons, *self.cortexes]

    def neuron(self, name: str) -> NeuronHost:
        return next(neuron for neuron in self.neurons if neuron.name == name)

    async def start(self) -> None:
        await asyncio.gather(*(neuron.start() for neuron in self.neurons))
        await asyncio.gather(*(cortex.start() for cortex in self.cortexes))

    def engines(self) -> list[EngineServer]:
        """The engines' main processes, in an order that does not depend on their pids. Blocks."""
        found = []
        for neuron in self.neurons:
            for pid in session.engine_processes(neuron.id_prefix):
                model_id = served_model(pid)
                if model_id is not None and leads_session(pid):
                    found.append(EngineServer(neuron.name, model_id, pid))
        return sorted(found, key=lambda engine: (engine.host, engine.model_id, engine.pid))

    async def kill_all(self) -> None:
        """Kills the services. The caller kills their engines."""
        for service in self.services:
            if service.process is not None and service.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    service.process.kill()
                await service.process.wait()


def served_model(pid: int) -> str | None:
    """The model in an engine's command line; None if it names none, as in an engine's core."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[words.index(b"--served-model-name") + 1].decode()
    return None


def leads_session(pid: int) -> bool:
    stat = stat_of(pid)
    return stat is not None and stat.alive and stat.session == pid


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _neuron(directory: Path, shape: HostShape, port: int, http: aiohttp.ClientSession) -> NeuronHost:
    home = directory / shape.name
    home.mkdir()
    return NeuronHost(
        name=shape.name,
        port=port,
        argv=(sys.executable, "-m", "neuron", "serve", "--config", str(home / "neuron.toml")),
        ready_path="/health",
        log=directory / f"{shape.name}.log",
        http=http,
        shape=shape,
        id_prefix=StateDir(home.resolve() / "state").engine_id_prefix,
    )


def _neuron_table(neuron: NeuronHost, directory: Path, first_port: int) -> dict[str, Any]:
    return {
        "name": neuron.name,
        "port": neuron.port,
        "state_dir": str(directory / neuron.name / "state"),
        "on_stop": neuron.shape.on_stop,
        "drain_timeout_secs": 2,
        "harnesses": [{"name": "sim"}],
        "harness": {
            "sim": {
                "extra_args": ["--ttft-ms", "5", "--tokens-per-sec", "200", "--answer-tokens", "1000"],
                "port_range": [first_port, first_port + _ENGINE_PORTS - _GROUP_PORTS - 1],
                "stop_timeout_secs": 2,
                "startup_timeout_secs": 60,
            }
        },
        "group": {"port_range": [first_port + _ENGINE_PORTS - _GROUP_PORTS, first_port + _ENGINE_PORTS - 1]},
        "health": {
            "interval_secs": 0.2,
            "unresponsive_secs": 15,
            "hang_grace_secs": 15,
            "prefill_grace_secs": 15,
        },
        "recovery": {"backoff_secs": 0.1, "max_backoff_secs": 0.5, "stable_secs": 3},
        "simulate": {
            "devices": [{"name": f"Sim {mb}", "vram_total_mb": mb} for mb in neuron.shape.devices_mb],
        },
    }


def _cortex(
    directory: Path, name: str, ports: Sequence[int], neurons: Sequence[NeuronHost], http: aiohttp.ClientSession
) -> Service:
    config = directory / f"{name}.toml"
    table = {
        "models_config": "models.toml",
        "state_dir": str(directory / f"{name}-state"),
        "gateway": {
            "listen": f"127.0.0.1:{ports[0]}",
            "metrics_listen": f"127.0.0.1:{ports[1]}",
            "drain_timeout_secs": 3,
        },
        "poll": {
            "interval_secs": POLL_SECS,
            "timeout_secs": POLL_TIMEOUT_SECS,
            "unhealthy_after": UNHEALTHY_AFTER,
        },
        "cold_load": {"timeout_secs": 60},
        "placement": {"min_residency_secs": 4, "patience_secs": 2, "starvation_secs": 8},
        "waiting": {"first_comment_secs": 0.3, "comment_interval_secs": 0.5},
        "neurons": [{"name": neuron.name, "endpoint": neuron.url} for neuron in neurons],
    }
    _write(config, table)
    return Service(
        name=name,
        port=ports[0],
        argv=(sys.executable, "-m", "cortex", "serve", "--config", str(config)),
        ready_path="/v1/models",
        log=directory / f"{name}.log",
        http=http,
    )


def _write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(tomli_w.dumps(table), encoding="utf-8")


def _free_ports(count: int, then: int) -> list[int]:
    """`count` consecutive free ports, with space for `then` more after them."""
    while True:
        first = random.randrange(*_PORTS) - count - then
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sock = stack.enter_context(socket.socket())
                sock.bind(("127.0.0.1", port))
            return list(range(first, first + count))
