"""The guard that runs inside vLLM, called as vLLM's server calls it."""

from __future__ import annotations

import ast
import asyncio
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from neuron.harness.vllm.guard import neuron_guard
from neuron.harness.vllm.guard.neuron_guard import (
    CONTROL_HEADER,
    DIGEST_VARIABLE,
    NOT_FOUND,
    SLEEPING,
    Guard,
    digest_of,
)

KEY = "a long random key"
DEV_ROUTES = (
    "/sleep", "/wake_up", "/is_sleeping", "/server_info", "/collective_rpc", "/pause", "/resume", "/is_paused",
    "/abort_requests", "/release_kv_cache_memory", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache",
    "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/start_draft_weight_update", "/finish_weight_update", "/update_weight_version", "/weight_info",
    "/weight_checker", "/get_world_size", "/inference/v1/abort_requests",
)  # fmt: skip
ADMIN_ROUTES = (
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/start_profile",
    "/stop_profile",
    "/fault_tolerance/apply",
)
OPEN = (
    "/health", "/ping", "/version", "/load", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions",
    "/v1/embeddings", "/v1/responses", "/v1/responses/resp_1/cancel", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/score", "/pooling", "/classify", "/tokenize", "/detokenize",
    "/v1/audio/transcriptions", "/v1/audio/translations", "/invocations",
    "/openapi.json", "/docs",
)  # fmt: skip
TRICKS = (
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_lora_adapter/", "/v1//load_lora_adapter",
    "/sleep/", "//sleep", "/./sleep", "/v1/../sleep", "/v1/./sleep", "/v1//sleep", "/v1/", "/v1", "/V1/../sleep",
    "/health/../sleep", "/health/", "/health/sleep", "/SLEEP", "/Sleep", "/%73leep", "/sleep;x", "/sleep?x",
    "/sleep\x00", "/sleep#", " /sleep", "/sleep ", "sleep", "", "/", "*", "http://host/sleep", "/metrics/../sleep",
    "/docs/..", "/v1\\..\\sleep", "/\u017fleep",
)  # fmt: skip


class Inner:
    """The application behind the guard: answers `status`, after `gate` if set, and records its requests."""

    def __init__(self) -> None:
        self.seen: list[MutableMapping[str, Any]] = []
        self.status = 200
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        if scope["type"] == "http":
            self.entered.set()
            if self.gate is not None and not scope["path"].startswith(("/sleep", "/wake_up")):
                await self.gate.wait()
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b"inner"})

    @property
    def paths(self) -> list[str]:
        return [scope["path"] for scope in self.seen]


class Caller:
    """The server side of one guard."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.left = asyncio.Event()  # the client has closed its connection

    async def __call__(
        self, path: str, *, method: str = "GET", headers: tuple[tuple[bytes, bytes], ...] = (), **scope: Any
    ) -> tuple[int | None, bytes, dict[bytes, bytes]]:
        """(status or close code, body, headers); None without an answer."""
        sent: list[Any] = []
        begun = False

        async def receive() -> Any:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        whole = {"type": "http", "method": method, "path": path, "headers": list(headers), "query_string": b"", **scope}
        await self.guard(whole, receive, send)
        if not sent:
            return None, b"", {}
        first = sent[0]
        body = b"".join(message.get("body", b"") for message in sent)
        return first.get("status", first.get("code")), body, dict(first.get("headers", []))

    async def control(self, path: str, *, method: str = "POST", key: str = KEY, **scope: Any) -> int | None:
        return (await self(path, method=method, headers=((CONTROL_HEADER.encode(), key.encode()),), **scope))[0]


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def ask(inner: Inner, monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.setenv(DIGEST_VARIABLE, digest_of(KEY))
    return Caller(Guard(inner))


def test_it_needs_only_the_standard_library() -> None:
    """It runs in vLLM's Python, without our packages; no other file in its directory may shadow a module there."""
    path = Path(neuron_guard.__file__)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    assert {file.name for file in path.parent.glob("*.py")} == {"__init__.py", "neuron_guard.py"}


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_client_routes_are_open(ask: Caller, inner: Inner, path: str, method: str) -> None:
    """Clients reach the engine's public routes without a key."""
    assert (await ask(path, method=method))[:2] == (200, b"inner")
    assert inner.paths == [path]


@pytest.mark.parametrize("path", [*DEV_ROUTES, *ADMIN_ROUTES, *TRICKS, "/something_new"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "sleep"])
async def test_other_routes_are_closed(ask: Caller, inner: Inner, path: str, method: str) -> None:
    """They answer as without development mode; unknown paths are closed too, and the engine never sees them."""
    assert (await ask(path, method=method))[:2] == (404, NOT_FOUND)
    assert inner.seen == []


async def test_head_has_no_body(ask: Caller) -> None:
    status, body, headers = await ask("/sleep", method="HEAD")
    assert (status, body, headers[b"content-length"]) == (404, b"", str(len(NOT_FOUND)).encode())


@pytest.mark.parametrize("path", DEV_ROUTES)
async def test_the_key_opens_everything(ask: Caller, inner: Inner, path: str) -> None:
    assert await ask.control(path) == 200
    assert inner.paths == [path]


async def test_the_engine_does_not_see_the_key(ask: Caller, inner: Inner) -> None:
    """The engine cannot log or pass on the key, not even on open paths."""
    for path in ("/is_sleeping", "/v1/models"):
        await ask(path, headers=((b"X-Neuron-Control", KEY.encode()), (b"accept", b"*/*")))
    assert [scope["headers"] for scope in inner.seen] == [[(b"accept", b"*/*")]] * 2


