"""Reserves an engine's development routes for its neuron. Loaded by `vllm serve --middleware neuron_guard.Guard`.

vLLM can sleep only in development mode, which opens dangerous routes on the clients' port: they call any method of the
workers, replace weights, stop the scheduler, and vLLM's API key protects none of them. The guard answers 404, as
without development mode, on every path that is not known to be for clients, unless the request has the control key.
It does so too for the routes that load LoRA adapters, which another variable opens.

Runs in the engine's process, whose Python and packages may differ from neuron's: standard library only. The engine
gets the digest of the key, never the key, so that neither its environment, nor its children's, nor its log reveals it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

CONTROL_HEADER = "x-neuron-control"
DIGEST_VARIABLE = "NEURON_CONTROL_DIGEST"
"""In the engine's environment: `digest_of` its control key. Without it no key is accepted."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What vLLM 0.32 offers to clients outside development mode, except what changes the engine (/scale_elastic_ep,
# /fault_tolerance, profiling). An allow-list: later versions may add routes that must stay closed.
OPEN_PATHS = frozenset(
    {
        "/health",
        "/ping",
        "/version",
        "/load",
        "/metrics",
        "/metrics/",
        "/kv_event_sources",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/invocations",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/v2/rerank",
        "/v2/embed",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
    }
)
# Protected by the engine's API key; nothing here depends on development mode.
OPEN_BELOW = "/v1/"
LOAD_ADAPTER = "/v1/load_lora_adapter"
UNLOAD_ADAPTER = "/v1/unload_lora_adapter"
_CLOSED = frozenset({LOAD_ADAPTER, UNLOAD_ADAPTER})
"""Below OPEN_BELOW, and yet not for clients: they change what the engine serves, from any path of its host."""

NOT_FOUND = b'{"detail":"Not Found"}'
"""vLLM's body for an unknown path."""

SLEEPING_HEADER = "x-neuron-sleeping"
"""On the 503 of a sleeping engine: the caller may have the engine woken and retry."""
SLEEPING = json.dumps(
    {"error": {"message": "The model is sleeping", "type": "Service Unavailable", "param": None, "code": 503}}
).encode()


BUSY = json.dumps(
    {"error": {"message": "The model still has requests", "type": "Conflict", "param": None, "code": 409}}
).encode()
IDLE_SECS = 10.0
"""Time for running requests to finish after a sleep request."""


def digest_of(key: str) -> str:
    """What the engine knows of its control key. A plain hash is enough: the key is random and long."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_open(path: str) -> bool:
    """True when `path` needs no key. It is compared as the router does: decoded, case-sensitive.

    Below /v1 empty, `.` and `..` segments are refused: no route has one, and a later layer might resolve it.
    """
    if path in _CLOSED:
        return False
    if path.startswith(OPEN_BELOW):
        return all(segment not in ("", ".", "..") for segment in path[1:].split("/"))
    return path in OPEN_PATHS


def knows_key(shown: Sequence[str], digest: str | None) -> bool:
    """True when `shown`, the values of all control headers of a request, is exactly the key with this digest."""
    return bool(digest) and len(shown) == 1 and hmac.compare_digest(digest_of(shown[0]), digest or "")


def needs_the_model(method: str, path: str) -> bool:
    """True when a sleeping engine cannot answer. vLLM would accept the request and let it wait, without counting it in
    its metrics."""
    return method == "POST" and is_open(path) and path != "/ping"


class Guard:
    """ASGI middleware around the engine's application.

    It learns from the requests it passes on whether the engine sleeps; of several API server processes, only the one
    that got the request knows.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._digest = os.environ.get(DIGEST_VARIABLE)
        self._sleeps = False  # from the start of a sleep until the engine is awake
        self._working = 0  # unfinished requests for the model
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            raise RuntimeError(f"unsupported ASGI scope type {kind!r}")
        method, path = scope.get("method", ""), scope["path"]
        if not self._may_pass(scope, path):
            await _refuse(scope, send, 404, NOT_FOUND)
        elif kind == "websocket" or needs_the_model(method, path):
            await self._work(scope, receive, send)
        elif (method, path) == ("POST", "/sleep"):
            await self._sleep(scope, receive, send)
        elif (method, path) == ("POST", "/wake_up"):
            await self._wake(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope, path: str) -> bool:
        header = CONTROL_HEADER.encode()
        shown = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == header]
        if shown:  # the application must not see the key
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != header]
        # neuron refuses --root-path: with one, the router would compare another path than this one.
        public = not scope.get("root_path") and is_open(path)
        return public or knows_key(shown, self._digest)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._sleeps:
            await _refuse(scope, send, 503, SLEEPING)
            return
        self._working += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._working -= 1
            if not self._working:
                self._idle.set()

    async def _sleep(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses new requests, waits for the running ones, then passes the sleep request on, so that no request is
        aborted or stuck. When the caller gives up or requests are still running, nothing has changed."""
        before, self._sleeps = self._sleeps, True
        done = False

        def answered(status: int) -> None:
            nonlocal done
            done = status == 200

        try:
            if self._idle.is_set() or await self._until_idle(receive):
                await self._app(scope, receive, _reporting(send, answered))
            elif self._working:
                await _refuse(scope, send, 409, BUSY)
        finally:
            if not done:
                self._sleeps = before

    async def _wake(self, scope: Scope, receive: Receive, send: Send) -> None:
        def answered(status: int) -> None:
            if status == 200 and not scope.get("query_string"):  # with tags it wakes partly
                self._sleeps = False

        await self._app(scope, receive, _reporting(send, answered))

    async def _until_idle(self, receive: Receive) -> bool:
        """True when all running requests have finished; False when the caller leaves first or they take too long."""
        idle = asyncio.ensure_future(self._idle.wait())
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({idle, left}, timeout=IDLE_SECS, return_when=asyncio.FIRST_COMPLETED)
            return idle.done() and not left.done()
        finally:
            idle.cancel()
            left.cancel()


def _reporting(send: Send, answered: Callable[[int], None]) -> Send:
    """`send` that reports the status to `answered` before it goes out."""

    async def reporting(message: Message) -> None:
        if message["type"] == "http.response.start":
            answered(message["status"])
        await send(message)

    return reporting


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(scope: Scope, send: Send, status: int, body: bytes) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000 if status == 404 else 1013, "reason": ""})
        return
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    if status == 503:
        headers += [(b"retry-after", b"1"), (SLEEPING_HEADER.encode(), b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
