"""The `llm` command with a model of extra-openai-models.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.running import MODELS, Bench

MODEL = MODELS[0]
TOOL = """
def get_weather(city: str) -> str:
    "The weather in a city"
    return f"sunny in {city}"
"""


def llm(bench: Bench, python: Path, *arguments: str) -> str:
    settings = bench.home / "llm"
    settings.mkdir(exist_ok=True)
    # YAML is a superset of JSON.
    model = {"model_id": "cortex", "model_name": MODEL, "api_base": f"{bench.url}/v1", "supports_tools": True}
    (settings / "extra-openai-models.yaml").write_text(json.dumps([model]), encoding="utf-8")
    command: list[str | Path] = [python.with_name("llm"), "prompt", "-m", "cortex", *arguments]
    return bench.run(command, LLM_USER_PATH=str(settings))


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["stream", "plain"])
def test_answers(bench: Bench, python: Path, state: str, options: list[str]) -> None:
    """It prints the answer."""
    if state == "cold":
        bench.cold(MODEL)
    answer = llm(bench, python, *options, "Who are you?")
    assert answer.startswith(f'{MODEL} (simulated): "Who are you?" Every word'), answer


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["stream", "plain"])
def test_uses_a_tool(bench: Bench, python: Path, options: list[str]) -> None:
    """It calls the function and sends the result back."""
    answer = llm(bench, python, *options, "--functions", TOOL, "What is the weather in Paris?")
    assert "sunny in Paris" in answer
