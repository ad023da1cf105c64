"""A neuron with events on a raw socket: every request is recorded, every answer can be replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from tests.cortex.raw_engine import RawEngine, Received, Script, plain, stream_head
from tests.cortex.raw_http import Wire, chunked


class RawNeuron:
    """`scripts` replace the answer to a path. Its models have one device, and change their state by `change` alone."""

    def __init__(self, name: str = "raw") -> None:
        self.name = name
        self.wire = RawEngine()
        self.wire.script = self._answer
        self.scripts: dict[str, Script] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.instance: str | None = "one"
        self.active: list[str] = []  # models in the health answer
        self.answering_devices = [0]  # of two at most; the others are lost
        self.streams: list[Wire] = []
        self.streaming = asyncio.Event()
        self._started = time.monotonic()

    @property
    def url(self) -> str:
        return self.wire.url

    @property
    def asked(self) -> list[str]:
        """The paths of all requests, in their order."""
        return [request.target for request in self.wire.requests]

    def change(self, model_id: str, status: str, **fields: Any) -> None:
        """Changes a model's state without an event."""
        self.models[model_id] = {
            "id": model_id, "harness": "vllm", "status": status, "devices": [0], "since": time.time(), **fields,
        }  # fmt: skip

    async def tell(self, name: str, data: Any) -> None:
        """Sends an event to every listener."""
        for stream in self.streams:
            await stream.send(_event(name, data))

    async def end_streams(self) -> None:
        """Ends every stream, as a stopping neuron does."""
        streams, self.streams = self.streams, []
        self.streaming.clear()
        for stream in streams:
            stream.reset()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RawNeuron]:
        """Serves inside the body."""
        async with self.wire.running():
            yield self

    def page(self, path: str) -> bytes:
        """The usual answer, as JSON."""
        figures = {"vram_used_mb": 1000, "vram_free_mb": 23000, "utilization_pct": 1, "temp_c": 40}
        devices = [{"index": index, **figures} for index in self.answering_devices]
        pages: dict[str, Any] = {
            "/health": {
                "uptime_secs": round(time.monotonic() - self._started, 3),
                "devices": devices,
                "instance_id": self.instance,
                "models": [{"id": model_id, "in_flight": 0, "queue_depth": 0} for model_id in self.active],
            },
            "/models": list(self.models.values()),
            "/discovery": {
                "hostname": self.name,
                "devices": [
                    {
                        "index": index,
                        "name": "GPU",
                        "vram_total_mb": 24000,
                        "lost": None if index in self.answering_devices else "it fell off the bus",
                    }
                    for index in range(max(self.answering_devices) + 1)
                ],
                "harnesses": ["vllm"],
                "instance_id": self.instance,
            },
            "/models/load": {"status": "loaded"},
        }
        return json.dumps(pages[path]).encode()

    async def _answer(self, wire: Wire, received: Received) -> None:
        script = self.scripts.get(received.target)
        if script is not None:
            await script(wire, received)
        elif received.target == "/events":
            await wire.send(stream_head() + _event("snapshot", list(self.models.values())))
            self.streams.append(wire)
            self.streaming.set()
            await wire.gone.wait()
        else:
            await wire.send(plain(self.page(received.target)))


def _event(name: str, data: Any) -> bytes:
    text = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
    return chunked(text, len(text)).removesuffix(b"0\r\n\r\n")
