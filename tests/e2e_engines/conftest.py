"""One fleet for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import openai
import pytest

from tests.e2e_engines.fleet import Engines, running_mixed_fleet
from tests.environment.cache import EnvironmentUnavailable, MachineUnsuitable
from tests.environment.infinity import infinity_environment
from tests.environment.llama_cpp import llama_cpp_environment
from tests.environment.models import minilm, tiny_qwen3
from tests.environment.vllm import vllm_environment
from tests.services import Fleet


@pytest.fixture(scope="session")
def engines() -> Engines:
    """Skips if an engine cannot be installed; fails in CI."""
    try:
        vllm = vllm_environment()
        return Engines(vllm.command, tiny_qwen3(vllm), minilm(), llama_cpp_environment(), infinity_environment())
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true" and not isinstance(error, MachineUnsuitable):
            pytest.fail(f"CI must run the real engines: {error}")
        pytest.skip(f"no real engines here: {error}")


@pytest.fixture(scope="session")
def fleet(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """cortex, and a neuron with all four kinds of engine."""
    with running_mixed_fleet(tmp_path_factory.mktemp("fleet"), engines) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.cortex.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client
