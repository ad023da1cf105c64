"""What a caller may use, and how the control app learns who calls."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import pytest

from cortex.accounts.caller import Caller
from cortex.app import build_control_app, control_address, control_socket, working
from cortex.config.settings import CortexConfig
from shared.errors import Unauthorized
from shared.serve import Site, bind, serving
from tests.cortex.conftest import RunningCortex
from tests.cortex.raw_engine import RawEngine, answering, plain
from tests.cortex.raw_http import RawClient, connected, request

OPEN = Caller("1", "open")
NARROW = Caller("2", "narrow", models=("other/*", "org/sm?ll"))
BARRED = Caller("3", "barred", models=("other/*",))


def authenticate(api_key: bytes | None) -> Caller:
    found = {caller.name.encode(): caller for caller in (OPEN, NARROW, BARRED)}.get(api_key or b"")
    if found is None:
        raise Unauthorized("no such key")
    return found


@contextlib.asynccontextmanager
async def with_keys(
    cortex: RunningCortex, authenticate: Callable[[bytes | None], Caller] = authenticate
) -> AsyncIterator[RawClient]:
    """A client of another front door of this cortex, which knows keys: a caller's name is its key."""
    sock, control = bind("127.0.0.1", 0), control_socket()
    async with (
        serving([Site(build_control_app(cortex.parts), control)], drain_timeout_secs=0),
        working(cortex.parts.resolver, CortexConfig(), [sock], control_address(control), authenticate=authenticate),
        connected(f"http://127.0.0.1:{sock.getsockname()[1]}") as client,
    ):
        yield client


def asking(key: str, path: str = "/v1/chat/completions", *lines: str, **fields: object) -> bytes:
    body = json.dumps({"model": "org/small", **fields}).encode()
    return request(body, f"Authorization: Bearer {key}", *lines, target=path)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/other"])
async def test_a_model_that_the_key_may_not_use_is_refused(cortex: RunningCortex, engine: RawEngine, path: str) -> None:
    """On every path, before an engine hears of it; by a key that may, the same request is answered."""
    engine.script = answering(plain(b'{"choices":[]}'))
    async with with_keys(cortex) as client:
        barred = await client.ask(asking("barred", path))
        engines_heard = len(engine.requests)
        allowed = [await client.ask(asking(key, path)) for key in ("open", "narrow")]
    error = json.loads(barred.body)["error"]
    assert (barred.status, engines_heard) == (403, 0)
    assert "org/small" in error["message"]
    assert error["code"] == "model_not_allowed"
    assert [answer.status for answer in allowed] == [200, 200]


async def test_the_list_of_models_has_what_the_key_may_use(cortex: RunningCortex, engine: RawEngine) -> None:
    """In every shape of the list, and for one model."""
    anthropic = "anthropic-version: 2023-06-01"

    async def get(client: RawClient, key: str, target: str, *lines: str) -> tuple[int, list[str]]:
        asked = request(b"", f"x-api-key: {key}", *lines, method="GET", target=target)
        answer = await client.ask(asked, "GET")
        found = json.loads(answer.body)
        entries = found.get("data", []) if "data" in found else [found]
        return answer.status, [entry["id"] for entry in entries if "id" in entry]

    async with with_keys(cortex) as client:
        for key, listed in (("open", ["org/small"]), ("narrow", ["org/small"]), ("barred", [])):
            assert await get(client, key, "/v1/models") == (200, listed)
            assert await get(client, key, "/v1/models", anthropic) == (200, listed)
            one = await get(client, key, "/v1/models/org/small")
            assert one == ((200, ["org/small"]) if listed else (404, []))


async def test_a_client_cannot_say_that_it_is_another(cortex: RunningCortex) -> None:
    """The header by which workers tell the control app of the caller is dropped from clients' requests."""
    forged = base64.b64encode(b'{"key_id":"1","name":"open","role":"admin"}').decode()
    async with with_keys(cortex) as client:
        for name in ("x-cortex-caller", "X-Cortex-Caller"):
            lines = ("x-api-key: barred", f"{name}: {forged}")
            answer = await client.ask(request(b"", *lines, method="GET", target="/v1/models"), "GET")
            assert json.loads(answer.body)["data"] == []
