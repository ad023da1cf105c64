"""`cortex dev` as a user starts it: the real command, real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.processes import alive, descendants, eventually

START_TIMEOUT_SECS = 40
FOREIGN = {"NEURON_TOKEN": "another neuron's", "CORTEX_GATEWAY__LISTEN": "nonsense"}
"""Variables that a user may have set for a real neuron and cortex. A development fleet ignores them."""


@dataclass
class Dev:
    """A running `cortex dev`."""

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    url: str = ""

    def family(self) -> set[int]:
        """Its process and all descendants."""
        return descendants(self.process.pid) | {self.process.pid}

    def text(self) -> str:
        return "".join(self.output)


@contextlib.contextmanager
def running_dev(*arguments: str) -> Iterator[Dev]:
    """`cortex dev` on a free port; the test fails if any of its processes is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cortex", "dev", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **FOREIGN},
    )
    dev = Dev(process)
    reader = threading.Thread(target=_read, args=(dev,), daemon=True)
    reader.start()
    family: set[int] = set()
    try:
        eventually(
            lambda: "Ctrl-C stops" in dev.text() or process.poll() is not None,
            "the announcement of cortex dev",
            within_secs=START_TIMEOUT_SECS,
        )
        match = re.search(r"cortex is at (http://[\w.:]+)", dev.text())
        assert match is not None, dev.text()
        dev.url = match[1]
        yield dev
    finally:
        family = dev.family()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
            eventually(lambda: not alive(family), "the end of every process", within_secs=30)
        finally:
            for pid in alive(family):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()


def _read(dev: Dev) -> None:
    assert dev.process.stdout is not None
    for line in dev.process.stdout:
        dev.output.append(line)
