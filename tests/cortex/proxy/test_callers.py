"""Which models a key may use, over real sockets."""

from __future__ import annotations

import json

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, answering, plain
from tests.cortex.raw_http import RawClient, request

KEYS = "\n".join(
    f'[[keys]]\nname = "{name}"\nkey = "sk-{name}"\n{models}'
    for name, models in (
        ("open", ""),
        ("narrow", 'models = ["other/*", "org/sm?ll"]'),
        ("barred", 'models = ["other/*"]'),
    )
)


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex with a key for all models, one for ours and others, and one for others only."""
    return await start_cortex([benjy], [{"id": "org/small"}], aliases={"fast": "org/small"}, keys=KEYS)


def asking(key: str, path: str, model: str) -> bytes:
    return request(json.dumps({"model": model}).encode(), f"Authorization: Bearer sk-{key}", target=path)


@pytest.mark.parametrize("model", ["org/small", "fast"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/other"])
async def test_a_model_that_the_key_may_not_use_is_refused(
    client: RawClient, engine: RawEngine, path: str, model: str
) -> None:
    """On every path and by every name, and no engine gets it; a key that may use the model gets its answer."""
    engine.script = answering(plain(b'{"choices":[]}'))
    barred = await client.ask(asking("barred", path, model))
    at_engine = len(engine.requests)
    allowed = [await client.ask(asking(key, path, model)) for key in ("open", "narrow")]
    error = json.loads(barred.body)["error"]
    assert (barred.status, at_engine) == (403, 0)
    assert "org/small" in error["message"]
    assert error["code"] == "model_not_allowed"
    assert [answer.status for answer in allowed] == [200, 200]


@pytest.mark.parametrize("lines", [(), ("anthropic-version: 2023-06-01",)], ids=["openai", "anthropic"])
@pytest.mark.parametrize(("key", "listed"), [("open", True), ("narrow", True), ("barred", False)])
async def test_the_list_of_models_has_what_the_key_may_use(
    client: RawClient, key: str, listed: bool, lines: tuple[str, ...]
) -> None:
    """In every shape of the list, aliases included, and for one model."""

    async def get(target: str) -> tuple[int, dict[str, object]]:
        answer = await client.ask(request(b"", f"x-api-key: sk-{key}", *lines, method="GET", target=target), "GET")
        return answer.status, json.loads(answer.body)

    status, page = await get("/v1/models")
    data = page["data"]
    assert isinstance(data, list)
    assert (status, [entry["id"] for entry in data]) == (200, ["org/small", "fast"] if listed else [])
    assert len(page["models"]) == len(data) if not lines else "models" not in page  # type: ignore[arg-type]
    for name in ("org/small", "fast"):
        assert (await get(f"/v1/models/{name}"))[0] == (200 if listed else 404)
