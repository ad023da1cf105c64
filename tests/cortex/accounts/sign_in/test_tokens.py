"""Tokens of an issuer as credentials: which are accepted, what role they give, and what they show up as."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey

from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer, new_key
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import Answer, connected, request

MODEL = "org/small"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
CHAT = "/v1/chat/completions"


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer) -> RunningCortex:
    """A cortex without keys in which people can sign in."""
    return await start_cortex([benjy], [{"id": MODEL}], auth={"oidc": issuer.settings()})


async def ask(url: str, target: str, token: str | None) -> Answer:
    """POST for a chat, otherwise GET."""
    method, body = ("POST", BODY) if target.startswith("/v1/chat") else ("GET", b"")
    lines = [] if token is None else [f"Authorization: Bearer {token}"]
    async with connected(url) as client:
        return await client.ask(request(body, *lines, method=method, target=target), method)


def message_of(answer: Answer) -> str:
    return str(json.loads(answer.body)["error"]["message"])


async def test_a_role_for_each_group(cortex: RunningCortex, issuer: SmallIssuer, engine: RawEngine) -> None:
    """Every role may use models, and each may do what it may with a key. The engine does not get the token."""
    for groups, statuses in (
        (["guests"], (200, 403, 403)),
        (["x", "team"], (200, 200, 403)),
        (["team", "ops"], (200, 200, 200)),
        ("guests ops", (200, 200, 200)),
    ):
        token = issuer.token(groups=groups)
        found = [(await ask(cortex.url, target, token)).status for target in (CHAT, "/fleet", "/keys")]
        assert tuple(found) == statuses, groups
        assert token not in str(engine.requests[-1].headers)
    refused = await ask(cortex.url, "/fleet", issuer.token(groups=["guests"]))
    assert "GET /fleet needs the role viewer; oidc:alice has the role user" in message_of(refused)


@pytest.mark.parametrize("target", [CHAT, "/fleet", "/v1/models"])
async def test_a_group_without_a_role(cortex: RunningCortex, issuer: SmallIssuer, target: str) -> None:
    """A person who may do nothing is told the groups."""
    for groups in (["others"], [], None, 7):
        answer = await ask(cortex.url, target, issuer.token(groups=groups))
        assert answer.status == 403
        assert "alice has signed in, but has no role here" in message_of(answer)


async def test_without_a_sign_in(cortex: RunningCortex, issuer: SmallIssuer) -> None:
    """Where people sign in, this host is not trusted either; what needs no key still needs none."""
    for target in (CHAT, "/fleet", "/v1/models"):
        assert (await ask(cortex.url, target, None)).status == 401
        assert (await ask(cortex.url, target, "sk-wrong")).status == 401
    for target in ("/health", "/openapi.json"):
        assert (await ask(cortex.url, target, "ey.a.b")).status == 200
    assert issuer.fetches == 1  # for the last one only


def forged(issuer: SmallIssuer) -> dict[str, tuple[str, str]]:
    """Tokens that are not accepted, and why."""
    public = issuer.key.as_dict(private=False)
    shared = OctKey.import_key(json.dumps(public))
    head, _, _ = issuer.token().partition(".")
    payload = issuer.token(groups=["ops"]).split(".")[1]
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    now = time.time()
    return {
        "none": (f"{none}.{payload}.", "the algorithm 'none' is not accepted"),
        "shared secret": (
            jwt.encode({"alg": "HS256", "kid": "first"}, {"iss": issuer.url, "sub": "1"}, shared, algorithms=["HS256"]),
            "the algorithm 'HS256' is not accepted",
        ),
        "other payload": (
            f"{head}.{payload}.{issuer.token().split('.')[2]}",
            "none of the issuer's keys has signed it",
        ),
        "other key": (issuer.token(key=new_key("first")), "none of the issuer's keys has signed it"),
        "unknown key": (issuer.token(key=new_key("other")), "none of the issuer's keys has signed it"),
        "logout token": (issuer.token(header={"typ": "logout+jwt"}), "the type 'logout+jwt' is not accepted"),
        "event": (issuer.token(events={}), "it reports an event"),
        "expired": (issuer.token(exp=now - 120), "the token has expired"),
        "without an end": (issuer.token(exp=None), "it has no exp"),
        "not yet": (issuer.token(nbf=now + 120), "nbf is"),
        "other issuer": (issuer.token(iss="http://evil.example.com"), "iss is 'http://evil.example.com'"),
        "other audience": (issuer.token(aud=["account"]), "it must be the client_id or one of audiences"),
        "no audience": (issuer.token(aud=None), "it has no aud"),
        "no subject": (issuer.token(sub=None), "no `sub` claim"),
        "rubbish": ("ey.a.b", "it is not a signed JWT"),
    }


async def test_tokens_that_are_refused(cortex: RunningCortex, issuer: SmallIssuer) -> None:
    """Each says why, on routes of engines and of cortex, and the token is not repeated. One fetch of the keys serves
    all of them: strangers cannot make cortex ask the issuer at will."""
    for name, (token, reason) in forged(issuer).items():
        for target in (CHAT, "/fleet"):
            answer = await ask(cortex.url, target, token)
            assert (answer.status, reason in message_of(answer)) == (401, True), (name, answer.body)
            assert token.encode() not in answer.body
    assert (await ask(cortex.url, CHAT, issuer.token())).status == 200
    assert issuer.fetches == 1


async def test_accepted_varieties(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer
) -> None:
    """Clocks that differ by less than a minute, other names of the audience, elliptic curves, nested
    groups, and people in no group at all."""
    more = {"audiences": ["api"], "cli_client_id": "cli", "groups_claim": "realm.roles", "default_role": "user"}
    cortex = await start_cortex([benjy], [{"id": MODEL}], auth={"oidc": issuer.settings(**more)})
    curve = ECKey.generate_key("P-256", {"kid": "curve", "alg": "ES256"})
    issuer.published.append(curve)
    for token in (
        issuer.token(exp=time.time() - 20, nbf=time.time() + 20),
        issuer.token(aud=["x", "api"]),
        issuer.token(aud="cli", header={"typ": "at+jwt"}),
        issuer.token(key=curve),
    ):
        assert (await ask(cortex.url, CHAT, token)).status == 200
        assert (await ask(cortex.url, "/fleet", token)).status == 403
    assert (await ask(cortex.url, "/fleet", issuer.token(realm={"roles": ["team"]}))).status == 200


async def test_keys_beside_people(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer
) -> None:
    """Machines keep their keys, also ones that look like a token."""
    keys = "bot:sk-bot\nodd:ey.a.b"
    cortex = await start_cortex([benjy], [{"id": MODEL}], keys=keys, auth={"oidc": issuer.settings()})
    for token in ("sk-bot", "ey.a.b", issuer.token()):
        assert (await ask(cortex.url, CHAT, token)).status == 200
    assert (await ask(cortex.url, CHAT, "sk-wrong")).status == 401
    assert issuer.fetches == 1


async def test_rotated_keys(cortex: RunningCortex, issuer: SmallIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a new key is accepted at once, and one of the withdrawn key no more."""
    assert (await ask(cortex.url, CHAT, issuer.token())).status == 200
    withdrawn = issuer.key
    monkeypatch.setattr("cortex.accounts.sign_in.issuer.PAUSE_SECS", 0.0)
    issuer.rotate()
    assert (await ask(cortex.url, CHAT, issuer.token())).status == 200
    assert (await ask(cortex.url, CHAT, issuer.token(key=withdrawn, exp=time.time() + 200))).status == 401


