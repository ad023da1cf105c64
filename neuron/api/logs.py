"""Answers `GET /models/{model_id}/logs`: the last lines, or those and all that follow, of one engine or of several."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from aiohttp import web

from neuron.engine.output import EngineOutput
from neuron.lifecycle.instance_state import InstanceState
from shared.http import EVENT_STREAM_HEADERS, KEEP_ALIVE_COMMENT
from shared.tasks import cancel_all

KEEP_ALIVE_SECS = 15.0
_PAUSE_SECS = 0.25
_ALL_LINES = 10_000


def outputs_of(models: Sequence[InstanceState]) -> dict[str, EngineOutput]:
    """The outputs of a model's instances by what their lines begin with: the instance's name if there are several. None
    of one that has no engine and had none."""
    prefixes = [f"[{model.key.instance}] " if len(models) > 1 else "" for model in models]
    return {prefix: model.output for prefix, model in zip(prefixes, models, strict=True) if model.output is not None}


async def last_lines(model_id: str, outputs: Mapping[str, EngineOutput], tail: int) -> web.Response:
    """`{"id", "lines"}`: the last `tail` lines of each engine, one engine after the other. `outputs`: see
    `outputs_of`."""
    tails = await asyncio.gather(*(output.tail(tail) for output in outputs.values()))
    lines = [prefix + line for prefix, found in zip(outputs, tails, strict=True) for line in found]
    return web.json_response({"id": model_id, "lines": lines})


async def stream_lines(
    request: web.Request, outputs: Callable[[], Mapping[str, EngineOutput]], tail: int, closing: asyncio.Event
) -> web.StreamResponse:
    """Server-sent events, a line in each: of each engine the last `tail` in memory, then each line that comes, until
    all engines are gone, `closing` is set, or the client leaves. Includes engines that start meanwhile."""
    response = web.StreamResponse(headers=EVENT_STREAM_HEADERS)
    await response.prepare(request)
    stream = _LineStream(response, closing)
    try:
        stream.follow(outputs(), tail)
        while stream.goes_on:
            await stream.proceed(_PAUSE_SECS)
            stream.follow(outputs(), _ALL_LINES)
    finally:
        await stream.close()
    return response


class _LineStream:
    """Writes the lines of several engines to one response."""

    def __init__(self, response: web.StreamResponse, closing: asyncio.Event) -> None:
        self._response = response
        self._closing = closing
        self._prefixes: dict[EngineOutput, str] = {}
        self._tasks: dict[EngineOutput, asyncio.Task[None]] = {}
        self._written = time.monotonic()
        self._writing = asyncio.Lock()

    @property
    def goes_on(self) -> bool:
        return not all(task.done() for task in self._tasks.values())

    def follow(self, outputs: Mapping[str, EngineOutput], tail: int) -> None:
        """Follows the outputs too, each from its last `tail` lines on; after the end of all earlier ones nothing."""
        self._prefixes.update({output: prefix for prefix, output in outputs.items()})
        if not self._tasks or not all(output.closed for output in self._tasks):
            for output in outputs.values():
                if output not in self._tasks:
                    work = self._follow(output, tail)
                    self._tasks[output] = asyncio.create_task(work, name=f"follow {output.file.path}")

    async def proceed(self, secs: float) -> None:
        """Waits for `secs`, or for the end of an engine. Raises ConnectionError: the client has left."""
        running = [task for task in self._tasks.values() if not task.done()]
        await asyncio.wait(running, timeout=secs, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            if task.done():
                task.result()

    async def close(self) -> None:
        await cancel_all(list(self._tasks.values()))

    async def _follow(self, output: EngineOutput, tail: int) -> None:
        with output.listening() as listener:
            lines: list[str] | None = await listener.start(tail)
            while lines is not None and not self._closing.is_set():
                if lines:
                    prefix = self._prefixes[output]
                    await self._write("".join(f"data: {prefix}{line}\n\n" for line in lines).encode())
                elif time.monotonic() - self._written >= KEEP_ALIVE_SECS:
                    await self._write(KEEP_ALIVE_COMMENT)
                lines = await listener.next(_PAUSE_SECS)

    async def _write(self, data: bytes) -> None:
        async with self._writing:
            await self._response.write(data)
            self._written = time.monotonic()
