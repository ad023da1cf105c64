"""One fleet for all tests of this folder: starting an engine takes a quarter of a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e_vllm.fleet import Fleet, running_fleet
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.models import minilm, tiny_qwen3
from tests.environment.vllm import vllm_environment


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """cortex and a neuron with the real vLLM; skips where vLLM cannot be had, and fails there in CI."""
    try:
        vllm = vllm_environment()
        models = tiny_qwen3(vllm), minilm()
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the real vLLM: {error}")
        pytest.skip(f"no real vLLM here: {error}")
    with running_fleet(tmp_path_factory.mktemp("fleet"), vllm.command, *models) as fleet:
        yield fleet
