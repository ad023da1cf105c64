"""The engine's answers, byte for byte what vLLM 0.32 behind uvicorn sends. Each is built once and sent many times.

The load generator builds the same answers and compares them with what it receives.
"""

from __future__ import annotations

import json
from functools import lru_cache

MODEL = "Qwen/Qwen3-8B"
CREATED = 1795545600
_ID = "chatcmpl-8f3a5c1e9b7d4f6a8c2e0d1b3a5f7c9e"
_DATE = b"date: Tue, 24 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
_WORDS = "All the bytes of this answer are made once and sent many times. "

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    + _DATE
    + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
TOKEN = b" tok-%06d"
"""A token's text. The number shows a lost, duplicate or misplaced token even if a gateway rewrites the events."""


def head(status: str, content_type: str, length: int) -> bytes:
    """The head of a plain answer."""
    return b"HTTP/1.1 %s\r\n%scontent-length: %d\r\ncontent-type: %s\r\n\r\n" % (
        status.encode(),
        _DATE,
        length,
        content_type.encode(),
    )


@lru_cache(maxsize=16)
def plain_body(size: int) -> bytes:
    """A chat completion whose text has `size` bytes (0: one sentence), with `usage`."""
    text = (_WORDS * (size // len(_WORDS) + 1))[: size or None]
    message: dict[str, object] = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "tool_calls": [],
        "reasoning": None,
    }
    answer = {
        "id": _ID,
        "object": "chat.completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": _usage(16),
        "prompt_logprobs": None,
        "kv_transfer_params": None,
    }
    return json.dumps(answer, separators=(",", ":")).encode()


@lru_cache(maxsize=16)
def plain_answer(size: int) -> bytes:
    """`plain_body` with its head."""
    body = plain_body(size)
    return head("200 OK", "application/json", len(body)) + body


def json_answer(value: object, status: str = "200 OK") -> bytes:
    """Any other answer, with its head."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return head(status, "application/json", len(body)) + body


@lru_cache(maxsize=16)
def stream_events(chunks: int) -> tuple[bytes, ...]:
    """The events of a stream as the engine sends them, in HTTP chunks of about 190 bytes: `chunks` tokens. The role
    precedes the first; the finish, the usage, [DONE] and the end of the body follow the last."""
    events = [_chunk(event) for event in token_events(chunks)]
    events[0] = _chunk(role_event()) + events[0]
    events[-1] += b"".join(_chunk(event) for event in closing_events(chunks)) + STREAM_END
    return tuple(events)


@lru_cache(maxsize=16)
def stream_payload(chunks: int) -> bytes:
    """The same stream's body without the chunks' framing."""
    return b"".join([role_event(), *token_events(chunks), *closing_events(chunks)])


def role_event() -> bytes:
    """The first event of a stream."""
    return _event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])


def token_events(chunks: int) -> list[bytes]:
    """One event a token."""
    return [
        _event([{"index": 0, "delta": {"content": (TOKEN % number).decode()}, "finish_reason": None}])
        for number in range(chunks)
    ]


def closing_events(chunks: int) -> list[bytes]:
    """The finish, the usage, and [DONE]."""
    return [
        _event([{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]),
        _event([], usage=_usage(chunks)),
        DONE,
    ]


def _usage(completion: int) -> dict[str, object]:
    return {
        "prompt_tokens": 150,
        "total_tokens": 150 + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
    }


def _event(choices: list[dict[str, object]], **more: object) -> bytes:
    value = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
        "choices": choices,
        **more,
    }
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
