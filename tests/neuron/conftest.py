"""Fixtures of the neuron tests. `mark` fails a test that leaves a process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from tests.neuron.neurons import MARK_VARIABLE, Neuron, config_of, marked_processes, neuron_here


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Marks every process that the test starts, and fails the test if one is alive after it."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK_VARIABLE, value)
    yield value
    left = marked_processes(value)
    described = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")) for pid in left]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while marked_processes(value) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"left behind: {described}"


@pytest.fixture
async def neuron(mark: str, tmp_path: Path) -> AsyncIterator[Neuron]:
    """A neuron with two simulated GPUs, served in this process. After the test none of its ports is in use."""
    # Code of ours that blocks the event loop raises: a blocked neuron answers no /health.
    with blockbuster_ctx(["neuron", "shared"]):
        async with neuron_here(config_of(tmp_path / "state")) as served:
            yield served
    assert not served.reserved_ports
