"""A path that the model's engine does not serve is refused: before it costs a load, and without asking the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = "org/m"
EMBEDS = ["/v1/embeddings", "/v1/rerank"]
CHATS = ["/v1/chat/completions"]


async def ask(cortex: RunningCortex, path: str) -> tuple[int, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    async with cortex.http.post(f"{cortex.url}{path}", json=body) as answer:
        return answer.status, json.loads(await answer.read())


def telling(**paths: list[str]) -> Callable[[Any], Any]:
    """A neuron's answers, with these paths of its harnesses in `GET /discovery`."""

    def rewritten(answer: Any) -> Any:
        return {**answer, "harness_paths": paths} if isinstance(answer, dict) and "harnesses" in answer else answer

    return rewritten


async def test_a_cold_model_is_not_loaded_for_it(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.rewrite = telling(vllm=EMBEDS)
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    for path in ("/v1/chat/completions", "/v1/audio/speech", "/v1/messages", "/v1/responses"):
        status, answer = await ask(cortex, path)
        assert status == 404
        for said in (MODEL, path, "vllm", *EMBEDS):
            assert said in answer["error"]["message"]
        assert answer["error"]["code"] == "not_found"
    assert not benjy.loads
    assert (await ask(cortex, "/v1/embeddings"))[0] == 200
    assert (await ask(cortex, "/v1/rerank/more"))[0] == 200
    assert len(benjy.loads) == 1


async def test_what_can_be_translated_is_loaded(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.rewrite = telling(vllm=CHATS)
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    assert (await ask(cortex, "/v1/messages"))[0] != 404
    assert len(benjy.loads) == 1


@pytest.mark.parametrize("told", [{}, {"other": EMBEDS}])
async def test_unless_all_neurons_tell(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron, told: dict[str, list[str]]
) -> None:
    benjy.rewrite, beast.rewrite = telling(vllm=EMBEDS), telling(**told)
    cortex = await start_cortex([benjy, beast], [{"id": MODEL}])
    assert (await ask(cortex, "/v1/chat/completions"))[0] == 200


async def test_a_loaded_engine_is_not_asked(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models[MODEL] = "loaded"
    benjy.entries[MODEL] = {"paths": EMBEDS}
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    for _ in range(2):  # of an engine that the control names, and of one in the route table
        status, answer = await ask(cortex, "/v1/chat/completions")
        assert (status, answer["error"]["code"]) == (404, "not_found")
        assert not benjy.engine.requests
        assert (await ask(cortex, "/v1/embeddings"))[0] == 200
        benjy.engine.requests.clear()
    assert not any(cortex.parts.counts.all_in_flight().values())


async def test_the_replica_that_serves_it_is_used(start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    for neuron, paths in ((benjy, EMBEDS), (beast, CHATS)):
        neuron.models[MODEL] = "loaded"
        neuron.entries[MODEL] = {"paths": paths}
    cortex = await start_cortex([benjy, beast], [{"id": MODEL}])
    for _ in range(4):
        assert (await ask(cortex, "/v1/embeddings"))[0] == 200
        assert (await ask(cortex, "/v1/chat/completions"))[0] == 200
        assert (await ask(cortex, "/v1/audio/speech"))[0] == 404
    assert {path for path, _, _ in benjy.engine.requests} == {"/v1/embeddings"}
    assert {path for path, _, _ in beast.engine.requests} == set(CHATS)
