"""The test library that stands in for NVML, and a place for the hardware that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nvml.library import build_library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which a process loads it."""
    return build_library(tmp_path_factory.getbasetemp() / "nvml")


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    return tmp_path / "hardware"
