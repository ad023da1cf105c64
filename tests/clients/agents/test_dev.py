"""Coding agents against `cortex dev` as it starts, with no setting but the address and the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.running import Bench
from tests.e2e.dev import Dev, running_dev
from tests.environment.clients import NodeEnvironment


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    with running_dev() as running:
        yield running


def test_claude_code_answers_and_uses_a_tool(dev: Dev, bench: Bench, node: NodeEnvironment) -> None:
    """The first request loads the model, whose context holds Claude Code's prompt and its tools."""
    (bench.home / "note.txt").write_text("the secret is 42\n", encoding="utf-8")
    settings = {
        "ANTHROPIC_BASE_URL": dev.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "large",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "large",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    answer = bench.run([node.command("claude"), "-p", "Say hello"], **settings)
    assert answer.startswith('Qwen/Qwen3.6-27B (simulated): "Say hello"')
    prompt = f'Use the Read tool on "{bench.home / "note.txt"}"'
    assert "the secret is 42" in bench.run([node.command("claude"), "-p", prompt], **settings)
