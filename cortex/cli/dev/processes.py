"""The processes of a development fleet: cortex and its neurons, which are restarted when they exit."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomli_w

from cortex.cli.dev.orphans import adopt_orphans, kill_adopted, reap_adopted
from shared.tasks import TaskSet, first_of

CORTEX: Final = "cortex"  # a neuron of the same name stops together with cortex, instead of before it
STOP_TIMEOUT_SECS: Final = 40.0
EARLY_EXIT_SECS: Final = 5.0
"""A process that exits sooner is restarted only after a pause."""
MAX_PAUSE_SECS: Final = 30.0


@dataclass
class Child:
    """One process. Its socket and configuration stay open for its successor, so that its port stays the same."""

    name: str
    module: str
    config_fd: int
    sock: socket.socket
    fds: tuple[int, ...]
    options: tuple[str, ...]
    process: asyncio.subprocess.Process
    pause_secs: float = 0.0

    @property
    def label(self) -> str:
        return self.name if self.module == CORTEX else f"neuron {self.name}"


def memory_file(name: str, table: dict[str, Any]) -> int:
    """A configuration as an anonymous memory file, which needs no cleanup."""
    fd = os.memfd_create(name, 0)
    os.write(fd, tomli_w.dumps(table).encode())
    return fd


class DevFleet:
    """The child processes: each in its own session, so that Ctrl-C reaches only this process, and each holding the
    read end of a pipe whose only writer is this process, so that they stop when it dies."""

    def __init__(self) -> None:
        """Needs a running loop."""
        adopt_orphans()
        self._lifeline, self._writer = os.pipe()
        self._children: list[Child] = []
        self._tasks = TaskSet()
        self._starting = 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    async def start(
        self,
        name: str,
        module: str,
        config_fd: int,
        sock: socket.socket,
        *fds: int,
        options: tuple[str, ...] = (),
    ) -> None:
        """Starts a process; takes `config_fd`, `sock` and `fds` over."""
        process = await self._execute(module, config_fd, sock, fds, options)
        self._children.append(Child(name, module, config_fd, sock, fds, options, process))

    async def first_exit(self) -> str:
        """Waits for a child to exit; returns which one, and how it ended."""
        first = await first_of({number: child.process.wait() for number, child in enumerate(self._children)})
        assert first is not None
        return _ended(self._children[first])

    def keep_running(self) -> None:
        """From now on restarts each child that exits, and says so."""
        for child in self._children:
            _task = self._tasks.spawn(self._restart(child), name=f"restarts of {child.label}")

    def signal_all(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.process.returncode is None:
                child.process.send_signal(number)

    async def stop(self) -> None:
        """Cortex first, so that it does not see its neurons leave; then the neurons, which stop their engines. Removes
        what a neuron that was killed, or did not come up, has left of its state."""
        await self._tasks.close()
        await self._end([child.process for child in self._children if child.name == CORTEX])
        await self._end([child.process for child in self._children if child.name != CORTEX])
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        await asyncio.to_thread(kill_adopted)
        for child in self._children:
            if child.module != CORTEX:
                await asyncio.to_thread(shutil.rmtree, _state_dir(child.sock), ignore_errors=True)
            child.sock.close()
            for fd in (child.config_fd, *child.fds):
                os.close(fd)
        os.close(self._writer)
        os.close(self._lifeline)

    async def _execute(
        self, module: str, config_fd: int, sock: socket.socket, fds: tuple[int, ...], options: tuple[str, ...]
    ) -> asyncio.subprocess.Process:
        arguments = ["serve", "--config", f"/dev/fd/{config_fd}", "--fd", str(sock.fileno()), *options]
        self._starting += 1
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", module, *arguments, "--lifeline-fd", str(self._lifeline)),
                stdin=asyncio.subprocess.DEVNULL,
                # The configuration is complete: no variable meant for a real cortex or neuron changes it.
                env={key: value for key, value in os.environ.items() if not key.startswith(("CORTEX_", "NEURON_"))},
                pass_fds=(config_fd, sock.fileno(), self._lifeline, *fds),
                start_new_session=True,
            )
        finally:
            self._starting -= 1

    async def _restart(self, child: Child) -> None:
        while True:
            started = time.monotonic()
            await child.process.wait()
            early = time.monotonic() - started < EARLY_EXIT_SECS
            child.pause_secs = min(max(2 * child.pause_secs, 1.0), MAX_PAUSE_SECS) if early else 0.0
            when = f" in {child.pause_secs:g} s" if child.pause_secs else ""
            print(f"cortex dev: {_ended(child)}; restarting it{when}", file=sys.stderr, flush=True)
            await asyncio.sleep(child.pause_secs)
            child.process = await self._execute(child.module, child.config_fd, child.sock, child.fds, child.options)

    def _reap(self) -> None:
        if not self._starting:  # else a child of ours may have no entry yet
            reap_adopted({child.process.pid for child in self._children})

    async def _end(self, processes: list[asyncio.subprocess.Process]) -> None:
        """SIGTERM, then SIGKILL after the time that draining and stopping engines may take."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [process for process in processes if process.returncode is None]
            for process in running:
                process.send_signal(number)
            if running:
                await asyncio.wait(
                    [asyncio.create_task(process.wait()) for process in running], timeout=STOP_TIMEOUT_SECS
                )


def _ended(child: Child) -> str:
    code = child.process.returncode
    assert code is not None
    return f"{child.label} " + (f"was killed by signal {-code}" if code < 0 else f"exited with status {code}")


def _state_dir(sock: socket.socket) -> Path:
    """Where a neuron without `state_dir` keeps its state (docs/configuration.md)."""
    return Path(tempfile.gettempdir(), f"neuron-{os.getuid()}-{sock.getsockname()[1]}")
