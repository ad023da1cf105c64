"""Where a path leads: to an engine whatever it is called, to the route that a slightly wrong one means, or to a 404
that helps."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from cortex.api.routes import CONTROL_ROUTES
from cortex.proxy.paths import INFERENCE, START_PAGE, is_own, meant_path, recorded_path
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, answering, plain
from tests.cortex.raw_http import Answer, RawClient, connected, request

MODEL = "org/small"
BODY = b'{"model":"org/small","n":1}'
FORM_TYPE = "Content-Type: multipart/form-data; boundary=X"


def form(*fields: tuple[str, str]) -> bytes:
    parts = [f'--X\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    return "".join([*parts, "--X--\r\n"]).encode()


@pytest.fixture
async def engine() -> AsyncIterator[RawEngine]:
    async with RawEngine().running() as engine:
        engine.script = answering(plain(b"{}"))
        yield engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex in front of the engine."""
    benjy.models[MODEL] = "loaded"
    benjy.engine_url = engine.url
    return await start_cortex([benjy], [{"id": MODEL}])


@pytest.fixture
async def with_default(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex whose default model is an alias."""
    benjy.models[MODEL] = "loaded"
    benjy.engine_url = engine.url
    return await start_cortex([benjy], [{"id": MODEL}], aliases={"usual": MODEL}, gateway={"default_model": "usual"})


@pytest.fixture
async def client(cortex: RunningCortex) -> AsyncIterator[RawClient]:
    async with connected(cortex.url) as client:
        yield client


def message(answer: Answer, status: int, code: str) -> str:
    """The error's message, after checking status and code."""
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"]) == (status, code)
    return str(error["message"])


@pytest.mark.parametrize(
    ("target", "arrives"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions?a=b//c", "/v1/completions?a=b//c"),
        ("/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/v1/v1/responses", "/v1/responses"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/embeddings/", "/v1/embeddings"),
        ("/v1/chat/completions/?x=1", "/v1/chat/completions?x=1"),
        ("//rerank/", "/rerank"),
        ("/v1/audio/transcriptions//", "/v1/audio/transcriptions"),
    ],
)
async def test_wrong_base_url_is_served_where_the_path_is_clear(
    client: RawClient, engine: RawEngine, target: str, arrives: str
) -> None:
    """A base URL with or without `/v1`, or with a slash too many, works. The engine gets the path it knows."""
    answer = await client.ask(request(BODY, target=target))
    assert answer.status == 200
    assert [received.target for received in engine.requests] == [arrives]


@pytest.mark.parametrize(
    "target", ["/models", "/v1/models/", "//v1/models", "/v1/v1/models", "/health/", "//health", "/fleet/"]
)
async def test_own_routes_are_served_too(client: RawClient, target: str) -> None:
    """cortex answers its own routes under these spellings too."""
    assert (await client.ask(request(method="GET", target=target), "GET")).status == 200


@pytest.mark.parametrize("target", ["/models/org/small", "/v1/v1/models/org%2Fsmall", "//v1/models/org/small/"])
async def test_one_model_is_served_too(client: RawClient, target: str) -> None:
    """The id keeps its encoding."""
    answer = await client.ask(request(method="GET", target=target), "GET")
    assert json.loads(answer.body)["id"] == MODEL


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/api/v1/chat/completions"),
        ("POST", "/v1/chat/completions/v1/messages"),
        ("POST", "/v1"),
        ("POST", "/"),
        ("POST", "/v1/chat/"),
        ("POST", "/api/chat"),
        ("GET", "/v1"),
        ("GET", "/api/tags"),
        ("PUT", "/v1/files/x"),
        ("HEAD", "/nowhere"),
    ],
)
async def test_other_paths_get_a_404_with_the_base_url(
    client: RawClient, engine: RawEngine, method: str, target: str
) -> None:
    """The error has the base URL that the client must be configured with."""
    body = b'{"prompt":"hi"}' if target == "/api/chat" else BODY
    answer = await client.ask(request(body, method=method, target=target, host="ai.internal:31313"), method)
    assert answer.status == 404
    if method != "HEAD":
        text = message(answer, 404, "not_found")
        assert "http://ai.internal:31313/v1 for OpenAI" in text
        assert target in text
    assert engine.requests == []


