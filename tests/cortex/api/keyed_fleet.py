"""A cortex whose keys a test changes, and a neuron whose engine writes lines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from shared.tasks import timeout
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron


class LoggingNeuron(V1Neuron):
    """Has an engine of `m` that writes a line, and another one when `more` is set."""

    def __init__(self, name: str, *vram_mb: int) -> None:
        super().__init__(name, *vram_mb)
        self.more = asyncio.Event()

    def _routes(self) -> list[web.RouteDef]:
        return [*super()._routes(), web.get("/models/m/logs", self._log)]

    async def _log(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: starting\n\n")
        await self.more.wait()
        await response.write(b"data: secret\n\n")
        await asyncio.Event().wait()
        return response


def key_entry(name: str, role: str, **fields: str) -> str:
    given = {"name": name, "key": f"sk-{name}", "role": role, **fields}
    return "\n".join(["[[keys]]", *(f"{field} = {value!r}" for field, value in given.items())]) + "\n"


@dataclass(frozen=True)
class KeyedFleet:
    cortex: RunningCortex
    benjy: LoggingNeuron
    file: Path

    async def use_keys(self, *entries: str) -> None:
        self.file.write_text("".join(entries), encoding="utf-8")
        await self.cortex.parts.keys.load(self.file)


@contextlib.asynccontextmanager
async def keyed_fleet(start_cortex: StartCortex, directory: Path, *entries: str) -> AsyncIterator[KeyedFleet]:
    """With these keys, and `m` loaded. The body has a minute."""
    benjy = LoggingNeuron("benjy", 24000)
    async with benjy.running(), timeout(60):
        benjy.models["m"] = "loaded"
        cortex = await start_cortex([benjy], [{"id": "m"}], poll={"interval_secs": 30})
        fleet = KeyedFleet(cortex, benjy, directory / "keys.toml")
        await fleet.use_keys(*entries)
        yield fleet
