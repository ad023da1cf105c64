"""Every request is admitted within its limits, settled once by what it used, and leaves one record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import pytest

from cortex.accounts.caller import Caller
from cortex.accounts.keys.key_table import KeyTable
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.terms import Grant, KeyLimits, Limits, TokenBound
from cortex.accounts.prices import PriceList
from cortex.accounts.usage.record import UsageRecord
from cortex.app import working
from cortex.config.settings import CortexConfig
from cortex.proxy.paths import INFERENCE_PATHS
from cortex.upstream.address import Address
from shared.errors import internal_error
from shared.serve import bind
from tests.cortex.conftest import RunningCortex
from tests.cortex.cortex_process import TOP
from tests.cortex.raw_engine import RawEngine, Received, answering, closing, plain, stream_head
from tests.cortex.raw_http import RawClient, Wire, chunked, connected, request

MODEL = "org/small"
LIMITED = Caller("7", "limited", limited=True)
NARROW = Caller("8", "narrow", models=("org/other",))
KEY_LINE = "Authorization: Bearer sk-limited"
RPM = 5
TPM = 10_000


class CountedLimiter:
    """Remembers what was settled. `asks`: as in a worker process, where the control is asked. Not a subclass: compiled
    classes have none that are interpreted."""

    def __init__(self, model_terms: ModelTermsTable) -> None:
        self.asks = False
        self.settled: list[tuple[int, int, int]] = []
        self.estimates = 0
        self._limiter = LocalLimiter(model_terms)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._limiter, name)

    def admit(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant | None:
        return None if self.asks else self._limiter.admit(caller, model_id, bound)

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        await asyncio.sleep(0)
        grant = self._limiter.admit(caller, model_id, bound)
        assert grant is not None
        return grant

    def settle(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        self.settled.append((prompt, completion, cached))
        self._limiter.settle(grant, prompt, completion, cached)

    def settle_estimate(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        self.settled.append((prompt, completion, cached))
        self.estimates += 1
        self._limiter.settle_estimate(grant, prompt, completion, cached)


class Door:
    """A front door with the keys of `LIMITED` and `NARROW`; collects the records of its requests."""

    def __init__(self, url: str, limiter: CountedLimiter, records: list[UsageRecord], client: RawClient) -> None:
        self.url = url
        self.limiter = limiter
        self.records = records
        self.client = client

    async def ask(self, body: dict[str, Any] | None = None, target: str = "/v1/chat/completions") -> Any:
        data = json.dumps({"model": MODEL, "max_tokens": 10, **(body or {})}).encode()
        return await self.client.ask(request(data, KEY_LINE, target=target))

    async def ended(self, count: int = 1) -> list[UsageRecord]:
        deadline = time.monotonic() + 10
        while len(self.records) < count:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        return self.records


class _Records:
    def __init__(self) -> None:
        self.found: list[UsageRecord] = []

    def add(self, record: UsageRecord) -> None:
        self.found.append(record)

    def use_prices(self, prices: PriceList) -> None: ...

    async def close(self) -> None: ...


class _WithLimiter:
    """The control of a cortex with another limiter."""

    def __init__(self, control: Any, limiter: CountedLimiter) -> None:
        self._control = control
        self.limiter = limiter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)


@contextlib.asynccontextmanager
async def opened(control: Any, limiter: CountedLimiter) -> AsyncIterator[Door]:
    sock, records = bind("127.0.0.1", 0), _Records()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    async with (
        working(
            control if isinstance(control, _WithLimiter) else _WithLimiter(control, limiter),
            CortexConfig(),
            [sock],
            Address("127.0.0.1", 1),
            keys=KeyTable({sha256(b"sk-limited").digest(): LIMITED, sha256(b"sk-narrow").digest(): NARROW}),
        ) as gateway,
        connected(url) as client,
    ):
        gateway._context.usage = records
        yield Door(url, limiter, records.found, client)


@pytest.fixture(params=[False, True], ids=["at-once", "asking"])
async def door(cortex: RunningCortex, request: pytest.FixtureRequest) -> AsyncIterator[Door]:
    limiter = CountedLimiter(cortex.parts.resolver.limiter._model_terms)  # type: ignore[attr-defined]
    limiter.asks = request.param
    limiter.use_keys({"7": KeyLimits(Limits(rpm=RPM, tpm=TPM))})
    async with opened(cortex.parts.resolver, limiter) as door:
        yield door


OPENAI = (
    b'"usage":{"prompt_tokens":30,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":16},'
    b'"completion_tokens_details":{"reasoning_tokens":2}}'
)
RESPONSES = (
    b'"usage":{"input_tokens":30,"output_tokens":5,"input_tokens_details":{"cached_tokens":16},'
    b'"output_tokens_details":{"reasoning_tokens":2}}'
)
MESSAGES = b'"usage":{"input_tokens":10,"output_tokens":5,"cache_read_input_tokens":16,"cache_creation_input_tokens":4}'
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
COUNTED = (30, 16, 5, 2)
ANSWERS = {
    "chat": ("/v1/chat/completions", plain(b'{"choices":[],' + OPENAI + b"}"), COUNTED),
    "chat, streamed": (
        "/v1/chat/completions",
        stream_head() + chunked(TEXT + b'data: {"choices":[],' + OPENAI + b"}\n\n" + DONE, 100),
        COUNTED,
    ),
    "completions": ("/v1/completions", plain(b'{"choices":[],' + OPENAI + b"}"), COUNTED),
    "responses": ("/v1/responses", plain(b'{"id":"resp_1",' + RESPONSES + b"}"), COUNTED),
    "messages": ("/v1/messages", plain(b'{"type":"message",' + MESSAGES + b"}"), (30, 16, 5, 0)),
    "messages, streamed": (
        "/v1/messages",
        stream_head()
        + chunked(
            b'event: message_start\ndata: {"message":{"usage":{"input_tokens":10,"cache_read_input_tokens":16,'
            b'"cache_creation_input_tokens":4,"output_tokens":1}}}\n\n'
            b'event: message_delta\ndata: {"usage":{"output_tokens":5}}\n\n',
            100,
        ),
        (30, 16, 5, 0),
    ),
    "embeddings": (
        "/v1/embeddings",
        plain(b'{"data":[],"usage":{"prompt_tokens":30,"total_tokens":30}}'),
        (30, 0, 0, 0),
    ),
    "rerank": ("/v1/rerank", plain(b'{"usage":{"prompt_tokens":30,"total_tokens":30},"results":[]}'), (30, 0, 0, 0)),
    "score": ("/v1/score", plain(b'{"usage":{"prompt_tokens":30,"total_tokens":30},"data":[]}'), (30, 0, 0, 0)),
    "pooling": ("/pooling", plain(b'{"data":[],"usage":{"prompt_tokens":30,"total_tokens":30}}'), (30, 0, 0, 0)),
    "classify": (
        "/classify",
        plain(b'{"data":[],"usage":{"prompt_tokens":30,"total_tokens":30,"completion_tokens":0}}'),
        (30, 0, 0, 0),
    ),
    "audio": (
        "/v1/audio/transcriptions",
        plain(b'{"text":"x","usage":{"type":"tokens","input_tokens":30,"output_tokens":5,"total_tokens":35}}'),
        (30, 0, 5, 0),
    ),
    "audio in seconds": (
        "/v1/audio/translations",
        plain(b'{"text":"x","usage":{"type":"duration","seconds":3}}'),
        (None, None, None, None),
    ),
    "images": (
        "/v1/images/generations",
        plain(b'{"data":[{"b64_json":"eA=="}],"usage":{"input_tokens":30,"output_tokens":5,"total_tokens":35}}'),
        (30, 0, 5, 0),
    ),
    "count_tokens": ("/v1/messages/count_tokens", plain(b'{"input_tokens":30}'), (None, None, None, None)),
    "tokenize": ("/tokenize", plain(b'{"count":30,"tokens":[1]}'), (None, None, None, None)),
}


@pytest.mark.parametrize("kind", ANSWERS)
async def test_usage_of_every_path_is_recorded_and_settled(door: Door, engine: RawEngine, kind: str) -> None:
    """In the names of each API: the prompt with its cached part, the completion with its reasoning."""
    target, answer, counts = ANSWERS[kind]
    engine.script = answering(answer)
    got = await door.ask({"stream": "streamed" in kind}, target)
    (record,) = await door.ended()
    assert got.status == 200
    prompt, cached, completion, reasoning = counts
    assert (record.prompt_tokens, record.cached_tokens) == (prompt, cached)
    assert (record.completion_tokens, record.reasoning_tokens) == (completion, reasoning)
    assert (record.key_id, record.key, record.model, record.node) == ("7", "limited", MODEL, "benjy")
    assert (record.path, record.status, record.cold, record.complete) == (target, 200, False, True)
    assert abs(record.ended_at - time.time()) < 60
    if prompt is not None:
        assert (door.limiter.settled, door.limiter.estimates) == ([(prompt, completion, cached)], 0)
    assert door.limiter._running == {}


def documented() -> dict[str, tuple[bool, ...]]:
    """Which tokens docs/usage.md says that a route counts, by its path."""
    rows = re.findall(r"^\| (`/.*?) \| (.+) \|$", (TOP / "docs" / "usage.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        path: tuple(mark == "yes" for mark in marks.split(" | "))
        for paths, marks in rows
        for path in re.findall(r"`([^`]+)`", paths)
    }


def test_the_table_in_the_documentation_is_true() -> None:
    """It has every path of inference, and says what the test above sees."""
    table = documented()
    assert set(INFERENCE_PATHS) <= set(table)
    for target, _, counts in ANSWERS.values():
        if counts[0] is not None:
            assert table[target] == tuple(count != 0 for count in counts), target


async def test_limits_are_in_the_head_of_every_answer(door: Door, engine: RawEngine) -> None:
    """Good ones and refusals, in OpenAI's names and in Anthropic's; a refused request reaches no engine."""
    engine.script = answering(plain(b'{"choices":[],' + OPENAI + b"}"))
    left = [dict((await door.ask()).headers)["x-ratelimit-remaining-requests"] for _ in range(RPM)]
    assert left == [str(number) for number in reversed(range(RPM))]
    heard = len(engine.requests)
    refused = await door.ask()
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (429, "rate_limit_exceeded")
    headers = dict(refused.headers)
    assert headers["x-ratelimit-limit-requests"] == str(RPM)
    assert 1 <= int(headers["retry-after"]) <= 60 / RPM
    anthropic = dict((await door.ask(target="/v1/messages")).headers)
    assert (anthropic["anthropic-ratelimit-requests-limit"], anthropic["anthropic-ratelimit-requests-remaining"]) == (
        str(RPM),
        "0",
    )
    assert len(engine.requests) == heard
    records = await door.ended(RPM + 2)
    assert [(record.status, record.model, record.node) for record in records[-2:]] == [(429, MODEL, "")] * 2


async def test_requests_that_fail_use_nothing(door: Door, engine: RawEngine) -> None:
    """An engine's error, and a model that no neuron has."""
    engine.script = answering(plain(b'{"error":"no"}', status="400 Bad Request"))
    assert (await door.ask()).status == 400
    assert (await door.ask({"model": "org/none"})).status == 404
    records = await door.ended(2)
    assert [(record.status, record.model, record.prompt_tokens) for record in records] == [
        (400, MODEL, None),
        (404, "unknown", None),
    ]
    assert door.limiter.settled == [(0, 0, 0)] * 2
    assert door.limiter._running == {}


