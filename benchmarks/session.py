"""A benchmark runs in its own session, with CPU priority, and only one at a time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from benchmarks.limits import prefer
from tests.environment.cache import locked


def in_own_session(main: Callable[[], int]) -> int:
    """Calls `main` in a child process; its exit status.

    Where the kernel groups processes by session, the CPU preference applies to a whole session; the caller's shell must
    not keep it. Waits while another benchmark runs on this machine. SIGINT and SIGTERM raise SystemExit in the child,
    so that it stops the processes it started.
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
