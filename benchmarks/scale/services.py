"""cortex and neuron as child processes of a benchmark, and kernel statistics of a process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

STOP_SECS = 30.0
_NS_PER_SEC = 1e9
_PORTS = range(21000, 32000)


class Child:
    """A child process of the benchmark with its output in a file. Stopped by `stop` or at the end of the `with`
    block."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cpus: Collection[int] | None = None,
        environ: Mapping[str, str] | None = None,
        directory: str | None = None,
    ) -> None:
        """`environ` replaces the environment; `cpus` None inherits this process's CPU affinity."""
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=directory,
                start_new_session=True,
                preexec_fn=_pinned_to(cpus),  # noqa: PLW1509 - only sets the affinity; this process has no threads
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> Path:
        return self._log

    def check(self) -> None:
        """Raises RuntimeError with its last output if it has exited."""
        if self._process.poll() is not None:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.returncode}:\n{self.last_lines()}")

    def last_lines(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])

    def stop(self) -> None:
        """Sends SIGTERM, then SIGKILL to its session if it does not exit in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()


def service(package: str, config: Path, *, cpus: Collection[int] | None = None) -> Child:
    """`cortex serve` or `neuron serve` with this configuration; its output goes next to it."""
    return Child(
        [sys.executable, "-m", package, "serve", "--config", str(config)],
        config.with_suffix(".log"),
        cpus=cpus,
        environ={**os.environ, "XDG_STATE_HOME": str(config.parent)},  # keeps the home directory clean
    )


def free_ports(count: int) -> list[int]:
    """Distinct free TCP ports, below the system's ephemeral range."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if len(found) == count:
            break
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


def cpu_secs(pid: int) -> float:
    """CPU time of a process so far, from the scheduler's nanosecond counters of its threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
    return total / _NS_PER_SEC


def rss_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def children_of(pid: int) -> list[int]:
    """The live children of a process, across all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    return found


def _pinned_to(cpus: Collection[int] | None) -> Callable[[], None] | None:
    return None if cpus is None else lambda: os.sched_setaffinity(0, cpus)
