"""What counts as work of a load, and which locks a dead process has left."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from neuron.progress.stale_locks import stale_locks
from neuron.progress.stall import IdleTime, LoadWork, ProcessWork, reported_after


def work(
    cpu_secs: float = 1.0,
    io_bytes: int | None = 1000,
    *,
    pids: tuple[int, ...] = (1,),
    output: tuple[int, int] = (10, 0),
    checks: int = 0,
) -> LoadWork:
    return LoadWork({pid: ProcessWork(cpu_secs, io_bytes) for pid in pids}, output, checks)


@pytest.mark.parametrize(
    ("after", "idle"),
    [
        (work(), True),
        (work(1.05), True),  # a loop that sleeps
        (work(io_bytes=1100), True),  # a few wake-ups
        (work(2.0), False),
        (work(io_bytes=5000), False),
        (work(io_bytes=None), False),  # unknown
        (work(pids=(1, 2)), False),
        (work(pids=(2,)), False),
        (work(output=(11, 0)), False),
        (work(output=(10, 1)), False),  # an unfinished line
        (work(1.3, 50_000, checks=100), True),  # it answers health checks
        (work(2.0, checks=100), False),
        (work(io_bytes=500_000, checks=100), False),
    ],
)
def test_what_counts_as_work(after: LoadWork, idle: bool) -> None:
    """CPU time and I/O above a small rate over 10 s, processes that come and go, and output."""
    time = IdleTime(work(), 100.0)
    assert time.observe(after, 110.0) == (10.0 if idle else 0.0)


def test_idle_time_counts_from_the_last_work() -> None:
    time = IdleTime(work(), 0.0)
    assert time.observe(work(), 50.0) == 50.0
    assert time.observe(work(5.0), 60.0) == 0.0
    assert time.observe(work(5.0), 75.0) == 15.0


def test_when_it_is_told() -> None:
    assert [reported_after(secs) for secs in (600, 300, 10, 0, 3600)] == [120, 60, 2, 120, 120]


def test_locks_of_dead_builds(tmp_path: Path) -> None:
    """Files that exist while a build runs, and files with the pid of a process that has ended; none that is held, and
    not the many that flock leaves behind."""
    environ = {"HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    extensions = tmp_path / ".cache/torch_extensions/py313_cu130"
    inductor = tmp_path / "inductor/locks"
    for directory in (extensions / "dead", extensions / "live", inductor):
        directory.mkdir(parents=True)
    assert stale_locks(environ, {}) == []
    dead, live = extensions / "dead/lock", extensions / "live/lock"
    dead.touch()
    for number in range(5):
        (inductor / f"{number}.lock").touch()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = tmp_path / ".cache/engine/kernels/lock"
    own.parent.mkdir(parents=True)
    own.touch()
    assert sorted(stale_locks(environ, {"ENGINE_CACHE": "engine"})) == sorted([dead, own])
    own.unlink()
    named = inductor / "named.lock"
    named.write_text(f"{ended.pid}\n")
    with live.open("w") as held, (inductor / "held.lock").open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert held.fileno()
        assert sorted(stale_locks(environ, {})) == sorted([dead, named])


def test_a_single_lock_is_named_even_if_its_owner_is_unknown(tmp_path: Path) -> None:
    """The hub's, for example, where the file system has no flock."""
    lock = tmp_path / "hub/.locks/models--org--model/abc.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert stale_locks({"HF_HUB_CACHE": str(tmp_path / "hub")}, {}) == [lock]
