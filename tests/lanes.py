"""`python -m tests.lanes [--lanes N] [PATH …]`: runs the tests below these paths, three directories at a time.

Most tests wait for processes and timers, so one pytest uses about a third of a core. Each directory is a pytest process
of its own, whose output appears when it ends. The tests do not share ports, state or names, so any directories can run
at the same time.

A busy machine can make a test fail that is not wrong. So a few failed tests are run again, alone, and the run succeeds
only if each of them then passes three times. They are listed as unsteady: such a test is a fault to mend, in the test
or in what it tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

LANES: Final = 3
NO_TESTS: Final = 5
"""pytest's exit status if it has found none."""

TESTS_FAILED: Final = 1
"""pytest's exit status if all tests have run and some have failed."""

MOST_UNSTEADY: Final = 6
"""More failed tests than these are not run again."""

REPEATS: Final = 3

END_SECS: Final = 20
"""How long an interrupted pytest may take to end the processes of its tests."""

LONGEST: Final = (
    "tests/e2e_vllm",
    "tests/neuron/lifecycle",
    "tests/cortex/proxy",
    "tests/e2e",
    "tests/clients",
    "tests/browser",
    "tests/container",
    "tests/cortex/accounts",
    "tests/e2e/eviction",
    "tests/cortex/control",
    "tests/cortex/config",
    "tests/cortex/simulator",
    "tests/cortex/fleet",
    "tests/e2e_engines",
    "tests/e2e/replicas",
    "tests/cortex/http",
)
"""They start first, so that no lane is left with a long one at the end."""

TOGETHER: Final = (
    "tests/clients",
    "tests/cortex/accounts",
    "tests/cortex/cli",
    "tests/cortex/proxy",
    "tests/deploy",
    "tests/neuron/gpu",
    "tests/neuron/harness",
    "tests/shared",
)
"""Their subdirectories are run with them: they share costly fixtures of the session, such as a PostgreSQL, or take less
time than another start of pytest."""


@dataclass(frozen=True)
class Ran:
    """A directory whose tests have ended. `status` is pytest's, `cache` where it recorded which failed, `cpu_secs` what
    pytest and its children took, without daemons and containers."""

    directory: str
    files: list[str]
    cache: Path
    status: int
    secs: float
    cpu_secs: float
    output: str

    @property
    def failed(self) -> bool:
        return self.status not in (0, NO_TESTS)

    @property
    def failures(self) -> list[str]:
        """The failed tests, as pytest's summary lists them."""
        return [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def directories(paths: Sequence[str]) -> dict[str, list[str]]:
    """The test files below `paths`, by directory, in the order in which they start."""
    files: set[Path] = set()
    for path in map(Path, paths):
        files |= {path} if path.is_file() else set(path.rglob("test_*.py"))
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        parent = file.parent.as_posix()
        directory = next((whole for whole in TOGETHER if f"{parent}/".startswith(f"{whole}/")), parent)
        found.setdefault(directory, []).append(file.as_posix())
    first = [name for name in LONGEST if name in found]
    return {name: found[name] for name in (*first, *(name for name in found if name not in first))}


class Lanes:
    """Runs pytest for each directory. The lanes take the next directory whenever they are free."""

    def __init__(self, waiting: dict[str, list[str]], caches: Path) -> None:
        self.ran: list[Ran] = []
        self._caches = caches
        self._waiting = list(waiting.items())
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, count: int) -> None:
        """Returns when `count` lanes have run all directories. Ends its processes if it is interrupted."""
        lanes = [threading.Thread(target=self._lane, daemon=True) for _ in range(count)]
        try:
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.join()
        finally:
            with self._lock:
                self._waiting.clear()
                left = list(self._running)
            for process in left:
                process.send_signal(signal.SIGINT)
            for process in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_SECS)

    def _lane(self) -> None:
        while True:
            # Not a pipe: a process that a test left would keep it open.
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
                with self._lock:
                    if not self._waiting:
                        return
                    directory, files = self._waiting.pop(0)
                    started = time.monotonic()
                    cache = self._caches / directory.replace("/", "-")
                    process = subprocess.Popen(
                        _pytest(cache, *files), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                    )
                    self._running.add(process)
                cpu_secs = _cpu_secs_when_ended(process.pid)
                status = process.wait()
                output.seek(0)
                ran = Ran(directory, files, cache, status, time.monotonic() - started, cpu_secs, output.read())
            with self._lock:
                self._running.discard(process)
                self.ran.append(ran)
                print(f"\n##### {directory}, {ran.secs:.0f} s\n{ran.output}", flush=True)


def _cpu_secs_when_ended(pid: int) -> float:
    """Waits for the process's end, and leaves its exit status to be read."""
    with contextlib.suppress(ChildProcessError, psutil.NoSuchProcess):  # an interrupted run has read it already
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system + times.children_user + times.children_system
    return 0.0


def _pytest(cache: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", *arguments]


def steady_alone(ran: Ran) -> bool:
    """Whether the failed tests of a directory pass each time that they are run again."""
    for number in range(REPEATS):
        cache = ran.cache.with_name(f"{ran.cache.name}-{number}")
        shutil.copytree(ran.cache, cache)  # pytest would forget the failures that pass
        print(f"\n##### {ran.directory}, its failed tests again, alone ({number + 1} of {REPEATS})", flush=True)
        again = _pytest(cache, "--last-failed", "--last-failed-no-failures=none", *ran.files)
        if subprocess.run(again, stdin=subprocess.DEVNULL, check=False).returncode:
            return False
    return True


def main(paths: Sequence[str], count: int = LANES) -> int:
    with tempfile.TemporaryDirectory() as caches:
        lanes = Lanes(directories(paths or ["tests"]), Path(caches))
        lanes.run(count)
        failed = [ran for ran in lanes.ran if ran.failed]
        few = sum(len(ran.failures) for ran in failed) <= MOST_UNSTEADY
        unsteady = [ran for ran in failed if few and ran.status == TESTS_FAILED and steady_alone(ran)]
    for ran in sorted(lanes.ran, key=lambda each: -each.secs):
        summary = ran.output.rstrip().rpartition("\n")[2].strip("= ")
        print(f"{ran.secs:6.0f} s {ran.cpu_secs:6.0f} s of CPU  {ran.directory}: {summary}")
    for ran in failed:
        what = f"unsteady, passed {REPEATS} times alone" if ran in unsteady else f"failed ({ran.status})"
        print(f"\n{ran.directory} {what}:", *ran.failures, sep="\n")
    return int(len(unsteady) < len(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="python -m tests.lanes")
    parser.add_argument("--lanes", type=int, default=LANES)
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args()
    sys.exit(main(options.paths, options.lanes))
