"""sseclient-py: a parser of event streams that knows nothing of the API."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.running import Bench, Report, python_report


@pytest.fixture(scope="module")
def report(bench: Bench, python: Path) -> Report:
    return python_report(bench, python, "requests_events")


@pytest.mark.parametrize("case", ["cold_stream", "warm_stream", "messages_stream"])
def test_events(report: Report, case: str) -> None:
    report.check_text(case)


def test_events_of_a_tool_call(report: Report) -> None:
    report.check_tool("tool_stream")
