"""A fleet for the clients: a cortex and a neuron as processes, with simulated engines that take a while to load."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from tests.e2e_vllm.fleet import Service
from tests.neuron.sim_process import free_port
from tests.processes import eventually

MODEL = "org/Qwen3-Agent"
ALIAS = "agent"
BROKEN = {name: f"org/Qwen3-Broken-{name}" for name in ("python", "node", "vercel", "claude", "codex")}
"""A model for each of these clients whose load fails after a while, and would fail again."""
TEXT = f"{MODEL} (simulated)"
"""How every answer of the model begins."""


@dataclass(frozen=True)
class ClientFleet:
    """`url` is what a client is pointed at."""

    cortex: Service

    @property
    def url(self) -> str:
        return self.cortex.url

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def get_ready(self, *, cold: bool) -> None:
        """Makes the next request for the model wait for a load, or find it loaded."""
        loaded = any(model["id"] == MODEL for model in self._models())
        if cold and loaded:
            self.cortex.request("/fleet/unload", {"model": MODEL})
        elif not cold and not loaded:
            self.cortex.request("/fleet/load", {"model": MODEL})

    def _models(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/fleet", timeout=20) as response:
            nodes = json.load(response)["nodes"]
        return [model for node in nodes for model in node["models"] if model["status"] == "loaded"]


@contextlib.contextmanager
def running_fleet(directory: Path) -> Iterator[ClientFleet]:
    """Comments begin long before the load ends: a cold stream has several of them before its first event."""
    ports = [free_port() for _ in range(3)]
    neuron: dict[str, Any] = {
        "name": "n",
        "host": "127.0.0.1",
        "port": ports[0],
        "token_env": "NEURON_TOKEN",
        "state_dir": str(directory / "state"),
        "harnesses": [{"name": "sim"}],
        "harness": {"sim": {"extra_args": ["--load-secs", "1", "--ttft-ms", "5", "--tokens-per-sec", "500"]}},
        "simulate": {"devices": ["RTX5090"]},
    }
    cortex: dict[str, Any] = {
        "models_config": "models.toml",
        "gateway": {"listen": f"127.0.0.1:{ports[1]}", "metrics_listen": f"127.0.0.1:{ports[2]}"},
        "poll": {"interval_secs": 0.1},
        "waiting": {"first_comment_secs": 0.1, "comment_interval_secs": 0.1},
        "neurons": [{"name": "n", "endpoint": f"http://127.0.0.1:{ports[0]}", "token_env": "NEURON_TOKEN"}],
    }
    common: dict[str, Any] = {"harness": "sim", "vram_mb": 4000, "tools": True}
    models: dict[str, Any] = {
        "models": [
            {"id": MODEL, "args": ["--max-model-len", "65536"], "limit": {"context": 65536}, **common},
            *({"id": name, "args": ["--fault", "oom-at-load"], **common} for name in BROKEN.values()),
        ],
        "aliases": {ALIAS: MODEL},
    }
    for name, table in {"neuron.toml": neuron, "cortex.toml": cortex, "models.toml": models}.items():
        (directory / name).write_text(tomli_w.dumps(table), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        services = []
        for package, port in (("neuron", ports[0]), ("cortex", ports[1])):
            service = Service(directory, package, directory / f"{package}.toml", f"http://127.0.0.1:{port}")
            stack.callback(service.stop)
            services.append(service)
        for service in services:
            eventually(service.answers, f"{service.url} answers", within_secs=30)
        yield ClientFleet(services[1])
