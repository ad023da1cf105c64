"""An engine that has only some of the paths, on a raw socket."""

from __future__ import annotations

import json
from typing import Any

from cortex.proxy.translation.interface import StreamTranslation, Translation
from tests.cortex.raw_engine import RawEngine, Received, plain, stream_head
from tests.cortex.raw_http import Wire, chunked

NOT_FOUND = {
    "fastapi": plain(b'{"detail":"Not Found"}', status="404 Not Found"),
    "vllm": plain(
        b'{"error":{"message":"Not Found","type":"Not Found","param":null,"code":404}}', status="404 Not Found"
    ),
    "llama.cpp": plain(
        b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}', status="404 Not Found"
    ),
    "gin": plain(b"404 page not found", status="404 Not Found", content_type="text/plain"),
    "empty": plain(b"", status="404 Not Found"),
    "with a list": plain(
        b'{"error":{"message":"Unknown path /v1/messages. There are /v1/models and /v1/chat/completions, not more."}}',
        status="404 Not Found",
    ),
    "html": plain(b"<html>No such page, try another model</html>", status="404 Not Found", content_type="text/html"),
    "405": plain(b'{"detail":"Method Not Allowed"}', "Allow: GET", status="405 Method Not Allowed"),
    "chunked": b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b'{"detail":"Not Found"}', 5),
    "until close": b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\n\r\nnot found",
}
"""How servers say that they do not know a path."""

COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "org/small",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi there"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
}


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """One `chat.completion.chunk`; without a delta it has no choice."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    identity = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "org/small"}
    return {**identity, "choices": choices, **more}


def stream_of(translation: Translation) -> StreamTranslation:
    """For a request that asks for a stream."""
    stream = translation.stream()
    assert stream is not None
    return stream


def events(*chunks: dict[str, Any] | str) -> bytes:
    """Chunks as an event stream."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in chunks]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


STREAM = events(
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hi"}),
    chunk({"content": " there"}),
    chunk({}, "stop"),
    chunk(usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}),
    "[DONE]",
)


class ChatEngine(RawEngine):
    """Has `/v1/chat/completions`, and answers any path in `lacks` with `missing`. Other paths get `native`."""

    def __init__(self) -> None:
        super().__init__()
        self.missing = NOT_FOUND["fastapi"]
        self.lacks = {"/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/tokenize"}
        self.native = plain(b'{"type": "message", "native": true}')
        self.completion = plain(json.dumps(COMPLETION).encode())
        self.stream = stream_head() + chunked(STREAM, 40)
        self.script = self._answer

    @property
    def paths(self) -> list[str]:
        """What was asked for, in order, without queries."""
        return [received.target.partition("?")[0] for received in self.requests]

    @property
    def chat(self) -> dict[str, Any]:
        """The body of the last request."""
        body: dict[str, Any] = json.loads(self.requests[-1].body)
        return body

    async def _answer(self, wire: Wire, received: Received) -> None:
        path = received.target.partition("?")[0]
        if path in self.lacks:
            await wire.send(self.missing)
            if b"\r\nContent-Length:" not in self.missing and b"chunked" not in self.missing:
                wire.close()
        elif path == "/v1/chat/completions":
            await wire.send(self.stream if json.loads(received.body).get("stream") else self.completion)
        else:
            await wire.send(self.native)
