"""Counts the tokens of prompts by models' own tokenizers, one prompt at a time in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
from importlib.util import find_spec
from time import monotonic
from typing import Final

import msgspec

from cortex.proxy.prompt import counting_process
from cortex.proxy.prompt.counting_process import CountReply, CountRequest
from cortex.proxy.prompt.local_tokenizer import LocalTokenizer
from cortex.proxy.prompt.prompt_size import PromptSize
from shared.tasks import timeout

COUNT_SECS: Final = 10.0
"""A count that takes longer, with the wait for others, is given up."""
ATTEMPTS: Final = 2
"""The process may end just as it is asked: it has been idle."""
RETRY_SECS: Final = 60.0
"""How long a tokenizer is left alone after the process could not be started, or ended while it counted."""

log = logging.getLogger(__name__)


class TokenCounter:
    """Owns the process: starts it when it is first needed, and kills it when a count is given up."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []
        self._unusable: dict[str, tuple[LocalTokenizer, float]] = {}  # by path; until when, by monotonic()

    async def counted(self, size: PromptSize, tokenizer: LocalTokenizer, context: int) -> PromptSize:
        """`size` with the tokens of its text; unchanged if they cannot be counted. Cancelled, it stops counting."""
        if self._is_unusable(tokenizer) or not await asyncio.to_thread(is_installed):
            return size
        request = CountRequest(tokenizer, size.text, size.seams, size.special, context)
        try:
            async with timeout(COUNT_SECS), self._turn:
                found = await self._ask(msgspec.json.encode(request) + b"\n")
        except asyncio.TimeoutError:
            return size
        except _ProcessFailed as error:
            self._note_unusable(tokenizer, str(error), monotonic() + RETRY_SECS)
            return size
        if found.error:
            self._note_unusable(tokenizer, found.error, math.inf)
            return size
        return msgspec.structs.replace(size, tokens=found.tokens, at_least=found.at_least)

    def _is_unusable(self, tokenizer: LocalTokenizer) -> bool:
        known, until = self._unusable.get(tokenizer.path, (None, 0.0))
        return known == tokenizer and monotonic() < until

    def _note_unusable(self, tokenizer: LocalTokenizer, reason: str, until: float) -> None:
        if not self._is_unusable(tokenizer):
            self._unusable[tokenizer.path] = tokenizer, until
            log.warning("cannot count tokens with %s, only characters: %s", tokenizer.path, reason)

    async def _ask(self, request: bytes) -> CountReply:
        failure = ""
        for _ in range(ATTEMPTS):
            try:
                line = await self._exchange(request)
            # It cannot be started, or has ended; uvloop raises RuntimeError for a pipe that it has closed.
            except (OSError, RuntimeError) as error:
                failure = str(error)
                continue
            if line.endswith(b"\n"):
                return msgspec.json.decode(line, type=CountReply)
            failure = "the process that counts has ended"
        raise _ProcessFailed(failure)

    async def _exchange(self, request: bytes) -> bytes:
        """Its answer, a line; something else if it has ended."""
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            process.stdin.write(request)
            await process.stdin.drain()
            answer = await process.stdout.readline()
        finally:
            if not answer.endswith(b"\n"):
                self._kill()
        return answer

    async def _running(self) -> asyncio.subprocess.Process:
        await self._reap()
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", counting_process.__name__),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for cortex
            )
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            self._killed.append(process)

    async def _reap(self) -> None:
        while self._killed:
            await self._killed[-1].wait()
            self._killed.pop()

    async def close(self) -> None:
        """Ends the process, once nothing is being counted."""
        self._kill()
        await self._reap()


class _ProcessFailed(Exception):
    """The process that counts cannot be started, or has ended."""


def is_installed() -> bool:
    """The optional package that counts. Blocks."""
    return find_spec("tokenizers") is not None
