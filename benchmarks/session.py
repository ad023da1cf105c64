"""A benchmark runs in a session of its own, before others on the CPU, and never beside another one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from benchmarks.limits import prefer
from tests.environment.cache import locked


def in_own_session(main: Callable[[], int]) -> int:
    """Calls `main` in a child process; its exit status.

    The preference on the CPU holds for a whole session where the kernel groups processes by it, and the caller's shell
    shall not have it afterwards. Waits while another benchmark runs on this machine. SIGINT and SIGTERM end the child
    by a SystemExit, so that what it has started is ended.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_child(main))

    def forward(number: int, _: object) -> None:
        os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(main: Callable[[], int]) -> int:
    os.setsid()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = 1
    try:
        with locked("bench-run"):
            prefer(os.getpid())
            status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)  # noqa: T201  # what the interpreter would do
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _leave(*_: object) -> None:
    raise SystemExit(143)
