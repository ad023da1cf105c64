"""`cortex dev` leaves nothing behind, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

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
def test_nothing_is_left(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons, cortex and engines exit after Ctrl-C, SIGTERM and even kill -9 of the command itself, and remove their
    state."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_dev("--fleet", "one=1xRTX3060") as dev:
        load_something(dev)
        assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"cortex", "neuron"}
        family = dev.family()
        assert len(family) == 6, "the command, a neuron, cortex with its recorder and an engine with its core"
        os.kill(dev.process.pid, number)
        code = dev.process.wait(30)
        eventually(lambda: not alive(family), "the end of every process", within_secs=30)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert list(tmp_path.iterdir()) == []


def test_keys_and_usage_are_kept_in_a_given_directory(tmp_path: Path) -> None:
    """Also when cortex is killed and restarted. Requests without a key go on."""

    def call(path: str, body: object = None, key: str = "") -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(dev.url + path, data, {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=30) as response:
            return dict(json.loads(response.read()))

    def usage() -> list[tuple[str, int]]:
        return [(row["key"], row["requests"]) for row in call("/usage?group_by=key")["rows"]]

    chat = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    arguments = ("--fleet", "one=1xRTX3060", "--state-dir", str(tmp_path / "state"))
    with running_dev(*arguments) as dev:
        secret = call("/keys", {"name": "alice"})["key"]
        call("/v1/chat/completions", chat, secret)
        eventually(lambda: ("alice", 1) in usage(), "the usage of the first request", within_secs=30)
        (killed,) = processes_of(dev, "cortex")
        os.kill(killed, signal.SIGKILL)
        eventually(partial(_is_replaced, dev, "cortex", killed), "its successor", within_secs=30)
        eventually(lambda: _is_healthy(dev), "the fleet is healthy again", within_secs=30)
        call("/v1/chat/completions", chat, secret)
    with running_dev(*arguments) as dev:
        load_something(dev)
        eventually(lambda: ("alice", 2) in usage(), "the usage of both", within_secs=30)
        assert [key["name"] for key in call("/keys")["keys"]] == ["alice"]


def state_dirs(dev: Dev) -> list[Path]:
    """Where the neurons of the fleet keep their state."""
    with urllib.request.urlopen(f"{dev.url}/fleet", timeout=10) as response:
        ports = [node["endpoint"].rpartition(":")[2] for node in json.loads(response.read())["nodes"]]
    return [Path(tempfile.gettempdir(), f"neuron-{os.getuid()}-{port}") for port in ports]


def processes_of(dev: Dev, module: str) -> list[int]:
    """The processes that run `python -m MODULE serve`."""
    command, found = f"\0{module}\0serve".encode(), []
    for pid in alive(dev.family()):
        with contextlib.suppress(OSError):
            if command in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.parametrize("module", ["neuron", "cortex"])
def test_killed_process_is_restarted(module: str) -> None:
    """After kill -9 of a neuron or of cortex the fleet goes on at the same addresses: the output names what was killed,
    a restarted neuron takes over its engines, and nothing is left in the end."""
    with running_dev("--fleet", "one=1xRTX3060") as dev:
        load_something(dev)
        states = state_dirs(dev)
        for _ in range(2):
            (killed,) = processes_of(dev, module)
            os.kill(killed, signal.SIGKILL)
            eventually(partial(_is_replaced, dev, module, killed), "its successor", within_secs=30)
            eventually(lambda: _is_healthy(dev), "the fleet is healthy again", within_secs=30)
            load_something(dev)
        named = "neuron one" if module == "neuron" else "cortex"
        assert f"cortex dev: {named} was killed by signal 9; restarting it" in dev.text()
        family = dev.family()
        os.kill(dev.process.pid, signal.SIGINT)
        assert dev.process.wait(30) == 0
        eventually(lambda: not alive(family), "the end of every process", within_secs=30)
    assert not any(state.exists() for state in states)


def _is_replaced(dev: Dev, module: str, killed: int) -> bool:
    return processes_of(dev, module) not in ([], [killed])


def _is_healthy(dev: Dev) -> bool:
    try:
        with urllib.request.urlopen(f"{dev.url}/health", timeout=5) as response:
            return bool(json.loads(response.read())["status"] == "ok")
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_killed_neuron_leaves_no_state(number: signal.Signals) -> None:
    """A neuron that was killed cannot remove its state directory: the command does, also when it stops right then."""
    with running_dev("--fleet", "one=1xRTX3060") as dev:
        load_something(dev)
        states = state_dirs(dev)
        os.kill(processes_of(dev, "neuron")[0], signal.SIGKILL)
        os.kill(dev.process.pid, number)
        assert dev.process.wait(30) == 0
    assert not any(state.exists() for state in states)


def test_failed_start_leaves_no_state(tmp_path: Path) -> None:
    """One host is wrong: the command names the neuron that exited and removes what the others have made so far."""
    found = subprocess.run(
        [sys.executable, "-m", "cortex", "dev", "--port", "0", "--fleet", "a=1xRTX3060,b=1xNoSuchCard"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert found.returncode == 1
    assert f"neuron b exited with status {os.EX_CONFIG} before the fleet was ready" in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_port_in_use_is_said() -> None:
    """It exits with a message, not with a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        second = subprocess.run(
            [sys.executable, "-m", "cortex", "dev", "--port", str(port)],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr


def test_a_wrong_state_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = subprocess.run(
        [sys.executable, "-m", "cortex", "dev", "--port", "0", "--state-dir", str(tmp_path / "file")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert f"--state-dir {tmp_path}/file is not a directory that can be written" in found.stderr


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
