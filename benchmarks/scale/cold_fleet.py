"""What starts an engine for the first request to a model, and stops the other model's: a cortex with a neuron,
llama-swap, and a start by hand. Each has two models and room for one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.scale import stamping_engine
from benchmarks.scale.http1 import Answer, Connection, request_bytes, until_answers
from benchmarks.scale.services import Child, children_of, free_ports, service

MODELS = ("bench/one", "bench/two")
CHAT = "/v1/chat/completions"
WATCH_SECS = 0.001
"""How often a start by hand looks whether the engine answers."""
START_TIMEOUT_SECS = 600.0
_HOST = "127.0.0.1"
# A wide range: a port whose engine closed a connection first is not reused for a minute (TIME_WAIT).
_ENGINE_PORTS = (32001, 32700)
_MODEL_MB = 20_000  # more than half of the simulated card


@dataclass(frozen=True)
class EngineKind:
    """How engines are started: `command` None uses the harness's own. `stamps`: where they record their times."""

    name: str
    harness: str
    args: list[str]
    source: str | None = None
    command: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)
    stamps: Path | None = None


@dataclass(frozen=True)
class EngineStart:
    """The command that neuron started, with enough detail to start it by hand."""

    argv: list[str]
    environ: dict[str, str]
    directory: str

    def argv_for(self, model: str, port: str) -> list[str]:
        argv = [*self.argv]
        argv[argv.index("--served-model-name") + 1] = model
        argv[argv.index("--port") + 1] = port
        return argv


class ColdStarter(Protocol):
    """Starts the engine of the model that a request names, and stops the other's before."""

    @property
    def name(self) -> str: ...

    async def ask(self, model: str) -> Answer:
        """The answer to a short question. Raises RuntimeError if it has not the status 200."""
        ...

    async def unload(self) -> None:
        """Returns when no engine runs."""
        ...


@dataclass(frozen=True)
class ColdFleet:
    """A cortex and a neuron, running and connected."""

    neuron: Child
    cortex_port: int
    name: str = "cortex"

    async def ask(self, model: str) -> Answer:
        return await _ask(self.cortex_port, model)

    async def unload(self) -> None:
        connection = Connection(_HOST, self.cortex_port)
        for model in MODELS:
            answer = await connection.post("/fleet/unload", {"model": model})
            if answer.status not in (200, 404):
                raise RuntimeError(f"unload: {answer.status} {answer.body!r}")
        connection.close()

    async def crowd(self, model: str, count: int) -> tuple[float, list[Answer]]:
        """Sends this many requests at once on open connections: when, and the answers in order of completion."""
        connections = [await Connection(_HOST, self.cortex_port).open() for _ in range(count)]
        asked = time.perf_counter()
        answers = await asyncio.gather(*(connection.send(chat_request(model)) for connection in connections))
        for connection in connections:
            connection.close()
        for answer in answers:
            _check(answer)
        return asked, sorted(answers, key=lambda answer: answer.ended_at)

    def engine_start(self) -> EngineStart:
        """How the running engine was started, according to the kernel. Only of one that was no spare process."""
        commands = {pid: _entries(Path(f"/proc/{pid}/cmdline")) for pid in children_of(self.neuron.pid)}
        (pid,) = (pid for pid, argv in commands.items() if "--port" in argv)
        proc = Path(f"/proc/{pid}")
        pairs = (entry.partition("=") for entry in _entries(proc / "environ"))
        return EngineStart(commands[pid], {name: value for name, _, value in pairs}, str((proc / "cwd").readlink()))


class ByHand:
    """Starts the engine as neuron did, looks every millisecond whether it is healthy, and asks it."""

    name = "by hand"

    def __init__(self, start: EngineStart, directory: Path) -> None:
        self._start = start
        self._log = directory / "by-hand.log"
        # neuron has removed the files this named; everything else is unchanged.
        self._environ = {**start.environ, "TMPDIR": str(directory)}
        self._engine: Child | None = None
        self._model, self._port = "", 0
        self.started_at = 0.0
        """When the last engine was started, as `time.monotonic`."""

    async def ask(self, model: str) -> Answer:
        asked = time.perf_counter()
        if model != self._model:
            await self.unload()
            (self._port,) = free_ports(1)
            self.started_at = time.monotonic()
            argv = self._start.argv_for(model, str(self._port))
            self._engine = Child(argv, self._log, environ=self._environ, directory=self._start.directory)
            self._model = model
            await _until_healthy(self._port, self._engine)
        answer = await _ask(self._port, model, self._start.environ.get("VLLM_API_KEY"))
        return Answer(answer.status, answer.headers, answer.body, asked, answer.first_byte_at, answer.ended_at)

    async def unload(self) -> None:
        if self._engine is not None:
            self._engine.stop()
            self._engine, self._model = None, ""


@dataclass(frozen=True)
class LlamaSwap:
    """llama-swap with the same engines."""

    port: int
    name: str = "llama-swap"

    async def ask(self, model: str) -> Answer:
        return await _ask(self.port, model)

    async def unload(self) -> None:
        connection = Connection(_HOST, self.port)
        _check(await connection.get("/unload"))
        connection.close()


