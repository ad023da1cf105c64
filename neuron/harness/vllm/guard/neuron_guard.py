"""Keeps an engine's development routes to its neuron. Loaded by `vllm serve --middleware neuron_guard.Guard`.

vLLM can be put to sleep only in its development mode, and that opens more on the port that clients reach: routes that
call any method of the workers, replace weights, stop the scheduler. vLLM's API key guards none of them. Here, what is
not known to be for clients is not there (404, as without development mode) for whoever does not show neuron's control
key.

Runs in the engine's process, whose Python and packages may be others than neuron's: only the standard library. The
engine is given the key's digest and never the key, so that neither its environment, nor its children's, nor its log
can tell it.
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
"""In the engine's environment: `digest_of` its control key. Without it nobody passes."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What vLLM 0.32 offers to clients outside of development mode, but for what changes the engine (/scale_elastic_ep,
# /fault_tolerance, profiling). A list of what is open and not of what is closed: later versions may add more to close.
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
# Guarded by the engine's API key, and none of it depends on development mode.
OPEN_BELOW = "/v1/"

NOT_FOUND = b'{"detail":"Not Found"}'
"""vLLM's own words for a path that it does not have."""

SLEEPING_HEADER = "x-neuron-sleeping"
"""On the 503 that a request gets from a sleeping engine: whoever sees it may have the engine woken, and ask again."""
SLEEPING = json.dumps(
    {"error": {"message": "The model is sleeping", "type": "Service Unavailable", "param": None, "code": 503}}
).encode()


BUSY = json.dumps(
    {"error": {"message": "The model still has requests", "type": "Conflict", "param": None, "code": 409}}
).encode()
IDLE_SECS = 10.0
"""How long an engine that is told to sleep may take for the requests it has."""


def digest_of(key: str) -> str:
    """What an engine is told of its control key. A plain hash is enough: the key is random and long."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_open(path: str) -> bool:
    """True when everybody may ask for `path`, given as the router compares it: decoded, and case counts.

    Below /v1 an empty, `.` or `..` segment is refused: no route has one, and something behind might resolve it.
    """
    if path.startswith(OPEN_BELOW):
        return all(segment not in ("", ".", "..") for segment in path[1:].split("/"))
    return path in OPEN_PATHS


def knows_key(shown: Sequence[str], digest: str | None) -> bool:
    """True when `shown`, the values of all control headers of a request, is the one key with this digest."""
    return bool(digest) and len(shown) == 1 and hmac.compare_digest(digest_of(shown[0]), digest or "")


def needs_the_model(method: str, path: str) -> bool:
    """True when a sleeping engine cannot answer. vLLM would take such a request and leave it waiting, seen by nobody:
    its metrics stand still meanwhile."""
    return method == "POST" and is_open(path) and path != "/ping"


class Guard:
    """ASGI middleware around the engine's application.

    Knows from the requests it lets through whether the engine sleeps; with several API server processes only the one
    that was told does.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._digest = os.environ.get(DIGEST_VARIABLE)
        self._sleeps = False  # from the beginning of its sleep until it is awake
        self._working = 0  # requests for the model that are not answered yet
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            raise RuntimeError(f"{kind!r} is no kind of request that the guard knows")
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
        if shown:  # the key goes no further than here
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != header]
        # neuron refuses --root-path: with one the router would compare another path than the one that is seen here.
        everybody = not scope.get("root_path") and is_open(path)
        return everybody or knows_key(shown, self._digest)

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
        """Lets nothing new in, waits a moment for what is there, then passes the wish on: nothing is aborted, and
        nothing gets stuck. When the asker gives up, or there still is something, nothing has changed."""
        before, self._sleeps = self._sleeps, True
        done = False

        def answered(status: int) -> None:
            nonlocal done
            done = status == 200

        try:
            if self._idle.is_set() or await self._idle_before(receive):
                await self._app(scope, receive, _telling(send, answered))
            elif self._working:
                await _refuse(scope, send, 409, BUSY)
        finally:
            if not done:
                self._sleeps = before

    async def _wake(self, scope: Scope, receive: Receive, send: Send) -> None:
        def answered(status: int) -> None:
            if status == 200 and not scope.get("query_string"):  # with tags it wakes in part
                self._sleeps = False

        await self._app(scope, receive, _telling(send, answered))

    async def _idle_before(self, receive: Receive) -> bool:
        """True when all that worked is done, False when the asker left before, or it takes too long."""
        idle = asyncio.ensure_future(self._idle.wait())
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({idle, left}, timeout=IDLE_SECS, return_when=asyncio.FIRST_COMPLETED)
            return idle.done() and not left.done()
        finally:
            idle.cancel()
            left.cancel()


def _telling(send: Send, answered: Callable[[int], None]) -> Send:
    """`send`, with a word about the status before it is out."""

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            answered(message["status"])
        await send(message)

    return telling


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
