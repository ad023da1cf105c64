"""Runs the JavaScript of tests/clients/scripts where Node.js finds the packages."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.clients.running import Bench, Report, report_of
from tests.environment.clients import NodeEnvironment

SCRIPTS = Path(__file__).parents[1] / "scripts"


def node_report(bench: Bench, node: NodeEnvironment, script: str, **environment: str) -> Report:
    """The report of a script, by name."""
    # A module's imports are looked up in the directories above it, so the scripts go next to the packages' link.
    modules = bench.home / "node_modules"
    if not modules.exists():
        modules.symlink_to(node.modules)
        for file in SCRIPTS.glob("*.mjs"):
            shutil.copy(file, bench.home)
    # With NODE_USE_ENV_PROXY, fetch honours the proxy variables.
    command = [node.node, bench.home / f"{script}.mjs"]
    return report_of(bench, command, NODE_USE_ENV_PROXY="1", **environment)
