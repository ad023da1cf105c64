"""What Anthropic's clients and Codex get besides inference: model lists, request ids and errors in their shapes."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import RawClient, connected, request

VERSION = "anthropic-version: 2023-06-01"
MODELS = [{"id": f"org/m{number}", "limit": {"context": 8192, "output": 512}} for number in range(5)]
NAMES = [*(f"org/m{number}" for number in range(5)), "large"]


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    benjy.models["org/m0"] = "loaded"
    return await start_cortex([benjy], MODELS, aliases={"large": "org/m4"})


async def got(client: RawClient, target: str, *lines: str) -> tuple[int, Any]:
    answer = await client.ask(request(b"", *lines, method="GET", target=target), "GET")
    return answer.status, json.loads(answer.body)


async def test_list_has_anthropics_shape(cortex: RunningCortex, client: RawClient) -> None:
    """Requests with an `anthropic-version` header get the list in Anthropic's shape, aliases included."""
    status, body = await got(client, "/v1/models", VERSION)
    assert status == 200
    assert set(body) == {"data", "has_more", "first_id", "last_id"}
    assert [model["id"] for model in body["data"]] == NAMES
    assert (body["has_more"], body["first_id"], body["last_id"]) == (False, "org/m0", "large")
    model = body["data"][0]
    assert (model["type"], model["display_name"]) == ("model", "org/m0")
    assert model["created_at"].endswith("Z")
    assert (model["max_input_tokens"], model["max_tokens"]) == (8192, 512)


@pytest.mark.parametrize(
    ("query", "ids", "more"),
    [
        ("limit=2", NAMES[:2], True),
        ("limit=6", NAMES, False),
        ("limit=2&after_id=org/m1", NAMES[2:4], True),
        ("after_id=org%2Fm3", NAMES[4:], False),
        ("after_id=large", [], False),
        ("limit=2&before_id=org/m3", NAMES[1:3], True),
        ("limit=3&before_id=org/m3", NAMES[:3], False),
        ("before_id=org/m0", [], False),
    ],
)
async def test_list_has_pages(client: RawClient, query: str, ids: list[str], more: bool) -> None:
    """`limit`, `after_id` and `before_id` work as at Anthropic."""
    _, body = await got(client, f"/v1/models?{query}", VERSION)
    assert ([model["id"] for model in body["data"]], body["has_more"]) == (ids, more)
    assert (body["first_id"], body["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "limit=%C2%B2", "after_id=no", "after_id=large&before_id=large"]
)
async def test_wrong_page_is_a_400(client: RawClient, query: str) -> None:
    """A bad page parameter gets an error in Anthropic's shape."""
    status, body = await got(client, f"/v1/models?{query}", VERSION)
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")


async def test_anthropic_client_reads_the_list(cortex: RunningCortex) -> None:
    """The real client: pages through the list and gets single models; an unknown one raises NotFoundError."""
    async with anthropic.AsyncAnthropic(base_url=cortex.url, api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list(limit=2)] == NAMES
        model = await client.models.retrieve("org/m1")
        assert (model.id, model.type, model.created_at.year >= 2024) == ("org/m1", "model", True)
        assert (await client.models.retrieve("large")).id == "large"
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("org/unknown")


async def test_list_for_codex(client: RawClient) -> None:
    """Codex decodes `models` and drops the list without it, or if a required field is missing. Checked with 0.171."""
    _, body = await got(client, "/v1/models?client_version=0.171.0")
    assert [model["slug"] for model in body["models"]] == [model["id"] for model in body["data"]] == NAMES
    required = {
        *("slug", "display_name", "supported_reasoning_levels", "shell_type", "visibility", "supported_in_api"),
        *("priority", "base_instructions", "supports_reasoning_summaries", "support_verbosity", "truncation_policy"),
        *("supports_parallel_tool_calls", "experimental_supported_tools"),
    }
    for model in body["models"]:
        assert required <= set(model)
        assert model["context_window"] == 8192


@pytest.mark.parametrize(
    ("asked", "lines", "status", "kind"),
    [
        ("GET /v1/models/unknown", (VERSION,), 404, "not_found_error"),
        ("GET /v1/messages", (), 405, "invalid_request_error"),
        ("GET /v1/messages/batches", (), 404, "not_found_error"),
        ("GET /v1/files", (VERSION,), 404, "not_found_error"),
        ("DELETE /v1/models", ("Anthropic-Version: 2023-06-01",), 405, "invalid_request_error"),
        ("POST /v1/messages", (), 400, "invalid_request_error"),
    ],
)
async def test_errors_have_anthropics_shape(
    client: RawClient, asked: str, lines: tuple[str, ...], status: int, kind: str
) -> None:
    """Every route that Anthropic's clients call has errors in their shape, with the id where they look for it."""
    method, target = asked.split(" ")
    answer = await client.ask(request(b"", *lines, method=method, target=target), method)
    body = json.loads(answer.body)
    assert (answer.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert answer.get("request-id") == answer.get("x-request-id") is not None


async def test_other_clients_get_openais_shape(client: RawClient) -> None:
    """Requests without the header and outside /v1/messages get OpenAI's shape."""
    for target in ("/v1/models/unknown", "/v1/files"):
        answer = await client.ask(request(b"", method="GET", target=target), "GET")
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
        assert answer.get("request-id") is None


async def test_answers_have_anthropics_request_id(cortex: RunningCortex, client: RawClient) -> None:
    """`request-id` beside `x-request-id`, on messages, on the list, and on a stream that waits; on no other answer."""
    body = b'{"model":"org/m0"}'
    answers = [
        await client.ask(request(body, "x-request-id: mine", target="/v1/messages")),
        await client.ask(request(b"", "x-request-id: mine", VERSION, method="GET", target="/v1/models"), "GET"),
    ]
    for answer in answers:
        assert (answer.status, answer.get("request-id"), answer.get("x-request-id")) == (200, "mine", "mine")
    assert (await client.ask(request(body, target="/v1/completions"))).get("request-id") is None


async def test_waiting_stream_has_anthropics_request_id(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Its head comes from cortex, before the engine's."""
    benjy.load_gate.clear()
    cortex = await start_cortex([benjy], MODELS, waiting={"first_comment_secs": 0.01})
    async with connected(cortex.url) as client:
        await client.send(request(b'{"model":"org/m0","stream":true}', "x-request-id: mine", target="/v1/messages"))
        head = await client.head()
        assert (head.get("request-id"), head.get("x-request-id")) == ("mine", "mine")
