"""Real clients, as their users install them: Python packages in a virtual environment of their own, npm packages beside
each other. Pinned, so that a test fails for a change of ours only."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import run

PYTHON_CLIENTS = (
    "anthropic==2.14.0",
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "llm==0.36",
    "openai==3.57.0",
    "pydantic-ai-slim[openai]==2.68.0",
)
NODE_CLIENTS = {
    "@ai-sdk/openai-compatible": "2.0.92",
    "@anthropic-ai/claude-code": "2.1.197",
    "@anthropic-ai/sdk": "1.14.0",
    "@openai/codex": "0.171.0",
    "ai": "6.0.326",
    "openai": "6.49.0",
    "opencode-ai": "1.18.33",
}
# These scripts put a native program in its place. npm runs no script: which ones it allows depends on its version.
_INSTALLERS = ("@anthropic-ai/claude-code/install.cjs", "opencode-ai/postinstall.mjs")
_LEAST_NODE = 18  # Debian 12
_INSTALL_TIMEOUT_SECS = 900


def python_clients() -> Path:
    """The directory with the virtual environment's commands, `python` and `llm` among them.

    Raises:
        EnvironmentUnavailable: the packages cannot be installed.
    """

    def build(directory: Path) -> None:
        print("building the environment of the Python clients, once", flush=True)
        run([sys.executable, "-m", "venv", directory], timeout=120)
        python = directory / "bin" / "python"
        run([python, "-m", "pip", "install", "--quiet", *PYTHON_CLIENTS], timeout=_INSTALL_TIMEOUT_SECS)

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return prepared(f"clients-python-{key_of(*PYTHON_CLIENTS, version)}", build) / "bin"


def node_clients() -> Path:
    """The directory with `node_modules`; takes 1 GB.

    Raises:
        EnvironmentUnavailable: node or npm is missing or too old, or the packages cannot be installed.
    """
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            raise EnvironmentUnavailable(f"{command} is not installed (Debian: apt-get install nodejs npm)")
    version = run(["node", "--version"], timeout=60).strip()
    if int(version.removeprefix("v").partition(".")[0]) < _LEAST_NODE:
        raise EnvironmentUnavailable(f"node {version} is too old for the packages: {_LEAST_NODE} is needed")
    package = json.dumps({"private": True, "dependencies": NODE_CLIENTS}, indent=1)

    def build(directory: Path) -> None:
        print("installing the npm clients, once; takes about 1 GB on disk", flush=True)
        (directory / "package.json").write_text(package, encoding="utf-8")
        install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]
        run(
            [*install, str(directory)],
            timeout=_INSTALL_TIMEOUT_SECS,
            env={**os.environ, "npm_config_update_notifier": "false"},
        )
        for script in _INSTALLERS:
            run(["node", directory / "node_modules" / script], timeout=120)

    return prepared(f"clients-node-{key_of(package)}", build)
