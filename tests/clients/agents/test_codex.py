"""Codex (`codex exec`) on `/v1/responses`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.clients.agents.commands import MODEL, codex, events_of, output_of
from tests.clients.running import BROKEN, CHAT_ONLY, Bench
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


@pytest.mark.parametrize("model", CHAT_ONLY)
def test_answers_from_an_engine_without_responses(bench: Bench, node: NodeEnvironment, model: str) -> None:
    """Cold, so that the stream begins with comments, and then warm."""
    bench.cold(model)
    for _ in range(2):
        answer = answer_of(codex(bench, node, "Say hello", model=model))
        assert answer.startswith(f'{model} (simulated): "Say hello" Every word'), answer


def test_uses_a_tool_with_an_engine_without_responses(bench: Bench, node: NodeEnvironment) -> None:
    """The call, its result and the answer are translated."""
    (bench.home / "note.txt").write_text("the secret is 43\n", encoding="utf-8")
    done = codex(bench, node, 'Use exec_command with "cat note.txt"', model=CHAT_ONLY[0])
    assert "the secret is 43" in answer_of(done)


def test_patches_with_an_engine_without_responses(bench: Bench, node: NodeEnvironment, tmp_path: Path) -> None:
    """`apply_patch`, whose input is free text with a grammar, is a function in a chat and a custom tool here."""
    catalog = tmp_path / "models.json"
    listed = bench.fleet.cortex.request("/v1/models").body["models"]
    catalog.write_text(json.dumps({"models": [{**model, "apply_patch_tool_type": "freeform"} for model in listed]}))
    patch = "*** Begin Patch\n*** Add File: made.txt\n+hi there\n*** End Patch"
    output_of(codex(bench, node, f'Use apply_patch with "{patch}"', model=CHAT_ONLY[0], catalog=catalog))
    assert (bench.home / "made.txt").read_text(encoding="utf-8") == "hi there\n"


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
