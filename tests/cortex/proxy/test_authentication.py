"""Who a request is from, and what its role allows, over real sockets."""

from __future__ import annotations

import asyncio
import json
import time
from hashlib import sha256
from typing import Any

import pytest

from cortex.accounts.caller import ANONYMOUS, GUEST, LOOPBACK, Caller
from cortex.accounts.keys import key_table
from cortex.accounts.keys.key_table import KeyTable
from cortex.accounts.sign_in.person import Identified
from cortex.config.settings import CortexConfig
from cortex.http.heads import request_reader
from cortex.http.request import Request
from cortex.proxy.authentication import Authentication, Unidentified
from shared.errors import Unauthorized
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import Answer, connected, request

MODEL = "org/small"
ROLES = ("user", "viewer", "operator", "admin")
KEYS = "\n".join(f'[[keys]]\nname = "{role}"\nkey = "sk-the-{role}-key"\nrole = "{role}"' for role in ROLES)
BODY = json.dumps({"model": MODEL}).encode()


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex with a key of each role."""
    return await start_cortex([benjy], [{"id": MODEL}], keys=KEYS)


async def ask(cortex: RunningCortex, method: str, target: str, *lines: str, body: bytes = b"") -> Answer:
    async with connected(cortex.url) as client:
        return await client.ask(request(body, *lines, method=method, target=target), method)


def error_of(answer: Answer) -> dict[str, Any]:
    found = json.loads(answer.body)["error"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/messages"),
        ("POST", "/somewhere"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/org/small"),
        ("GET", "/fleet"),
        ("GET", "/fleet/events"),
        ("GET", "//fleet/"),
        ("POST", "/fleet/load"),
        ("GET", "/keys"),
        ("DELETE", "/keys/admin"),
        ("GET", "/fleet/unknown"),
        ("GET", "/nope"),
    ],
)
@pytest.mark.parametrize(
    "line", [None, "Authorization: Bearer sk-wrong", "x-api-key: sk-wrong", "Authorization: Basic x"]
)
async def test_every_route_needs_a_key(
    cortex: RunningCortex, engine: RawEngine, method: str, target: str, line: str | None
) -> None:
    """Neither an engine nor a handler gets the request, and the answer does not repeat the key."""
    engine.requests.clear()
    lines = ["Content-Type: application/json", *([] if line is None else [line])]
    answer = await ask(cortex, method, target, *lines, body=BODY if method == "POST" else b"")
    assert answer.status == 401
    assert dict(answer.headers)["www-authenticate"] == "Bearer"
    assert b"sk-wrong" not in answer.body
    if not target.startswith("/v1/messages"):
        assert error_of(answer)["code"] == "invalid_api_key"
    assert engine.requests == []


@pytest.mark.parametrize(
    "line",
    ["Authorization: Bearer sk-the-user-key", "authorization: bearer sk-the-user-key", "x-api-key: sk-the-user-key"],
)
async def test_both_headers_have_the_key(cortex: RunningCortex, engine: RawEngine, line: str) -> None:
    """As OpenAI's and Anthropic's clients send it. The engine does not get it."""
    assert (await ask(cortex, "POST", "/v1/chat/completions", line, body=BODY)).status == 200
    assert "sk-the-user-key" not in str(engine.requests[-1].headers)
    assert (await ask(cortex, "GET", "/v1/models", line)).status == 200


@pytest.mark.parametrize("target", ["/health", "/openapi.json"])
async def test_open_routes(cortex: RunningCortex, target: str) -> None:
    """Load balancers and client generators have no key; a wrong one does no harm."""
    assert (await ask(cortex, "GET", target)).status == 200
    assert (await ask(cortex, "GET", target, "Authorization: Bearer sk-wrong")).status == 200


@pytest.mark.parametrize(
    ("method", "target", "needed"),
    [
        ("GET", "/v1/models", "user"),
        ("GET", "/fleet", "viewer"),
        ("HEAD", "/fleet", "viewer"),
        ("GET", "/fleet/explain?model=org/small", "viewer"),
        ("POST", "/fleet/nodes/benjy/drain", "operator"),
        ("GET", "/keys", "admin"),
        ("DELETE", "/keys/nope", "admin"),
    ],
)
async def test_roles(cortex: RunningCortex, method: str, target: str, needed: str) -> None:
    """Each role may do what those before it may; the refusal names the role that is needed."""
    for role in ROLES:
        lines = f"Authorization: Bearer sk-the-{role}-key", "Content-Type: application/json"
        answer = await ask(cortex, method, target, *lines, body=b"{}" if method == "POST" else b"")
        allowed = ROLES.index(role) >= ROLES.index(needed)
        assert (answer.status != 403) == allowed, (role, answer.status)
        if not allowed and method != "HEAD":
            assert f"needs the role {needed}; the API key '{role}' has the role {role}" in error_of(answer)["message"]


@pytest.mark.parametrize("name", ["anonymous", "loopback", "file:admin", "env:admin"])
async def test_a_client_cannot_say_who_it_is(cortex: RunningCortex, name: str) -> None:
    """The header by which a worker tells the control is never taken from a client."""
    lines = ("Authorization: Bearer sk-the-user-key", f"X-Cortex-Caller: {name}")
    assert (await ask(cortex, "GET", "/keys", *lines)).status == 403
    assert (await ask(cortex, "GET", "/keys", f"x-cortex-caller: {name}")).status == 401


def request_from(peer: str, *lines: str) -> Request:
    head, reader = request_reader()
    text = "\r\n".join(["GET /v1/realtime?model=m HTTP/1.1", "Host: c", *lines, "", ""])
    assert reader.feed(text.encode()) == b""
    return Request(head, peer=peer, received=0.0)


SOME_KEY = KeyTable({sha256(b"sk-alice").digest(): Caller("1", "alice")})
ALL_REVOKED = KeyTable(configured=True)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "192.0.2.1", "2001:db8::1", ""])
@pytest.mark.parametrize("anonymous", [False, True])
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("proxied", [False, True])
def test_who_may_come_without_a_key(peer: str, anonymous: bool, trust: bool, proxied: bool) -> None:
    """As docs/keys.md has it: this host while there are no keys or it is trusted; clients of a proxy on it, who may be
    anyone, while there are no keys; others only if that is allowed, and then behind all with a key. "" is the address
    of a client that has reset its connection."""
    config = CortexConfig.model_validate({"gateway": {"allow_anonymous": anonymous}, "auth": {"trust_loopback": trust}})
    here = peer != "" and not peer.startswith(("192", "2001"))
    for keys, local in ((KeyTable(), ANONYMOUS), (SOME_KEY, LOOPBACK), (ALL_REVOKED, LOOPBACK)):
        authentication = Authentication(keys, config)
        asked = request_from(peer, *(["X-Forwarded-For: 192.0.2.7"] if proxied else []))
        if here and not proxied and (keys.empty or trust):
            assert authentication.caller_of(asked) is local
        elif anonymous or (here and keys.empty):
            assert authentication.caller_of(asked) is GUEST
        else:
            with pytest.raises(Unauthorized, match="requires an API key"):
                authentication.caller_of(asked)


@pytest.mark.parametrize("line", ["X-Forwarded-For: 192.0.2.7", "Forwarded: for=192.0.2.7"])
async def test_a_proxy_on_this_host_gives_no_rights_without_keys(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, line: str
) -> None:
    """Its clients may use models. The refusal of everything else says what to do; a program on this host may do it."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    json_line = "Content-Type: application/json"
    assert (await ask(cortex, "POST", "/v1/chat/completions", line, json_line, body=BODY)).status == 200
    assert (await ask(cortex, "GET", "/v1/models", line)).status == 200
    for method, target, needed in (
        ("GET", "/fleet", "viewer"),
        ("POST", f"/fleet/nodes/{benjy.name}/drain", "operator"),
        ("POST", "/keys", "admin"),
    ):
        answer = await ask(cortex, method, target, line, json_line, body=b"{}" if method == "POST" else b"")
        assert answer.status == 403
        message = error_of(answer)["message"]
        assert f"needs the role {needed}; without an API key you have the role user" in message
        assert "create a key on cortex's host with `cortex keys create NAME --admin" in message
    assert (await ask(cortex, "GET", "/fleet")).status == 200
    assert (await ask(cortex, "GET", "/keys")).status == 200


