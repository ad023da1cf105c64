"""Neurons for the tests: in this process or as real processes, with the simulated engine as real child processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import psutil

from neuron.api.app_keys import SERVICES
from neuron.app import build_app
from neuron.config import NeuronConfig
from neuron.lifecycle.registry import Registry
from shared.protocol import ENGINE_KEYS_HEADER
from shared.serve import Site, bind, serving
from tests.processes import EXITED

MARK_VARIABLE = "ENGINE_TEST_MARK"
"""Inherited by every process that a test starts, so that leftovers can be attributed to the test."""
REPOSITORY = Path(__file__).parent.parent.parent
TIMEOUT_SECS = 60.0
OF_A_CORTEX = {ENGINE_KEYS_HEADER: "1"}
"""Headers of a caller that sends engines their keys."""


def marked_processes(mark: str) -> list[int]:
    """Live processes, other than this one, that inherited the mark."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.environ().get(MARK_VARIABLE) == mark and process.status() not in EXITED and pid != os.getpid():
                found.append(pid)
    return found


def marked_engines(mark: str) -> list[int]:
    """The marked processes that lead a session: one per engine."""
    return [pid for pid in marked_processes(mark) if os.getsid(pid) == pid]


async def until(condition: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout_secs: float = TIMEOUT_SECS) -> Any:
    """The value of `condition` as soon as it is true. Fails the test when that takes too long."""
    deadline = time.monotonic() + timeout_secs
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_secs} s: {condition}"
        await asyncio.sleep(0.02)


@dataclass
class Answer:
    """Status and JSON body of a response."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.body["error"]
        return error


@dataclass
class Client:
    """A client of a neuron's HTTP API."""

    session: aiohttp.ClientSession
    base: str

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, self.base + path, **options) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return Answer(response.status, json.loads(text) if is_json else text, response.headers)

    async def load(self, model_id: str, *args: str, wait: bool = True, **fields: Any) -> Answer:
        """Loads with the sim harness; `args` are the engine's. Takes a fifth of a second unless they say otherwise."""
        given = list(args) if "--load-secs" in args else ["--load-secs", "0.2", *args]
        body = {"model_id": model_id, "harness": "sim", "args": given, **fields}
        return await self.call("POST", f"/models/load{'' if wait else '?wait=false'}", json=body)

    async def unload(self, model_id: str) -> Answer:
        return await self.call("POST", "/models/unload", json={"model_id": model_id})

    async def model(self, model_id: str) -> dict[str, Any]:
        """The model's entry of `/models`; empty when it is not listed."""
        listed = (await self.call("GET", "/models")).body
        return next((entry for entry in listed if entry["id"] == model_id), {})

    async def until_status(self, model_id: str, status: str) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            entry = await self.model(model_id)
            return entry if entry.get("status") == status else None

        found: dict[str, Any] = await until(reached)
        return found

    async def endpoint(self, model_id: str) -> Answer:
        return await self.call("GET", f"/models/{quote(model_id, safe='')}/endpoint")


@dataclass
class Neuron(Client):
    """A neuron served in this process."""

    registry: Registry
    state_dir: Path

    def activity(self) -> dict[str, int]:
        """Requests running in the loaded models' engines, as last reported."""
        running: Counter[str] = Counter()
        for each in self.registry.activity():
            running[each.id] += each.in_flight
        return running

    @property
    def reserved_ports(self) -> frozenset[int]:
        return self.registry._launcher.reserved_ports


def config_of(state_dir: Path, **changes: Any) -> NeuronConfig:
    """Two simulated GPUs, a fast engine, and short timeouts."""
    sim: dict[str, Any] = {"stop_timeout_secs": 2, "port_range": [28100, 28899]}
    sim.update(changes.pop("sim", {}))
    settings = {
        "name": "test",
        "port": 0,
        "state_dir": state_dir,
        "drain_timeout_secs": 2,
        "harnesses": [{"name": "sim"}, {"name": "vllm"}],
        "harness": {"sim": sim},
        "simulate": {"devices": ["RTX 5090", "RTX 5090"]},
        **changes,
    }
    return NeuronConfig.model_validate(settings)


@contextlib.asynccontextmanager
async def neuron_here(config: NeuronConfig, *, port: int = 0) -> AsyncIterator[Neuron]:
    """Serves a neuron in this process, through the same code as in production."""
    sock = bind("127.0.0.1", port)
    app = build_app(config, port=sock.getsockname()[1])
    site = Site(app, sock)
    headers = {"Authorization": f"Bearer {config.bearer_token}"} if config.bearer_token is not None else {}
    async with (
        aiohttp.ClientSession(headers={**headers, **OF_A_CORTEX}) as session,
        serving([site], drain_timeout_secs=config.drain_timeout_secs),
    ):
        assert config.state_dir is not None
        yield Neuron(session, f"http://127.0.0.1:{site.port}", app[SERVICES].registry, config.state_dir)


@dataclass
class NeuronProcess(Client):
    """`python -m neuron serve` as a child of the test."""

    process: asyncio.subprocess.Process
    log: Path

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits for the exit."""
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_SECS)


@contextlib.asynccontextmanager
async def neuron_process(
    config_file: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    whole_env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> AsyncIterator[NeuronProcess]:
    """Starts the real command and waits until it logs where it listens; stops it at the end if it still runs. `env` is
    added to the environment, `whole_env` replaces it; the command follows `prefix`."""
    log = config_file.with_suffix(".log")
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *(*prefix, sys.executable, "-m", "neuron", "serve", "--config", str(config_file), *options),
            cwd=REPOSITORY,
            env={**(os.environ if whole_env is None else whole_env), **(env or {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=pass_fds,
        )
    try:
        address = await until(lambda: process.returncode is not None or listening_address(log))
        assert isinstance(address, str), log.read_text()
        async with aiohttp.ClientSession(headers=OF_A_CORTEX) as session:
            yield NeuronProcess(session, address, process, log)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def listening_address(log: Path) -> str | None:
    found = [line.rpartition(" ")[2] for line in log.read_text().splitlines() if " listening on " in line]
    return found[0] if found else None


def toml_config(directory: Path, *lines: str) -> Path:
    """A neuron.toml with one simulated GPU and the given lines before its tables."""
    path = directory / "neuron.toml"
    tables = (
        '[[harnesses]]\nname = "sim"\n[harness.sim]\nextra_args = ["--load-secs", "0.2"]\nport_range = [28900, 28999]\n'
        '[simulate]\ndevices = ["RTX 4090"]\n'
    )
    path.write_text("\n".join((*lines, tables)))
    return path


@contextlib.contextmanager
def listening_socket() -> Iterator[int]:
    """A loopback port on which another process listens."""
    sock = bind("127.0.0.1", 0)
    sock.listen()
    try:
        yield int(sock.getsockname()[1])
    finally:
        sock.close()
