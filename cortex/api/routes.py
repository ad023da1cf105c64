"""The route table, as data."""

from __future__ import annotations

from aiohttp import web

from cortex.api import fleet, models
from cortex.keys import PARTS

INFERENCE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""POST routes whose body names a model; all take the same way."""


async def infer(request: web.Request) -> web.StreamResponse:
    return await request.app[PARTS].forwarder.handle(request)


async def expose_metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[PARTS].metrics.exposition(), headers={"Content-Type": METRICS_TYPE})


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GATEWAY_ROUTES = (
    *(web.post(path, infer) for path in INFERENCE_PATHS),
    web.get("/v1/models", models.list_models),
    web.get("/v1/models/{model_id:.+}", models.show_model),
    web.get("/health", fleet.health),
    web.get("/fleet", fleet.show_fleet),
    web.get("/fleet/events", fleet.fleet_events),
    web.get("/fleet/explain", fleet.explain_model),
    web.post("/fleet/load", fleet.load_model),
    web.post("/fleet/unload", fleet.unload_model),
    web.post("/fleet/nodes/{name}/drain", fleet.drain_node),
    web.post("/fleet/nodes/{name}/resume", fleet.resume_node),
)

METRICS_ROUTES = (web.get("/metrics", expose_metrics),)
