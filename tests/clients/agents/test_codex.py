"""Codex (`codex exec`) on `/v1/responses`."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.clients.running import BROKEN, MODELS, Bench
from tests.environment.clients import NodeEnvironment
from tests.services import NODE

MODEL = MODELS[0]
UNLOADABLE = BROKEN["codex"]
CONFIG = """
model = "{model}"
model_provider = "cortex"
model_context_window = 32768
check_for_update_on_startup = false
[analytics]
enabled = false
[features]
plugins = false  # asks the Internet for plugins at each start
[model_providers.cortex]
name = "cortex"
base_url = "{url}/v1"
wire_api = "responses"
"""


def codex(
    bench: Bench, node: NodeEnvironment, prompt: str, *, more: str = "", model: str = MODEL
) -> subprocess.CompletedProcess[str]:
    """`more` is added to the provider's table."""
    home = bench.home / ".codex"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(CONFIG.format(model=model, url=bench.url) + more, encoding="utf-8")
    # No sandbox: it needs user namespaces, which containers lack.
    options = ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return bench.attempt([node.command("codex"), "exec", *options, prompt])


def events_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def answer_of(done: subprocess.CompletedProcess[str]) -> str:
    """The last message of the model."""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    items = [event["item"] for event in events_of(done) if event["type"] == "item.completed"]
    text: str = [item["text"] for item in items if item["type"] == "agent_message"][-1]
    return text


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_answers(bench: Bench, node: NodeEnvironment, state: str) -> None:
    """It prints the answer."""
    if state == "cold":
        bench.cold(MODEL)
    answer = answer_of(codex(bench, node, "Say hello"))
    assert answer.startswith(f'{MODEL} (simulated): "Say hello" Every word'), answer


def test_uses_a_tool(bench: Bench, node: NodeEnvironment) -> None:
    """It runs the command that the model names, and sends the output back."""
    (bench.home / "note.txt").write_text("the secret is 42\n", encoding="utf-8")
    assert "the secret is 42" in answer_of(codex(bench, node, 'Use exec_command with "cat note.txt"'))


def test_idle_timeout_is_the_clients_own(bench: Bench, node: NodeEnvironment) -> None:
    """Comments do not keep Codex from giving up: its own setting must be longer than the load."""
    bench.cold(MODEL)
    done = codex(bench, node, "Say hello", more="stream_idle_timeout_ms = 300\nstream_max_retries = 0\n")
    assert done.returncode != 0
    assert "idle timeout" in done.stdout


def test_shows_why_a_model_cannot_be_loaded(bench: Bench, node: NodeEnvironment) -> None:
    """The stream has begun by the time that the load fails."""
    done = codex(bench, node, "Say hello", model=UNLOADABLE, more="stream_max_retries = 0\n")
    assert done.returncode != 0
    assert f"loading '{UNLOADABLE}' on {NODE} failed: Model architectures" in done.stdout, done.stdout
