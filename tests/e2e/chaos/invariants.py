"""What must never happen in the fleet, checked continuously, and what must hold at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from neuron.engine import session
from tests.e2e.chaos.fleet import Fleet, NeuronHost, Service, served_model
from tests.e2e.chaos.models import model_of
from tests.neuron.neurons import marked_processes

_PROCESSES_SECS = 0.05  # between two checks
_NEURONS_SECS = 0.15
SETTLE_SECS = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")
_YOUNG_SECS = 3.0  # younger processes may still become engines: between fork and exec they look like their neuron
_QUIET = frozenset({"loaded", "unloaded", "sleeping", "failed"})


@dataclass
class Watch:
    """Checks the processes and asks the neurons until it is cancelled. `found` has each violation once, with the
    monotonic time of its first occurrence."""

    fleet: Fleet
    found: dict[str, float] = field(default_factory=dict)
    checks: int = 0
    started: int = 0
    most_engines: int = 0
    _known: dict[tuple[int, int], tuple[str, str] | None] = field(default_factory=dict)

    async def run(self) -> None:
        await asyncio.gather(self._watch_processes(), *(self._watch_neuron(neuron) for neuron in self.fleet.neurons))

    async def _watch_processes(self) -> None:
        while True:
            self._note(await asyncio.to_thread(self._duplicates))
            self.checks += 1
            await asyncio.sleep(_PROCESSES_SECS)

    async def _watch_neuron(self, neuron: NeuronHost) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                health, models = await asyncio.gather(neuron.get("/health"), neuron.get("/models"))
                self._note(overbooked(neuron, health, models))
            await asyncio.sleep(_NEURONS_SECS)

    def _note(self, found: list[str]) -> None:
        for what in found:
            self.found.setdefault(what, time.monotonic())

    def _duplicates(self) -> list[str]:
        """Models that have more engines on a host than they may."""
        leaders: dict[tuple[str, str], list[int]] = defaultdict(list)
        seen = set()
        for process in session.processes():
            if process.alive and process.session == process.pid:
                key = process.pid, process.start_ticks
                seen.add(key)
                engine = self._engine_of(key)
                if engine is not None:
                    leaders[engine].append(process.pid)
        self._known = {key: engine for key, engine in self._known.items() if key in seen}
        self.most_engines = max(self.most_engines, len(leaders))
        return [
            f"{model_id} has {len(pids)} engines on {host}: {sorted(pids)}"
            for (host, model_id), pids in leaders.items()
            if len(pids) > model_of(model_id).most_engines(self.fleet.neuron(host).shape)
        ]

    def _engine_of(self, key: tuple[int, int]) -> tuple[str, str] | None:
        """The host and the model of a session leader; None if it is not an engine."""
        if key in self._known:
            return self._known[key]
        pid, start_ticks = key
        engine_id, model_id = session.engine_id_of(pid), served_model(pid)
        host = next((each.name for each in self.fleet.neurons if (engine_id or "").startswith(each.id_prefix)), None)
        engine = None if host is None or model_id is None else (host, model_id)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / _TICKS
        self.started += engine is not None
        if engine is not None or age > _YOUNG_SECS:
            self._known[key] = engine
        return engine


def overbooked(neuron: NeuronHost, health: Mapping[str, Any], models: list[Mapping[str, Any]]) -> list[str]:
    """Devices with more memory booked than they have; loads that ran out of memory."""
    found = [
        f"{neuron.name}: device {device['index']}: {device[name]} MiB {words} of {total}"
        for device, total in zip(health["devices"], neuron.shape.devices_mb, strict=True)
        for name, words in (("vram_booked_mb", "booked"), ("vram_used_mb", "used"))
        if device[name] > total
    ]
    found += [
        f"{neuron.name}: {model['id']} ran out of memory: {model['error']}"
        for model in models
        if "out of memory" in (model.get("error") or "") and "killed" not in model["error"]
    ]
    return found


async def settled(fleet: Fleet) -> list[str]:
    """Waits until nothing is in progress. Returns what still is after SETTLE_SECS, normally nothing."""
    deadline = time.monotonic() + SETTLE_SECS
    while True:
        found = [what for service in fleet.services for what in await _in_progress(service)]
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.1)


async def _in_progress(service: Service) -> list[str]:
    try:
        if isinstance(service, NeuronHost):
            models = await service.get("/models")
            return [
                f"{service.name}: {model['id']} is {model['state']}" for model in models if model["state"] not in _QUIET
            ]
        fleet = await service.get("/fleet")
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        return [f"{service.name} does not answer: {type(error).__name__} {error}"]
    return [
        *(f"{service.name}: {each['count']} in flight: {each}" for each in fleet["in_flight"] if each["count"]),
        *(f"{service.name}: still loading: {load}" for load in fleet["loads"]),
        *(f"{service.name}: {node['name']} is not healthy" for node in fleet["nodes"] if not node["healthy"]),
    ]


async def nothing_left(fleet: Fleet) -> list[str]:
    """Processes and ports that remain after all models were unloaded and all services have exited."""
    found = [
        f"process {pid}: {_command(pid)}"
        for pid in await asyncio.to_thread(marked_processes, fleet.mark)
        if pid != os.getpid()
    ]
    for service in fleet.services:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", service.port))
            except OSError as error:
                found.append(f"port {service.port} of {service.name}: {error}")
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "gone"
