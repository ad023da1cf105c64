"""A pydantic-ai agent, which runs its tool and sends the result back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.clients.running import CHAT_ONLY, MODELS, TEXT_CASES, TOOL_CASES, Bench, Report, python_report


@pytest.fixture(scope="module", params=[MODELS, CHAT_ONLY], ids=["every path", "chat only"])
def report(bench: Bench, python: Path, request: pytest.FixtureRequest) -> Report:
    return python_report(replace(bench, models=request.param), python, "pydantic_agent")


@pytest.mark.parametrize("case", [*TEXT_CASES, "responses_stream"])
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", [*TOOL_CASES, "responses_tool"])
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)
