"""A foreign neuron and its engine, as real servers on real sockets.

The neuron has the six endpoints of protocol v1 with their fields and nothing else: no events, no instance id, no flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from shared.serve import Site, bind, serving
from tests.ports import free_port

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class V1Engine:
    """The engine of a loaded model. `answer` can be replaced by a test; requests are recorded as they came."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: Answer = self.echo
        self.models_page: Any = {"object": "list", "data": []}  # None: does not answer
        self.listed = 0  # how often that page was asked for
        self.aborted = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and request.path == "/v1/models":
            self.listed += 1
            if self.models_page is None:
                await asyncio.Event().wait()
            return web.json_response(self.models_page)
        self.requests.append((request.raw_path, dict(request.headers), await request.read()))
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.aborted.set()
            raise

    async def echo(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        return web.json_response(
            {"model": body["model"], "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}
        )


class V1Neuron:
    """A neuron of protocol v1; tests set its state and its failures."""

    def __init__(self, name: str, *vram_total_mb: int, harnesses: tuple[str, ...] = ("vllm",)) -> None:
        self.name = name
        self.vram_total_mb = vram_total_mb
        self.used_mb = [0] * len(vram_total_mb)
        self.harnesses = harnesses
        self.models: dict[str, str] = {}
        self.entries: dict[str, dict[str, Any]] = {}  # further fields of a model's entry, by its id
        self.health: dict[str, Any] = {}  # further fields of `/health`
        self.loads: list[dict[str, Any]] = []
        self.unloads: list[str] = []
        self.calls: list[str] = []
        self.shown: list[str | None] = []  # the Authorization of each call
        self.engine = V1Engine()
        self.engine_url: str | None = None  # None: that of the engine
        self.load_gate = asyncio.Event()  # a load ends when it is set
        self.load_gate.set()
        self.load_started = asyncio.Event()
        self.unload_gate = asyncio.Event()  # an unload ends when it is set
        self.unload_gate.set()
        self.load_error: tuple[int, Any] | None = None
        self.answers = asyncio.Event()  # calls are answered when it is set
        self.answers.set()
        self.rewrite: Callable[[Any], Any] | None = None  # makes another answer of each JSON answer
        self.silent = False  # True: accepts calls and never answers
        self.url = ""

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.get("/discovery", self._discovery),
            web.get("/health", self._health),
            web.get("/models", self._models),
            web.post("/models/load", self._load),
            web.post("/models/unload", self._unload),
            web.get("/models/{model_id}/endpoint", self._endpoint),
        ]

    async def _discovery(self, request: web.Request) -> web.Response:
        devices = [
            {"index": i, "name": "GPU", "vram_total_mb": mb, "compute_capability": "8.9"}
            for i, mb in enumerate(self.vram_total_mb)
        ]
        return web.json_response(
            {
                "hostname": self.name,
                "os": "Linux",
                "kernel": "6.1",
                "cuda_version": "13.0",
                "driver_version": "580.1",
                "devices": devices,
                "harnesses": list(self.harnesses),
            }
        )

    async def _health(self, request: web.Request) -> web.Response:
        devices = [
            {"index": i, "vram_used_mb": used, "vram_free_mb": mb - used, "utilization_pct": 0, "temp_c": 40}
            for i, (mb, used) in enumerate(zip(self.vram_total_mb, self.used_mb, strict=True))
        ]
        return web.json_response({"uptime_secs": 5, "devices": devices, **self.health})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            [
                {"id": model_id, "harness": "vllm", "status": status, "devices": [0], "vram_used_mb": 1}
                | self.entries.get(model_id, {})
                for model_id, status in self.models.items()
            ]
        )

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads.append(body)
        self.load_started.set()
        await self.load_gate.wait()
        if self.load_error is not None:
            status, error = self.load_error
            return web.json_response(error, status=status)
        self.models[body["model_id"]] = "loaded"
        return web.json_response({"status": "loaded"})

    async def _unload(self, request: web.Request) -> web.Response:
        model_id = (await request.json())["model_id"]
        self.unloads.append(model_id)
        await self.unload_gate.wait()
        if self.models.pop(model_id, None) is None:
            return web.json_response({"error": "unknown model"}, status=404)
        return web.json_response({"status": "unloaded"})

    async def _endpoint(self, request: web.Request) -> web.Response:
        if self.models.get(request.match_info["model_id"]) != "loaded":
            return web.json_response({"error": "not loaded"}, status=404)
        return web.json_response({"url": self.engine_url or self.engine.url})

    @web.middleware
    async def _observe(self, request: web.Request, handler: Answer) -> web.StreamResponse:
        self.calls.append(request.path)
        self.shown.append(request.headers.get("Authorization"))
        if self.silent:
            await asyncio.Event().wait()
        await self.answers.wait()
        response = await handler(request)
        if self.rewrite is None or not isinstance(response, web.Response) or response.text is None:
            return response
        return web.json_response(self.rewrite(json.loads(response.text)), status=response.status)

    @contextlib.asynccontextmanager
    async def running(self, port: int | None = None) -> AsyncIterator[V1Neuron]:
        """Serves the neuron and its engine inside the body; the neuron at a port that stays free when it ends, so that
        it can come back."""
        neuron_app = web.Application(middlewares=[self._observe])
        neuron_app.add_routes(self._routes())
        engine_app = web.Application(client_max_size=64 << 20)
        engine_app.router.add_route("*", "/{path:.*}", self.engine.handle)
        sites = [Site(neuron_app, bind("127.0.0.1", port or free_port())), Site(engine_app, bind("127.0.0.1", 0))]
        self.url, self.engine.url = (f"http://127.0.0.1:{site.port}" for site in sites)
        async with serving(sites, drain_timeout_secs=0):
            yield self
