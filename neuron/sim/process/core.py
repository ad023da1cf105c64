"""The engine core: the child process that holds the memory, like vLLM's EngineCore.

It survives a killed server and keeps the memory until it is killed too; a server survives its core by about a second.
It is forked before anything heavy is imported, and this module imports little (no pathlib): so it takes a millisecond
and 3 MiB.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from enum import Enum

TITLE = "VLLM::EngineCore"
"""Its command line in /proc, as vLLM sets it; its process name is the first 15 characters."""
# An orphan that a failed test leaves behind exits after this time.
_ORPHAN_LIFETIME_SECS = 600.0


class CoreState(Enum):
    """The state of the core. When stopped (SIGSTOP), it computes nothing and the server does not notice."""

    RUNNING = "running"
    STOPPED = "stopped"
    DEAD = "dead"


class EngineCore:
    """The core as its server's child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._state = CoreState.RUNNING

    @classmethod
    def fork(cls) -> EngineCore:
        """Starts the core of this process, with its environment, session and output."""
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                _live(server)
            finally:
                os._exit(0)
        return cls(pid)

    def state(self) -> CoreState:
        """The current state."""
        while self._state is not CoreState.DEAD:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                break
            if os.WIFSTOPPED(status):
                self._state = CoreState.STOPPED
            elif os.WIFCONTINUED(status):
                self._state = CoreState.RUNNING
            else:
                self._state = CoreState.DEAD
        return self._state

    def kill(self) -> None:
        """Sends SIGKILL and waits: its memory is free when this returns."""
        if self.state() is not CoreState.DEAD:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._state = CoreState.DEAD


def _live(server: int) -> None:
    """Sleeps until a signal or a long time without its server ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        _set_title()
    while os.getppid() == server:
        time.sleep(_ORPHAN_LIFETIME_SECS)
    time.sleep(_ORPHAN_LIFETIME_SECS)


def _set_title() -> None:
    """Overwrites the arguments of this process but not its environment, as vLLM does with SPT_NOENV=1."""
    title = TITLE.encode()
    with open("/proc/self/comm", "wb", buffering=0) as name:  # noqa: PTH123
        name.write(title)
    with open("/proc/self/stat", "rb") as stat:  # noqa: PTH123
        fields = stat.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    with open("/proc/self/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        memory.seek(start)
        memory.write(title[: end - start - 1].ljust(end - start, b"\0"))
