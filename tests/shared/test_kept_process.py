"""A child process whose output is not what it should be."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from shared import tasks
from shared.system import kept_process
from shared.system.kept_process import KeptProcess

WRITES = "import sys; print('[1]\\nnonsense\\n' + 'x' * 100_000 + '\\n[2]', flush=True); sys.stdin.read()"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "writes_lines.py").write_text(WRITES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "writes_lines"


@pytest.mark.parametrize("limit", [1 << 24, 1 << 16])
async def test_a_line_that_cannot_be_used_is_logged(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    """Also one that is too long. Those after it are read, by the same process."""
    monkeypatch.setattr(kept_process, "LINE_BYTES", limit)
    told: list[int] = []
    done, failures = asyncio.Event(), list[str]()

    def use(line: str) -> None:
        told.extend(json.loads(line))
        if told == [1, 2]:
            done.set()

    process = KeptProcess(
        "the writer", module, first_line=lambda: b"", on_line=use, on_failure=failures.append, stop_secs=10
    )
    async with process.running():
        await done.wait()
    assert "the writer: cannot use this line of its output: 'nonsense'" in caplog.text
    assert ("a line of its output is too long" in caplog.text) == (limit < 100_000)
    assert failures == []


async def test_a_failure_of_its_keeper_starts_another_one(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would read the output of the old one."""
    monkeypatch.setattr(tasks, "RESTART_DELAY_SECS", 0.001)
    second, starts, failures = asyncio.Event(), 0, list[str]()

    def first_line() -> bytes:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise RuntimeError("no settings")
        return b""

    process = KeptProcess(
        "the writer",
        module,
        first_line=first_line,
        on_line=lambda line: second.set() if line == "[2]" else None,
        on_failure=failures.append,
        stop_secs=10,
    )
    async with process.running():
        await second.wait()
    assert (starts, failures) == (2, ["the writer failed"])
