"""Background tasks that neither die silently nor outlive their owner."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

# Not asyncio.wait_for: before Python 3.12 it loses a cancellation that arrives with the result.
if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

__all__ = ["TaskSet", "cancel_all", "first_of", "keep_running", "running", "timeout"]

from shared.errors import ServiceError

log = logging.getLogger(__name__)

Key = TypeVar("Key")
Result = TypeVar("Result")

RESTART_DELAY_SECS = 1.0
CANCEL_AGAIN_SECS = 1.0


async def keep_running(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` repeatedly until cancelled. Logs a failure and restarts after a jittered pause."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("background task %s failed, restarting", name)
        await asyncio.sleep(RESTART_DELAY_SECS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret


@contextlib.asynccontextmanager
async def running(loops: Mapping[str, Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    """Keeps the named loops running inside the `async with` body."""
    tasks = [asyncio.create_task(keep_running(name, work), name=name) for name, work in loops.items()]
    try:
        yield
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels the tasks and waits until each has really ended.

    Third-party code can swallow a cancellation, so it is repeated.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_SECS)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not report it


async def first_of(alternatives: Mapping[Key, Awaitable[Any]], *, timeout_secs: float | None = None) -> Key | None:
    """The key of the awaitable that finishes first; None after `timeout_secs`.

    If several have finished, the one listed first wins. The others are cancelled and have ended when this returns.
    Raises what the winner raised.
    """
    tasks = {asyncio.ensure_future(work): key for key, work in alternatives.items()}
    try:
        await asyncio.wait(tasks, timeout=timeout_secs, return_when=asyncio.FIRST_COMPLETED)
        winner = next((task for task in tasks if task.done()), None)
    finally:
        await cancel_all([task for task in tasks if not task.done()])
    for task in tasks:
        if task is not winner and not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not report it
    if winner is None:
        return None
    winner.result()
    return tasks[winner]


class TaskSet:
    """Owns detached tasks: keeps references, logs failures and refusals, and cancels the rest on `close`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Result], *, name: str) -> asyncio.Task[Result]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            if isinstance(error, ServiceError):  # it explains itself, and a refusal (409, say) is not our fault
                level = logging.INFO if error.status < 500 else logging.ERROR
                log.log(level, "task %s failed: %s", task.get_name(), error)
            else:
                log.error("task %s failed: %s", task.get_name(), error, exc_info=error)

    async def close(self) -> None:
        """Cancels the tasks that still run and waits for them."""
        await cancel_all(list(self._tasks))
