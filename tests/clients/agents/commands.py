"""Coding agents as a user starts them, with the settings of docs/clients.md. Each runs once and exits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.clients.running import MODELS, Bench
from tests.environment.clients import NodeEnvironment

MODEL = MODELS[0]
_CODEX = """
model = "{model}"
model_provider = "cortex"
model_context_window = 32768
check_for_update_on_startup = false
[analytics]
enabled = false
[features]
plugins = false
[model_providers.cortex]
name = "cortex"
base_url = "{url}/v1"
wire_api = "responses"
stream_max_retries = 0
"""


def claude(
    bench: Bench, node: NodeEnvironment, prompt: str, *options: str, model: str = MODEL, output_tokens: int = 4096
) -> subprocess.CompletedProcess[str]:
    """Claude Code, on `/v1/messages`."""
    settings = {
        "ANTHROPIC_BASE_URL": bench.url,
        "ANTHROPIC_AUTH_TOKEN": "unused",
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(output_tokens),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "32768",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    command: list[str | Path] = [node.command("claude"), "-p", prompt, *options]
    return bench.attempt(command, **settings)


def codex(
    bench: Bench, node: NodeEnvironment, prompt: str, *, model: str = MODEL, more: str = "", catalog: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Codex, on `/v1/responses`, as JSON lines. `more` is added to the provider's table, `catalog` describes models."""
    home = bench.home / ".codex"
    home.mkdir(exist_ok=True)
    catalogued = "" if catalog is None else f'model_catalog_json = "{catalog}"\n'
    settings = catalogued + _CODEX.format(model=model, url=bench.url) + more
    (home / "config.toml").write_text(settings, encoding="utf-8")
    # No sandbox: it needs user namespaces, which containers lack.
    options = ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return bench.attempt([node.command("codex"), "exec", *options, prompt])


def opencode(
    bench: Bench,
    node: NodeEnvironment,
    *prompt: str,
    model: str = MODEL,
    small: str = MODEL,
    output_tokens: int = 4096,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """opencode, on `/v1/chat/completions`, as JSON lines. `small` writes the titles, `options` are the provider's."""
    limit = {"limit": {"context": 32768, "output": output_tokens}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{bench.url}/v1", **options},
        "models": dict.fromkeys({model, small}, limit),
    }
    config = {
        "provider": {"cortex": provider},
        "model": f"cortex/{model}",
        "small_model": f"cortex/{small}",
        "autoupdate": False,
        "share": "disabled",
    }
    (bench.home / "opencode.json").write_text(json.dumps(config), encoding="utf-8")
    quiet = {
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        "NPM_CONFIG_REGISTRY": "http://127.0.0.1:9",  # it installs a package in the background; here it cannot
    }
    return bench.attempt([node.command("opencode"), "run", "--format", "json", *prompt], **quiet)


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    """What an agent printed; fails if it failed."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def events_of(output: str) -> list[dict[str, Any]]:
    """The JSON lines."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
