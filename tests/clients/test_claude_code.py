"""Claude Code in print mode."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.clients.fleet import BROKEN, MODEL, TEXT, ClientFleet
from tests.clients.programs import NodeClients, run_client


def ask(node: NodeClients, fleet: ClientFleet, prompt: str, *, model: str = MODEL, status: int = 0) -> Any:
    """What `claude -p` reports, in a directory with one file."""
    Path(node.env["HOME"], "notes.txt").write_text("buy milk\n", encoding="utf-8")
    env = {
        **node.env,
        "ANTHROPIC_BASE_URL": fleet.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_SMALL_FAST_MODEL": model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096",
    }
    command = [str(node.command("claude")), "-p", prompt, "--output-format", "json"]
    return json.loads(run_client(command, env, status=status).out)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, node: NodeClients, cold: bool) -> None:
    fleet.get_ready(cold=cold)
    result = ask(node, fleet, "Say hello")
    assert result["result"].startswith(f'{TEXT}: "Say hello"')
    assert (result["is_error"], result["num_turns"]) == (False, 1)


def test_a_tool_is_called_and_its_result_answered(fleet: ClientFleet, node: NodeClients) -> None:
    """It reads the file itself and sends the content back."""
    result = ask(node, fleet, "Please read notes.txt")
    assert "buy milk" in result["result"]
    assert result["num_turns"] == 2


def test_a_failed_load_is_reported_without_retries(fleet: ClientFleet, node: NodeClients) -> None:
    """By default it retries ten times, for minutes."""
    began = time.monotonic()
    result = ask(node, fleet, "Say hello", model=BROKEN["claude"], status=1)
    assert result["is_error"]
    assert "CUDA out of memory" in result["result"]
    assert time.monotonic() - began < 30
