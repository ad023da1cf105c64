"""A third engine, as small as one can be: a command line and a health path. What adding an engine takes."""

from __future__ import annotations

import sys
from pathlib import Path

from neuron.harness.base import EngineCommand, Harness, LaunchFacts, LaunchPlan
from neuron.harness.environment import engine_environment

_SERVER = str(Path(__file__).parent / "server.py")


class EchoHarness(Harness):
    """Answers every POST with its body."""

    health_path = "/healthz"
    missing_paths = ("/v1/messages",)

    def command(self, plan: LaunchPlan, facts: LaunchFacts) -> EngineCommand:
        argv = (sys.executable, _SERVER, plan.host, str(plan.port), *plan.arguments)
        return EngineCommand(argv, engine_environment(plan, facts.environ, {}, {}))
