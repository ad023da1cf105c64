"""A process as /proc/PID/stat describes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shared.system.process_stat import ProcessStat, parse_stat, stat_of


@pytest.mark.parametrize("name", ["sh", "a) b (c", "((", "x y", ") S 1"])
def test_any_process_name_is_parsed(name: str) -> None:
    """The name of a process may contain spaces and parentheses."""
    stat = parse_stat(f"17 ({name}) S 4 5 6 " + "0 " * 7 + "8 9 " + "0 " * 6 + "4711 0")
    assert stat == ProcessStat(17, "S", 4, 5, 6, 4711, cpu_ticks=17)


def test_zombie_is_not_alive_and_keeps_its_start_time() -> None:
    """An exited process is known by the same start time until its parent waits for it, and not at all afterwards."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    running = stat_of(child.pid)
    assert running is not None
    assert running.alive
    assert (running.parent, running.session, running.group) == (os.getpid(), child.pid, child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = stat_of(child.pid)
    assert zombie is not None
    assert not zombie.alive
    assert zombie.start_ticks == running.start_ticks
    child.communicate()
    assert stat_of(child.pid) is None