async def test_other_paths_that_people_try(client: RawClient) -> None:
    """They say where the dashboard and the metrics are."""
    answer = await client.ask(request(method="GET", target="/"), "GET")
    assert (answer.status, answer.get("content-type")) == (200, "application/json; charset=utf-8")
    assert json.loads(answer.body)["dashboard"] == "open this address in a browser"
    answer = await client.ask(request(method="GET", target="/metrics"), "GET")
    assert "[gateway] metrics_listen" in message(answer, 404, "not_found")


async def test_refused_head_request_gets_no_body(client: RawClient) -> None:
    """A body would be read as the beginning of the next answer."""
    answer = await client.ask(request(method="HEAD", target="/nowhere"), "HEAD")
    assert (answer.status, int(answer.get("content-length") or "0") > 0) == (404, True)
    assert (await client.ask(request(method="GET", target="/health"), "GET")).status == 200


@pytest.mark.parametrize(
    ("value", "scheme"),
    [("https", "https"), ("HTTPS, https", "https"), ("https,http", "https"), ("http, https", "http")],
)
async def test_base_url_has_the_scheme_of_the_proxy(client: RawClient, value: str, scheme: str) -> None:
    """A proxy that ends TLS says so in X-Forwarded-Proto; of several proxies the first is the client's."""
    answer = await client.ask(request(b"", f"X-Forwarded-Proto: {value}", method="GET", target="/v1"), "GET")
    assert f" {scheme}://cortex/v1" in message(answer, 404, "not_found")


@pytest.mark.parametrize("target", ["/" + "x" * 60_000, "/%0a" + "y" * 1000, "/a\x7f"[:2] + "?q=" + "z" * 60_000])
async def test_long_or_odd_path_gets_the_envelope(client: RawClient, target: str) -> None:
    """The message quotes the beginning only."""
    answer = await client.ask(request(b"{}", target=target))
    assert len(message(answer, 404, "not_found")) < 600


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/v2/rerank",
            "/v1/audio/speech",
            "/v1/images/generations",
            "/v1/videos",
            "/v1/systemone",
            "/invocations",
        ),
        *(
            "/v1/chat/completions/render",
            "/inference/v1/generate",
            "/v1/chat%2Fcompletions",
            "/V1/completions",
            "/a?b=c",
        ),
    ],
)
async def test_any_post_that_names_a_model_goes_to_its_engine(
    client: RawClient, engine: RawEngine, target: str
) -> None:
    """The engine decides what exists: path and body arrive unchanged, and its answer comes back."""
    for body, line in ((BODY, "Content-Type: application/json"), (form(("model", MODEL), ("n", "1")), FORM_TYPE)):
        answer = await client.ask(request(body, line, target=target))
        assert (answer.status, answer.get("x-cortex-node")) == (200, "benjy")
        assert (engine.requests[-1].target, engine.requests[-1].body) == (target, body)


@pytest.mark.parametrize(
    "target",
    [
        *("/sleep", "/sleep/", "//sleep", "/./wake_up", "/%73leep", "/v1/load_lora_adapter", "/v1/v1/sleep"),
        *("/fault_tolerance/apply", "/collective_rpc?x=1", "/update_weights_from_disk", "/Sleep"),
    ],
)
async def test_routes_that_manage_an_engine_are_refused(client: RawClient, engine: RawEngine, target: str) -> None:
    """However the path is written: an engine of a protocol v1 neuron may have no guard of its own."""
    answer = await client.ask(request(BODY, "Content-Type: application/json", target=target))
    message(answer, 403, "forbidden")
    assert engine.requests == []


