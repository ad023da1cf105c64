"""Codex in its non-interactive mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.fleet import BROKEN, MODEL, TEXT, ClientFleet
from tests.clients.programs import NodeClients, Printed, run_client

CONFIG = """
model = "{model}"
model_provider = "cortex"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.cortex]
name = "cortex"
base_url = "{url}"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 1
stream_idle_timeout_ms = 1800000
"""


def ask(node: NodeClients, fleet: ClientFleet, prompt: str, *, model: str = MODEL, status: int = 0) -> Printed:
    """What `codex exec` prints; its standard output is the answer alone."""
    home = Path(node.env["HOME"], ".codex")
    home.mkdir()
    (home / "config.toml").write_text(CONFIG.format(model=model, url=fleet.v1), encoding="utf-8")
    return run_client([node.command("codex"), "exec", "--skip-git-repo-check", prompt], node.env, status=status)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, node: NodeClients, cold: bool) -> None:
    fleet.get_ready(cold=cold)
    assert ask(node, fleet, "Say hello").out.startswith(f'{TEXT}: "Say hello"')


def test_a_tool_is_called_and_its_result_answered(fleet: ClientFleet, node: NodeClients) -> None:
    """The words of the prompt choose the tool; whatever its result is, the next answer ends the turn."""
    printed = ask(node, fleet, "Update the plan")
    assert printed.out.startswith(f"{TEXT}: ")
    assert "Update the plan" not in printed.out, "the answer quotes the tool's result"


def test_a_failed_load_shows_its_reason(fleet: ClientFleet, node: NodeClients) -> None:
    """In the first answer, which began before the load had failed, and without another request."""
    printed = ask(node, fleet, "Say hello", model=BROKEN["codex"], status=1)
    assert "CUDA out of memory" in printed.errors
    assert "Reconnecting" not in printed.errors
