"""A simulated host with a real neuron on it, which can be killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from neuron.engine import session
from neuron.gpu import simulated_vram as vram
from neuron.sim.process.core import TITLE
from neuron.spec import InstanceKey
from tests.neuron.neurons import OF_A_CORTEX, REPOSITORY, marked_processes
from tests.ports import free_port

DEVICES, DEVICE_MB = 3, 8000
START_SECS = 20.0
CALL_SECS = 12.0
_ANSWER = aiohttp.ClientTimeout(total=0.5)

CONFIG = """
name = "faulty"
port = {port}
state_dir = "{state}"
drain_timeout_secs = 1
[[harnesses]]
name = "sim"
[harness.sim]
extra_args = ["--load-secs", "0.1", "--ttft-ms", "0", "--tokens-per-sec", "inf"]
port_range = [26000, 26999]
stop_timeout_secs = 1
startup_timeout_secs = 5
[health]
interval_secs = 0.2
unresponsive_secs = 1
hang_grace_secs = 1
prefill_grace_secs = 2
[recovery]
backoff_secs = 0.1
max_backoff_secs = 0.5
stable_secs = 5
[simulate]
devices = [{devices}]
"""


@dataclass(frozen=True)
class EngineProcess:
    """A live process with an engine's mark in its environment."""

    pid: int
    session: int
    is_core: bool


def engine_processes(mark: str) -> list[EngineProcess]:
    """Every live engine process of this test's neuron, whichever neuron process started it."""
    found = []
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            if session.engine_id_of(pid) is not None:
                title = Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0")
                found.append(EngineProcess(pid, os.getsid(pid), title == TITLE.encode()))
    return found


class Host:
    """Restarts neuron on one port with one state directory. `mark` is in the environment of every process,
    `foreign_mb` the MiB of foreign processes by device."""

    def __init__(self, directory: Path, mark: str) -> None:
        self.mark = mark
        self.uuids: list[str] = []
        self.vram_dir = directory / "state" / "vram"
        self.foreign_mb = dict.fromkeys(range(DEVICES), 0)
        self.disk_full = False
        self.disk_was_full = False  # since this neuron process began
        self._config = directory / "neuron.toml"
        self._log = directory / "neuron.log"
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._neuron: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None
        devices = ", ".join(f'{{ name = "Sim", vram_total_mb = {DEVICE_MB} }}' for _ in range(DEVICES))
        self._config.write_text(CONFIG.format(port=port, state=directory / "state", devices=devices))

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(headers=OF_A_CORTEX, timeout=aiohttp.ClientTimeout(total=CALL_SECS))
        return self._http

    @property
    def neuron(self) -> asyncio.subprocess.Process:
        assert self._neuron is not None
        return self._neuron

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    async def start(self) -> None:
        """Returns when neuron answers."""
        await self.launch()
        deadline = time.monotonic() + START_SECS
        while True:
            assert self.neuron.returncode is None, f"neuron ended: {self.neuron.returncode}\n{self.log_tail()}"
            with contextlib.suppress(aiohttp.ClientError):
                self.uuids = [device["uuid"] for device in (await self.get("/discovery"))["devices"]]
                return
            assert time.monotonic() < deadline, f"neuron does not answer\n{self.log_tail()}"
            await asyncio.sleep(0.02)

    async def launch(self) -> None:
        """Starts neuron without waiting for it."""
        self.disk_full = self.disk_was_full = False
        with self._log.open("ab") as sink:
            self._neuron = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "neuron", "serve", "--config", str(self._config)),
                cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
            )

    async def stop(self) -> int:
        """Sends SIGTERM to neuron; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.neuron.terminate()
        return await asyncio.wait_for(self.neuron.wait(), START_SECS)

    async def kill(self) -> None:
        """Sends SIGKILL to neuron alone: its engines keep running."""
        with contextlib.suppress(ProcessLookupError):
            self.neuron.kill()
        await self.neuron.wait()

    async def close(self) -> None:
        """Kills what is left."""
        if self._neuron is not None:
            await self.kill()
        while left := engine_processes(self.mark):
            for process in left:
                send(process.pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        if self._http is not None:
            await self._http.close()

    async def get(self, path: str) -> Any:
        """The JSON of a GET to neuron."""
        async with self.http.get(self._url + path) as response:
            body = await response.text()
            assert response.status == 200, f"GET {path}: {response.status} {body}"
            return json.loads(body)

    async def post(self, path: str, body: dict[str, object]) -> str:
        """A POST to neuron, and its outcome in short. Neuron may be killed meanwhile; it must not stay silent."""
        try:
            async with self.http.post(self._url + path, json=body) as response:
                answer = await response.json()
                error = answer.get("error") or {}
                return f"{response.status} {error.get('code', answer.get('status'))}"
        except aiohttp.ClientError as error:
            return type(error).__name__

    async def models(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = await self.get("/models")
        return listed

    async def endpoint(self, key: InstanceKey) -> dict[str, str]:
        path = f"/models/{quote(key.model_id, safe='')}/endpoint?instance={key.instance}"
        found: dict[str, str] = await self.get(path)
        return found

    async def answers(self, key: InstanceKey) -> bool:
        """True when a client finds a loaded engine healthy."""
        try:
            url = (await self.endpoint(key))["url"]
            async with self.http.get(f"{url}/health", timeout=_ANSWER) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError, AssertionError):
            return False

    def hold_foreign(self, index: int, mb: int) -> None:
        """This test process acts as the foreign process."""
        self.foreign_mb[index] = mb
        held = {self.uuids[each]: held for each, held in self.foreign_mb.items() if held}
        vram.hold(self.vram_dir, held)

    def limit_disk(self, *, full: bool) -> None:
        """`full`: neither neuron nor an engine that it starts can write to a file. A new neuron can.

        The limit of a file's size needs no rights; the error is EFBIG, where a full disk's would be ENOSPC.
        """
        self.disk_full, self.disk_was_full = full, True
        _, hard = resource.prlimit(self.neuron.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.neuron.pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))


def send(pid: int | None, number: signal.Signals) -> None:
    """Sends a signal to a process that may be gone; None: to no process."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
