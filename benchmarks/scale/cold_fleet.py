"""A cortex and a neuron with one model, and the timing of a cold load as seen from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scale.http1 import Answer, Connection, request_bytes, until_answers
from benchmarks.scale.services import Child, children_of, free_ports, service

MODEL = "bench/cold"
CHAT = "/v1/chat/completions"
WATCH_SECS = 0.002
"""Polling interval: the resolution of every time below."""
START_TIMEOUT_SECS = 600.0
_HOST = "127.0.0.1"
# A wide range: a port whose engine closed a connection first is not reused for a minute (TIME_WAIT).
_ENGINE_PORTS = (32001, 32700)


@dataclass(frozen=True)
class EngineKind:
    """How a run starts its engines; `command` None uses the harness's own."""

    harness: str
    args: list[str]
    source: str | None = None
    command: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Moments:
    """Times of one cold request, as `time.perf_counter`, in seconds."""

    asked: float
    spawned: float  # the engine's process exists
    ready: float  # its /health returns 200
    loaded: float  # reported on neuron's event stream
    answered: float  # last byte of the answer
    engines: int  # processes that neuron started meanwhile


@dataclass(frozen=True)
class EngineStart:
    """The command neuron started, with enough detail to start it by hand."""

    argv: list[str]
    environ: dict[str, str]
    directory: str


@dataclass(frozen=True)
class ColdFleet:
    """Both services, running and connected."""

    cortex: Child
    neuron: Child
    cortex_port: int
    neuron_port: int

    async def unload(self) -> None:
        """Returns when the engine is gone. Raises RuntimeError."""
        connection = Connection(_HOST, self.cortex_port)
        answer = await connection.post("/fleet/unload", {"model": MODEL})
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"unload: {answer.status} {answer.body!r}")

    async def cold_requests(self, count: int) -> tuple[Moments, list[Answer]]:
        """Sends this many first requests at once on open connections; returns the answers in order of completion."""
        connections = [await Connection(_HOST, self.cortex_port).open() for _ in range(count)]
        before = set(children_of(self.neuron.pid))
        seen: set[int] = set()
        async with _neuron_events(self.neuron_port) as loaded:
            watch = asyncio.create_task(self._watch(before, seen, loaded))
            asked = time.perf_counter()
            asking = asyncio.create_task(_all_answers(connections))
            # An answer before the load is seen is a failure, so stop waiting.
            waits: list[asyncio.Task[Any]] = [watch, asking]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            answers = await asking
            wrong = [answer for answer in answers if answer.status != 200]
            if wrong:
                watch.cancel()
                raise RuntimeError(f"{len(wrong)} of {count} failed: {wrong[0].status} {wrong[0].body[:500]!r}")
            spawned_at, ready_at, loaded_at = await watch
        seen |= set(children_of(self.neuron.pid)) - before
        for connection in connections:
            connection.close()
        return Moments(asked, spawned_at, ready_at, loaded_at, answers[-1].ended_at, len(seen)), answers

    async def _watch(self, before: set[int], seen: set[int], loaded: asyncio.Task[float]) -> tuple[float, float, float]:
        """When the engine's process started, when it became healthy, and when neuron reported it."""
        pid, spawned_at = await _first_child(self.neuron.pid, before)
        seen.add(pid)
        return spawned_at, await until_healthy(await _port_of(pid)), await loaded

    async def warm_secs(self) -> float:
        """How long a request takes when the model is loaded."""
        connection = await Connection(_HOST, self.cortex_port).open()
        answer = await connection.send(chat_request())
        connection.close()
        return answer.secs

    def engine_start(self) -> EngineStart:
        """How the current engine was started, according to the kernel."""
        (pid,) = children_of(self.neuron.pid)
        proc = Path(f"/proc/{pid}")
        pairs = (entry.partition("=") for entry in _entries(proc / "environ"))
        return EngineStart(
            _entries(proc / "cmdline"), {name: value for name, _, value in pairs}, str((proc / "cwd").readlink())
        )


