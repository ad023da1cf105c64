"""Output lines in vLLM's format: `(APIServer pid=7) INFO 11-23 11:11:55 [file.py:12] text`."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Literal

Process = Literal["APIServer", "EngineCore"]


def _write(descriptor: int, text: str) -> None:
    # Unbuffered, so that a line is out before a fault kills this process. A reader that went away is no reason to
    # fail: vLLM's logging does not mind either.
    with contextlib.suppress(OSError):
        os.write(descriptor, (text + "\n").encode())


def _prefix(process: Process, pid: int | None) -> str:
    return f"({process} pid={os.getpid() if pid is None else pid}) "


def log(process: Process, source: str, text: str, *, level: str = "INFO", pid: int | None = None) -> None:
    """One record of vLLM's logger on standard output, a line for each line of `text`; `source` is `file.py:line`.

    `pid` is the process's, when it is not this one.
    """
    head = f"{_prefix(process, pid)}{level} {time.strftime('%m-%d %H:%M:%S')} [{source}] "
    for line in text.splitlines():
        _write(1, head + line)


def raw(process: Process, text: str, *, pid: int | None = None) -> None:
    """What vLLM prints beside its logger (progress bars, tracebacks, its web server), on standard error."""
    for line in text.splitlines():
        _write(2, _prefix(process, pid) + line)
