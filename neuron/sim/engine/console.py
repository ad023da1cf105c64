"""Output lines in vLLM's format: `(APIServer pid=7) INFO 11-23 11:11:55 [file.py:12] text`."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Literal

Process = Literal["APIServer", "EngineCore"]


def _write(descriptor: int, text: str) -> None:
    # Unbuffered, so that a line is out before a fault kills this process. A closed pipe is ignored, as in vLLM.
    with contextlib.suppress(OSError):
        os.write(descriptor, (text + "\n").encode())


def _prefix(process: Process, pid: int | None) -> str:
    return f"({process} pid={os.getpid() if pid is None else pid}) "


def log(process: Process, source: str, text: str, *, level: str = "INFO", pid: int | None = None) -> None:
    """Writes a record of vLLM's logger to standard output, for each line of `text`. `source` is `file.py:line`; `pid`
    defaults to this process."""
    head = f"{_prefix(process, pid)}{level} {time.strftime('%m-%d %H:%M:%S')} [{source}] "
    for line in text.splitlines():
        _write(1, head + line)


def raw(process: Process, text: str, *, pid: int | None = None) -> None:
    """Writes what vLLM prints without its logger (progress bars, tracebacks, web server) to standard error."""
    for line in text.splitlines():
        _write(2, _prefix(process, pid) + line)