@pytest.mark.parametrize(
    "shown",
    [
        (),
        (b"",),
        (b"another key",),
        (KEY.encode() + b" ",),
        (digest_of(KEY).encode(),),
        (b"\xff\xfe",),
        (KEY.encode(), KEY.encode()),
        (b"another key", KEY.encode()),
    ],
)
async def test_a_wrong_key_opens_nothing(ask: Caller, inner: Inner, shown: tuple[bytes, ...]) -> None:
    """The digest, which is in the environment, opens nothing either, nor does one key among several."""
    headers = tuple((CONTROL_HEADER.encode(), value) for value in shown)
    assert (await ask("/sleep", method="POST", headers=headers))[0] == 404
    assert inner.seen == []


@pytest.mark.parametrize("digest", [None, ""])
async def test_without_a_digest_no_key_is_accepted(
    inner: Inner, monkeypatch: pytest.MonkeyPatch, digest: str | None
) -> None:
    monkeypatch.delenv(DIGEST_VARIABLE, raising=False)
    if digest is not None:
        monkeypatch.setenv(DIGEST_VARIABLE, digest)
    ask = Caller(Guard(inner))
    assert await ask.control("/sleep") == 404
    assert await ask.control("/sleep", key="") == 404
    assert (await ask("/health"))[0] == 200


async def test_a_root_path_opens_nothing(ask: Caller, inner: Inner) -> None:
    """The router removes it: /v1/sleep with a root path of /v1 would be /sleep."""
    for path, root in (("/v1/sleep", "/v1"), ("/health", "/"), ("/x/health", "/x")):
        assert (await ask(path, root_path=root))[0] == 404
    assert inner.seen == []


async def test_websockets_follow_the_same_rules(ask: Caller, inner: Inner) -> None:
    """A websocket to a closed route is closed, one to a public route passes."""
    assert (await ask("/sleep", type="websocket"))[0] == 1000
    assert inner.seen == []
    await ask("/v1/realtime", type="websocket")
    assert inner.paths == ["/v1/realtime"]


async def test_other_scopes(ask: Caller, inner: Inner) -> None:
    """The server's lifespan events pass; unknown scope types do not."""
    await ask("", type="lifespan")
    assert len(inner.seen) == 1
    with pytest.raises(RuntimeError, match="'new'"):
        await ask("/health", type="new")


async def test_a_sleeping_engine_refuses_only_model_requests(ask: Caller, inner: Inner) -> None:
    """vLLM would let the request wait, without counting it in its metrics, until the engine wakes."""
    assert await ask.control("/sleep") == 200
    status, body, headers = await ask("/v1/chat/completions", method="POST")
    assert (status, body, headers[b"retry-after"], headers[b"x-neuron-sleeping"]) == (503, SLEEPING, b"1", b"1")
    assert (await ask("/v1/realtime", type="websocket"))[0] == 1013
    for path in ("/health", "/metrics", "/v1/models"):
        assert (await ask(path))[0] == 200
    assert await ask.control("/wake_up", query_string=b"tags=weights") == 200
    assert (await ask("/v1/completions", method="POST"))[0] == 503  # only partly awake
    assert await ask.control("/wake_up") == 200
    assert (await ask("/v1/completions", method="POST"))[0] == 200


async def test_a_failed_sleep_changes_nothing(ask: Caller, inner: Inner) -> None:
    inner.status = 500
    assert await ask.control("/sleep") == 500
    inner.status = 200
    assert (await ask("/v1/completions", method="POST"))[0] == 200
    await ask.control("/sleep")
    inner.status = 500
    for path in ("/sleep", "/wake_up"):  # it stays asleep
        assert await ask.control(path) == 500
    assert (await ask("/v1/completions", method="POST"))[0] == 503


async def test_it_sleeps_after_its_requests(ask: Caller, inner: Inner) -> None:
    """No request is aborted, and no new one gets in."""
    inner.gate = asyncio.Event()
    running = asyncio.create_task(ask("/v1/completions", method="POST"))
    await inner.entered.wait()
    sleeping = asyncio.create_task(ask.control("/sleep"))
    await asyncio.sleep(0)
    assert (await ask("/v1/completions", method="POST"))[0] == 503
    assert inner.paths == ["/v1/completions"]
    inner.gate.set()
    assert (await running)[0] == 200
    assert await sleeping == 200
    assert inner.paths == ["/v1/completions", "/sleep"]


@pytest.mark.parametrize("gives_up", [True, False])
async def test_it_does_not_sleep_with_running_requests(
    ask: Caller, inner: Inner, monkeypatch: pytest.MonkeyPatch, gives_up: bool
) -> None:
    """When they take too long or the caller has left, the engine accepts requests as before."""
    if not gives_up:
        monkeypatch.setattr(neuron_guard, "IDLE_SECS", 0.05)
    inner.gate = asyncio.Event()
    running = asyncio.create_task(ask("/v1/completions", method="POST"))
    await inner.entered.wait()
    sleeping = asyncio.create_task(Caller.control(ask, "/sleep"))
    await asyncio.sleep(0)
    if gives_up:
        ask.left.set()
    assert await sleeping == 409 or gives_up
    inner.gate.set()
    assert (await running)[0] == 200
    assert (await ask("/v1/completions", method="POST"))[0] == 200
    assert "/sleep" not in inner.paths
