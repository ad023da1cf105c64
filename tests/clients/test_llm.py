"""llm, the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.fleet import ALIAS, TEXT, ClientFleet
from tests.clients.programs import PythonClients, run_client

MODELS = """
- model_id: cortex
  model_name: {model}
  api_base: {url}
  supports_tools: true
"""


def ask(python: PythonClients, fleet: ClientFleet, *arguments: str) -> str:
    settings = Path(python.env["HOME"]) / "llm"
    settings.mkdir()
    (settings / "extra-openai-models.yaml").write_text(MODELS.format(model=ALIAS, url=fleet.v1), encoding="utf-8")
    env = {**python.env, "LLM_USER_PATH": str(settings), "OPENAI_API_KEY": "none"}
    return run_client([python.directory / "llm", "-m", "cortex", *arguments], env).out


@pytest.mark.parametrize("flags", [[], ["--no-stream"]], ids=["streamed", "plain"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, python: PythonClients, cold: bool, flags: list[str]) -> None:
    fleet.get_ready(cold=cold)
    assert ask(python, fleet, *flags, "Hello").startswith(f'{TEXT}: "Hello"')


def test_a_tool_is_called_and_its_result_answered(fleet: ClientFleet, python: PythonClients) -> None:
    out = ask(python, fleet, "-T", "llm_version", "Which llm version is this?")
    assert out.startswith(f'{TEXT}: "0.')
