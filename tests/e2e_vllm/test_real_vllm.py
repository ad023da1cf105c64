"""A real vLLM through the whole fleet. Every test cold-loads what it needs; in this order few engines are started."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterator

import anthropic
import openai
import pytest

from cortex.proxy.prompt.counting_process import CountRequest, count_tokens
from cortex.proxy.prompt.local_tokenizer import local_tokenizer
from cortex.proxy.prompt.prompt_size import excess, prompt_size
from tests.e2e_vllm.conftest import RealVllm
from tests.e2e_vllm.fleet import BROKEN, MINILM, PAIR, TINY
from tests.processes import eventually, of_session
from tests.services import NODE, Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

QUESTION = "The cat sees the moon"
WHOLE = {"ignore_eos": True}  # a random model may end immediately


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.cortex.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def ask(fleet: Fleet, model: str) -> tuple[int, dict[str, str], str]:
    """A short chat without a client package: status, headers, text or error message."""
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **WHOLE}
    answer = fleet.cortex.request("/v1/chat/completions", body)
    if answer.status == 200:
        return answer.status, answer.headers, answer.body["choices"][0]["message"]["content"]
    return answer.status, answer.headers, answer.body["error"]["message"]


def test_unload_ends_the_engine(fleet: Fleet) -> None:
    """When unload answers, every process of the engine is gone, and a new request starts a new one."""
    assert ask(fleet, TINY)[0] == 200
    engine = fleet.engine_of(TINY)
    assert fleet.unload(TINY).status == 200
    assert of_session(engine[0].pid) == []
    entry = fleet.status_of(TINY)
    assert entry is None or entry["status"] == "unloaded"


def test_first_request_loads_the_model_and_is_answered(fleet: Fleet) -> None:
    """The first chat starts an engine and gets its answer; the second uses the same engine."""
    entry = fleet.status_of(TINY)
    if entry is not None and entry["status"] == "loaded":  # by another test, if the one above did not run
        assert fleet.unload(TINY).status == 200
    status, headers, text = ask(fleet, TINY)
    assert (status, headers["x-cortex-node"]) == (200, NODE), f"{text}\n{fleet.neuron.log_tail()}"
    entry = fleet.status_of(TINY)
    assert entry is not None
    assert (entry["status"], entry["harness"], len(entry["devices"])) == ("loaded", "vllm", 1)
    leader = fleet.engine_of(TINY)[0].pid
    again = ask(fleet, TINY)
    assert again[2] == text
    assert again[1].get("x-cortex-cold-start") != headers["x-cortex-cold-start"]
    assert fleet.engine_of(TINY)[0].pid == leader


def test_tools_of_the_catalogue_are_accepted(fleet: Fleet) -> None:
    """Without `tools = true` vLLM answers 400."""
    body = {"model": TINY, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
    schema = {"type": "object", "properties": {}}
    chat = {**body, "tools": [{"type": "function", "function": {"name": "look", "parameters": schema}}]}
    for path, asked in (
        ("/v1/chat/completions", chat),
        ("/v1/messages", {**body, "tools": [{"name": "look", "input_schema": schema}]}),
    ):
        answer = fleet.cortex.request(path, asked)
        assert answer.status == 200, (path, answer)


def test_openai_chat_streams_the_same_answer_as_it_gives_whole(client: openai.OpenAI) -> None:
    """Plain and streamed, with usage, through the openai package; by an alias."""
    whole = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
        extra_body=WHOLE,
    )
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (24, "length")
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=WHOLE,
    )
    with stream:
        chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len(texts) > 2
    assert chunks[-1].usage == whole.usage


def test_anthropic_message_is_answered(fleet: Fleet) -> None:
    """The anthropic package talks to vLLM's own Messages API through cortex."""
    with anthropic.Anthropic(base_url=fleet.cortex.url, api_key="none", max_retries=0, timeout=300) as client:
        message = client.messages.create(
            model=TINY, max_tokens=16, messages=[{"role": "user", "content": QUESTION}], extra_body=WHOLE
        )
    assert message.usage.output_tokens > 0
    assert [block.type for block in message.content] == ["text"]


