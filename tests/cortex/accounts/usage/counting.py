"""An engine that counts what it serves, and clients with keys that ask for it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

MODEL = "org/small"
REQUESTS = int(os.environ.get("USAGE_TEST_REQUESTS", "1000"))
CLIENTS = 200
KEYS: list[dict[str, Any]] = [{"name": f"key{number}", "key": f"secret-{number}"} for number in range(20)]
MOST_TOKENS = 100
"""Of a prompt, and of an answer."""
LOST_SECS = 1.0
"""A killed process may take with it the records of requests that ended so shortly before."""


class Tokens(NamedTuple):
    """What one request used."""

    prompt: int
    cached: int
    completion: int


class CountingEngine:
    """Counts what it serves, by the number that the client gives as `user`."""

    def __init__(self) -> None:
        self.served: dict[str, Tokens] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        tokens = Tokens(random.randint(1, MOST_TOKENS), random.randint(0, 1), random.randint(1, MOST_TOKENS))
        self.served[body["user"]] = tokens
        usage = {
            "prompt_tokens": tokens.prompt,
            "completion_tokens": tokens.completion,
            "prompt_tokens_details": {"cached_tokens": tokens.cached},
        }
        await asyncio.sleep(random.random() / 50)
        if not body.get("stream"):
            return web.json_response({"id": "a", "object": "chat.completion", "choices": [], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events: list[dict[str, Any]] = [{"id": "a", "choices": [{"index": 0, "delta": {"content": "x"}}]}]
        if body.get("stream_options", {}).get("include_usage"):
            events.append({"id": "a", "choices": [], "usage": usage})
        for event in events:
            await response.write(b"data: %b\n\n" % json.dumps(event).encode())
        await response.write(b"data: [DONE]\n\n")
        return response


class Clients:
    """Clients with all keys, of one or several cortexes. `answered` says when each request was, by its number;
    `refused` are those of them that were over a limit."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._numbers = itertools.count()
        self.answered: dict[str, float] = {}
        self.refused: set[str] = set()
        self.lost: set[str] = set()

    async def ask(self, count: int) -> set[str]:
        """As many requests as that. Their numbers."""
        numbers = list(itertools.islice(self._numbers, count))
        left = iter(numbers)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            await asyncio.gather(*(self._run(http, left) for _ in range(CLIENTS)))
        return {f"request-{number}" for number in numbers}

    def cortex_of(self, number: str) -> int:
        """The position of the cortex that gets this request."""
        return int(number.removeprefix("request-")) // len(KEYS) % len(self.urls)

    async def _run(self, http: aiohttp.ClientSession, left: Iterator[int]) -> None:
        for number in left:
            body: dict[str, Any] = {
                "model": MODEL,
                "user": f"request-{number}",
                "max_tokens": MOST_TOKENS,
                "messages": [{"role": "user", "content": "x" * MOST_TOKENS}],
            }
            if number % 3:
                body["stream"] = True
            if number % 3 == 2:
                body["stream_options"] = {"include_usage": True}
            headers = {"Authorization": f"Bearer secret-{number % len(KEYS)}", "X-Request-Id": body["user"]}
            url = self.urls[self.cortex_of(body["user"])]
            try:
                async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                    text = await response.text()
            except aiohttp.ClientError:
                self.lost.add(body["user"])
                continue
            assert response.status in (200, 429), text
            self.answered[body["user"]] = time.time()
            if response.status == 429:
                self.refused.add(body["user"])
