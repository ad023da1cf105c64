"""`cortex dev`: real processes on loopback that end with this one."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from cortex.cli.dev.fleet import (
    DevEngine,
    SimulatedHost,
    cortex_table,
    models_table,
    neuron_table,
    parse_fleet,
)
from cortex.cli.dev.processes import CORTEX, DevFleet, memory_file
from cortex.config.catalogue import Catalogue, load_catalogue
from shared.serve import ListenError, bind
from shared.settings import SettingsError
from shared.system.files import is_writable
from shared.tasks import first_of
from shared.terminal.command_line import fail

MAX_PORT = 65535
READY_TIMEOUT_SECS = 60.0
REMOVE_STATE = "--remove-state"
"""The option of `cortex serve` for a temporary state directory: it removes it also when this process was killed."""


def run_dev(
    fleet: str, *, port: int, engine: str, model_dir: Path | None, vllm_command: str, state_dir: Path | None
) -> int:
    """Runs until a signal, or until a child exits before the fleet is ready; the exit status. `state_dir`: where cortex
    keeps its state; None: in a temporary directory."""
    try:
        if not 0 <= port <= MAX_PORT:
            raise ValueError(f"--port must be from 0 to {MAX_PORT}, got {port}")
        hosts = parse_fleet(fleet)
        if state_dir is not None and not is_writable(state_dir):
            raise ValueError(f"--state-dir {state_dir} is not a directory that can be written")
        started = _engine(engine, model_dir, vllm_command)
        if state_dir is not None:
            return asyncio.run(_dev(hosts, started, port, state_dir.absolute()))
        with tempfile.TemporaryDirectory(prefix="cortex-dev-", ignore_cleanup_errors=True) as temporary:
            return asyncio.run(_dev(hosts, started, port, Path(temporary), (REMOVE_STATE,)))
    except (ValueError, ListenError, SettingsError) as error:
        fail("cortex dev", error)


def _engine(name: str, model_dir: Path | None, vllm_command: str) -> DevEngine:
    if name == "sim":
        return DevEngine()
    if model_dir is None or not model_dir.is_dir():
        raise ValueError("--engine vllm needs --model-dir with the directory of a model")
    return DevEngine("vllm", tuple(shlex.split(vllm_command)), str(model_dir.resolve()))


def example_catalogue() -> Catalogue:
    """models.example.toml: of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "models.example.toml"
    return load_catalogue(installed if installed.exists() else package.parent / "models.example.toml")


async def _dev(
    hosts: list[SimulatedHost], engine: DevEngine, port: int, state_dir: Path, options: tuple[str, ...] = ()
) -> int:
    gateway = bind("127.0.0.1", port)
    url = f"http://127.0.0.1:{gateway.getsockname()[1]}"
    metrics_listen = f"127.0.0.1:{port + 1 if 0 < port < MAX_PORT else 0}"
    fleet, stop = DevFleet(), asyncio.Event()
    _on_signals(fleet, stop)
    try:
        neurons = await _start_neurons(fleet, hosts, engine)
        models_fd = memory_file("models.toml", models_table(example_catalogue(), hosts, engine))
        table = cortex_table(
            neurons, models_config=f"/dev/fd/{models_fd}", metrics_listen=metrics_listen, state_dir=state_dir
        )
        config_fd = memory_file("cortex.toml", table)
        await fleet.start(CORTEX, CORTEX, config_fd, gateway, models_fd, options=options)
        ready = asyncio.create_task(_until_ready(url, len(hosts)))
        exited = asyncio.create_task(fleet.first_exit())
        first = await first_of({"stop": stop.wait(), "exit": exited, "ready": ready})
        if first == "exit":
            print(f"cortex dev: {exited.result()} before the fleet was ready; stopping the rest", file=sys.stderr)
            return 1
        if first == "ready":
            _announce(url, neurons, ready.result())
            fleet.keep_running()
            await stop.wait()
        return 0
    finally:
        await fleet.stop()


def _on_signals(fleet: DevFleet, stop: asyncio.Event) -> None:
    """The first signal stops the fleet; a second one is forwarded and makes the children exit at once."""

    def on_signal() -> None:
        if stop.is_set():
            fleet.signal_all(signal.SIGTERM)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)


async def _start_neurons(fleet: DevFleet, hosts: list[SimulatedHost], engine: DevEngine) -> list[tuple[str, int]]:
    """The neurons as (name, port)."""
    neurons: list[tuple[str, int]] = []
    for number, host in enumerate(hosts):
        sock = bind("127.0.0.1", 0)
        sock.listen()  # from now on callers wait instead of being refused
        neurons.append((host.name, sock.getsockname()[1]))
        config_fd = memory_file(f"{host.name}.toml", neuron_table(host, number, engine))
        await fleet.start(host.name, "neuron", config_fd, sock)
    return neurons


async def _until_ready(url: str, hosts: int) -> list[dict[str, Any]]:
    """Waits until every neuron is healthy; returns the models."""
    deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_SECS
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/health") as response:
                    healthy = (await response.json())["nodes"]["healthy"]
            except (aiohttp.ClientError, OSError, ValueError, LookupError):
                healthy = 0
            if healthy == hosts or asyncio.get_running_loop().time() > deadline:
                async with session.get(f"{url}/v1/models") as response:
                    return list((await response.json())["data"])
            await asyncio.sleep(0.1)


def _announce(url: str, neurons: list[tuple[str, int]], models: list[dict[str, Any]]) -> None:
    print(f"\ncortex is at {url}, its neurons:")
    for name, port in neurons:
        print(f"  {name} at http://127.0.0.1:{port}")
    print("\nModels:")
    for model in models:
        alias = f" = {model['alias_of']}" if "alias_of" in model else ""
        print(f"  {model['id']}{alias}  (can run on {', '.join(model['feasible_on'])})")
    example = models[0]["id"] if models else "MODEL"
    body = f'{{"model": "{example}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    print(f"\nTry: open {url}/ in a browser, or")
    print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print("\nCtrl-C stops everything.", flush=True)
