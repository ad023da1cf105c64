"""The simulated engine satisfies the real OpenAI and Anthropic client packages."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.neuron.sim_process import FAST, MODEL, SimProcess, ready_engine

KEY = "sk-sim"


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[SimProcess]:
    async with ready_engine(*FAST, "--served-model-name", MODEL, "large", env={"VLLM_API_KEY": KEY}) as started:
        yield started


@pytest_asyncio.fixture
async def client(engine: SimProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{engine.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest_asyncio.fixture
async def claude(engine: SimProcess) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=engine.url, auth_token=KEY, max_retries=0) as made:
        yield made


async def test_chat_plain_names_the_model_and_counts_tokens(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="large", messages=[{"role": "user", "content": "Say hello"}], max_tokens=12
    )
    assert answer.model == "large"
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.startswith('large (simulated): "Say hello"')
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


async def test_chat_without_a_limit_ends_by_itself_and_repeats_itself(client: AsyncOpenAI) -> None:
    """The answer ends with finish_reason stop, with and without a limit above its length; the same question gets the
    same text."""
    texts, counts = [], []
    for limit in (openai.omit, 4000):
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hé, 你好?"}], max_tokens=limit
        )
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        counts.append(answer.usage.completion_tokens)
        texts.append(answer.choices[0].message.content)
    assert texts[0] == texts[1]
    assert counts[0] == counts[1] < 200
    assert "Hé, 你好?" in (texts[0] or "")


async def test_chat_stream_adds_up_to_the_plain_answer_with_usage_last(client: AsyncOpenAI) -> None:
    plain = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], n=2)
    texts, reasons, usages = ["", ""], [], []
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in plain.choices]
    assert texts[0] != texts[1]
    assert reasons == ["stop", "stop"]
    assert usages[-1] == plain.usage
    assert not any(usages[:-1])


async def test_completions_answers_every_prompt_plain_and_streamed(client: AsyncOpenAI) -> None:
    plain = await client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=20)
    assert [choice.index for choice in plain.choices] == [0, 1]
    assert '"two"' in plain.choices[1].text
    texts = ["", ""]
    async for chunk in await client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=20, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in plain.choices]


async def test_embeddings_are_near_when_texts_share_words(client: AsyncOpenAI) -> None:
    answer = await client.embeddings.create(
        model=MODEL, input=["the cat sat on the mat", "on the mat sat a cat", "revenue fell last quarter"]
    )
    first, second, third = (item.embedding for item in answer.data)
    assert len(first) == 64
    assert math.isclose(math.fsum(x * x for x in first), 1, abs_tol=1e-6)
    near, far = (math.fsum(x * y for x, y in zip(first, other, strict=True)) for other in (second, third))
    assert near > 0.7
    assert far < 0.4


async def test_embeddings_base64_and_float_agree(client: AsyncOpenAI) -> None:
    floats = await client.embeddings.create(model=MODEL, input="a text", encoding_format="float")
    coded = await client.with_raw_response.embeddings.create(model=MODEL, input="a text", encoding_format="base64")
    raw = coded.http_response.json()["data"][0]["embedding"]
    assert struct.unpack("<64f", base64.b64decode(raw)) == pytest.approx(floats.data[0].embedding, abs=1e-6)


async def test_responses_plain_and_streamed(client: AsyncOpenAI) -> None:
    plain = await client.responses.create(model=MODEL, input="Hello", instructions="Be short")
    assert plain.status == "completed"
    assert plain.output_text.startswith(f"{MODEL} (simulated)")
    assert plain.usage is not None
    kinds = []
    async with client.responses.stream(model=MODEL, input="Hello", instructions="Be short") as stream:
        async for event in stream:
            kinds.append(event.type)
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == plain.usage.output_tokens
    assert final.output_text == plain.output_text
    assert final.usage == plain.usage


async def test_responses_are_stored(client: AsyncOpenAI) -> None:
    """Until the engine ends, plain and streamed ones can be read again, unless the request says otherwise."""
    plain = await client.responses.create(model=MODEL, input="Hello")
    async with client.responses.stream(model=MODEL, input="Hello") as stream:
        streamed = await stream.get_final_response()
    for made in (plain, streamed):
        again = await client.responses.retrieve(made.id)
        assert (again.id, again.output_text, again.status) == (made.id, made.output_text, "completed")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await client.responses.cancel(plain.id)
    forgotten = await client.responses.create(model=MODEL, input="Hello", store=False)
    with pytest.raises(openai.NotFoundError, match="not found"):
        await client.responses.retrieve(forgotten.id)


async def test_realtime_transcribes(engine: SimProcess) -> None:
    """Audio goes in as base64; after the final commit its words come one by one. A wrong event is an error, not an
    end."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession() as http:
        async with http.ws_connect(f"{engine.url}/v1/realtime?model=large", headers=headers) as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            await socket.send_json({"type": "nonsense"})
            assert (await socket.receive_json())["type"] == "error"
            await socket.send_json(
                {"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(900)).decode()}
            )
            await socket.send_json({"type": "input_audio_buffer.commit", "final": True})
            text, event = "", await socket.receive_json()
            while event["type"] == "transcription.delta":
                text, event = text + event["delta"], await socket.receive_json()
            assert (event["type"], event["text"]) == ("transcription.done", text)
            assert text == "large (simulated) heard 900 bytes."
        async with http.get(f"{engine.url}/v1/realtime", headers=headers) as plain:
            assert plain.status == 426


async def test_responses_cut_short_are_incomplete(client: AsyncOpenAI) -> None:
    cut = await client.responses.create(model=MODEL, input=[{"role": "user", "content": "Hello"}], max_output_tokens=16)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


async def test_messages_plain_streamed_and_counted(claude: AsyncAnthropic) -> None:
    plain = await claude.messages.create(
        model=MODEL, max_tokens=20, system="Be short", messages=[{"role": "user", "content": "Hello"}]
    )
    assert plain.stop_reason == "max_tokens"
    assert plain.usage.output_tokens == 20
    assert plain.content[0].type == "text"
    assert plain.content[0].text.startswith(f"{MODEL} (simulated)")
    async with claude.messages.stream(
        model=MODEL, max_tokens=20, system="Be short", messages=[{"role": "user", "content": "Hello"}]
    ) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == plain.content[0].text
    assert final.usage.output_tokens == 20
    counted = await claude.messages.count_tokens(
        model=MODEL, system="Be short", messages=[{"role": "user", "content": "Hello"}]
    )
    assert counted.input_tokens == plain.usage.input_tokens == final.usage.input_tokens


async def test_transcription_takes_a_form_with_a_file(client: AsyncOpenAI) -> None:
    heard = await client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"RIFF" + b"\x00" * 70000))
    assert "a.wav: 70004 bytes" in heard.text


async def test_errors_reach_the_client_as_its_own_kinds(client: AsyncOpenAI, claude: AsyncAnthropic) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
        await client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match="max_tokens=40000 cannot be greater than max_model_len=32768"):
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=40000
        )
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    from anthropic import NotFoundError

    with pytest.raises(NotFoundError) as caught:
        await claude.messages.create(model="nope", max_tokens=1, messages=[{"role": "user", "content": "Hi"}])
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "not_found_error"


async def test_models_lists_every_served_name(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL, "large"]
