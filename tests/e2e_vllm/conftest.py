"""One fleet for all tests of this folder: starting an engine takes 15 seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e_vllm.fleet import running_vllm_fleet
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.models import minilm, tiny_qwen3
from tests.environment.vllm import vllm_environment
from tests.neuron.conftest import mark
from tests.services import Fleet

__all__ = ["mark"]


@dataclass(frozen=True)
class RealVllm:
    """The command of the real vLLM, and models for it."""

    command: list[str]
    tiny: Path
    minilm: Path


@pytest.fixture(scope="session")
def real_vllm() -> RealVllm:
    """Skips if vLLM cannot be installed; fails in CI."""
    try:
        vllm = vllm_environment()
        return RealVllm(list(vllm.command), tiny_qwen3(vllm), minilm())
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the real vLLM: {error}")
        pytest.skip(f"no real vLLM here: {error}")


@pytest.fixture(scope="session")
def fleet(real_vllm: RealVllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """cortex and a neuron with the real vLLM."""
    directory = tmp_path_factory.mktemp("fleet")
    with running_vllm_fleet(directory, real_vllm.command, real_vllm.tiny, real_vllm.minilm) as fleet:
        yield fleet
