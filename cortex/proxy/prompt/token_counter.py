"""Counts the tokens of prompts by models' own tokenizers, one prompt at a time in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from importlib.util import find_spec
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

log = logging.getLogger(__name__)


class TokenCounter:
    """Owns the process: starts it when it is first needed, and kills it when a count is given up."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []
        self._unusable: dict[str, tuple[int, int]] = {}  # path to modification times

    async def counted(self, size: PromptSize, tokenizer: LocalTokenizer, context: int) -> PromptSize:
        """`size` with the tokens of its text; unchanged if they cannot be counted. Cancelled, it stops counting."""
        if self._unusable.get(tokenizer.path) == tokenizer.changed or not await asyncio.to_thread(is_installed):
            return size
        request = CountRequest(tokenizer, size.text, size.seams, size.special, context)
        try:
            async with timeout(COUNT_SECS), self._turn:
                found = await self._ask(msgspec.json.encode(request) + b"\n")
        except asyncio.TimeoutError:
            return size
        if not found.error:
            return msgspec.structs.replace(size, tokens=found.tokens, at_least=found.at_least)
        if self._unusable.get(tokenizer.path) != tokenizer.changed:
            self._unusable[tokenizer.path] = tokenizer.changed
            log.warning("cannot count tokens with %s, only characters: %s", tokenizer.path, found.error)
        return size

    async def _ask(self, request: bytes) -> CountReply:
        failure = ""
        for _ in range(ATTEMPTS):
            try:
                line = await self._exchange(request)
            except OSError as error:  # it cannot be started, or has ended
                failure = str(error)
                continue
            if line.endswith(b"\n"):
                return msgspec.json.decode(line, type=CountReply)
            failure = "the process that counts has ended"
        return CountReply(error=failure)

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


def is_installed() -> bool:
    """The optional package that counts. Blocks."""
    return find_spec("tokenizers") is not None
