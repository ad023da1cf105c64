"""The simulated engine's HTTP API beyond what the client packages use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.neuron.sim_process import FAST, MODEL, SimProcess, ready_engine

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def metrics(session: aiohttp.ClientSession, engine: SimProcess) -> dict[tuple[str, str], float]:
    """The samples by name and finished_reason (empty without one)."""
    async with session.get(f"{engine.url}/metrics") as response:
        text = await response.text()
    return {
        (sample.name, sample.labels.get("finished_reason", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


async def until_metric(
    session: aiohttp.ClientSession, engine: SimProcess, name: str, value: float, reason: str = ""
) -> None:
    async def polled() -> None:
        while True:
            if (await metrics(session, engine))[name, reason] == value:
                return
            await asyncio.sleep(0.01)

    await asyncio.wait_for(polled(), 10)


async def post(session: aiohttp.ClientSession, engine: SimProcess, path: str, body: Any) -> tuple[int, Any]:
    async with session.post(engine.url + path, json=body) as response:
        return response.status, await response.json()


async def test_every_view_answers(session: aiohttp.ClientSession) -> None:
    """/health and /ping are empty 200s; /version, /load and /v1/models are JSON like vLLM's."""
    async with ready_engine(*FAST, "--max-model-len", "4k") as engine:
        for path in ("/health", "/ping"):
            async with session.get(engine.url + path) as response:
                assert (response.status, await response.read()) == (200, b"")
        async with session.get(engine.url + "/version") as response:
            assert await response.json() == {"version": "0.32.0"}
        async with session.get(engine.url + "/load") as response:
            assert await response.json() == {"server_load": 0}
        async with session.get(engine.url + "/v1/models") as response:
            [model] = (await response.json())["data"]
        assert (model["id"], model["max_model_len"], model["root"]) == (MODEL, 4000, MODEL)


