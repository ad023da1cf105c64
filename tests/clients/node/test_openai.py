"""The openai library for Node.js, the current version and an old one."""

from __future__ import annotations

import pytest

from tests.clients.node.scripts import node_report
from tests.clients.running import TEXT_CASES, TOOL_CASES, Bench, Report
from tests.environment.clients import NodeEnvironment, old_name


@pytest.fixture(scope="module", params=["openai", old_name("openai")])
def report(bench: Bench, node: NodeEnvironment, request: pytest.FixtureRequest) -> Report:
    return node_report(bench, node, "openai_sdk", CLIENT_PACKAGE=request.param)


@pytest.mark.parametrize("case", [*TEXT_CASES, "responses_stream", "responses_plain"])
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", TOOL_CASES)
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)


def test_models(report: Report) -> None:
    report.check_models()
