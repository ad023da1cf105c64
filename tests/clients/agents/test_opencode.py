"""opencode (`opencode run`) on `/v1/chat/completions`, through @ai-sdk/openai-compatible."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.clients.agents.commands import MODEL, events_of, opencode, output_of
from tests.clients.running import BROKEN, SLOW, SLOW_LOAD_SECS, Bench
from tests.environment.clients import NodeEnvironment
from tests.services import NODE


def answer_of(done: subprocess.CompletedProcess[str]) -> str:
    """The text parts of its answer."""
    return "\n".join(event["part"]["text"] for event in events_of(output_of(done)) if event["type"] == "text")


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_answers(bench: Bench, node: NodeEnvironment, state: str) -> None:
    """It prints the answer."""
    if state == "cold":
        bench.cold(MODEL)
    answer = answer_of(opencode(bench, node, "Say hello"))
    assert answer.startswith(f"{MODEL} (simulated): "), answer
    assert "Say hello" in answer


def test_uses_a_tool(bench: Bench, node: NodeEnvironment) -> None:
    """It reads the file that the model names, and sends the contents back."""
    note = bench.home / "note.txt"
    note.write_text("the secret is 42\n", encoding="utf-8")
    assert "the secret is 42" in answer_of(opencode(bench, node, "read", str(note)))


def test_comments_keep_it_waiting(bench: Bench, node: NodeEnvironment) -> None:
    """A load may last longer than `chunkTimeout`, since comments count as chunks."""
    bench.cold(SLOW)
    began = time.monotonic()
    assert f"{SLOW} (simulated)" in answer_of(opencode(bench, node, "Hello", model=SLOW, chunkTimeout=3000))
    assert time.monotonic() - began > SLOW_LOAD_SECS


def test_shows_why_a_model_cannot_be_loaded(bench: Bench, node: NodeEnvironment) -> None:
    """The stream has begun by the time that the load fails."""
    done = opencode(bench, node, "Hello", model=BROKEN["opencode"])
    assert f"loading '{BROKEN['opencode']}' on {NODE} failed: Model architectures" in done.stdout, done.stdout
