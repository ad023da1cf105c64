"""The openai library for Python, the current version and an old one, on engines with `/v1/responses` and on engines
that have only chat completions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.clients.running import CHAT_ONLY, MODELS, TEXT_CASES, TOOL_CASES, Bench, Report, python_report


@pytest.fixture(
    scope="module",
    params=[("python", MODELS), ("old_python", MODELS), ("python", CHAT_ONLY), ("old_python", CHAT_ONLY)],
    ids=["current", "old", "current, chat only", "old, chat only"],
)
def report(bench: Bench, request: pytest.FixtureRequest) -> Report:
    environment, models = request.param
    python: Path = request.getfixturevalue(environment)
    return python_report(replace(bench, models=models), python, "openai_sdk")


@pytest.mark.parametrize("case", [*TEXT_CASES, "responses_stream", "responses_plain"])
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", [*TOOL_CASES, "responses_tool"])
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)


def test_models(report: Report) -> None:
    report.check_models()
