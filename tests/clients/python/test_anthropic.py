"""The anthropic library for Python, the current version and an old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.running import TEXT_CASES, TOOL_CASES, Bench, Report, python_report


@pytest.fixture(scope="module", params=["python", "old_python"])
def report(bench: Bench, request: pytest.FixtureRequest) -> Report:
    python: Path = request.getfixturevalue(request.param)
    return python_report(bench, python, "anthropic_sdk")


@pytest.mark.parametrize("case", TEXT_CASES)
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", TOOL_CASES)
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)


def test_models(report: Report) -> None:
    report.check_models()
