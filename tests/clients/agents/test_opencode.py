"""opencode (`opencode run`) on `/v1/chat/completions`, through @ai-sdk/openai-compatible."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.clients.running import BROKEN, MODELS, SLOW, Bench
from tests.environment.clients import NodeEnvironment
from tests.services import NODE

MODEL = MODELS[0]
UNLOADABLE = BROKEN["opencode"]
QUIET = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "NPM_CONFIG_REGISTRY": "http://127.0.0.1:9",  # it installs a package in the background; here it cannot
}


def configured(bench: Bench, model: str, options: Mapping[str, Any]) -> None:
    """Writes opencode.json."""
    provider: dict[str, Any] = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{bench.url}/v1", **options},
        "models": {name: {"limit": {"context": 32768, "output": 4096}} for name in {model, MODEL}},
    }
    config = {
        "provider": {"cortex": provider},
        "model": f"cortex/{model}",
        "small_model": f"cortex/{MODEL}",
        "autoupdate": False,
        "share": "disabled",
    }
    (bench.home / "opencode.json").write_text(json.dumps(config), encoding="utf-8")


def opencode(bench: Bench, node: NodeEnvironment, *prompt: str, model: str = MODEL, **options: Any) -> str:
    """The text parts of its answer. `options` are the provider's."""
    configured(bench, model, options)
    output = bench.run([node.command("opencode"), "run", "--format", "json", *prompt], **QUIET)
    events = [json.loads(line) for line in output.splitlines()]
    return "\n".join(event["part"]["text"] for event in events if event["type"] == "text")


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_answers(bench: Bench, node: NodeEnvironment, state: str) -> None:
    """It prints the answer."""
    if state == "cold":
        bench.cold(MODEL)
    answer = opencode(bench, node, "Say hello")
    assert answer.startswith(f"{MODEL} (simulated): "), answer
    assert "Say hello" in answer


def test_uses_a_tool(bench: Bench, node: NodeEnvironment) -> None:
    """It reads the file that the model names, and sends the contents back."""
    note = bench.home / "note.txt"
    note.write_text("the secret is 42\n", encoding="utf-8")
    assert "the secret is 42" in opencode(bench, node, "read", str(note))


def test_comments_keep_it_waiting(bench: Bench, node: NodeEnvironment) -> None:
    """A load may last longer than `chunkTimeout`, since comments count as chunks."""
    bench.cold(SLOW)
    assert f"{SLOW} (simulated)" in opencode(bench, node, "Hello", model=SLOW, chunkTimeout=1500)


def test_shows_why_a_model_cannot_be_loaded(bench: Bench, node: NodeEnvironment) -> None:
    """The stream has begun by the time that the load fails."""
    configured(bench, UNLOADABLE, {})
    done = bench.attempt([node.command("opencode"), "run", "--format", "json", "Hello"], **QUIET)
    assert f"loading '{UNLOADABLE}' on {NODE} failed: Model architectures" in done.stdout, done.stdout
