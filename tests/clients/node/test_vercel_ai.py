"""Vercel's AI SDK with @ai-sdk/openai-compatible."""

from __future__ import annotations

import pytest

from tests.clients.node.scripts import node_report
from tests.clients.running import TEXT_CASES, TOOL_CASES, Bench, Report
from tests.environment.clients import NodeEnvironment


@pytest.fixture(scope="module")
def report(bench: Bench, node: NodeEnvironment) -> Report:
    return node_report(bench, node, "vercel_ai")


@pytest.mark.parametrize("case", TEXT_CASES)
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", TOOL_CASES)
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)
