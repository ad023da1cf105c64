"""TCP ports for programs that must be told their port before they start."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

FIRST, LAST = 10_000, 19_999
"""Below the kernel's range for connections and for "any port", from which others take ports at any time, and outside
the default ranges of engines."""


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on and that no other caller on this host gets for a long while: tests
    run side by side in several processes, and between the choice of a port and its use another could take it."""
    counter = Path(tempfile.gettempdir()) / f"cortex-neuron-test-port-{os.getuid()}"
    with counter.open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = _next_free(int(file.read() or LAST))
        file.truncate(0)
        file.write(str(port))
    return port


def _next_free(previous: int) -> int:
    for step in range(1, LAST - FIRST + 2):
        port = FIRST + (previous - FIRST + step) % (LAST - FIRST + 1)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port from {FIRST} to {LAST} is free")
