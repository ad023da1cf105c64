"""cortex itself, as an operator starts it, with one neuron."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders.compiled import compiled
from benchmarks.contenders.contender import Contender, Launch, Place
from benchmarks.contenders.process import REPOSITORY, free_port
from benchmarks.engine.answers import MODEL
from benchmarks.load.request import API_KEY
from shared import __version__

_CONFIG = """
[gateway]
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics_port}"
[[neurons]]
name = "bench"
endpoint = "http://127.0.0.1:{neuron_port}"
"""
_MODELS = f"""
[[models]]
id = "{MODEL}"
harness = "vllm"
"""

_KEYS = f'''
[[keys]]
name = "bench"
key = "{API_KEY}"
rpm = 100000000
tpm = 100000000000
parallel = 100000
'''
"""Limits that admit every request: what is measured is the work."""


def _prepare(checkout: Path, workers: int, *, interpreted: bool, protocol_v1: bool) -> Callable[[Place], Launch]:
    def prepare(place: Place) -> Launch:
        packages = checkout if interpreted else compiled(checkout)
        neuron_port = free_port()
        config = place.directory / "cortex.toml"
        config.write_text(
            _CONFIG.format(port=place.port, metrics_port=free_port(), neuron_port=neuron_port), encoding="utf-8"
        )
        (place.directory / "models.toml").write_text(_MODELS, encoding="utf-8")
        command = [sys.executable, "-m", "cortex", "serve", "--config", str(config)]
        if workers > 1:
            command += ["--workers", str(workers)]
        neuron = [sys.executable, "-m", "benchmarks.contenders.protocol_v1_neuron", str(neuron_port), place.engine_url]
        neuron += ["bare"] if protocol_v1 else []
        # -m prefers modules in the working directory to installed ones.
        path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {"PYTHONPATH": path, "XDG_STATE_HOME": str(place.directory), "CORTEX_KEYS": _KEYS}
        return Launch(command, env=environ, cwd=packages, companions=[neuron], version=__version__)

    return prepare


_ON = (
    "routing by the body's `model`, failover, the key recognised, its limits (requests, tokens, parallel) checked and "
    "settled, their headers, `usage` read, in streams asked for and taken out again, a row in SQLite for each request, "
    "metrics, "
    "request ids and forwarding headers, an access line for each request (written in batches)"
)


def cortex(
    checkout: Path = REPOSITORY,
    name: str = "cortex",
    title: str = "cortex",
    *,
    workers: int = 1,
    interpreted: bool = False,
    protocol_v1: bool = False,
) -> Contender:
    """The cortex of a checkout, compiled as in the container image unless `interpreted`. `protocol_v1`: its neuron
    sends only the fields of protocol v1."""
    on = _ON
    if interpreted:
        on = "the same, not compiled: as it runs from a checkout"
    elif protocol_v1:
        on = "the same; its neuron sends only the fields of protocol v1"
    elif workers > 1:
        on = f"the same in {workers} worker processes, all on the one CPU"
    return Contender(
        name, title, on, _prepare(checkout, workers, interpreted=interpreted, protocol_v1=protocol_v1), workers=workers
    )