async def test_unknown_path_with_an_unknown_model_is_model_not_found(client: RawClient) -> None:
    """The path may be right."""
    answer = await client.ask(request(b'{"model":"org/unknown"}', target="/v2/rerank"))
    message(answer, 404, "model_not_found")


@pytest.mark.parametrize("target", ["/fleet/load", "/fleet/nowhere", "/v1/models", "/health", "/openapi.json"])
async def test_own_paths_never_go_to_an_engine(client: RawClient, engine: RawEngine, target: str) -> None:
    """cortex answers these paths even if the body names a model that an engine has."""
    answer = await client.ask(request(BODY, "Content-Type: application/json", target=target))
    assert answer.status in (400, 404, 405)
    assert answer.get("x-cortex-node") is None
    assert engine.requests == []


def test_own_paths_are_complete() -> None:
    """Each route of the control app is either for engines or counts as cortex's own, as the start page does for
    browsers."""
    for route in CONTROL_ROUTES:
        path = route.path.replace("{model_id:.+}", "x").replace("{name}", "x").encode()
        assert (path in INFERENCE) is not (is_own(path) or path == START_PAGE), path
        assert meant_path(path, reads=route.method == "GET") == path


@pytest.mark.parametrize("path", ["/v1/completions", "/v2/rerank"])
@pytest.mark.parametrize(
    ("body", "arrives"),
    [
        (b"{}", b'{"model":"org/small"}'),
        (b' {"a": {"model": "x"} } ', b' {"a": {"model": "x"} ,"model":"org/small"} '),
        (b'{"model": null, "a": NaN}', {"model": MODEL}),
        (b'{"model": ""}', {"model": MODEL}),
        (b'{"a": "}"}', b'{"a": "}","model":"org/small"}'),
    ],
)
async def test_request_without_a_model_goes_to_the_default(
    with_default: RunningCortex, engine: RawEngine, path: str, body: bytes, arrives: bytes | dict[str, str]
) -> None:
    """`[gateway] default_model`, an id or alias; nothing else in the body changes."""
    async with connected(with_default.url) as client:
        assert (await client.ask(request(body, target=path))).status == 200
    received = engine.requests[0].body
    if isinstance(arrives, bytes):
        assert received == arrives
    else:
        assert json.loads(received)["model"] == arrives["model"]


async def test_form_without_a_model_goes_to_the_default(with_default: RunningCortex, engine: RawEngine) -> None:
    """The form gets one more part."""
    async with connected(with_default.url) as client:
        answer = await client.ask(request(form(("file", "abc")), FORM_TYPE, target="/v1/audio/transcriptions"))
    assert answer.status == 200
    assert engine.requests[0].body == form(("model", MODEL), ("file", "abc"))


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'{"model": 1}', b'{"model"'])
async def test_default_does_not_hide_mistakes(with_default: RunningCortex, engine: RawEngine, body: bytes) -> None:
    """Only a missing model is filled in."""
    async with connected(with_default.url) as client:
        message(await client.ask(request(body)), 400, "invalid_request")
        message(await client.ask(request(body, target="/v2/rerank")), 404, "not_found")
        named = await client.ask(request(b'{"model":"org/unknown"}'))
        message(named, 404, "model_not_found")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "recorded"),
    [
        (b"/v1/chat/completions", "/v1/chat/completions"),
        (b"/v1/responses", "/v1/responses"),
        (b"/v1/responses/resp_12ab", "/v1/responses/{id}"),
        (b"/v1/responses/resp_12ab/cancel", "/v1/responses/{id}/cancel"),
        (b"/v2/embed", "/v2/embed"),
        (b"/x" * 1000, "/x" * 128 + "…"),
    ],
)
def test_recorded_paths(path: bytes, recorded: str) -> None:
    """Usage neither gives away the ids of stored responses nor keeps what a client has made up."""
    assert recorded_path(path) == recorded
