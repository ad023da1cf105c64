"""`make test-gpu`: the tests that need real GPUs, and a report to send back. See docs/gpu-tests.md.

Prints each test's result and facts, and writes them to `gpu-report.json` (`--output FILE`), with the host's GPUs and
versions. Other arguments go to pytest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from neuron.config import NeuronConfig
from neuron.gpu.discovery import discovery_of, topology_source

TESTS = ("tests/gpu", "tests/e2e_vllm")
MAX_TEXT = 4000
"""Characters of a failure or of a test's output, from the end."""


@dataclass
class GpuTestResult:
    """One test. `why`: of a failure or a skip. `facts`: what it measured; `output`: what it printed."""

    test: str
    outcome: str
    secs: float
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    output: str = ""


class Results:
    """A plugin of pytest that collects the results."""

    def __init__(self) -> None:
        self.tests: list[GpuTestResult] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            why = str(report.longrepr[2]).removeprefix("Skipped: ")
        self.tests.append(
            GpuTestResult(
                test=report.nodeid,
                outcome=report.outcome
                if report.when == "call" or report.skipped
                else f"{report.when} {report.outcome}",
                secs=round(report.duration, 2),
                why=why[-MAX_TEXT:],
                facts=dict(report.user_properties),
                output=report.capstdout[-MAX_TEXT:],
            )
        )


async def host() -> dict[str, Any]:
    """The GPUs as neuron sees them, and their figures now."""
    config = NeuronConfig()
    source = topology_source(config, Path("/nonexistent"))
    try:
        discovery = await discovery_of(config, source, instance_id=None)
        return {
            "python": platform.python_version(),
            "discovery": discovery.model_dump(mode="json"),
            "health": [each.model_dump(mode="json") for each in (await source.read()).health],
            "processes": await source.process_memory_mb(),
        }
    finally:
        await source.close()


def told(test: GpuTestResult) -> str:
    """A few lines for people."""
    facts = "".join(f"\n    {name}: {value}" for name, value in test.facts.items())
    reason = test.why.strip().splitlines()[-1:] if test.why else []
    return f"{test.outcome.upper():8} {test.test} ({test.secs} s){''.join(f': {line}' for line in reason)}{facts}"


def main() -> int:
    """Returns pytest's status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-report.json"))
    options, rest = parser.parse_known_args()
    results = Results()
    paths = [each for each in rest if not each.startswith("-")] or list(TESTS)
    flags = [each for each in rest if each.startswith("-")]
    status = int(pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *flags, *paths], plugins=[results]))
    report = {"host": asyncio.run(host()), "tests": [asdict(test) for test in results.tests]}
    options.output.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print("\n".join(["", *map(told, results.tests), "", f"report: {options.output.absolute()}"]))
    return status


if __name__ == "__main__":
    sys.exit(main())
