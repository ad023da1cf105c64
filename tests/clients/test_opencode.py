"""opencode in print mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.fleet import MODEL, TEXT, ClientFleet
from tests.clients.programs import NodeClients, run_client


def ask(node: NodeClients, fleet: ClientFleet, prompt: str) -> str:
    home = Path(node.env["HOME"])
    (home / "notes.txt").write_text("buy milk\n", encoding="utf-8")
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "cortex",
        "options": {"baseURL": fleet.v1, "apiKey": "none"},
        "models": {MODEL: {"name": MODEL, "limit": {"context": 65536, "output": 4096}}},
    }
    model = f"cortex/{MODEL}"
    config = {"autoupdate": False, "share": "disabled", "provider": {"cortex": provider}, "model": model}
    (home / "opencode.json").write_text(json.dumps({**config, "small_model": model}), encoding="utf-8")
    return run_client([node.command("opencode"), "run", "-m", model, prompt], node.env).out


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, node: NodeClients, cold: bool) -> None:
    fleet.get_ready(cold=cold)
    out = ask(node, fleet, "Say hello")
    assert f"{TEXT}: " in out
    assert "Say hello" in out


def test_a_tool_is_called_and_its_result_answered(fleet: ClientFleet, node: NodeClients) -> None:
    assert "buy milk" in ask(node, fleet, "Please read notes.txt")
