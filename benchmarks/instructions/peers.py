"""The neuron, its engine and the client around a measured cortex: one request at a time, one chunk at a time.

A chunk is sent when the one before it has arrived, so that every run gives cortex the same sequence of events however
slowly it runs.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from benchmarks.scale.http1 import Connection, request_bytes
from benchmarks.scale.neurons import Exchange, completion, json_answer

HOST = "127.0.0.1"
MODEL = "bench/model"
CHAT = "/v1/chat/completions"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_DISCOVERY: dict[str, Any] = {"hostname": "host", "devices": [], "harnesses": ["vllm"], "instance_id": "one"}
_VIEW: dict[str, Any] = {"id": MODEL, "harness": "vllm", "status": "loaded", "devices": [], "since": 1.0}
API_KEY = "sk-0123456789abcdef0123456789abcdef"
_HEADERS = {"Authorization": f"Bearer {API_KEY}", "User-Agent": "OpenAI/Python 3.57.0"}


def chat(**more: Any) -> bytes:
    """A request of about 600 bytes."""
    messages = [{"role": "system", "content": "You answer briefly. " * 10}, {"role": "user", "content": "Is it? " * 40}]
    return request_bytes("POST", CHAT, {"model": MODEL, "messages": messages, **more}, _HEADERS)


def frame(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def token_chunk(number: int) -> bytes:
    """About 190 bytes, as vLLM sends them."""
    choices = [{"index": 0, "delta": {"content": f" word{number % 10}"}, "logprobs": None, "finish_reason": None}]
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": choices}
    return f"data: {json.dumps(chunk)}\n\n".encode()


class Peers:
    """A neuron with an engine on one port, and a client with one connection to cortex."""

    def __init__(self) -> None:
        self._connections: set[Exchange] = set()
        self._streams: asyncio.Queue[Exchange] = asyncio.Queue()

    async def listen(self, port: int) -> asyncio.Server:
        self._url = f"http://{HOST}:{port}"
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Exchange(self._respond, self._connections), HOST, port)

    async def plain(self, connection: Connection, count: int) -> None:
        """That many whole requests. Raises RuntimeError when one is not answered with 200."""
        request = chat()
        for _ in range(count):
            answer = await connection.send(request)
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")

    async def stream(self, port: int, chunks: int, *, asks: bool) -> None:
        """One streamed answer; `asks`: for usage too. Raises RuntimeError when it is not what the client asked for."""
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(chat(stream=True, **({"stream_options": {"include_usage": True}} if asks else {})))
        engine = (await self._streams.get()).transport
        assert engine is not None
        engine.write(_STREAM_HEAD)
        head = await reader.readuntil(b"\r\n\r\n")
        usage = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": chunks, "total_tokens": 1}}
        usage_event, done = f"data: {json.dumps(usage)}\n\n".encode(), b"data: [DONE]\n\n"
        for payload in (*map(token_chunk, range(chunks)), usage_event + done if asks else done):
            engine.write(frame(usage_event + done if payload is done else payload))
            size = int(await reader.readline(), 16)
            if (await reader.readexactly(size + 2))[:-2] != payload:
                raise RuntimeError(f"a chunk came in another form, after {head!r}")
        engine.write(b"0\r\n\r\n")
        await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    def _respond(self, exchange: Exchange, method: str, path: str, body: bytes) -> bytes | None:
        if path == CHAT and json.loads(body).get("stream"):
            self._streams.put_nowait(exchange)
            return None
        pages: dict[str, Any] = {
            CHAT: completion(MODEL),
            "/discovery": _DISCOVERY,
            "/health": {"uptime_secs": 1, "devices": [], "instance_id": "one"},
            "/models": [_VIEW],
        }
        if path in pages:
            return json_answer(pages[path])
        if path.endswith("/endpoint"):
            return json_answer({"url": self._url})
        return json_answer({"error": f"{method} {path}: not found"}, "404 Not Found")
