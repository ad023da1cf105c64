"""A pydantic-ai agent, which runs its tool and sends the result back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.running import TEXT_CASES, TOOL_CASES, Bench, Report, python_report


@pytest.fixture(scope="module")
def report(bench: Bench, python: Path) -> Report:
    return python_report(bench, python, "pydantic_agent")


@pytest.mark.parametrize("case", [*TEXT_CASES, "responses_stream"])
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", TOOL_CASES)
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)
