"""Clients of the fleet: a seeded mix of dialects, models and patience. None of them retries."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.e2e.chaos import outcomes
from tests.e2e.chaos.fleet import Service
from tests.e2e.chaos.models import ChaosModel
from tests.e2e.chaos.outcomes import COMPLETE, PATHS, Kind, Outcome

NO_END_SECS = 90.0
"""A request without an end by then is a violation."""
_STREAMED = 0.5  # share of the requests
_LEAVING = 0.06
_LEAVES_WITHIN_SECS = 0.3
_LONG = 0.1
_TOKENS, _LONG_TOKENS = (2, 24), (40, 80)
_FIELDS = {
    "chat": lambda tokens: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens},
    "completions": lambda tokens: {"prompt": "Hello", "max_tokens": tokens},
    "responses": lambda tokens: {"input": "Hello", "max_output_tokens": tokens},
    "messages": lambda tokens: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens},
}


@dataclass(frozen=True)
class Asked:
    """One request. The client disconnects after `leaves_secs`; None: it stays to the end."""

    model_id: str
    dialect: str
    streamed: bool
    tokens: int
    leaves_secs: float | None = None

    def body(self) -> dict[str, Any]:
        return {"model": self.model_id, "stream": self.streamed, **_FIELDS[self.dialect](self.tokens)}


@dataclass(frozen=True)
class Answered:
    """A request and its end; times are monotonic. `head_at` is None if not even a status arrived."""

    asked: Asked
    cortex: str
    since: float
    until: float
    head_at: float | None
    node: str
    request_id: str
    outcome: Outcome

    def line(self, start: float) -> str:
        """One line, with times relative to `start`."""
        asked, outcome = self.asked, self.outcome
        how = f"{asked.dialect}{' stream' if asked.streamed else ''} {asked.tokens}"
        return (
            f"{self.since - start:7.3f} … {self.until - start:7.3f} {self.cortex} {asked.model_id} ({how}) "
            f"node={self.node or '-'} id={self.request_id or '-'}: {outcome.kind.value} {outcome.code} {outcome.detail}"
        )


class Clients:
    """`answered` has every request that has ended."""

    def __init__(self, cortexes: Sequence[Service], models: Sequence[ChaosModel], *, seed: int, pause_secs: float):
        self.answered: list[Answered] = []
        self._cortexes = cortexes
        self._models = models
        self._seed = seed
        self._pause_secs = pause_secs

    async def ask_for(self, secs: float, *, clients: int) -> None:
        """Returns when all clients have their last answers, shortly after `secs`."""
        until = time.monotonic() + secs
        # A connection for each request: one that a killed cortex left half-open would tell nothing.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as http:
            await asyncio.gather(*(self._client(number, http, until) for number in range(clients)))

    async def ask(self, http: aiohttp.ClientSession, cortex: Service, asked: Asked) -> Answered:
        since, answer = time.monotonic(), _Answer()
        patience = NO_END_SECS if asked.leaves_secs is None else asked.leaves_secs
        try:
            outcome = await asyncio.wait_for(_exchange(http, cortex.url, asked, answer), patience)
        except (asyncio.TimeoutError, TimeoutError):
            outcome = Outcome(Kind.LEFT)
            if asked.leaves_secs is None:
                outcome = Outcome(
                    Kind.VIOLATION, detail=f"timed out after {NO_END_SECS:g} s; got {bytes(answer.body)!r}"
                )
        ended = Answered(
            asked, cortex.name, since, time.monotonic(), answer.head_at, answer.node, answer.request_id, outcome
        )
        self.answered.append(ended)
        return ended

    async def _client(self, number: int, http: aiohttp.ClientSession, until: float) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        await asyncio.sleep(chance.uniform(0, self._pause_secs))
        while time.monotonic() < until:
            asked, cortex = self._next_request(chance), chance.choice(self._cortexes)
            await self.ask(http, cortex, asked)
            await asyncio.sleep(chance.expovariate(1 / self._pause_secs))  # paces the load

    def _next_request(self, chance: random.Random) -> Asked:
        model = chance.choices(self._models, [model.weight for model in self._models])[0]
        tokens = chance.randint(*(_LONG_TOKENS if chance.random() < _LONG else _TOKENS))
        leaves_secs = chance.uniform(0, _LEAVES_WITHIN_SECS) if chance.random() < _LEAVING else None
        return Asked(model.id, chance.choice(list(PATHS)), chance.random() < _STREAMED, tokens, leaves_secs)


class _Answer:
    """What has been received of an answer."""

    def __init__(self) -> None:
        self.head_at: float | None = None
        self.node = ""
        self.request_id = ""
        self.body = bytearray()


async def _exchange(http: aiohttp.ClientSession, url: str, asked: Asked, answer: _Answer) -> Outcome:
    try:
        async with http.post(
            url + PATHS[asked.dialect], json=asked.body(), timeout=aiohttp.ClientTimeout()
        ) as response:
            answer.head_at = time.monotonic()
            answer.node = response.headers.get("x-cortex-node", "")
            answer.request_id = response.headers.get("x-request-id", "")
            async for piece in response.content.iter_any():
                answer.body += piece
    except aiohttp.ClientConnectorError as error:
        return Outcome(Kind.REFUSED, detail=str(error))
    except (aiohttp.ClientError, OSError) as error:
        return _of_cut(asked, answer, error)
    body = bytes(answer.body)
    if not answer.request_id:
        return Outcome(Kind.VIOLATION, detail=f"an answer {response.status} without x-request-id: {body[:200]!r}")
    if response.status != 200:
        return outcomes.of_refusal(response.status, response.headers, body)
    if asked.streamed:
        return outcomes.of_stream(asked.dialect, asked.model_id, body)
    return outcomes.of_whole(asked.dialect, asked.model_id, body)


def _of_cut(asked: Asked, answer: _Answer, error: Exception) -> Outcome:
    """A connection that broke. What arrived before may be complete: an error event, or the whole answer."""
    if answer.head_at is not None and asked.streamed:
        received = outcomes.of_stream(asked.dialect, asked.model_id, bytes(answer.body))
        if received.kind is Kind.ERROR or received == COMPLETE:
            return received
    with contextlib.suppress(IndexError):
        return Outcome(Kind.CUT, detail=f"{type(error).__name__} {error}, after {bytes(answer.body)[-200:]!r}")
    return Outcome(Kind.CUT, detail=type(error).__name__)