@contextlib.asynccontextmanager
async def cold_fleet(directory: Path, kind: EngineKind) -> AsyncIterator[ColdFleet]:
    """Starts both services in `directory`, and stops them at the end."""
    cortex_port, metrics_port, neuron_port = free_ports(3)
    neuron_toml, cortex_toml = directory / "neuron.toml", directory / "cortex.toml"
    neuron_toml.write_text(_neuron_toml(kind, neuron_port, directory), encoding="utf-8")
    cortex_toml.write_text(_cortex_toml(cortex_port, metrics_port, neuron_port), encoding="utf-8")
    source = "" if kind.source is None else f"source = {json.dumps(kind.source)}\n"
    models_toml = f"[[models]]\nid = {json.dumps(MODEL)}\nharness = {json.dumps(kind.harness)}\n{source}"
    (directory / "models.toml").write_text(models_toml, encoding="utf-8")
    with service("neuron", neuron_toml) as neuron, service("cortex", cortex_toml) as cortex:
        await until_answers(_HOST, neuron_port, "/health", within_secs=30)
        await until_answers(_HOST, cortex_port, "/health", within_secs=30)
        yield ColdFleet(cortex, neuron, cortex_port, neuron_port)


async def by_hand(start: EngineStart, log: Path) -> tuple[float, float]:
    """Starts the engine as neuron did and sends the same request: seconds until ready, seconds of the first answer."""
    # neuron has removed the files this named; everything else is unchanged.
    environ = {**start.environ, "TMPDIR": str(log.parent)}
    (port,) = free_ports(1)
    argv = [*start.argv]
    argv[argv.index("--port") + 1] = str(port)
    spawned = time.perf_counter()
    with Child(argv, log, environ=environ, directory=start.directory) as engine:
        ready = await until_healthy(port, engine)
        connection = await Connection(_HOST, port).open()
        answer = await connection.send(chat_request(start.environ["VLLM_API_KEY"]))
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"engine started by hand: {answer.status} {answer.body[:500]!r}")
    return ready - spawned, answer.secs


def chat_request(key: str | None = None) -> bytes:
    """One short question with a one-token answer."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    return request_bytes("POST", CHAT, body, {} if key is None else {"Authorization": f"Bearer {key}"})


async def until_healthy(port: int, engine: Child | None = None) -> float:
    """When `/health` on the port first returns 200. Raises RuntimeError if `engine` exits first, or TimeoutError."""
    deadline = time.perf_counter() + START_TIMEOUT_SECS
    connection = Connection(_HOST, port)
    while time.perf_counter() < deadline:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if (await connection.get("/health")).status == 200:
                connection.close()
                return time.perf_counter()
        if engine is not None:
            engine.check()
        await asyncio.sleep(WATCH_SECS)
    raise TimeoutError(f"no engine on port {port} within {START_TIMEOUT_SECS:g} s")


async def _all_answers(connections: list[Connection]) -> list[Answer]:
    """The same request on each connection, written at once; the answers in order of completion."""
    answers = await asyncio.gather(*(connection.send(chat_request()) for connection in connections))
    return sorted(answers, key=lambda answer: answer.ended_at)


async def _first_child(pid: int, before: set[int]) -> tuple[int, float]:
    """The first new child of a process, and when it appeared."""
    deadline = time.perf_counter() + START_TIMEOUT_SECS
    while time.perf_counter() < deadline:
        new = set(children_of(pid)) - before
        if new:
            return new.pop(), time.perf_counter()
        await asyncio.sleep(WATCH_SECS)
    raise TimeoutError(f"process {pid} started nothing within {START_TIMEOUT_SECS:g} s")


async def _port_of(pid: int) -> int:
    """The `--port` in an engine's command line, available once it runs the engine's executable."""
    while True:
        argv = _entries(Path(f"/proc/{pid}/cmdline"))
        if "--port" in argv:
            return int(argv[argv.index("--port") + 1])
        await asyncio.sleep(WATCH_SECS)


@contextlib.asynccontextmanager
async def _neuron_events(port: int) -> AsyncIterator[asyncio.Task[float]]:
    """A task that ends when the neuron reports the model as loaded on `/events`, with the time."""
    reader, writer = await asyncio.open_connection(_HOST, port)
    writer.write(request_bytes("GET", "/events", None))
    await reader.readuntil(b"\r\n\r\n")

    async def loaded() -> float:
        while line := await reader.readline():
            if line.startswith(b"data:") and line.startswith(b"{", 5 + (line[5:6] == b" ")):
                view = json.loads(line[5:])
                if view.get("id") == MODEL and view.get("status") == "loaded":
                    return time.perf_counter()
        raise RuntimeError("neuron ended its event stream")

    task = asyncio.create_task(loaded())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        writer.close()


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
