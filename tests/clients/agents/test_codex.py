"""Codex (`codex exec`) on `/v1/responses`."""

from __future__ import annotations

import subprocess

import pytest

from tests.clients.agents.commands import MODEL, codex, events_of, output_of
from tests.clients.running import BROKEN, Bench
from tests.environment.clients import NodeEnvironment
from tests.services import NODE


def answer_of(done: subprocess.CompletedProcess[str]) -> str:
    """The last message of the model."""
    items = [event["item"] for event in events_of(output_of(done)) if event["type"] == "item.completed"]
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
    done = codex(bench, node, "Say hello", more="stream_idle_timeout_ms = 300\n")
    assert done.returncode != 0
    assert "idle timeout" in done.stdout


def test_shows_why_a_model_cannot_be_loaded(bench: Bench, node: NodeEnvironment) -> None:
    """The stream has begun by the time that the load fails."""
    done = codex(bench, node, "Say hello", model=BROKEN["codex"])
    assert done.returncode != 0
    assert f"loading '{BROKEN['codex']}' on {NODE} failed: Model architectures" in done.stdout, done.stdout
