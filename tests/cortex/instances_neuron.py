"""A neuron with several engines of one model, as real servers on real sockets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from shared.serve import Site, bind, serving
from tests.cortex.protocol_v1_neuron import V1Engine, V1Neuron

MODEL = "org/m"


class InstancesNeuron(V1Neuron):
    """Has these instances of MODEL, each on a device of its own. Their states change by `statuses` alone. It sends no
    events, and tells endpoints only when it is asked."""

    def __init__(self, name: str, *instances: str, devices: int = 8) -> None:
        super().__init__(name, *[24000] * devices)
        self.statuses = dict.fromkeys(instances, "loaded")
        self.engines = {instance: V1Engine() for instance in instances}
        self.asked: list[str | None] = []  # the instances whose endpoint was asked for
        self.since = 1.0
        self.process = f"{name}-1"  # another one after a restart
        self.variant: str | None = None  # of all engines
        self.max_model_len: int | None = None  # of all engines

    def requests(self) -> dict[str, int]:
        """How many requests each engine got."""
        return {instance: len(engine.requests) for instance, engine in self.engines.items()}

    async def _discovery(self, request: web.Request) -> web.Response:
        plain = await super()._discovery(request)
        return web.json_response({**json.loads(plain.text or ""), "instance_id": self.process, "instances": True})

    async def _models(self, request: web.Request) -> web.Response:
        entries: list[dict[str, Any]] = [
            {
                "id": MODEL,
                "instance": instance,
                "variant": self.variant,
                "max_model_len": self.max_model_len,
                "harness": "vllm",
                "status": status,
                "devices": [place],
                "since": self.since,
                "vram_booked_mb": 9000,
            }
            for place, (instance, status) in enumerate(self.statuses.items())
        ]
        return web.json_response(entries)

    async def _health(self, request: web.Request) -> web.Response:
        plain = await super()._health(request)
        models = [{"id": MODEL, "instance": each} for each, status in self.statuses.items() if status == "loaded"]
        return web.json_response(
            {**json.loads(plain.text or ""), "instance_id": self.process, "models": models, **self.health}
        )

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads.append(body)
        self.statuses[body["instance"]] = "loaded"
        self.engines.setdefault(body["instance"], next(iter(self.engines.values())))
        self.since += 1
        return web.json_response({"status": "loaded", "instance": body["instance"]})

    async def _unload(self, request: web.Request) -> web.Response:
        instance = (await request.json())["instance"]
        self.unloads.append(instance)
        if self.statuses.pop(instance, None) is None:
            return web.json_response({"error": "unknown instance"}, status=404)
        return web.json_response({"status": "unloaded", "instance": instance})

    async def _endpoint(self, request: web.Request) -> web.Response:
        instance = request.query.get("instance")
        self.asked.append(instance)
        if instance is None and len(self.engines) == 1:
            (instance,) = self.engines
        if self.statuses.get(instance or "") != "loaded":
            return web.json_response({"error": "not loaded"}, status=404)
        return web.json_response({"url": self.engines[instance or ""].url})

    @contextlib.asynccontextmanager
    async def running(self, port: int | None = None) -> AsyncIterator[InstancesNeuron]:
        sites: list[Site] = []
        for engine in self.engines.values():
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", engine.handle)
            site = Site(app, bind("127.0.0.1", 0))
            engine.url = f"http://127.0.0.1:{site.port}"
            sites.append(site)
        async with super().running(port), serving(sites, drain_timeout_secs=0):
            yield self
