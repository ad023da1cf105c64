"""Starts the simulated engine as neuron does: a child in its own session, whose output is read continuously."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import aiohttp

from neuron.gpu import simulated_vram as vram
from neuron.sim.process.core import TITLE
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[2]
MODEL = "Qwen/Qwen3-8B"
FAST = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "inf")
"""Arguments for an engine without delays."""


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], *, timeout_secs: float = 10) -> None:
    """Polls for a condition without a notification, such as the exit of a foreign process. Raises
    asyncio.TimeoutError."""

    async def polled() -> None:
        while True:
            value = condition()
            if await value if isinstance(value, Awaitable) else value:
                return
            await asyncio.sleep(0.01)

    await asyncio.wait_for(polled(), timeout_secs)


def children_of(pid: int) -> list[int]:
    """The pids of a process's children, including unreaped ones."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def core_of(pid: int) -> int:
    """The pid of an engine's core, found by its title."""
    titles = {child: Path(f"/proc/{child}/cmdline").read_bytes().strip(b"\0") for child in children_of(pid)}
    [core] = [child for child, title in titles.items() if title == TITLE.encode()]
    return core


def memory_environment(directory: Path, *totals_mb: int) -> dict[str, str]:
    """The variables that give an engine its devices, here GPU-0, GPU-1, …"""
    devices = {f"GPU-{index}": total for index, total in enumerate(totals_mb)}
    return {vram.VRAM_DIR_VARIABLE: str(directory), vram.DEVICES_VARIABLE: json.dumps(devices)}


class SimProcess:
    """A running simulated engine and its output so far."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._more = asyncio.Condition()

    @property
    def pid(self) -> int:
        return self.process.pid

    async def read_output(self) -> None:
        """Collects lines until the pipe is closed."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self._more:
                self.lines.append(line.decode().rstrip("\n"))
                self._more.notify_all()

    async def printed(self, text: str, *, timeout_secs: float = 10) -> str:
        """Waits for the first line with `text`."""

        async def found() -> str:
            async with self._more:
                await self._more.wait_for(lambda: any(text in line for line in self.lines))
            return next(line for line in self.lines if text in line)

        return await asyncio.wait_for(found(), timeout_secs)

    async def ready(self, *, timeout_secs: float = 20) -> None:
        """Waits until /health returns 200. Fails with the output when the process exits first."""

        async def polled() -> None:
            async with aiohttp.ClientSession() as session:
                while True:
                    assert self.process.returncode is None, "\n".join(self.lines)
                    with contextlib.suppress(aiohttp.ClientError):
                        async with session.get(f"{self.url}/health") as response:
                            if response.status == 200:
                                return
                    await asyncio.sleep(0.01)

        await asyncio.wait_for(polled(), timeout_secs)

    async def ended(self, *, timeout_secs: float = 10) -> int:
        """Waits for the process to exit; its exit status.

        Not `process.wait()`: asyncio lets that wait for the pipe's end too, which a child of the engine may hold.
        """
        await until(lambda: self.process.returncode is not None, timeout_secs=timeout_secs)
        assert self.process.returncode is not None
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.asynccontextmanager
async def started_engine(
    *arguments: str, env: Mapping[str, str] | None = None, port: int | None = None, model: str = MODEL
) -> AsyncIterator[SimProcess]:
    """A starting engine; its whole session is killed after the body."""
    port = port or free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "neuron.sim", "serve", model, "--port", str(port), *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        cwd=REPOSITORY, env={**os.environ, **(env or {})}, start_new_session=True,
    )  # fmt: skip
    engine = SimProcess(process, port)
    reading = asyncio.create_task(engine.read_output())
    try:
        yield engine
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await reading


@contextlib.asynccontextmanager
async def ready_engine(
    *arguments: str, env: Mapping[str, str] | None = None, port: int | None = None, model: str = MODEL
) -> AsyncIterator[SimProcess]:
    """A healthy engine."""
    async with started_engine(*arguments, env=env, port=port, model=model) as engine:
        await engine.ready()
        yield engine
