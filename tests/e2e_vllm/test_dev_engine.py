"""`cortex dev --engine vllm`: the same command with the real engine in place of the simulated one."""

from __future__ import annotations

import shlex

import openai
import pytest

from tests.e2e.dev import running_dev
from tests.e2e_vllm.conftest import RealVllm
from tests.processes import all_processes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_dev_fleet_with_the_real_engine(real_vllm: RealVllm) -> None:
    """A vLLM on the CPU answers for a model of the example catalogue; afterwards none of its processes is left."""
    arguments = [
        "--engine",
        "vllm",
        "--model-dir",
        str(real_vllm.tiny),
        "--vllm-command",
        shlex.join(real_vllm.command),
    ]
    with (
        running_dev(*arguments, "--fleet", "one=1xRTX3060") as dev,
        openai.OpenAI(base_url=f"{dev.url}/v1", api_key="none", max_retries=0, timeout=200) as client,
    ):
        answer = client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "The cat sees the moon"}],
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
        assert answer.model == "Qwen/Qwen3-0.6B"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        family = dev.family()
        assert any("VLLM" in process.command for process in all_processes() if process.pid in family)
