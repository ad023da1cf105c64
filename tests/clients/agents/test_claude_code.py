"""Claude Code (`claude -p`) on `/v1/messages`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.running import BROKEN, MODELS, Bench
from tests.environment.clients import NodeEnvironment
from tests.services import NODE

MODEL = MODELS[0]
UNLOADABLE = BROKEN["claude"]
# Without the names of small models it asks for one that the fleet does not have.
SETTINGS = {
    "ANTHROPIC_AUTH_TOKEN": "unused",
    "ANTHROPIC_MODEL": MODEL,
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096",
    "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "32768",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
}


def claude(bench: Bench, node: NodeEnvironment, prompt: str, *options: str) -> str:
    command: list[str | Path] = [node.command("claude"), "-p", prompt, *options]
    return bench.run(command, ANTHROPIC_BASE_URL=bench.url, **SETTINGS)


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_answers(bench: Bench, node: NodeEnvironment, state: str) -> None:
    """It prints the answer."""
    if state == "cold":
        bench.cold(MODEL)
    assert claude(bench, node, "Say hello").startswith(f'{MODEL} (simulated): "Say hello" Every word')


def test_streams_its_events(bench: Bench, node: NodeEnvironment) -> None:
    """With partial messages, the events of the stream arrive one by one."""
    output = claude(
        bench, node, "Say hello", "--output-format", "stream-json", "--verbose", "--include-partial-messages"
    )
    events = [json.loads(line) for line in output.splitlines()]
    deltas = [event for event in events if event.get("event", {}).get("type") == "content_block_delta"]
    assert len(deltas) > 5
    assert events[-1]["subtype"] == "success", events[-1]


def test_uses_a_tool(bench: Bench, node: NodeEnvironment) -> None:
    """It reads the file that the model names, and sends the contents back."""
    note = bench.home / "note.txt"
    note.write_text("the secret is 42\n", encoding="utf-8")
    assert "the secret is 42" in claude(bench, node, f'Use the Read tool on "{note}"')


def test_shows_why_a_model_cannot_be_loaded(bench: Bench, node: NodeEnvironment) -> None:
    """The stream has begun by the time that the load fails."""
    settings = {**SETTINGS, "ANTHROPIC_MODEL": UNLOADABLE, "CLAUDE_CODE_MAX_RETRIES": "0"}
    done = bench.attempt([node.command("claude"), "-p", "Say hello"], ANTHROPIC_BASE_URL=bench.url, **settings)
    assert done.returncode != 0
    assert f"loading '{UNLOADABLE}' on {NODE} failed: Model architectures" in done.stdout, done.stdout