async def test_a_client_that_leaves_is_charged_what_is_known(door: Door, engine: RawEngine) -> None:
    """The bytes of its prompt, and a token for each four bytes that it got, but no more than it had reserved."""

    async def never_ends(wire: Wire, received: Received) -> None:
        await wire.send(stream_head() + chunked(TEXT * 9, 10_000).removesuffix(b"0\r\n\r\n"))
        await wire.gone.wait()

    engine.script = never_ends
    body = json.dumps({"model": MODEL, "stream": True, "max_tokens": 10}).encode()
    async with connected(door.url) as leaving:
        await leaving.send(request(body, "x-api-key: sk-limited", target="/v1/chat/completions"))
        await leaving.incoming.readuntil(b"finish_reason")
    (record,) = await door.ended()
    assert (record.status, record.complete, record.prompt_tokens) == (200, False, None)
    assert (door.limiter.settled, door.limiter.estimates) == ([(len(body), 10, 0)], 1)
    assert door.limiter._running == {}


async def test_a_message_whose_client_leaves_is_charged_its_answer(door: Door, engine: RawEngine) -> None:
    """The first event has the prompt and a token of the answer: that is not all of it."""

    async def never_ends(wire: Wire, received: Received) -> None:
        events = b'event: message_start\ndata: {"message":{' + MESSAGES.replace(b"5", b"1") + b"}}\n\n" + TEXT * 9
        await wire.send(stream_head() + chunked(events, 10_000).removesuffix(b"0\r\n\r\n"))
        await wire.gone.wait()

    engine.script = never_ends
    body = json.dumps({"model": MODEL, "stream": True, "max_tokens": 10}).encode()
    async with connected(door.url) as leaving:
        await leaving.send(request(body, "x-api-key: sk-limited", target="/v1/messages"))
        await leaving.incoming.readuntil(b"finish_reason")
    (record,) = await door.ended()
    assert (record.complete, record.prompt_tokens, record.completion_tokens) == (False, 30, 1)
    assert (door.limiter.settled, door.limiter.estimates) == ([(30, 10, 16)], 1)


