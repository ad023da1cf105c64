"""A cortex that the network can reach says so, because it asks for no key."""

from __future__ import annotations

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