def test_what_cortex_refuses_before_a_load_vllm_refuses_in_the_same_words(fleet: Fleet, real_vllm: RealVllm) -> None:
    """A loaded model answers itself, as cortex does for a cold one; a template adds characters to a chat's."""
    assert ask(fleet, TINY)[0] == 200
    entry = fleet.status_of(TINY)
    assert entry is not None
    assert entry["max_model_len"] == 512
    tokenizer = local_tokenizer(str(real_vllm.tiny))
    assert tokenizer is not None
    longest = tokenizer.longest_token
    text = "a " * (512 * longest)
    chat = [{"role": "user", "content": text}]
    for path, asked in (
        ("/v1/chat/completions", {"messages": chat}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 513}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 513}),
        ("/v1/completions", {"prompt": [1] * 513}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 513}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 513}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 513}),
    ):
        body = {"model": TINY, **asked}
        expected = excess(prompt_size(path.encode(), json.dumps(body).encode()), 512, longest)
        assert expected is not None
        answer = fleet.cortex.request(path, body)
        error = answer.body["error"]
        message = re.sub(r"contains \d+ char|value=\d{5}", "", error["message"])
        assert message == re.sub(r"contains at least \d+ char|value=\d{5}", "", expected.message), path
        assert answer.status == 400
        if path != "/v1/messages":
            assert (error["type"], error["code"]) == ("BadRequestError", 400)


def test_cortex_counts_tokens_as_vllm_does(fleet: Fleet, real_vllm: RealVllm) -> None:
    """Those of a completion exactly; of a chat, whose template adds some, not more."""
    assert ask(fleet, TINY)[0] == 200
    tokenizer = local_tokenizer(str(real_vllm.tiny))
    assert tokenizer is not None
    for text in ("the quick brown fox " * 20, "naïve\n\n\t 12345 😀" * 9):
        for path, asked in (
            ("/v1/completions", {"prompt": text}),
            ("/v1/completions", {"prompt": text, "add_special_tokens": False}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ):
            body = {"model": TINY, "max_tokens": 1, **asked}
            size = prompt_size(path.encode(), json.dumps(body).encode())
            counted = count_tokens(CountRequest(tokenizer, size.text, size.seams, size.special, 512))
            answer = fleet.cortex.request(path, body)
            assert answer.status == 200, answer.body
            prompt_tokens = answer.body["usage"]["prompt_tokens"]
            assert counted.tokens <= prompt_tokens
            assert counted.at_least or counted.tokens == prompt_tokens


def test_killed_engine_is_noticed_and_loaded_again(fleet: Fleet) -> None:
    """kill -9 of vLLM's main process leaves workers that hold memory: neuron kills them, and the model comes back."""
    assert ask(fleet, TINY)[0] == 200
    engine = fleet.engine_of(TINY)
    assert len(engine) > 1
    os.kill(engine[0].pid, signal.SIGKILL)

    def noticed() -> bool:
        entry = fleet.status_of(TINY)
        return entry is not None and entry["status"] in ("failed", "recovering")

    eventually(noticed, "the neuron says so", within_secs=15)
    eventually(lambda: not of_session(engine[0].pid), "the workers are gone", within_secs=15)
    eventually(lambda: ask(fleet, TINY)[0] == 200, "it is served again", within_secs=120)
    assert fleet.engine_of(TINY)[0].pid != engine[0].pid


def test_wrong_model_directory_says_so(fleet: Fleet) -> None:
    """The client of a failed load gets vLLM's root cause, not its last line. The neuron keeps it."""
    body = {"model": BROKEN, "messages": [{"role": "user", "content": QUESTION}]}
    answer = fleet.cortex.request("/v1/chat/completions", body)
    assert (answer.status, answer.body["error"]["code"]) == (503, "cold_load_failed")
    assert int(answer.headers["retry-after"]) > 0
    assert "nothing-here" in answer.body["error"]["message"]
    entry = fleet.status_of(BROKEN)
    assert entry is not None
    assert entry["status"] == "failed"
    assert "nothing-here" in entry["error"]
    assert "nothing-here" in str(fleet.neuron.request("/models/test%2Fbroken/logs?tail=50").body)


def test_tensor_parallel_model_runs_on_both_devices(fleet: Fleet) -> None:
    """min_devices = 2 becomes one vLLM with two workers, each a process."""
    status, _, text = ask(fleet, PAIR)
    assert status == 200, text
    entry = fleet.status_of(PAIR)
    assert entry is not None
    assert (entry["status"], entry["devices"]) == ("loaded", [0, 1])
    workers = [process.command for process in fleet.engine_of(PAIR) if "Worker_TP" in process.command]
    assert len(workers) == 2  # it stays loaded: test_real_vllm_estimate.py reads its log


def test_related_sentences_are_nearer_than_unrelated_ones(fleet: Fleet, client: openai.OpenAI) -> None:
    """Real weights give meaningful embeddings: the bytes of an answer are the engine's own."""
    sentences = ["a cat sits on the mat", "a kitten rests on a rug", "quarterly revenue fell"]
    answer = client.embeddings.create(model=MINILM, input=sentences)
    cat, kitten, revenue = [item.embedding for item in answer.data]
    assert len(cat) == 384
    assert cosine(cat, kitten) > 0.5
    assert cosine(cat, revenue) < 0.2


def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of the angle between two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
