"""vLLM, llama.cpp, infinity and the simulation at once behind one cortex, used with the `openai` client."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e_engines.fleet import EMBEDDER, GGUF, SIMULATED, VLLM
from tests.processes import eventually, of_session
from tests.services import Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def chat(client: openai.OpenAI, model: str) -> None:
    """A chat, whole and streamed."""
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "The cat sees the moon"}]
    extra = {"ignore_eos": True}  # a random model may end immediately
    whole = client.chat.completions.create(
        model=model, messages=question, max_tokens=8, temperature=0, extra_body=extra
    )
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    stream = client.chat.completions.create(
        model=model,
        messages=question,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    chunks = list(stream)
    assert any(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [8]


def embed(client: openai.OpenAI, model: str) -> None:
    """Sentences of one meaning are nearer to each other than to a third."""
    texts = ["a cat sits on the mat", "a kitten rests on a rug", "quarterly revenue fell"]
    answer = client.embeddings.create(model=model, input=texts)
    cat, kitten, revenue = (entry.embedding for entry in answer.data)

    def likeness(other: list[float]) -> float:
        return sum(a * b for a, b in zip(cat, other, strict=True))

    assert likeness(kitten) > 0.5 > likeness(revenue)
    assert answer.usage.prompt_tokens > 0


USES: dict[str, Callable[[openai.OpenAI, str], None]] = {VLLM: chat, GGUF: chat, EMBEDDER: embed, SIMULATED: chat}
HARNESSES = {VLLM: "vllm", GGUF: "llama", EMBEDDER: "infinity", SIMULATED: "sim"}


def test_the_client_uses_four_kinds_of_engine_cold_and_warm(fleet: Fleet, client: openai.OpenAI) -> None:
    """The first request of each loads its engine, the second finds it; all four run at once."""
    for model, use in USES.items():
        use(client, model)
        leader = fleet.engine_of(model)[0].pid
        use(client, model)
        assert fleet.engine_of(model)[0].pid == leader
    entries = {entry["id"]: entry for entry in fleet.neuron.request("/models").body}
    assert {model: (entries[model]["status"], entries[model]["harness"]) for model in USES} == {
        model: ("loaded", harness) for model, harness in HARNESSES.items()
    }
    assert all(entries[model]["engine_version"] for model in USES)


@pytest.mark.parametrize("model", USES)
def test_a_killed_engine_is_started_again(fleet: Fleet, client: openai.OpenAI, model: str) -> None:
    """kill -9 of an engine: the next request is answered by a new one, and nothing is left of the old one."""
    USES[model](client, model)
    old = fleet.engine_of(model)[0].pid
    os.kill(old, signal.SIGKILL)
    USES[model](client, model)
    assert fleet.engine_of(model)[0].pid != old
    eventually(lambda: not of_session(old), "the killed engine's processes are gone", within_secs=30)
