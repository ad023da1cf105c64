"""A real cortex process opens its database at the start."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cortex.accounts.database.database import open_database
from cortex.accounts.database.source import database_source
from tests.cortex.conftest import StartCortex
from tests.cortex.cortex_process import TOP, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import connected, request


async def test_cortex_makes_its_database(tmp_path: Path, benjy: V1Neuron) -> None:
    """It is there before the first request, and closed when cortex has ended."""
    async with cortex_process(tmp_path, [benjy], [], state_dir="state") as cortex:
        assert (tmp_path / "state/cortex.db-wal").exists()
        assert (tmp_path / "state/running").exists()
        cortex.process.terminate()
        assert await cortex.ended() == 0
    assert not (tmp_path / "state/cortex.db-wal").exists()
    assert not (tmp_path / "state/running").exists()  # a clean end
    assert sqlite3.connect(tmp_path / "state/cortex.db").execute("SELECT * FROM api_keys").fetchall() == []


async def test_cortex_serves_without_a_directory_for_it(tmp_path: Path, benjy: V1Neuron) -> None:
    """One warning names the directory."""
    (tmp_path / "file").write_text("not a directory")
    async with cortex_process(tmp_path, [benjy], [], state_dir="file/state") as cortex:
        assert f"no state can be kept in {tmp_path / 'file/state'}" in cortex.log()
        assert "cortex.db" not in cortex.log()


@pytest.mark.parametrize("module", ["cortex.workers.__main__", "cortex.cli.serve", "cortex.cli.simulate"])
def test_only_an_open_database_needs_sqlalchemy(module: str) -> None:
    """Workers and the simulator are spared its memory and import time."""
    code = f"import sys, {module}; sys.exit('sqlalchemy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)


def test_check_reads_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cortex check` lists wrong keys of both sources, without a key in the output."""
    (tmp_path / "cortex.toml").write_text('keys.file = "keys.toml"\n', encoding="utf-8")
    (tmp_path / "models.toml").touch()
    (tmp_path / "keys.toml").write_text('[[keys]]\nname = "a"\nkey = "sk-secret"\nrmp = 5\n', encoding="utf-8")
    monkeypatch.setenv("CORTEX_KEYS", "sk-secret")
    command = [sys.executable, "-m", "cortex", "check", "--config", str(tmp_path / "cortex.toml")]
    checked = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "environment CORTEX_KEYS: line 1 must be NAME:KEY" in checked.stderr
    assert f"{tmp_path}/keys.toml: keys[0] (a): rmp: unknown key" in checked.stderr
    assert "sk-secret" not in checked.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for another user")
async def test_root_makes_the_file_for_the_owner_of_the_directory(tmp_path: Path) -> None:
    """`cortex keys create --config` as root must not lock out the user that cortex runs as."""
    os.chown(tmp_path, 65534, 65534)
    source = database_source(None, tmp_path)
    assert source is not None
    await (await open_database(source)).close()
    status = (tmp_path / "cortex.db").stat()
    assert (status.st_uid, status.st_gid) == (65534, 65534)


@pytest.mark.parametrize(
    ("line", "status"), [("Authorization: Bearer sk-m", 200), ("Authorization: Bearer x", 401), ("X-A: b", 401)]
)
async def test_metrics_may_need_a_token(start_cortex: StartCortex, benjy: V1Neuron, line: str, status: int) -> None:
    """Prometheus sends it as a bearer token."""
    cortex = await start_cortex([benjy], [], gateway={"metrics_token": "sk-m"})
    async with connected(cortex.metrics_url) as client:
        assert (await client.ask(request(b"", line, method="GET", target="/metrics"))).status == status
