"""A simulated host with a real neuron on it, and everything that can go wrong there, a method each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from neuron.harness.base import ENGINE_ID_VARIABLE
from neuron.sim import vram
from neuron.sim.core import TITLE
from shared.serve import ListenError, bind
from tests.neuron.neurons import REPOSITORY, marked_processes
from tests.neuron.sim_process import free_port

DEVICES, DEVICE_MB = 3, 8000
START_SECS = 20.0
CALL_SECS = 12.0
_HELD_PORTS = 3
_STEAL_SECS = 0.5


@dataclass(frozen=True)
class FaultModel:
    """A model of the host. Not all of them fit at once."""

    id: str
    vram_mb: int  # all devices together
    tensor_parallel: int = 1


MODELS = (
    FaultModel("small/a", 1500),
    FaultModel("small/b", 2500),
    FaultModel("middle", 5000),
    FaultModel("large", 7500),
    FaultModel("wide", 8000, tensor_parallel=2),
)

CONFIG = """
name = "faulty"
port = {port}
state_dir = "{state}"
drain_timeout_secs = 1
log_level = "info"
[[harnesses]]
name = "sim"
[harness.sim]
extra_args = ["--load-secs", "0.1", "--ttft-ms", "0", "--tokens-per-sec", "inf"]
port_range = [27000, 27059]
stop_timeout_secs = 1
startup_timeout_secs = 5
[health]
interval_secs = 0.2
unresponsive_secs = 1
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
    """Every live process that an engine of this test's neuron consists of, whichever neuron process started it."""
    found = []
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            if f"{ENGINE_ID_VARIABLE}=".encode() in environ:
                title = Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0")
                found.append(EngineProcess(pid, os.getsid(pid), title == TITLE.encode()))
    return found


