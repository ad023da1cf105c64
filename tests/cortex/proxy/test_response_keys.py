"""A stored response is for the API key that made it, and for operators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex.proxy.body.model_field import chooses_response_id
from cortex.proxy.paths import is_misspelt_response
from cortex.routing.response_owners import UNSTORED
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain
from tests.cortex.raw_http import RawClient, Wire, connected, request

MODEL = "org/small"
KEYS = "\n".join(
    f'[[keys]]\nname = "{name}"\nkey = "sk-{name}"\nrole = "{role}"'
    for name, role in (
        ("alice", "user"),
        ("bob", "user"),
        ("viewer", "viewer"),
        ("operator", "operator"),
        ("admin", "admin"),
    )
)
OTHERS = ["bob", "viewer"]
UNKNOWN = "resp_unknown"


async def answer(wire: Wire, received: Received) -> None:
    """Makes `resp_1`, and has every response."""
    made = received.target == "/v1/responses" and "previous_response_id" not in json.loads(received.body)
    await wire.send(plain(b'{"id": "resp_1"}' if made else b'{"id": "resp_next"}'))


@pytest.fixture
def engine(engine: RawEngine) -> RawEngine:
    engine.script = answer
    return engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """One engine, to which every request for the model goes."""
    return await start_cortex([benjy], [{"id": MODEL}], keys=KEYS)


def about(method: str, target: str, key: str) -> bytes:
    return request(b"", *credentials(key), method=method, target=target)


def making(key: str, target: str = "/v1/responses", **members: object) -> bytes:
    return sending(key, json.dumps({"model": MODEL, "input": "hi", **members}).encode(), target)


def sending(key: str, body: bytes, target: str = "/v1/responses") -> bytes:
    return request(body, *credentials(key), target=target)


def credentials(key: str) -> tuple[str, ...]:
    return (f"authorization: Bearer sk-{key}",) if key else ()


async def status_of(url: str, sent: bytes) -> int:
    async with connected(url) as client:
        return (await client.ask(sent)).status


def uses_of(response_id: str, key: str) -> list[bytes]:
    """Each way to use a stored response."""
    target = f"/v1/responses/{response_id}"
    return [
        about("GET", target, key),
        about("GET", f"{target}?stream=true", key),
        about("GET", f"{target}/input_items", key),
        about("DELETE", target, key),
        about("POST", f"{target}/cancel", key),
        making(key, previous_response_id=response_id),
        making(key, "/v1/responses/compact", previous_response_id=response_id),
    ]


@pytest.mark.parametrize("key", OTHERS)
async def test_another_key_gets_what_it_gets_for_an_unknown_response(
    cortex: RunningCortex, client: RawClient, engine: RawEngine, key: str
) -> None:
    """404, whether it is read, deleted, cancelled or continued. The engine, which has it, is not asked."""
    assert (await client.ask(making("alice"))).status == 200
    for foreign, unknown in zip(uses_of("resp_1", key), uses_of(UNKNOWN, key), strict=True):
        refused, expected = await client.ask(foreign), await client.ask(unknown)
        assert refused.status == expected.status == 404
        assert refused.body.replace(b"resp_1", UNKNOWN.encode()) == expected.body
        assert json.loads(refused.body)["error"]["code"] == "not_found"
    assert len(engine.requests) == 1


@pytest.mark.parametrize("target", ["/v1/responses", "/v1/responses/compact", "/v1/responses/input_tokens"])
async def test_an_id_that_no_engine_has_needs_no_check(
    cortex: RunningCortex, client: RawClient, engine: RawEngine, target: str
) -> None:
    """cortex made it for a chat's answer, so the engine says what becomes of it."""
    answer = await client.ask(making("bob", target, previous_response_id=f"{UNSTORED}0123"))
    assert (answer.status, [each.target for each in engine.requests]) == (200, [target])


