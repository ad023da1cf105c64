"""A real cortex process opens its database at the start."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cortex.cortex_process import TOP, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron


async def test_cortex_makes_its_database(tmp_path: Path, benjy: V1Neuron) -> None:
    """It is there before the first request, and closed when cortex has ended."""
    async with cortex_process(tmp_path, [benjy], [], state_dir="state") as cortex:
        assert (tmp_path / "state/cortex.db-wal").exists()
        cortex.process.terminate()
        assert await cortex.ended() == 0
    assert not (tmp_path / "state/cortex.db-wal").exists()
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