def test_a_wrong_key_is_an_error_even_where_none_is_needed() -> None:
    """Its sender expects what the key is for."""
    config = CortexConfig.model_validate({"gateway": {"allow_anonymous": True}, "auth": {"trust_loopback": True}})
    for keys in (SOME_KEY, ALL_REVOKED):
        with pytest.raises(Unauthorized, match="invalid API key"):
            Authentication(keys, config).caller_of(request_from("127.0.0.1", "x-api-key: sk-bob"))
    assert Authentication(KeyTable(), config).caller_of(request_from("127.0.0.1", "x-api-key: any")) is ANONYMOUS


@pytest.mark.parametrize(("expiries", "hashed"), [({}, 1), ({sha256(b"sk-alice").digest(): 4e9}, 2)])
def test_how_often_a_key_is_hashed(monkeypatch: pytest.MonkeyPatch, expiries: dict[bytes, float], hashed: int) -> None:
    """Once; one that expires once for each request."""
    seen: list[bytes] = []

    def noted(key: bytes) -> object:
        seen.append(key)
        return sha256(key)

    monkeypatch.setattr(key_table, "sha256", noted)
    authentication = Authentication(KeyTable(SOME_KEY.callers, expiries), CortexConfig())
    for _ in range(2):
        assert authentication.caller_of(request_from("192.0.2.1", "x-api-key: sk-alice")).name == "alice"
    assert len(seen) == hashed


