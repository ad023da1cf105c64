"""The faults of the random fault test, one method each."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from neuron.gpu import simulated_vram as vram
from neuron.spec import InstanceKey
from shared.serve import ListenError, bind
from tests.neuron.faults.host import DEVICE_MB, DEVICES, EngineProcess, Host, engine_processes, send

SEEN_SECS = 5.0
"""How long neuron may take for a change that a step waits for."""
_HELD_PORTS = 3
_STEAL_SECS = 0.5
_LOAD_SECS = 0.6  # about as long as a load takes
_BEGIN_SECS = 0.8  # about as long as neuron takes to begin
_CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}

Item = TypeVar("Item")


@dataclass(frozen=True)
class FaultModel:
    """A model of the host, or one instance of it. They do not all fit at once."""

    id: str
    vram_mb: int  # all devices together
    tensor_parallel: int = 1
    instance: str | None = None

    def __str__(self) -> str:
        return self.id if self.instance is None else f"{self.id} instance {self.instance}"

    @property
    def names(self) -> dict[str, object]:
        """As in a command."""
        return {"model_id": self.id, **({} if self.instance is None else {"instance": self.instance})}


MODELS = (
    FaultModel("small/a", 1500),
    FaultModel("small/b", 2500),
    FaultModel("several", 1000, instance="0"),
    FaultModel("several", 1000, instance="1"),
    FaultModel("several", 1000, instance="2"),
    FaultModel("several", 1000),
    FaultModel("middle", 5000),
    FaultModel("large", 7500),
    FaultModel("wide", 8000, tensor_parallel=2),
)


class Faults:
    """Each method uses `pick`, 0 to 1, to choose among the candidates, and returns in words what it did."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._ports: list[socket.socket] = []
        self._calls: set[asyncio.Task[str]] = set()

    async def close(self) -> None:
        """Waits for the background calls, which end when no process is left to answer, and releases the ports."""
        await self.calls_answered(0)
        self._free_ports()

    # Models.

    async def load(self, pick: float) -> str:
        return await self._load(_chosen(MODELS, pick))

    async def load_in_passing(self, pick: float) -> str:
        """Does not wait for the load to finish."""
        self._in_passing(self.load(pick))
        return f"load of {_chosen(MODELS, pick)} begun"

    async def unload(self, pick: float) -> str:
        model = _chosen(MODELS, pick)
        return f"unload {model}: {await self.host.post('/models/unload', model.names)}"

    async def unload_in_passing(self, pick: float) -> str:
        self._in_passing(self.unload(pick))
        return f"unload of {_chosen(MODELS, pick)} begun"

    async def unload_model(self, model_id: str) -> str:
        return f"unload {model_id}: {await self.host.post('/models/unload', {'model_id': model_id})}"

    async def calls_answered(self, _pick: float) -> str:
        """Waits for the answers to all background calls."""
        return f"answers: {await asyncio.gather(*self._calls)}"

    # Engines.

    async def kill_engine(self, pick: float) -> str:
        return await self._signal_engine(pick, signal.SIGKILL)

    async def kill_core(self, pick: float) -> str:
        return await self._signal_engine(pick, signal.SIGKILL, core=True)

    async def stop_engine(self, pick: float) -> str:
        return await self._signal_engine(pick, signal.SIGSTOP)

    async def stop_core(self, pick: float) -> str:
        """Not noticed without a request; stopping the engine must end this process too."""
        return await self._signal_engine(pick, signal.SIGSTOP, core=True)

    async def sicken_engine(self, pick: float) -> str:
        """Makes the health check fail while the process lives. (A signal that arrives during the load is ignored.)"""
        return await self._signal_engine(pick, signal.SIGUSR2)

    async def hang_engine(self, pick: float) -> str:
        """Sends a request that the engine never answers: neuron must notice from its counters."""
        loaded = await self._loaded()
        if not loaded:
            return "no engine to be hung"
        key = _chosen(sorted(loaded), pick)
        send(loaded[key], signal.SIGUSR1)
        self._in_passing(self._ask(key))
        await self._until_loaded(lambda now: now.get(key) != loaded[key], f"{key} hangs, and is ended")
        return f"{key} hung, with a request, and found out"

    async def steal_port(self, pick: float) -> str:
        """Kills an engine with all its processes, and takes its port at once."""
        processes = await asyncio.to_thread(engine_processes, self.host.mark)
        name, pid = _engine(pick, processes)
        if pid is None:
            return "no engine whose port could be stolen"
        port = _port_of(pid)
        for process in processes:
            if process.session == pid:
                send(process.pid, signal.SIGKILL)
        self._free_ports(but=_HELD_PORTS - 1)
        deadline = time.monotonic() + _STEAL_SECS
        while port is not None and time.monotonic() < deadline:
            with contextlib.suppress(ListenError):  # its processes are not dead yet, or another process was faster
                self._ports.append(bind("127.0.0.1", port))
                return f"kill -9 of all of {name}, and its port {port} taken"
            await asyncio.sleep(0.002)
        return f"kill -9 of all of {name}, and its port {port} not to be had"

    async def kill_engine_behind_neurons_back(self, pick: float) -> str:
        """Kills an engine while neuron is stopped."""
        self.host.neuron.send_signal(signal.SIGSTOP)
        try:
            name = await self._signal_engine(pick, signal.SIGKILL)
        finally:
            self.host.neuron.send_signal(signal.SIGCONT)
        return f"{name}, while neuron is stopped"

    # Neuron.

    async def kill_neuron(self, _pick: float) -> str:
        """Its engines keep running; the next neuron adopts the healthy ones without a new start."""
        kept = {}
        if not self.host.disk_was_full and not self._calls:
            kept = {name: pid for name, pid in (await self._loaded()).items() if await self.host.answers(name)}
        await self.host.kill()
        await self.host.start()
        await self._until_loaded(lambda now: kept.items() <= now.items(), f"{kept} are adopted")
        return f"kill -9 of neuron, and a new one, which adopts {sorted(map(str, kept))}"

    async def kill_neuron_as_it_loads(self, pick: float) -> str:
        """Kills it at a random moment between the command and the engine's readiness."""
        model = _chosen(MODELS, (pick * 7) % 1)
        self._in_passing(self._load(model))
        await asyncio.sleep(pick * _LOAD_SECS)
        await self.host.kill()
        await self.host.start()
        return f"kill -9 of neuron {pick * _LOAD_SECS:.3f} s after a load of {model}, and a new one"

    async def kill_neuron_as_it_begins(self, pick: float) -> str:
        """Kills it twice; the second time at a random moment of its start, while it looks for engines."""
        await self.host.kill()
        await self.host.launch()
        await asyncio.sleep(pick * _BEGIN_SECS)
        await self.host.kill()
        await self.host.start()
        return f"kill -9 of neuron, of a new one after {pick * _BEGIN_SECS:.3f} s, and a third"

    async def kill_neuron_and_engine(self, pick: float) -> str:
        """The engine ends unnoticed and leaves its core."""
        await self.host.kill()
        name = await self._signal_engine(pick, signal.SIGKILL)
        await self.host.start()
        return f"kill -9 of neuron, {name}, and a new neuron"

    async def restart_neuron(self, _pick: float) -> str:
        """A regular stop, which stops the engines."""
        status = await self.host.stop()
        left = await asyncio.to_thread(engine_processes, self.host.mark)
        assert (status, left) == (0, []), f"status {status}, left {left}\n{self.host.log_tail()}"
        await self.host.start()
        return "SIGTERM to neuron, and a new one"

    # Memory and disk.

    async def fill_device(self, pick: float) -> str:
        """A foreign process takes all free memory of a device."""
        index = _chosen(range(DEVICES), pick)
        used = (await asyncio.to_thread(vram.used_mb, self.host.vram_dir))[self.host.uuids[index]]
        self.host.hold_foreign(index, self.host.foreign_mb[index] + max(DEVICE_MB - used, 0))
        return f"device {index} full: a foreign process has {self.host.foreign_mb[index]} MiB of it"

    async def empty_devices(self, _pick: float) -> str:
        for index in range(DEVICES):
            self.host.hold_foreign(index, 0)
        return "all foreign processes gone"

    async def fill_disk(self, _pick: float) -> str:
        """Run records cannot be written until this is called again or neuron is restarted."""
        self.host.limit_disk(full=not self.host.disk_full)
        return "disk full" if self.host.disk_full else "room on the disk again"

    async def heal(self, _pick: float) -> str:
        """Ends every fault that lasts."""
        if self.host.disk_full:
            self.host.limit_disk(full=False)
        self._free_ports()
        return await self.empty_devices(0)

    # Helpers.

    async def _load(self, model: FaultModel) -> str:
        body: dict[str, object] = {**model.names, "harness": "sim", "vram_mb": model.vram_mb}
        if model.tensor_parallel > 1:
            body["tensor_parallel"] = model.tensor_parallel
        return f"load {model}: {await self.host.post('/models/load', body)}"

    async def _ask(self, key: InstanceKey) -> str:
        """A request to an engine. It may fail; it must not hang."""
        try:
            endpoint = await self.host.endpoint(key)
            headers = {"Authorization": f"Bearer {endpoint['api_key']}"}
            async with self.host.http.post(
                endpoint["url"] + "/v1/chat/completions", json={**_CHAT, "model": key.model_id}, headers=headers
            ) as response:
                return f"request to {key}: {response.status}"
        except (aiohttp.ClientError, AssertionError) as error:
            return f"request to {key}: {type(error).__name__}"

    def _in_passing(self, call: Coroutine[Any, Any, str]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _signal_engine(self, pick: float, number: signal.Signals, *, core: bool = False) -> str:
        name, pid = _engine(pick, await asyncio.to_thread(engine_processes, self.host.mark), core=core)
        send(pid, number)
        return f"{number.name} to {name}"

    async def _loaded(self) -> dict[InstanceKey, int]:
        """The processes of the loaded engines."""
        return {
            InstanceKey(model["id"], model["instance"]): model["pid"]
            for model in await self.host.models()
            if model["status"] == "loaded"
        }

    async def _until_loaded(self, wanted: Callable[[Mapping[InstanceKey, int]], bool], what: str) -> None:
        """Waits until the loaded engines are `wanted`; `what` is that in words."""
        deadline = time.monotonic() + SEEN_SECS
        while not wanted(now := await self._loaded()):
            assert time.monotonic() < deadline, f"{what}: not within {SEEN_SECS:g} s; loaded are {now}"
            await asyncio.sleep(0.02)

    def _free_ports(self, but: int = 0) -> None:
        while len(self._ports) > but:
            self._ports.pop(0).close()


def _engine(pick: float, processes: Sequence[EngineProcess], *, core: bool = False) -> tuple[str, int | None]:
    """Name and pid of one of the engines' leaders, or cores."""
    found = sorted(each.pid for each in processes if (each.is_core if core else each.pid == each.session))
    if not found:
        return "no engine", None
    pid = _chosen(found, pick)
    return f"{'core' if core else 'engine'} {pid}", pid


def _chosen(among: Sequence[Item], pick: float) -> Item:
    return among[min(int(pick * len(among)), len(among) - 1)]


def _port_of(pid: int) -> int | None:
    """The port in an engine's command line."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return int(words[words.index(b"--port") + 1])
    return None