async def test_an_issuer_that_is_down(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer
) -> None:
    """Keys go on, and so do tokens once the issuer's keys are known; before that the error says what fails."""
    token = issuer.token()
    dead = SmallIssuer(url="http://127.0.0.1:9")
    cortex = await start_cortex([benjy], [{"id": MODEL}], keys="bot:sk-bot", auth={"oidc": dead.settings()})
    for target in (CHAT, "/fleet"):
        answer = await ask(cortex.url, target, token)
        assert answer.status == 503
        assert json.loads(answer.body)["error"]["code"] == "issuer_unavailable"
        assert "http://127.0.0.1:9 cannot be used" in message_of(answer)
    assert (await ask(cortex.url, CHAT, "sk-bot")).status == 200
    assert (await ask(cortex.url, "/health", token)).status == 200


async def test_unknown_keys_of_an_issuer_that_is_down(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of a key that the issuer may have published meanwhile is not called invalid, also while cortex does not
    ask the issuer again. Tokens of known keys go on."""
    issuer = SmallIssuer()
    monkeypatch.setattr("cortex.accounts.sign_in.issuer.PAUSE_SECS", 0.0)
    async with issuer.running():
        cortex = await start_cortex([benjy], [{"id": MODEL}], auth={"oidc": issuer.settings()})
        assert (await ask(cortex.url, CHAT, issuer.token())).status == 200
    new = issuer.token(key=new_key("new"))
    for pause in (0.0, 3600.0):  # the second finds that it was asked just now
        monkeypatch.setattr("cortex.accounts.sign_in.issuer.PAUSE_SECS", pause)
        answer = await ask(cortex.url, CHAT, new)
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "issuer_unavailable")
        assert f"{issuer.url} cannot be used" in message_of(answer)
    assert (await ask(cortex.url, CHAT, issuer.token(sub="another"))).status == 200


@pytest.mark.parametrize("document", [{"keys": "none"}, {"keys": {}}, {"keys": None}, {}, [], "nonsense"])
async def test_keys_that_are_nonsense(
    cortex: RunningCortex, issuer: SmallIssuer, monkeypatch: pytest.MonkeyPatch, document: Any
) -> None:
    """The keys that are known stay."""
    assert (await ask(cortex.url, CHAT, issuer.token())).status == 200
    issuer.document = document
    monkeypatch.setattr("cortex.accounts.sign_in.issuer.PAUSE_SECS", 0.0)
    answer = await ask(cortex.url, CHAT, issuer.token(key=new_key("new")))
    assert answer.status == 503
    assert f"{issuer.url}/keys answers 200: it has no list `keys`" in message_of(answer)
    assert (await ask(cortex.url, CHAT, issuer.token(sub="another"))).status == 200


async def test_in_every_worker_and_in_usage(
    tmp_path: Path, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer
) -> None:
    """Real processes: each worker accepts the token, refuses a forged one with the reason, and usage has the person."""
    auth: dict[str, Any] = {"oidc": issuer.settings()}
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state", workers=2, auth=auth) as cortex:
        token, guest = issuer.token(), issuer.token(sub="2", preferred_username="bob mallory", groups=["guests"])
        for _ in range(12):
            assert (await ask(cortex.url, CHAT, token)).status == 200
            assert (await ask(cortex.url, CHAT, guest)).status == 200
            assert (await ask(cortex.url, "/fleet", token)).status == 200
            refused = await ask(cortex.url, CHAT, issuer.token(aud="other"))
            assert (refused.status, "aud is 'other'" in message_of(refused)) == (401, True)
        usage: dict[str, Any] = {}
        while usage.get("totals", {}).get("requests", 0) < 24:
            await asyncio.sleep(0.05)
            answer = await ask(cortex.url, "/usage?group_by=key", token)
            usage = json.loads(answer.body)
        requests = {row["key"]: row["requests"] for row in usage["rows"]}
        assert requests == {"oidc:alice": 12, "oidc:bob_mallory": 12}
        own = json.loads((await ask(cortex.url, "/usage?group_by=key", guest)).body)
        assert [row["key"] for row in own["rows"]] == ["oidc:bob_mallory"]
        assert token not in cortex.log()
