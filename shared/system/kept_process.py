"""A child process that is kept running: it reads lines of input, and ends when its input does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from shared.tasks import cancel_all, timeout

RESTART_SECS: Final = 1.0

log = logging.getLogger(__name__)


class KeptProcess:
    """`python -m MODULE ARGUMENTS`, started again whenever it exits. `first_line` makes the line that each new process
    is told. `on_line` gets each line of its output, `on_failure` why it does not run."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str] = (),
        *,
        first_line: Callable[[], bytes],
        on_line: Callable[[str], None],
        on_failure: Callable[[str], None],
        stop_secs: float,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`name` is for the log and messages, such as "the usage recorder"."""
        self._name = name
        self._command = (sys.executable, "-m", module, *arguments)
        self._first_line = first_line
        self._on_line = on_line
        self._on_failure = on_failure
        self._stop_secs = stop_secs
        self._pass_fds = pass_fds
        self._process: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It runs inside the body; this ends once it has ended, or after `stop_secs`."""
        keeper = asyncio.create_task(self._keep_running(), name=self._name)
        try:
            yield
        finally:
            await cancel_all([keeper])
            await self._end()

    def tell(self, line: bytes) -> None:
        """Sends it a line, if it runs: a new process begins with the first line."""
        process = self._process
        # uvloop raises RuntimeError for a pipe that it has closed, because the process has ended.
        with contextlib.suppress(OSError, RuntimeError):
            if process is not None and process.stdin is not None:
                process.stdin.write(line + b"\n")

    async def _keep_running(self) -> None:
        while True:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for cortex
                    pass_fds=self._pass_fds,
                )
            except OSError as error:
                log.warning("%s cannot be started: %s", self._name, error.strerror)
                self._on_failure(f"{self._name} cannot be started: {error.strerror}")
            else:
                self.tell(self._first_line())
                assert self._process.stdout is not None
                async for line in self._process.stdout:
                    self._on_line(line.decode("utf-8", "replace").strip())
                status = await self._process.wait()
                log.error("%s exited with status %d; restarting", self._name, status)
                self._on_failure(f"{self._name} exited with status {status}")
            await asyncio.sleep(RESTART_SECS)

    async def _end(self) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            async with timeout(self._stop_secs):
                await process.wait()
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
