"""Fixtures of the tests of keys, limits and usage."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgresql import new_postgresql, own_postgresql_server, postgresql_server

__all__ = ["new_postgresql", "own_postgresql_server", "postgresql_server"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with 2 MiB of space."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "small", str(path)]
    if os.getuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
