"""The anthropic library for Node.js, the current version and an old one, on engines with `/v1/messages` and on engines
that have only chat completions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.clients.node.scripts import node_report
from tests.clients.running import CHAT_ONLY, MODELS, TEXT_CASES, TOOL_CASES, Bench, Report
from tests.environment.clients import NodeEnvironment, old_name

PACKAGE = "@anthropic-ai/sdk"


@pytest.fixture(
    scope="module",
    params=[(PACKAGE, MODELS), (old_name(PACKAGE), MODELS), (PACKAGE, CHAT_ONLY), (old_name(PACKAGE), CHAT_ONLY)],
    ids=["current", "old", "current, chat only", "old, chat only"],
)
def report(bench: Bench, node: NodeEnvironment, request: pytest.FixtureRequest) -> Report:
    package, models = request.param
    return node_report(replace(bench, models=models), node, "anthropic_sdk", CLIENT_PACKAGE=package)


@pytest.mark.parametrize("case", TEXT_CASES)
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", TOOL_CASES)
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)


def test_models(report: Report) -> None:
    report.check_models()