def test_trust_follows_a_reload() -> None:
    """The next request has it."""
    authentication = Authentication(SOME_KEY, CortexConfig())
    authentication.configure(CortexConfig.model_validate({"auth": {"trust_loopback": True}}))
    assert authentication.caller_of(request_from("127.0.0.1")) is LOOPBACK


class SlowPeople:
    """Implements `person.People`: answers what was true when it was asked, once `answering` is set."""

    def __init__(self) -> None:
        self.caller = Caller("oidc:1", "oidc:alice", "admin")
        self.asked = asyncio.Event()
        self.answering = asyncio.Event()

    async def identify(self, credential: bytes) -> Identified:
        found = Identified(self.caller, time.time() + 60)
        self.asked.set()
        await self.answering.wait()
        return found


async def test_a_reload_while_a_person_is_looked_up() -> None:
    """The role from before it is not remembered."""
    people = SlowPeople()
    authentication = Authentication(KeyTable(), CortexConfig(), people)
    asked, token = request_from("192.0.2.1", "Authorization: Bearer ey.a.b"), b"ey.a.b"
    looking_up = asyncio.create_task(authentication.identify(asked, token))
    await people.asked.wait()
    people.caller = Caller("oidc:1", "oidc:alice", "user")
    authentication.configure(CortexConfig())
    people.answering.set()
    await looking_up
    with pytest.raises(Unidentified):
        authentication.caller_of(asked)
    assert (await authentication.identify(asked, token)).role == "user"
    assert authentication.caller_of(asked).role == "user"


@pytest.mark.parametrize(
    ("offered", "passed_on"),
    [
        ("realtime, openai-insecure-api-key.sk-alice, openai-beta.realtime-v1", "realtime, openai-beta.realtime-v1"),
        ("openai-insecure-api-key.sk-alice", None),
    ],
)
def test_key_of_a_browsers_websocket(offered: str, passed_on: str | None) -> None:
    """A browser can only offer it as a protocol. Engines get the other protocols."""
    asked = request_from("192.0.2.1", "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Protocol: {offered}")
    assert Authentication(SOME_KEY, CortexConfig()).caller_of(asked).name == "alice"
    lines = asked.head_for(b"engine", b"", b"id", []).decode().split("\r\n")
    assert [line.partition(": ")[2] for line in lines if line.lower().startswith("sec-websocket-protocol")] == (
        [] if passed_on is None else [passed_on]
    )
    assert not any("sk-alice" in line for line in lines)
