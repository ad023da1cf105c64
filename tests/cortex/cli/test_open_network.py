"""What cortex says of the addresses that it listens on."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

TOP = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("gateway", "warned"),
    [
        ({"listen": "0.0.0.0:0"}, True),
        ({"listen": "0.0.0.0:0", "allow_anonymous": True}, False),
        ({"listen": "127.0.0.1:0"}, False),
    ],
    ids=str,
)
def test_listening_on_the_network_is_warned_of(tmp_path: Path, gateway: dict[str, object], warned: bool) -> None:
    """The line names the key that accepts it."""
    table = {"state_dir": "state", "gateway": {"metrics_listen": "127.0.0.1:0", **gateway}}
    (tmp_path / "cortex.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    (tmp_path / "models.toml").touch()
    with subprocess.Popen(
        [sys.executable, "-m", "cortex", "serve", "--config", str(tmp_path / "cortex.toml")],
        cwd=TOP,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "cortex listening on" in line:
                process.terminate()  # the warning comes before it ends
        assert process.wait(20) == 0
    found = [line for line in lines if "WARNING" in line and "allow_anonymous" in line]
    assert len(found) == warned


def test_taken_address_of_the_metrics_is_named(tmp_path: Path) -> None:
    """It has a default of its own, so its user may never have read of it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = f"127.0.0.1:{taken.getsockname()[1]}"
        table = {"state_dir": "state", "gateway": {"metrics_listen": metrics, "listen": "127.0.0.1:0"}}
        (tmp_path / "cortex.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        (tmp_path / "models.toml").touch()
        command = [sys.executable, "-m", "cortex", "serve", "--config", str(tmp_path / "cortex.toml")]
        ended = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"cannot listen on {metrics}: Address already in use ([gateway] metrics_listen)" in ended.stderr
