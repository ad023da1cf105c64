"""The HTTP application: routes and middlewares."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container

from aiohttp import web
from aiohttp.typedefs import Middleware

from neuron.sim.api import audio, chat, completions, errors, messages, pooling, realtime, responses, tokenization
from neuron.sim.api.adapters import add_adapter_routes
from neuron.sim.api.sleep import Sleeper, add_sleep_routes, guard
from neuron.sim.engine import metrics
from neuron.sim.engine.engine import ENGINE, CoreDied, SimEngine
from neuron.sim.engine.faults import Fault, Faults

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_BODY = 512 * 1024 * 1024  # vLLM has no limit; this protects the host's memory
_VERSION = "0.32.0"
_STARTED = web.AppKey("started", int)


async def health(request: web.Request) -> web.Response:
    return web.Response(status=200 if request.app[ENGINE].healthy else 503)


async def version(_request: web.Request) -> web.Response:
    return web.json_response({"version": _VERSION})


async def models(request: web.Request) -> web.Response:
    settings = request.app[ENGINE].settings
    data: list[dict[str, object]] = [
        {
            "id": name,
            "object": "model",
            "created": request.app[_STARTED],
            "owned_by": "vllm",
            "root": settings.model,
            "parent": None,
            "max_model_len": settings.max_model_len,
            "permission": [],
        }
        for name in settings.served_names
    ]
    data += [
        {**data[0], "id": name, "root": path, "parent": settings.name, "max_model_len": None}
        for name, path in request.app[ENGINE].adapters.items()
    ]
    return web.json_response({"object": "list", "data": data})


async def exposition(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    faults = engine.settings.faults
    if Fault.NO_METRICS in faults:
        raise web.HTTPNotFound
    if Fault.HANGING_METRICS in faults:
        await asyncio.Event().wait()
    text = "python_info 1\n" if Fault.BARE_METRICS in faults else engine.exposition()
    return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def server_load(request: web.Request) -> web.Response:
    """Open requests; always 0 without --enable-server-load-tracking, as in vLLM."""
    engine = request.app[ENGINE]
    return web.json_response({"server_load": engine.requests_open if engine.settings.track_load else 0})


WORK: dict[str, Handler] = {
    "/v1/chat/completions": chat.chat_completions,
    "/v1/completions": completions.completions,
    "/v1/responses": responses.responses,
    "/v1/messages": messages.messages,
    "/v1/messages/count_tokens": messages.count_tokens,
    "/v1/embeddings": pooling.embeddings,
    "/pooling": pooling.pooling,
    "/classify": pooling.classify,
    "/rerank": pooling.rerank,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
    "/score": pooling.score,
    "/v1/score": pooling.score,
    "/tokenize": tokenization.tokenize,
    "/detokenize": tokenization.detokenize,
    "/v1/audio/transcriptions": audio.speech_to_text,
    "/v1/audio/translations": audio.speech_to_text,
}
"""POST routes that need the model."""

_WORK_OF_THE_CORE = frozenset(WORK) - {"/tokenize", "/detokenize"}
"""With a dead core vLLM answers these with 500, streams too."""

_NOT_CHAT = ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens")

VIEWS: dict[str, Handler] = {
    "/health": health,
    "/ping": health,
    "/version": version,
    "/v1/models": models,
    "/metrics": exposition,
    "/load": server_load,
}


@web.middleware
async def _envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    anthropic = request.path.startswith("/v1/messages")
    try:
        if request.path in _WORK_OF_THE_CORE:
            request.app[ENGINE].check_core()
        return await handler(request)
    except errors.ApiError as error:
        return errors.response(error, anthropic=anthropic)
    except CoreDied as error:
        return errors.response(errors.ApiError(500, str(error), "InternalServerError"), anthropic=anthropic)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return errors.response(errors.ApiError(error.status, error.reason, error.reason), anthropic=anthropic)


def _without(paths: Container[str], status: int) -> Middleware:
    """Answers as an engine that lacks some paths."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in paths:
            return await handler(request)
        detail = "Method Not Allowed" if status == 405 else "Not Found"
        return web.json_response({"detail": detail}, status=status)

    return check


def _missing_routes(faults: Faults) -> list[Middleware]:
    missing = []
    if Fault.CHAT_ONLY in faults:
        missing.append(_without(_NOT_CHAT, 404))
    if Fault.CHAT_ONLY_405 in faults:
        missing.append(_without(_NOT_CHAT, 405))
    if Fault.NO_TOKENIZE in faults:
        missing.append(_without(("/tokenize", "/detokenize"), 404))
    return missing


@web.middleware
async def _count(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.path not in WORK:
        return await handler(request)
    engine = request.app[ENGINE]
    engine.requests_seen += 1
    engine.requests_open += 1
    try:
        return await handler(request)
    finally:
        engine.requests_open -= 1


def _require_key(key: str) -> Middleware:
    """Protects /v1 only: vLLM leaves /health, /metrics, /tokenize and others open."""
    expected = f"Bearer {key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path.startswith("/v1") and not hmac.compare_digest(given, expected):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return check


def build_app(
    engine: SimEngine,
    *,
    api_key: str | None,
    sleeper: Sleeper | None = None,
    updates_adapters: bool = False,
    control_digest: str | None = None,
) -> web.Application:
    """The application around an engine; `api_key` None leaves everything open.

    With a `sleeper` it has vLLM's sleep routes, with `updates_adapters` those for LoRA adapters, for callers with the
    control key of this digest.
    """
    guards: list[Middleware] = [guard(sleeper, control_digest)] if sleeper is not None or updates_adapters else []
    guards += [] if api_key is None else [_require_key(api_key)]
    guards += _missing_routes(engine.settings.faults)
    app = web.Application(middlewares=[*guards, _envelope, _count], client_max_size=_MAX_BODY)
    app[ENGINE] = engine
    app[_STARTED] = int(time.time())
    app.router.add_routes([web.get(path, handler) for path, handler in VIEWS.items()])
    app.router.add_routes([web.post(path, handler) for path, handler in WORK.items()])
    app.router.add_post("/ping", health)
    app[responses.STORED] = OrderedDict()
    app.router.add_get("/v1/responses/{response_id}", responses.show_response)
    app.router.add_post("/v1/responses/{response_id}/cancel", responses.cancel_response)
    app.router.add_get("/v1/realtime", realtime.realtime)
    if sleeper is not None:
        add_sleep_routes(app, sleeper)
    if updates_adapters:
        add_adapter_routes(app)
    return app
