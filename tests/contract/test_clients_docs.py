"""docs/clients.md lists the clients and versions that tests/clients runs."""

from __future__ import annotations

import re

from tests.contract.documents import TOP
from tests.environment.clients import NPM, NPM_OLD, PYTHON, PYTHON_OLD

ROWS = {
    "openai (Python)": (PYTHON["openai"], PYTHON_OLD["openai"]),
    "anthropic (Python)": (PYTHON["anthropic"], PYTHON_OLD["anthropic"]),
    "langchain-openai": (PYTHON["langchain-openai"],),
    "litellm": (PYTHON["litellm"],),
    "llm": (PYTHON["llm"],),
    "pydantic-ai": (PYTHON["pydantic-ai-slim"],),
    "openai (Node)": (NPM["openai"], NPM_OLD["openai"]),
    "@anthropic-ai/sdk": (NPM["@anthropic-ai/sdk"], NPM_OLD["@anthropic-ai/sdk"]),
    "Vercel AI SDK: ai, @ai-sdk/openai-compatible": (NPM["ai"], NPM["@ai-sdk/openai-compatible"]),
    "httpx-sse, sseclient-py": (PYTHON["httpx-sse"], PYTHON["sseclient-py"]),
    "Claude Code": (NPM["@anthropic-ai/claude-code"],),
    "Codex": (NPM["@openai/codex"],),
    "opencode": (NPM["opencode-ai"],),
    "curl": ("Debian's",),
}
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)


def test_versions_are_those_that_are_installed() -> None:
    """The table of clients has every pinned package, with its versions."""
    text = (TOP / "docs" / "clients.md").read_text(encoding="utf-8")
    table = text.partition("| client | version |")[2].partition("\n\n")[0]
    rows = {client: tuple(versions.split(", ")) for client, versions in ROW.findall(table) if client != "---"}
    assert rows == ROWS
    pins = [*PYTHON.values(), *PYTHON_OLD.values(), *NPM.values(), *NPM_OLD.values()]
    assert sorted(pins) == sorted(version for versions in rows.values() for version in versions if version[0].isdigit())
