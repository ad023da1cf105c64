"""Fixtures of every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Otherwise each process that a test starts would compile all modules again, which is half of its start.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def _no_state_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Started processes keep their state in a temporary directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("STATE_DIRECTORY", raising=False)
        yield
