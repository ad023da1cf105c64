"""Compares neuron's view of a host, its models and ledger, with the process table and the memory in use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron.gpu import simulated_vram as vram
from neuron.spec import InstanceKey
from tests.neuron.faults.host import DEVICE_MB, EngineProcess, Host, engine_processes

AGREE_SECS = 5.0
HAS_ENGINE = frozenset({"starting", "loading", "loaded", "sleeping", "waking", "draining", "stopping", "recovering"})
FILLING = frozenset({"starting", "loading", "waking", "recovering"})
LEAVING = frozenset({"draining", "stopping"})
_POLL_SECS = 0.05


@dataclass(frozen=True)
class Sight:
    """Every view at one moment. `held`: pid -> device index -> MiB."""

    models: Sequence[Mapping[str, Any]]
    devices: Sequence[Mapping[str, Any]]
    processes: Sequence[EngineProcess]
    held: Mapping[int, Mapping[int, int]]
    foreign_mb: Mapping[int, int]


async def agreement(host: Host) -> list[str]:
    """Empty as soon as all views agree; otherwise the differences after `AGREE_SECS`."""
    deadline = time.monotonic() + AGREE_SECS
    while True:
        found = await look(host)
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(_POLL_SECS)


async def look(host: Host) -> list[str]:
    """The differences now."""
    before = await host.models()
    health = await host.get("/health")
    processes = await asyncio.to_thread(engine_processes, host.mark)
    usage = await asyncio.to_thread(vram.usage_by_process, host.vram_dir)
    held = {pid: {host.uuids.index(uuid): mb for uuid, mb in each.items()} for pid, each in usage.items()}
    loaded = [_key(model) for model in before if model["status"] == "loaded"]
    silent = [key for key in loaded if not await host.answers(key)]
    after = await host.models()
    if _outline(before) != _outline(after):
        return [f"still moving: {_outline(before)} -> {_outline(after)}"]
    found = differences(Sight(after, health["devices"], processes, held, host.foreign_mb))
    return found + [f"{key} is loaded and does not answer" for key in silent]


def differences(sight: Sight) -> list[str]:
    """States that contradict each other."""
    return [*_processes(sight), *_memory(sight), *_ledger(sight)]


def _processes(sight: Sight) -> list[str]:
    found = []
    owners: dict[int, list[str]] = {}
    for model in sight.models:
        if model.get("pid") is not None:
            owners.setdefault(model["pid"], []).append(str(_key(model)))
            if model["state"] not in HAS_ENGINE:
                found.append(f"{_key(model)} is {model['state']} and names process {model['pid']}")
    found += [f"{' and '.join(ids)} name one process, {pid}" for pid, ids in owners.items() if len(ids) > 1]
    found += [
        f"{'core' if process.is_core else 'process'} {process.pid} of session {process.session} belongs to no model"
        for process in sight.processes
        if process.session not in owners
    ]
    sessions = {process.session for process in sight.processes}
    leaders = {process.pid for process in sight.processes}
    for model in sight.models:
        pid, is_up = model.get("pid"), model["status"] in ("loaded", "sleeping")
        if (is_up or pid is not None) and pid not in (leaders if is_up else sessions):
            found.append(f"{_key(model)} is {model['state']} and nothing is there of its process {pid}")
    return found


def _memory(sight: Sight) -> list[str]:
    found = []
    for device in sight.devices:
        index = device["index"]
        held = sum(each.get(index, 0) for each in sight.held.values())
        if device["vram_used_mb"] != held:
            found.append(f"device {index}: used {device['vram_used_mb']} MiB, held {held}")
    sessions = {process.pid: process.session for process in sight.processes}
    for model in sight.models:
        if model["status"] == "loaded":
            held = sum(sum(each.values()) for pid, each in sight.held.items() if sessions.get(pid) == model["pid"])
            if model["vram_used_mb"] != held:
                found.append(f"{_key(model)}: uses {model['vram_used_mb']} MiB, its processes hold {held}")
    return found


def _ledger(sight: Sight) -> list[str]:
    found = []
    engines = {process.pid for process in sight.processes}
    for device in sight.devices:
        index, booked = device["index"], device["vram_booked_mb"]
        held = sum(each.get(index, 0) for pid, each in sight.held.items() if pid in engines)
        told = sum(
            model["vram_booked_mb"] // len(model["devices"])
            for model in sight.models
            if index in model["devices"] and model["state"] in HAS_ENGINE - LEAVING
        )
        lasting = [model for model in sight.models if model["state"] in HAS_ENGINE - LEAVING]
        ids = [model["id"] for model in lasting if index in model["devices"]]
        found += [f"device {index}: {ids.count(each)} instances of {each}" for each in set(ids) if ids.count(each) > 1]
        if booked > DEVICE_MB:
            found.append(f"device {index}: {booked} MiB are booked of {DEVICE_MB}")
        if booked < held:
            found.append(f"device {index}: {booked} MiB are booked, engines hold {held}")
        if booked != told:
            found.append(f"device {index}: {booked} MiB are booked, its models have {told}")
        # Until an engine holds memory, foreign memory may be counted as its first.
        filling = any(index in model["devices"] and model["state"] in FILLING for model in sight.models)
        if not filling and device["vram_foreign_mb"] != sight.foreign_mb[index]:
            found.append(f"device {index}: foreign {device['vram_foreign_mb']} MiB, not {sight.foreign_mb[index]}")
    return found


def _key(model: Mapping[str, Any]) -> InstanceKey:
    return InstanceKey(model["id"], model["instance"])


def _outline(models: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    return [(_key(model), model["state"], model.get("pid"), tuple(model["devices"] or ())) for model in models]
