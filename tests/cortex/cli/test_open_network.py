"""What cortex says of the addresses that it listens on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tomli_w

TOP = Path(__file__).parents[3]


def command_for(directory: Path, gateway: dict[str, object], state_dir: str | None = "state") -> list[str]:
    table: dict[str, object] = {"gateway": {"metrics_listen": "127.0.0.1:0", **gateway}}
    if state_dir is not None:
        table["state_dir"] = state_dir
    (directory / "cortex.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    (directory / "models.toml").touch()
    return [sys.executable, "-m", "cortex", "serve", "--config", str(directory / "cortex.toml")]


def test_no_key_and_the_network(tmp_path: Path) -> None:
    """cortex does not start, and says what would make it. systemd does not start it again."""
    command = command_for(tmp_path, {"listen": "0.0.0.0:0"})
    ended = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == os.EX_CONFIG
    assert f"`cortex keys create NAME --admin --config {tmp_path}/cortex.toml`" in ended.stderr
    assert "[gateway] allow_anonymous = true" in ended.stderr


def test_the_hint_names_systemds_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not have the unit's variable, and would make the key in another place."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "of-the-unit"))
    command = command_for(tmp_path, {"listen": "0.0.0.0:0"}, state_dir=None)
    ended = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60, check=False)
    assert f"`STATE_DIRECTORY={tmp_path}/of-the-unit cortex keys create NAME" in ended.stderr


@pytest.mark.parametrize(
    ("gateway", "keys"),
    [
        ({"listen": "0.0.0.0:0", "allow_anonymous": True}, ""),
        ({"listen": "0.0.0.0:0"}, "alice:sk-alice"),
        ({"listen": "127.0.0.1:0"}, ""),
    ],
    ids=str,
)
def test_what_may_listen(
    tmp_path: Path, gateway: dict[str, object], keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key, or where the operator has allowed it, or on loopback."""
    monkeypatch.setenv("CORTEX_KEYS", keys)
    with subprocess.Popen(command_for(tmp_path, gateway), cwd=TOP, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "cortex listening on" in line:
                process.terminate()
        assert process.wait(20) == 0


def test_workers_do_not_inherit_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need digests only."""
    monkeypatch.setenv("CORTEX_KEYS", "alice:sk-alice")
    command = command_for(tmp_path, {"listen": "127.0.0.1:0", "workers": 2})
    with subprocess.Popen(command, cwd=TOP, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if "cortex listening on" in line)
        workers = [each for each in psutil.Process(process.pid).children() if "cortex.workers" in each.cmdline()]
        environs = [each.environ() for each in workers]
        process.terminate()
        rest = process.stderr.read()
    assert (process.returncode, len(environs)) == (0, 2), started + rest
    assert not any("CORTEX_KEYS" in environ for environ in environs)


def test_taken_address_of_the_metrics_is_named(tmp_path: Path) -> None:
    """It has a default of its own, so its user may never have read of it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = f"127.0.0.1:{taken.getsockname()[1]}"
        command = command_for(tmp_path, {"metrics_listen": metrics, "listen": "127.0.0.1:0"})
        ended = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"cannot listen on {metrics}: Address already in use ([gateway] metrics_listen)" in ended.stderr
