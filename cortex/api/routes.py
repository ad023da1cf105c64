"""The route table, as data."""

from __future__ import annotations

from aiohttp import web

from cortex.api import engine_actions, keys, models, openapi, operator, sign_in, usage
from cortex.api.dashboard import pages
from cortex.api.engines import scraping
from cortex.api.fleet import configuration, logs, registration, requests
from cortex.api.fleet import handlers as fleet
from cortex.proxy.paths import INFERENCE_PATHS


async def of_workers(request: web.Request) -> web.StreamResponse:
    """Workers relay these requests to engines; the routes exist here only to answer other methods with 405."""
    raise web.HTTPNotFound


CONTROL_ROUTES = (
    *(web.post(path, of_workers) for path in INFERENCE_PATHS),
    web.get("/v1/models", models.list_models),
    web.get("/v1/models/{model_id:.+}", models.show_model),
    web.get("/health", fleet.health),
    web.get("/fleet", fleet.show_fleet),
    web.get("/fleet/events", fleet.fleet_events),
    web.get("/fleet/explain", fleet.explain_model),
    web.get("/fleet/timeline", fleet.show_timeline),
    web.get("/fleet/requests", requests.show_requests),
    web.get("/fleet/logs", logs.show_logs),
    web.post("/fleet/register", registration.register_neuron),
    web.get("/fleet/configuration", configuration.show_configuration),
    web.post("/fleet/configuration/reload", configuration.reload_configuration),
    web.post("/fleet/load", operator.load_model),
    web.post("/fleet/unload", operator.unload_model),
    web.post("/fleet/sleep", engine_actions.sleep_model),
    web.post("/fleet/wake", engine_actions.wake_model),
    web.post("/fleet/restart", engine_actions.restart_model),
    web.post("/fleet/nodes/{name}/drain", operator.drain_node),
    web.post("/fleet/nodes/{name}/resume", operator.resume_node),
    web.get("/keys", keys.list_keys),
    web.post("/keys", keys.create_key),
    web.delete("/keys/{name}", keys.revoke_key),
    web.post("/keys/{name}/rotate", keys.rotate_key),
    web.get("/usage", usage.show_usage),
    web.get("/usage/energy", usage.show_energy),
    web.get("/v1/organization/usage/completions", usage.organization_completions),
    web.get("/v1/organization/usage/embeddings", usage.organization_embeddings),
    web.get("/v1/organization/costs", usage.organization_costs),
    web.get("/openapi.json", openapi.show_openapi),
    web.get("/", pages.show_page),
    web.get("/dashboard/me", pages.show_viewer),
    web.get("/dashboard/{path:.+}", pages.show_file),
    web.get("/login", sign_in.login),
    web.get("/login/callback", sign_in.login_callback),
    web.get("/login/settings", sign_in.login_settings),
    web.post("/logout", sign_in.logout),
)

METRICS_ROUTES = (
    web.get("/metrics", scraping.expose_metrics),
    web.get("/metrics/engines", scraping.expose_engine_metrics),
    web.get("/metrics/targets", scraping.show_targets),
)
