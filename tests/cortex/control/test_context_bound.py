"""A request that cannot fit is refused before it costs a load."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cortex.config.catalogue import Catalogue
from cortex.control.decision import context_bound
from cortex.routing.control import ContextBound
from tests.cortex import instances_neuron
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.instances_neuron import InstancesNeuron
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = "org/m"
SMALL = {"id": MODEL, "max_model_len": 100}
TOO_LONG = {"messages": [{"role": "user", "content": "x " * 60_000}]}
TOO_MUCH = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 101}


async def ask(cortex: RunningCortex, body: dict[str, Any], path: str = "chat/completions") -> tuple[int, Any]:
    async with cortex.http.post(f"{cortex.url}/v1/{path}", json={"model": MODEL, **body}) as answer:
        return answer.status, json.loads(await answer.read())


@pytest.mark.parametrize("body", [TOO_LONG, TOO_MUCH], ids=["prompt", "answer"])
async def test_it_costs_no_load(start_cortex: StartCortex, benjy: V1Neuron, body: dict[str, Any]) -> None:
    """In the shape of vLLM's error, and of Anthropic's; a stream too. What fits is loaded."""
    cortex = await start_cortex([benjy], [SMALL])
    for more in ({}, {"stream": True}):
        status, answer = await ask(cortex, {**body, **more})
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (400, "BadRequestError", 400)
    status, answer = await ask(cortex, {"max_tokens": 1, **body}, "messages")
    assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")
    assert not benjy.loads
    assert (await ask(cortex, {**TOO_MUCH, "max_tokens": 100}))[0] == 200
    assert len(benjy.loads) == 1


async def test_a_loaded_model_says_so_itself(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models[MODEL] = "loaded"
    cortex = await start_cortex([benjy], [SMALL])
    for body in (TOO_LONG, TOO_MUCH):
        assert (await ask(cortex, body))[0] == 200


async def test_an_alias_counts_with_what_it_sets(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    alias = {"model": MODEL, "set": {"max_tokens": 100}}
    cortex = await start_cortex([benjy], [SMALL], aliases={"short": alias})
    assert (await ask(cortex, {**TOO_MUCH, "model": "short"}))[0] == 200


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ({"max_model_len": 100, "source": "/srv/m"}, "m", ContextBound(100, "/srv/m")),
        ({"max_model_len": 100, "harness": "sim"}, "m", ContextBound(100, "m")),
        ({"max_model_len": 100, "variants": [{"quant": "a"}, {"quant": "b", "max_model_len": 200}]}, "m", 200),
        ({"max_model_len": 100, "variants": [{"quant": "a"}, {"quant": "b", "max_model_len": 200}]}, "m@a", 100),
        # Another tokenizer than that of the source.
        ({"max_model_len": 100, "args": ["--tokenizer", "/srv/other"]}, "m", ContextBound(100, "")),
        ({"max_model_len": 100, "args": ["--tokenizer_mode=slow"]}, "m", ContextBound(100, "")),
        ({"max_model_len": 100, "args": ["--revision", "v2"]}, "m", ContextBound(100, "")),
        # Not known, as long as the largest card, or of engines that may shorten a prompt.
        ({}, "m", None),
        ({"args": ["--max-model-len", "100"]}, "m", None),
        ({"max_model_len": "auto"}, "m", None),
        ({"variants": [{"quant": "a"}, {"quant": "b", "max_model_len": 200}]}, "m", None),
        ({"max_model_len": 100, "harness": "llama.cpp"}, "m", None),
        ({}, "other", None),
    ],
)
def test_bound(model: dict[str, Any], name: str, expected: ContextBound | int | None) -> None:
    catalogue = Catalogue.model_validate({"models": [{"id": "m", **model}]})
    found = context_bound(name, catalogue, lambda _: None)
    assert (found.tokens if found is not None and isinstance(expected, int) else found) == expected


def test_bound_of_an_adapter() -> None:
    """That of its base; its tokenizer may be its own."""
    models = [{"id": "m", "max_model_len": 100}, {"id": "a", "base": "m", "lora": "/srv/a"}]
    assert context_bound("a", Catalogue.model_validate({"models": models}), lambda _: None) == ContextBound(100, "")


async def test_what_an_engine_served_counts_for_the_next_load(start_cortex: StartCortex) -> None:
    """As long as the catalogue entry and the neuron process are the same: another may have other settings."""
    model, one = instances_neuron.MODEL, InstancesNeuron("one", devices=1)
    one.engines["0"], one.max_model_len = one.engine, 100
    async with one.running():
        cortex = await start_cortex([one], [{"id": model}])
        resolver, live = cortex.parts.resolver, cortex.parts.live

        async def ask_for_101() -> int:
            return (await ask(cortex, {**TOO_MUCH, "model": model}))[0]

        assert await ask_for_101() == 200  # nothing is known yet
        await cortex.until(lambda: resolver.contexts.longest(live.catalogue.models[0]) == 100)
        one.statuses.clear()
        await cortex.until(lambda: not cortex.parts.fleet.snapshot().serving(model))
        assert (await ask_for_101(), len(one.loads)) == (400, 1)
        changed = Catalogue.model_validate({"models": [{"id": model, "args": ["--max-model-len", "200"]}]})
        assert resolver.contexts.longest(changed.models[0]) is None
        one.process = "one-2"
        await cortex.until(lambda: resolver.contexts.longest(live.catalogue.models[0]) is None)
        assert (await ask_for_101(), len(one.loads)) == (200, 2)
