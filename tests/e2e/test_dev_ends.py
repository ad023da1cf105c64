"""`cortex dev` leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.dev import Dev, running_dev
from tests.processes import alive, eventually


def load_something(dev: Dev) -> None:
    """Loads a model, so that a neuron has an engine."""
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{dev.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        response.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(number: signal.Signals) -> None:
    """Neurons, cortex and engines exit after Ctrl-C, SIGTERM and even kill -9 of the command itself."""
    with running_dev("--fleet", "one=1xRTX3060") as dev:
        load_something(dev)
        with urllib.request.urlopen(f"{dev.url}/fleet", timeout=10) as response:
            port = json.loads(response.read())["nodes"][0]["endpoint"].rpartition(":")[2]
        state = Path(tempfile.gettempdir(), f"neuron-{os.getuid()}-{port}")
        assert state.is_dir()
        family = dev.family()
        assert len(family) == 5, "the command, a neuron, cortex and an engine with its core"
        os.kill(dev.process.pid, number)
        code = dev.process.wait(30)
        eventually(lambda: not alive(family), "the end of every process", within_secs=30)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert not state.exists()


def test_killed_neuron_ends_the_fleet_with_its_engines() -> None:
    """kill -9 of a neuron orphans its engines. They still end with the fleet, which names the neuron that exited."""
    with running_dev("--fleet", "one=1xRTX3060") as dev:
        load_something(dev)
        family = dev.family()
        (neuron,) = [pid for pid in family if b"\0neuron\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(neuron, signal.SIGKILL)
        assert dev.process.wait(30) == 1
        eventually(lambda: not alive(family), "the end of every process", within_secs=30)
        assert "one exited" in dev.text()


def test_port_in_use_is_said() -> None:
    """A second fleet on the same port exits with a message, not with a traceback."""
    with running_dev("--fleet", "one=1xRTX3060") as dev:
        port = dev.url.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "cortex", "dev", "--port", port],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr


@pytest.mark.parametrize(
    ("fleet", "named"),
    [
        ("nonsense", "'nonsense'"),
        ("a=0xRTX3060", "'a=0xRTX3060'"),
        ("a=1xRTX3060,a=1xRTX3060", "duplicate host name"),
        ("a=1xNoSuchCard", "NoSuchCard"),
        ("", "1 to 200 hosts"),
    ],
)
def test_wrong_fleet_is_said(fleet: str, named: str) -> None:
    """The error names the invalid part."""
    found = subprocess.run(
        [sys.executable, "-m", "cortex", "dev", "--port", "0", "--fleet", fleet],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert named in found.stderr