class FaultyHost:
    """Starts and restarts neuron on one port with one state directory. `mark` is in everything's environment.

    A fault's method takes `pick`, 0 to 1, which chooses among what there is, and returns what it did, in words.
    """

    def __init__(self, directory: Path, mark: str) -> None:
        self.mark = mark
        self.vram_dir = directory / "state" / "vram"
        self.foreign_mb = dict.fromkeys(range(DEVICES), 0)
        self.disk_full = False
        self._config = directory / "neuron.toml"
        self._log = directory / "neuron.log"
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self._uuids: list[str] = []
        self._held: list[socket.socket] = []
        self._calls: set[asyncio.Task[str]] = set()
        self._neuron: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None
        devices = ", ".join(f'{{ name = "Sim", vram_total_mb = {DEVICE_MB} }}' for _ in range(DEVICES))
        self._config.write_text(CONFIG.format(port=self._port, state=directory / "state", devices=devices))

    # Looking.

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_SECS))
        return self._http

    async def get(self, path: str) -> Any:
        """The JSON of a GET at neuron."""
        async with self.http.get(self._url + path) as response:
            body = await response.text()
            assert response.status == 200, f"GET {path}: {response.status} {body}"
            return json.loads(body)

    async def models(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = await self.get("/models")
        return listed

    async def endpoint(self, model_id: str) -> Any:
        return await self.get(f"/models/{quote(model_id, safe='')}/endpoint")

    @property
    def uuids(self) -> list[str]:
        """Of the devices, by index."""
        return self._uuids

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    # Neuron itself.

    async def start(self) -> None:
        """Returns when neuron answers."""
        self.disk_full = False
        with self._log.open("ab") as sink:
            self._neuron = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "neuron", "serve", "--config", str(self._config)),
                cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECS
        while True:
            assert self._neuron.returncode is None, f"neuron ended with {self._neuron.returncode}\n{self.log_tail()}"
            with contextlib.suppress(aiohttp.ClientError):
                self._uuids = [device["uuid"] for device in (await self.get("/discovery"))["devices"]]
                return
            assert time.monotonic() < deadline, f"neuron does not answer\n{self.log_tail()}"
            await asyncio.sleep(0.02)

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        assert self._neuron is not None
        with contextlib.suppress(ProcessLookupError):
            self._neuron.terminate()
        return await asyncio.wait_for(self._neuron.wait(), START_SECS)

    async def close(self) -> None:
        """Ends whatever is left, tells nobody."""
        if self._neuron is not None and self._neuron.returncode is None:
            self._neuron.kill()
            await self._neuron.wait()
        while left := engine_processes(self.mark):
            for process in left:
                _kill(process.pid)
            await asyncio.sleep(0.01)
        await self.calls_answered()
        self.free_ports()
        if self._http is not None:
            await self._http.close()

    async def kill_neuron(self, _pick: float) -> str:
        """Its engines live on; the next neuron finds them."""
        assert self._neuron is not None
        self._neuron.kill()
        await self._neuron.wait()
        await self.start()
        return "kill -9 of neuron, and a new one"

    async def kill_engine_behind_neurons_back(self, pick: float) -> str:
        """While neuron is stopped."""
        assert self._neuron is not None
        self._neuron.send_signal(signal.SIGSTOP)
        try:
            name, pid = self._engine(pick, await asyncio.to_thread(engine_processes, self.mark))
            _kill(pid)
        finally:
            self._neuron.send_signal(signal.SIGCONT)
        return f"kill -9 of {name} while neuron is stopped"

    # Models.

    async def load(self, pick: float) -> str:
        model = _chosen(MODELS, pick)
        body = {"model_id": model.id, "harness": "sim", "vram_mb": model.vram_mb}
        if model.tensor_parallel > 1:
            body["tensor_parallel"] = model.tensor_parallel
        return f"load {model.id}: {await self._call('/models/load', body)}"

    async def load_in_passing(self, pick: float) -> str:
        """Nobody waits for its end."""
        self._in_passing(self.load(pick))
        return f"load of {_chosen(MODELS, pick).id} begun"

    async def unload(self, pick: float) -> str:
        return await self.unload_model(_chosen(MODELS, pick).id)

    async def unload_model(self, model_id: str) -> str:
        return f"unload {model_id}: {await self._call('/models/unload', {'model_id': model_id})}"

    async def unload_in_passing(self, pick: float) -> str:
        self._in_passing(self.unload(pick))
        return f"unload of {_chosen(MODELS, pick).id} begun"

    async def calls_answered(self) -> str:
        """Waits for the answers to all calls made in passing."""
        return f"answers: {await asyncio.gather(*self._calls)}"

    # Engines.

    async def kill_engine(self, pick: float) -> str:
        return await self._signal_engine(pick, signal.SIGKILL)

    async def stop_engine(self, pick: float) -> str:
        return await self._signal_engine(pick, signal.SIGSTOP)

    async def sicken_engine(self, pick: float) -> str:
        """Its health check turns bad, and it lives. (A signal that comes while it loads is ignored.)"""
        return await self._signal_engine(pick, signal.SIGUSR2)

    async def kill_core(self, pick: float) -> str:
        return await self._signal_engine(pick, signal.SIGKILL, core=True)

    async def stop_core(self, pick: float) -> str:
        """Without a request nobody notices; whoever ends the engine has to end this as well."""
        return await self._signal_engine(pick, signal.SIGSTOP, core=True)

    async def steal_port(self, pick: float) -> str:
        """Kills an engine with all its processes, and listens on its port before anybody else does."""
        listed = {model["pid"]: model["id"] for model in await self.models() if model.get("pid")}
        leaders = sorted(pid for pid in listed if _alive(pid))
        if not leaders:
            return "no engine whose port could be stolen"
        pid = _chosen(leaders, pick)
        port = _port_of(pid)
        for process in engine_processes(self.mark):
            if process.session == pid:
                _kill(process.pid)
        if port is None:
            return f"kill -9 of all of {listed[pid]}"
        self.free_ports(but=_HELD_PORTS - 1)
        deadline = time.monotonic() + _STEAL_SECS
        while time.monotonic() < deadline:
            with contextlib.suppress(ListenError):  # its processes are not dead yet, or somebody was faster
                self._held.append(bind("127.0.0.1", port))
                return f"kill -9 of all of {listed[pid]}, and its port {port} taken"
            await asyncio.sleep(0.002)
        return f"kill -9 of all of {listed[pid]}, and its port {port} not to be had"

    def free_ports(self, but: int = 0) -> None:
        while len(self._held) > but:
            self._held.pop(0).close()

    # The host's means.

    async def fill_device(self, pick: float) -> str:
        """A stranger takes all that is free of a device, or gives it back."""
        index = _chosen(range(DEVICES), pick)
        if self.foreign_mb[index]:
            self._hold_foreign(index, 0)
            return f"device {index} given back by its stranger"
        free = DEVICE_MB - (await asyncio.to_thread(vram.used_mb, self.vram_dir))[self._uuids[index]]
        self._hold_foreign(index, max(free, 0))
        return f"device {index} full: a stranger has {free} MiB of it"

    async def fill_disk(self, _pick: float) -> str:
        """Neuron and its new engines write to no file, until this is called again or neuron is another process."""
        assert self._neuron is not None
        self.disk_full = not self.disk_full
        _, hard = resource.prlimit(self._neuron.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._neuron.pid, resource.RLIMIT_FSIZE, (0 if self.disk_full else hard, hard))
        return "disk full" if self.disk_full else "room on the disk again"

    async def heal(self, _pick: float) -> str:
        """No fault is left but those that happened."""
        if self.disk_full:
            await self.fill_disk(0)
        for index in self.foreign_mb:
            self._hold_foreign(index, 0)
        self.free_ports()
        return "all that was taken is given back"

    # How it is done.

    def _hold_foreign(self, index: int, mb: int) -> None:
        """This test is the stranger."""
        self.foreign_mb[index] = mb
        held = {self._uuids[each]: held for each, held in self.foreign_mb.items() if held}
        vram.hold(self.vram_dir, held)

    async def _call(self, path: str, body: dict[str, object]) -> str:
        """A POST to neuron, and its outcome in short. Neuron may be killed meanwhile; it may not be silent."""
        try:
            async with self.http.post(self._url + path, json=body) as response:
                answer = await response.json()
                error = answer.get("error") or {}
                return f"{response.status} {error.get('code', answer.get('status'))}"
        except aiohttp.ClientError as error:
            return type(error).__name__

    def _in_passing(self, call: Any) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _signal_engine(self, pick: float, number: signal.Signals, *, core: bool = False) -> str:
        name, pid = self._engine(pick, await asyncio.to_thread(engine_processes, self.mark), core=core)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return f"{number.name} to {name}"

    @staticmethod
    def _engine(pick: float, processes: list[EngineProcess], *, core: bool = False) -> tuple[str, int | None]:
        found = sorted(each.pid for each in processes if (each.is_core if core else each.pid == each.session))
        if not found:
            return "no engine", None
        pid = _chosen(found, pick)
        return f"{'core' if core else 'engine'} {pid}", pid


def _chosen(among: Any, pick: float) -> Any:
    return among[min(int(pick * len(among)), len(among) - 1)]


def _kill(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    return vram.process_start_ticks(pid) is not None


def _port_of(pid: int) -> int | None:
    """The port in an engine's command line."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return int(words[words.index(b"--port") + 1])
    return None