@pytest.mark.parametrize(
    "background", [b'"background": true', b'"background":1', b'"background": "true"', b'"b\\u0061ckground": true']
)
async def test_a_response_in_the_background_is_charged_what_it_may_use(
    door: Door, engine: RawEngine, background: bytes
) -> None:
    """Its tokens are not known when the request ends. vLLM reads each of these as true."""
    engine.script = answering(plain(b'{"id":"resp_1","status":"queued","usage":null}'))
    body = b'{"model": "%b", %b, "input": "x", "max_output_tokens": 700}' % (MODEL.encode(), background)
    assert (await door.client.ask(request(body, KEY_LINE, target="/v1/responses"))).status == 200
    (record,) = await door.ended()
    assert (record.prompt_tokens, record.completion_tokens) == (None, None)
    ((_, completion, _),) = door.limiter.settled
    assert completion == 700


async def test_a_stored_response_counts_once(door: Door, engine: RawEngine) -> None:
    """Its usage is in the answer again whenever a client asks for it."""
    engine.script = answering(plain(b'{"id":"resp_1",' + RESPONSES + b"}"))
    assert (await door.ask(target="/v1/responses")).status == 200
    got = await door.client.ask(request(b"", KEY_LINE, method="GET", target="/v1/responses/resp_1"), "GET")
    assert got.status == 200
    records = await door.ended(2)
    assert [(record.path, record.status, record.prompt_tokens) for record in records] == [
        ("/v1/responses", 200, 30),
        ("/v1/responses/{id}", 200, None),
    ]


