"""Claude Code (`claude -p`) on `/v1/messages`."""

from __future__ import annotations

import pytest

from tests.clients.agents.commands import MODEL, claude, events_of, output_of
from tests.clients.running import BROKEN, CHAT_ONLY, Bench
from tests.environment.clients import NodeEnvironment
from tests.services import NODE


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_answers(bench: Bench, node: NodeEnvironment, state: str) -> None:
    """It prints the answer."""
    if state == "cold":
        bench.cold(MODEL)
    answer = output_of(claude(bench, node, "Say hello"))
    assert answer.startswith(f'{MODEL} (simulated): "Say hello" Every word'), answer


def test_streams_its_events(bench: Bench, node: NodeEnvironment) -> None:
    """With partial messages, the events of the stream arrive one by one."""
    options = ["--output-format", "stream-json", "--verbose", "--include-partial-messages"]
    events = events_of(output_of(claude(bench, node, "Say hello", *options)))
    deltas = [event for event in events if event.get("event", {}).get("type") == "content_block_delta"]
    assert len(deltas) > 5
    assert events[-1]["subtype"] == "success", events[-1]


def test_uses_a_tool(bench: Bench, node: NodeEnvironment) -> None:
    """It reads the file that the model names, and sends the contents back."""
    note = bench.home / "note.txt"
    note.write_text("the secret is 42\n", encoding="utf-8")
    assert "the secret is 42" in output_of(claude(bench, node, f'Use the Read tool on "{note}"'))


@pytest.mark.parametrize("model", CHAT_ONLY)
def test_answers_from_an_engine_without_messages(bench: Bench, node: NodeEnvironment, model: str) -> None:
    """cold, so that the stream begins with pings, and then warm."""
    bench.cold(model)
    for _ in range(2):
        answer = output_of(claude(bench, node, "Say hello", model=model))
        assert answer.startswith(f'{model} (simulated): "Say hello" Every word'), answer


def test_uses_a_tool_with_an_engine_without_messages(bench: Bench, node: NodeEnvironment) -> None:
    """The call, its result and the answer are translated."""
    note = bench.home / "note.txt"
    note.write_text("the secret is 43\n", encoding="utf-8")
    done = claude(bench, node, f'Use the Read tool on "{note}"', model=CHAT_ONLY[0])
    assert "the secret is 43" in output_of(done)


def test_shows_why_a_model_cannot_be_loaded(bench: Bench, node: NodeEnvironment) -> None:
    """The stream has begun by the time that the load fails."""
    done = claude(bench, node, "Say hello", model=BROKEN["claude"])
    assert done.returncode != 0
    assert f"loading '{BROKEN['claude']}' on {NODE} failed: Model architectures" in done.stdout, done.stdout