async def test_error_bodies_have_vllms_form(session: aiohttp.ClientSession) -> None:
    async with ready_engine(*FAST) as engine:
        status, body = await post(session, engine, "/v1/chat/completions", {**HELLO, "model": "x"})
        assert status == 404
        assert body["error"].pop("message").startswith("The model `x` does not exist.")
        assert body == {"error": {"type": "NotFoundError", "param": "model", "code": 404}}
        async with session.post(engine.url + "/v1/chat/completions", data=b"{not json") as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == 400
        wrong: list[Any] = [
            {},
            [],
            {"messages": []},
            {"messages": "x"},
            {**HELLO, "max_tokens": "x"},
            {**HELLO, "n": 0},
        ]
        for refused in wrong:
            status, body = await post(session, engine, "/v1/chat/completions", refused)
            assert (status, body["error"]["code"]) == (400, 400), refused
        status, body = await post(session, engine, "/v1/messages", {**HELLO, "model": "x", "max_tokens": 1})
        assert (status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
        status, body = await post(session, engine, "/nowhere", {})
        assert (status, body["error"]["message"]) == (404, "Not Found")


async def test_a_request_without_a_model_is_served(session: aiohttp.ClientSession) -> None:
    async with ready_engine(*FAST, "--served-model-name", "first", "second") as engine:
        status, body = await post(session, engine, "/v1/chat/completions", HELLO)
        assert (status, body["model"]) == (200, "first")


async def test_an_api_key_protects_v1_only(session: aiohttp.ClientSession) -> None:
    """vLLM answers a plain 401 below /v1; /health and /metrics stay open for monitoring."""
    async with ready_engine(*FAST, env={"VLLM_API_KEY": "secret"}) as engine:
        assert await post(session, engine, "/v1/chat/completions", HELLO) == (401, {"error": "Unauthorized"})
        for path in ("/health", "/metrics", "/version"):
            async with session.get(engine.url + path) as response:
                assert response.status == 200
        async with session.get(engine.url + "/v1/models", headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 200


async def test_tokenize_and_detokenize_undo_each_other(session: aiohttp.ClientSession) -> None:
    text = "Grüße, 世界!\n\n  two  spaces 🎉 and a-very-long-word"
    async with ready_engine(*FAST) as engine:
        _, coded = await post(session, engine, "/tokenize", {"prompt": text, "return_token_strs": True})
        assert coded["count"] == len(coded["tokens"]) == len(coded["token_strs"])
        assert "".join(coded["token_strs"]) == text
        assert await post(session, engine, "/detokenize", {"tokens": coded["tokens"]}) == (200, {"prompt": text})
        status, strange = await post(session, engine, "/detokenize", {"tokens": [0, -1, 7, 2**60]})
        assert (status, strange) == (200, {"prompt": "\ufffd" * 4})


async def test_reading_endpoints_answer_in_vllms_shapes(session: aiohttp.ClientSession) -> None:
    documents = ["money and banks", "cats like milk", "a cat drinks milk"]
    async with ready_engine(*FAST, "--embedding-dims", "32") as engine:
        _, ranked = await post(
            session, engine, "/v1/rerank", {"query": "a cat drinks water", "documents": documents, "top_n": 2}
        )
        assert ranked["results"][0]["index"] == 2
        assert len(ranked["results"]) == 2
        _, scored = await post(session, engine, "/score", {"text_1": "a cat", "text_2": ["a cat", "some bank"]})
        assert scored["data"][0]["score"] == pytest.approx(1)
        assert scored["data"][1]["score"] < 0.9
        _, pooled = await post(session, engine, "/pooling", {"input": [[1, 2], [3]]})
        assert [len(item["data"]) for item in pooled["data"]] == [32, 32]
        _, classified = await post(session, engine, "/classify", {"input": "a text"})
        assert sum(classified["data"][0]["probs"]) == pytest.approx(1)


async def test_translations_take_a_form_and_refuse_one_without_a_file(session: aiohttp.ClientSession) -> None:
    async with ready_engine(*FAST) as engine:
        url = engine.url + "/v1/audio/translations"
        form = aiohttp.FormData({"model": MODEL})
        form.add_field("file", b"RIFF", filename="b.wav")
        async with session.post(url, data=form) as response:
            assert "b.wav: 4 bytes" in (await response.json())["text"]
        async with session.post(url, data=aiohttp.FormData({"model": MODEL}, default_to_multipart=True)) as response:
            assert response.status == 400
        async with session.post(url, json={}) as response:
            assert response.status == 400


async def test_metrics_count_requests_and_tokens(session: aiohttp.ClientSession) -> None:
    async with ready_engine(*FAST) as engine:
        before = await metrics(session, engine)
        assert before["vllm:request_success_total", "stop"] == 0
        _, body = await post(session, engine, "/v1/chat/completions", {**HELLO, "n": 2, "max_tokens": 5})
        _, whole = await post(session, engine, "/v1/completions", {"prompt": "Hello"})
        after = await metrics(session, engine)
    assert after["vllm:request_success_total", "length"] == 2
    assert after["vllm:request_success_total", "stop"] == 1
    assert after["vllm:generation_tokens_total", ""] == 10 + whole["usage"]["completion_tokens"]
    assert after["vllm:prompt_tokens_total", ""] == body["usage"]["prompt_tokens"] + 2
    assert after["vllm:time_to_first_token_seconds_count", ""] == 3  # like vLLM: one per sequence
    assert after["vllm:e2e_request_latency_seconds_count", ""] == 3
    assert after["vllm:num_requests_running", ""] == after["vllm:kv_cache_usage_perc", ""] == 0


async def test_a_disconnect_aborts_a_stream(session: aiohttp.ClientSession) -> None:
    """Generation stops at once, counts as aborted, and frees its slot and cache."""
    async with ready_engine("--load-secs", "0", "--tokens-per-sec", "20") as engine:
        body = {**HELLO, "stream": True, "max_tokens": 2000, "ignore_eos": True}
        response = await session.post(engine.url + "/v1/chat/completions", json=body)
        await response.content.readany()
        assert (await metrics(session, engine))["vllm:num_requests_running", ""] == 1
        response.close()
        await until_metric(session, engine, "vllm:num_requests_running", 0)
        after = await metrics(session, engine)
    assert after["vllm:request_success_total", "abort"] == 1
    assert after["vllm:kv_cache_usage_perc", ""] == 0
    assert after["vllm:generation_tokens_total", ""] < 100


async def test_a_disconnect_while_waiting_frees_the_place_in_the_queue(session: aiohttp.ClientSession) -> None:
    """With one slot, the second and third wait; when the second disconnects, the third gets the slot next."""
    async with ready_engine("--load-secs", "0", "--max-num-seqs", "1", "--tokens-per-sec", "20") as engine:
        url = engine.url + "/v1/chat/completions"
        endless = {**HELLO, "stream": True, "max_tokens": 2000, "ignore_eos": True}
        first = await session.post(url, json=endless)
        await first.content.readany()
        second = asyncio.create_task(session.post(url, json=HELLO))
        await until_metric(session, engine, "vllm:num_requests_waiting", 1)
        third = asyncio.create_task(session.post(url, json={**HELLO, "max_tokens": 2}))
        await until_metric(session, engine, "vllm:num_requests_waiting", 2)
        second.cancel()
        await until_metric(session, engine, "vllm:num_requests_waiting", 1)
        first.close()
        async with await asyncio.wait_for(third, 10) as response:
            assert response.status == 200
        await until_metric(session, engine, "vllm:request_success_total", 2, "abort")


async def test_configured_speeds_are_kept(session: aiohttp.ClientSession) -> None:
    """200 ms to the first token and 100 tokens/s: 11 tokens take 0.3 s."""
    loop = asyncio.get_running_loop()
    async with ready_engine("--load-secs", "0", "--ttft-ms", "200", "--tokens-per-sec", "100") as engine:
        started = loop.time()
        await post(session, engine, "/v1/chat/completions", {**HELLO, "max_tokens": 11})
        assert 0.3 <= loop.time() - started < 1.5


async def test_load_counts_open_requests_when_tracked(session: aiohttp.ClientSession) -> None:
    async with ready_engine("--load-secs", "0", "--enable-server-load-tracking") as engine:
        body = {**HELLO, "stream": True, "max_tokens": 2000, "ignore_eos": True}
        async with session.post(engine.url + "/v1/chat/completions", json=body) as response:
            await response.content.readany()
            async with session.get(engine.url + "/load") as load:
                assert await load.json() == {"server_load": 1}
            response.close()