async def test_refused_requests_have_records(door: Door, engine: RawEngine) -> None:
    """With the status and no tokens: a key that may not use the model, a model that is unknown, an engine that is busy.
    Without a key, or without a model, there is no record."""
    engine.script = answering(plain(b"{}", status="503 Busy"))
    body = json.dumps({"model": MODEL}).encode()
    assert (await door.client.ask(request(body, "x-api-key: wrong"))).status == 401
    assert (await door.client.ask(request(b"{}", KEY_LINE))).status == 400
    assert (await door.client.ask(request(body, "x-api-key: sk-narrow"))).status == 403
    assert (await door.ask({"model": "org/none"})).status == 404
    assert (await door.ask()).status == 503
    records = await door.ended(3)
    assert [(record.status, record.key, record.model, record.prompt_tokens) for record in records] == [
        (403, "narrow", MODEL, None),
        (404, "limited", "unknown", None),
        (503, "limited", MODEL, None),
    ]


async def test_an_engine_that_is_lost_is_charged_once(door: Door, engine: RawEngine) -> None:
    """Also if the engine ends in the middle of its answer."""
    engine.script = closing(stream_head() + chunked(TEXT, 10_000).removesuffix(b"0\r\n\r\n"))
    assert (await door.ask({"stream": True})).status == 200
    (record,) = await door.ended()
    assert (record.status, record.complete) == (200, False)
    assert len(door.limiter.settled) == 1
    assert door.limiter._running == {}


async def test_a_fault_of_cortex_is_answered(cortex: RunningCortex) -> None:
    """An unexpected error while the request waits for the control: it must not leave the client without an answer."""

    class Broken(_WithLimiter):
        table: dict[str, Any] = {}  # noqa: RUF012

        async def resolve(self, *_: Any) -> Any:
            raise RuntimeError("broken")

    limiter = CountedLimiter(cortex.parts.resolver.limiter._model_terms)  # type: ignore[attr-defined]
    limiter.use_keys({"7": KeyLimits(Limits(rpm=RPM))})
    async with opened(Broken(cortex.parts.resolver, limiter), limiter) as door:
        answer = await door.ask()
        assert (answer.status, json.loads(answer.body)) == (500, internal_error().body())
        assert [record.status for record in await door.ended()] == [500]
        assert limiter.settled == [(0, 0, 0)]
