"""The configurations of a development fleet. Pure: options in, tables out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from shared.protocol.topology import MIG_KIND

FIRST_ENGINE_PORT = 20000
ENGINE_PORTS_PER_HOST = 200
MAX_HOSTS = 200
CPU = "cpu"
CPU_HOST_RAM_MB = 64_000
CPU_MODEL = ModelProfile(id="BAAI/bge-m3", devices=0, vram_mb=4000)
"""For a fleet with a host without GPUs."""

MAX_MIG_INSTANCES = 7

_MIG_INSTANCE = re.compile(r"(?P<gpu>.+)-(?P<profile>\d+g\.\d+gb)")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?:(?P<count>\d+)x)?(?P<device>[^,=]+)")


@dataclass(frozen=True)
class SimulatedHost:
    """One host of the fleet, with one kind of GPU, or without any. `devices` as in `[simulate]`."""

    name: str
    devices: tuple[str | Mapping[str, Any], ...]

    @property
    def has_ram(self) -> bool:
        """Whether models on the CPU can be placed there."""
        return not self.devices


@dataclass(frozen=True)
class DevEngine:
    """The engine of the neurons: "sim", or "vllm" with a command and a model directory."""

    harness: str = "sim"
    command: tuple[str, ...] = ()
    model_dir: str | None = None


def parse_fleet(text: str) -> list[SimulatedHost]:
    """`NAME=COUNTxDEVICE,…` as hosts. The device `cpu` means none, `A100-1g.10gb` a MIG instance of one A100.

    Raises:
        ValueError: naming the part that is wrong.
    """
    hosts: list[SimulatedHost] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _HOST.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} must be NAME=COUNTxDEVICE, for example beast=2xRTX5090")
        count = int(match["count"] or 1)
        if not 1 <= count <= 16:
            raise ValueError(f"{part!r}: a host has 1 to 16 devices")
        if any(host.name == match["name"] for host in hosts):
            raise ValueError(f"{part!r}: duplicate host name")
        device = match["device"].strip()
        hosts.append(SimulatedHost(match["name"], _devices(part, device, count)))
    if not 1 <= len(hosts) <= MAX_HOSTS:
        raise ValueError(f"a fleet has 1 to {MAX_HOSTS} hosts")
    return hosts


def _devices(part: str, device: str, count: int) -> tuple[str | Mapping[str, Any], ...]:
    if device.lower() == CPU:
        return ()
    instance = _MIG_INSTANCE.fullmatch(device)
    if instance is None:
        return (device,) * count
    if count > MAX_MIG_INSTANCES:
        raise ValueError(f"{part!r}: a GPU has at most {MAX_MIG_INSTANCES} MIG instances")
    return (instance["gpu"], *[{"kind": MIG_KIND, "parent": 0, "profile": instance["profile"]}] * count)


def neuron_table(host: SimulatedHost, number: int, engine: DevEngine) -> dict[str, Any]:
    """neuron.toml of the host with this number (from 0). The port comes from the inherited socket."""
    first = FIRST_ENGINE_PORT + number * ENGINE_PORTS_PER_HOST
    harness: dict[str, Any] = {"port_range": [first, first + ENGINE_PORTS_PER_HOST - 1]}
    if engine.harness == "vllm":
        harness["command"] = list(engine.command)
        # A small model on a shared CPU: no compilation, and a cache of a fixed size instead of most of the memory.
        harness["extra_args"] = shlex.split("--dtype bfloat16 --enforce-eager --kv-cache-memory-bytes 64M")
        harness["env"] = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {
        "name": host.name,
        "log_level": "warning",
        "drain_timeout_secs": 5,
        "harnesses": [{"name": engine.harness}],
        "harness": {engine.harness: harness},
        "simulate": {"devices": list(host.devices), **({"ram_mb": CPU_HOST_RAM_MB} if host.has_ram else {})},
    }


def cortex_table(
    neurons: list[tuple[str, int]], *, models_config: str, metrics_listen: str, state_dir: Path
) -> dict[str, Any]:
    """cortex.toml for neurons given as (name, port). Requests without a key still work once there are keys: only this
    host can send any."""
    return {
        "models_config": models_config,
        "state_dir": str(state_dir),
        "log_level": "warning",
        "gateway": {"metrics_listen": metrics_listen, "drain_timeout_secs": 5},
        "auth": {"trust_loopback": True},
        "poll": {"interval_secs": 1.0},
        "neurons": [{"name": name, "endpoint": f"http://127.0.0.1:{port}"} for name, port in neurons],
    }


def models_table(example: Catalogue, hosts: list[SimulatedHost], engine: DevEngine) -> dict[str, Any]:
    """The example catalogue for this engine. Pins on hosts that this fleet does not have are removed, and a fleet with
    a host without GPUs gets a model for it."""
    names = {host.name for host in hosts}
    profiles = [*example.models, *([CPU_MODEL] if any(host.has_ram for host in hosts) else [])]
    return {
        "models": [_model(profile, names, engine) for profile in profiles],
        "aliases": {name: alias.model_dump(mode="json") for name, alias in example.aliases.items()},
    }


def _model(profile: ModelProfile, names: set[str], engine: DevEngine) -> dict[str, Any]:
    left_out = {"harness", "quant", "source"}
    table = profile.model_dump(mode="json", exclude_none=True, exclude_unset=True, exclude=left_out)
    table["harness"] = engine.harness
    table["pinned_on"] = [name for name in profile.pinned_on if name in names]
    if engine.model_dir is not None:  # the settings are for a different model
        table |= {"source": engine.model_dir, "args": [], "tools": False}
        table.pop("max_model_len", None)
    return table