@pytest.mark.parametrize("key", ["alice", "operator", "admin"])
async def test_its_own_key_and_operators_may_use_it(
    cortex: RunningCortex, client: RawClient, engine: RawEngine, key: str
) -> None:
    assert (await client.ask(making("alice"))).status == 200
    for use in uses_of("resp_1", key):
        assert (await client.ask(use)).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "org/small", "previous\\u005fresponse_id": "resp_1"}',
        b'{"model": "org/small", "previous_response_id": "resp\\u005f1"}',
        b'{"model": "org/small", "previous_response_id": null, "previous_response_id": "resp_1"}',
        b'{"model": "org/small", "temperature": NaN, "previous_response_id": "resp_1"}',
        b'\xef\xbb\xbf{"model": "org/small", "previous_response_id": "resp_1"}',
    ],
)
async def test_no_spelling_of_the_body_continues_it(
    cortex: RunningCortex, client: RawClient, engine: RawEngine, body: bytes
) -> None:
    """The engine would read each as the response's id."""
    await client.ask(making("alice"))
    assert (await client.ask(sending("bob", body))).status == 404
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/resp_1%2Fcancel",
        "/v1/response%73/resp_1/cancel",
        "/v1//responses/resp_1/cancel",
        "/v1/responses//resp_1/cancel",
        "/responses/resp_1/cancel",
    ],
)
async def test_no_spelling_of_the_path_reaches_it(
    cortex: RunningCortex, client: RawClient, engine: RawEngine, path: str
) -> None:
    """An engine's router would read each as the response's own path."""
    await client.ask(making("alice"))
    assert (await client.ask(making("bob", path))).status == 404
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("path", "misspelt"),
    [
        (b"/v1/responses", False),
        (b"/v1/responses/compact", False),
        (b"/v1/responses/resp_1/input_items", False),
        (b"/v1/Responses", True),
        (b"/v1/%72esponses", True),
        (b"/v1/./responses", True),
        (b"/v1/responses_of", False),
        (b"/v1/chat/responses", False),
    ],
)
def test_misspelt_paths_of_responses(path: bytes, misspelt: bool) -> None:
    assert is_misspelt_response(path) is misspelt


@pytest.mark.parametrize(("key", "status"), [("bob", 400), ("alice", 400), ("operator", 200)])
async def test_a_key_may_not_choose_the_id_of_its_response(
    cortex: RunningCortex, client: RawClient, engine: RawEngine, key: str, status: int
) -> None:
    """vLLM takes it from `request_id`, so a client could make another's response its own."""
    await client.ask(making("alice"))
    answered = await client.ask(making(key, request_id="resp_1"))
    assert answered.status == status
    if status == 400:
        assert json.loads(answered.body)["error"]["param"] == "request_id"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"request_id": "resp_1"}', True),
        (b'{"request\\u005fid": "resp_1"}', True),
        (b'{"top_p": NaN, "request_id": 5}', True),
        (b'{"request_id": null}', False),
        (b'{"metadata": {"request_id": "mine"}}', False),
        (b'{"input": "\\u0020"}', False),
        (b"[]", False),
    ],
)
def test_choice_of_an_id(body: bytes, expected: bool) -> None:
    assert chooses_response_id(body) is expected


async def test_clients_without_a_key_beside_others_with_one(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """They share theirs, and have no one else's."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], keys=KEYS, gateway={"allow_anonymous": True})
    async with connected(cortex.url) as client:
        await client.ask(making("alice"))
        assert [(await client.ask(use)).status for use in uses_of("resp_1", "")] == [404] * 7
        await client.ask(making(""))
        assert [(await client.ask(use)).status for use in uses_of("resp_1", "")] == [200] * 7
        assert [(await client.ask(use)).status for use in uses_of("resp_1", "alice")] == [404] * 7


async def test_without_keys_every_client_may(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> None:
    """Also one on another host, and a response that cortex has forgotten can be continued."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], host="127.0.0.1")
    async with connected(cortex.url) as client:
        await client.ask(making(""))
        for use in [*uses_of("resp_1", ""), making("", previous_response_id=UNKNOWN), making("", request_id="a")]:
            assert (await client.ask(use)).status == 200


async def test_each_worker_knows_the_key(tmp_path: Path, benjy: V1Neuron, engine: RawEngine) -> None:
    """Of a new response, and of those that cortex has kept over a restart. One of a version that did not keep the key
    is for operators only."""
    (tmp_path / "keys.toml").write_text(KEYS, encoding="utf-8")
    made = {"resp_kept": 0, "resp_old": 1}
    responses = {"engines": [[MODEL, "benjy"]] * 2, "keys": {0: "file:alice"}, "made": made}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text(json.dumps({"version": 1, "responses": responses}), encoding="utf-8")
    keys = {"file": str(tmp_path / "keys.toml")}
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state", keys=keys, workers=2) as process:
        assert await status_of(process.url, making("alice")) == 200
        for _ in range(3):  # often enough to reach each worker
            for response_id, allowed in (
                ("resp_1", {"alice", "operator"}),
                ("resp_kept", {"alice", "operator"}),
                ("resp_old", {"operator"}),
            ):
                for key in ("alice", "bob", "operator"):
                    expected = 200 if key in allowed else 404
                    assert await status_of(process.url, about("GET", f"/v1/responses/{response_id}", key)) == expected
                    continuing = making(key, previous_response_id=response_id)
                    assert await status_of(process.url, continuing) == expected
