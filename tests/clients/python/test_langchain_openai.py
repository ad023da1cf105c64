"""langchain-openai's ChatOpenAI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.running import TEXT_CASES, TOOL_CASES, Bench, Report, python_report


@pytest.fixture(scope="module")
def report(bench: Bench, python: Path) -> Report:
    return python_report(bench, python, "langchain")


@pytest.mark.parametrize("case", [*TEXT_CASES, "async_stream"])
def test_text(report: Report, case: str) -> None:
    report.check_text(case)


@pytest.mark.parametrize("case", TOOL_CASES)
def test_tool_call(report: Report, case: str) -> None:
    report.check_tool(case)


def test_comments_do_not_count_as_chunks(report: Report) -> None:
    """A long load needs a longer `stream_chunk_timeout`, as docs/clients.md says."""
    assert report.results["impatient"] == "timed out"