@contextlib.asynccontextmanager
async def cold_fleet(directory: Path, kind: EngineKind) -> AsyncIterator[ColdFleet]:
    """Starts cortex and neuron in `directory`, and stops them at the end."""
    cortex_port, metrics_port, neuron_port = free_ports(3)
    neuron_toml, cortex_toml = directory / "neuron.toml", directory / "cortex.toml"
    neuron_toml.write_text(_neuron_toml(kind, neuron_port, directory), encoding="utf-8")
    cortex_toml.write_text(_cortex_toml(cortex_port, metrics_port, neuron_port), encoding="utf-8")
    source = "" if kind.source is None else f"source = {json.dumps(kind.source)}\n"
    entries = [
        f"[[models]]\nid = {json.dumps(model)}\nharness = {json.dumps(kind.harness)}\nvram_mb = {_MODEL_MB}\n{source}"
        for model in MODELS
    ]
    (directory / "models.toml").write_text("\n".join(entries), encoding="utf-8")
    with service("neuron", neuron_toml) as neuron, service("cortex", cortex_toml):
        await until_answers(_HOST, neuron_port, "/health", within_secs=30)
        await until_answers(_HOST, cortex_port, "/health", within_secs=30)
        yield ColdFleet(neuron, cortex_port)


@contextlib.asynccontextmanager
async def llama_swap(directory: Path, command: str, start: EngineStart) -> AsyncIterator[LlamaSwap]:
    """Starts llama-swap with the engines that neuron starts, and stops it at the end."""
    (port,) = free_ports(1)
    models = {
        model: {
            "cmd": shlex.join(start.argv_for(model, "${PORT}")),
            "proxy": f"http://{_HOST}:${{PORT}}",
            "env": [f"{name}={value}" for name, value in start.environ.items() if name != "VLLM_API_KEY"],
        }
        for model in MODELS
    }
    config = directory / "llama-swap.yaml"
    # JSON is YAML.
    config.write_text(json.dumps({"startPort": _ENGINE_PORTS[1] + 1, "models": models}, indent=1), encoding="utf-8")
    argv = [command, "--config", str(config), "--listen", f"{_HOST}:{port}"]
    with Child(argv, directory / "llama-swap.log") as child:
        try:
            await until_answers(_HOST, port, "/health", within_secs=30)
        except TimeoutError:
            child.check()
            raise
        yield LlamaSwap(port)


def bare_engine(stamps: Path, load_secs: float) -> EngineKind:
    """The engine that records its times in the file `stamps`."""
    command = [sys.executable, "-IS", str(Path(stamping_engine.__file__).resolve())]
    return EngineKind(
        "bare", "sim", ["--load-secs", f"{load_secs:g}", "--stamps", str(stamps)], command=command, stamps=stamps
    )


def chat_request(model: str, key: str | None = None) -> bytes:
    """One short question with a one-token answer."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    return request_bytes("POST", CHAT, body, {} if key is None else {"Authorization": f"Bearer {key}"})


async def _ask(port: int, model: str, key: str | None = None) -> Answer:
    connection = await Connection(_HOST, port).open()
    answer = await connection.send(chat_request(model, key))
    connection.close()
    return _check(answer)


def _check(answer: Answer) -> Answer:
    if answer.status != 200:
        raise RuntimeError(f"answer {answer.status}: {answer.body[:500]!r}")
    return answer


async def _until_healthy(port: int, engine: Child) -> None:
    """Waits until `/health` on the port returns 200. Raises RuntimeError if `engine` exits first, or TimeoutError."""
    deadline = time.perf_counter() + START_TIMEOUT_SECS
    connection = Connection(_HOST, port)
    while time.perf_counter() < deadline:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if (await connection.get("/health")).status == 200:
                connection.close()
                return
        engine.check()
        await asyncio.sleep(WATCH_SECS)
    raise TimeoutError(f"no engine on port {port} within {START_TIMEOUT_SECS:g} s")


def _entries(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="surrogateescape").rstrip("\0").split("\0")


def _neuron_toml(kind: EngineKind, port: int, directory: Path) -> str:
    lines = [
        f'name = "bench"\nport = {port}\nstate_dir = {json.dumps(str(directory / "state"))}',
        f'[[harnesses]]\nname = "{kind.harness}"',
        f"[harness.{kind.harness}]\nport_range = {list(_ENGINE_PORTS)}",
        f"extra_args = {json.dumps(kind.args)}",
        "" if kind.command is None else f"command = {json.dumps(kind.command)}",
        f"[harness.{kind.harness}.env]",
        *(f"{name} = {json.dumps(value)}" for name, value in kind.env.items()),
        '[simulate]\ndevices = ["RTX 5090"]',
    ]
    return "\n".join(lines) + "\n"


def _cortex_toml(port: int, metrics_port: int, neuron_port: int) -> str:
    return (
        f'[gateway]\nlisten = "{_HOST}:{port}"\nmetrics_listen = "{_HOST}:{metrics_port}"\n'
        f'[[neurons]]\nname = "bench"\nendpoint = "http://{_HOST}:{neuron_port}"\n'
    )
