"""A child process that is kept running: it reads lines of input, and ends when its input does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from shared.errors import shortened
from shared.tasks import cancel_all, keep_running, timeout

LINE_BYTES: Final = 1 << 24
"""A longer line is not read whole."""

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
        keeper = asyncio.create_task(keep_running(self._name, self._run), name=self._name)
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

    async def _run(self) -> None:
        """Starts it, and returns once it has exited."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
                start_new_session=True,  # Ctrl-C is for cortex
                pass_fds=self._pass_fds,
            )
        except OSError as error:
            log.warning("%s cannot be started: %s", self._name, error.strerror)
            self._on_failure(f"{self._name} cannot be started: {error.strerror}")
            return
        self._process = process
        assert process.stdout is not None
        try:
            self.tell(self._first_line())
            while await self._use_line(process.stdout):
                pass
            status = await process.wait()
        except Exception:  # `keep_running` logs it and starts another one
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._on_failure(f"{self._name} failed")
            raise
        log.error("%s exited with status %d; restarting", self._name, status)
        self._on_failure(f"{self._name} exited with status {status}")

    async def _use_line(self, output: asyncio.StreamReader) -> bool:
        """False at the end. What cannot be used is logged: the next line can be."""
        try:
            line = await output.readline()
        except ValueError as error:
            log.error("%s: a line of its output is too long: %s", self._name, error)  # noqa: TRY400 - the text says all
            return True
        if not line:
            return False
        text = line.decode("utf-8", "replace").strip()
        try:
            self._on_line(text)
        except Exception:
            log.exception("%s: cannot use this line of its output: %r", self._name, shortened(text))
        return True

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
