"""Background tasks neither die silently nor outlive their owner."""

from __future__ import annotations

import asyncio
import logging

import pytest

from shared import tasks
from shared.errors import Conflict, ServiceError, Unavailable
from shared.protocol import ErrorCode
from shared.tasks import TaskSet, cancel_all, first_of, running


async def test_a_failing_loop_is_logged_and_restarted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad reply of a neuron does not end its polling."""
    monkeypatch.setattr(tasks, "RESTART_DELAY_SECS", 0.001)
    third, starts = asyncio.Event(), 0

    async def work() -> None:
        nonlocal starts
        starts += 1
        if starts >= 3:
            third.set()
            await asyncio.Event().wait()
        raise RuntimeError("bad answer")

    async with running({"watch": work}):
        await third.wait()
    assert caplog.text.count("background task watch failed") == 2


async def test_loops_end_with_their_owner() -> None:
    """Leaving the body, also by an exception, waits for the loop's own cleanup."""
    started, events = asyncio.Event(), []

    async def work() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            events.append("cleaned up")

    async def owner() -> None:
        async with running({"watch": work}):
            await started.wait()
            raise KeyError

    with pytest.raises(KeyError):
        await owner()
    assert events == ["cleaned up"]


async def test_task_set_logs_failures_and_cancels_on_close(caplog: pytest.LogCaptureFixture) -> None:
    """The failure of a detached task is logged with its name; close cancels running tasks."""
    spawned = TaskSet()
    forever = asyncio.Event()

    async def fail() -> None:
        raise ValueError("why")

    failing = spawned.spawn(fail(), name="load org/model")
    waiting = spawned.spawn(forever.wait(), name="waiting")
    await asyncio.wait([failing])
    await asyncio.sleep(0)
    assert "task load org/model failed" in caplog.text
    await spawned.close()
    assert waiting.cancelled()


async def test_a_refusal_is_not_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """A second restart of an engine is refused (409), which its client is told; a 503 may need someone."""
    spawned, level_of = TaskSet(), {}
    refusals = (Conflict("it is being started", code=ErrorCode.LOAD_IN_PROGRESS), Unavailable("down", retry_after=1))
    caplog.set_level(logging.INFO)

    async def refuse(error: ServiceError) -> None:
        raise error

    for error in refusals:
        await asyncio.wait([spawned.spawn(refuse(error), name="restart")])
        await asyncio.sleep(0)
        (record,) = caplog.records
        level_of[error.status] = record.levelname
        caplog.clear()
    assert level_of == {409: "INFO", 503: "ERROR"}


async def test_cancel_all_waits_for_the_end() -> None:
    """It waits for a task that ends slowly, also if another one fails while it is cancelled."""
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            ended.append("slow")

    async def failing() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("at the end")

    started = [asyncio.create_task(slow()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    await cancel_all(started)
    assert ended == ["slow"]


async def test_first_of_names_the_winner_and_ends_the_others() -> None:
    """On a tie the one listed first wins; a timeout is None; the winner's exception is raised."""
    ended = asyncio.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fails() -> None:
        raise ValueError("lost")

    assert await first_of({"slow": never(), "quick": asyncio.sleep(0)}) == "quick"
    assert ended.is_set()
    assert await first_of({"a": asyncio.sleep(0), "b": asyncio.sleep(0)}) == "a"
    assert await first_of({"slow": never()}, timeout_secs=0.01) is None
    with pytest.raises(ValueError, match="lost"):
        await first_of({"slow": never(), "failing": fails()})
    assert await first_of({"quick": asyncio.sleep(0), "failing": fails()}) == "quick"
