"""Requests as the openai package 3.57 sends them, ready made."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.engine.answers import MODEL

API_KEY = "sk-bench-4f9c2b7e8a1d5036c4e2f8b9a7d1c3e5"
PROMPT_BYTES = 600
_SENTENCE = "Explain to me, in a few plain words, why the sky is blue and the sea is not always so. "


def prompt_text(spec: AnswerSpec, size: int = PROMPT_BYTES) -> str:
    """A prompt of `size` bytes that begins with the spec."""
    return (spec.text() + " " + _SENTENCE * (size // len(_SENTENCE) + 1))[:size]


def chat_request(port: int, spec: AnswerSpec, *, image_bytes: int = 0) -> bytes:
    """A whole request: head and body. `image_bytes` > 0 adds so many bytes of base64 as an image in the prompt."""
    content: Any = prompt_text(spec)
    if image_bytes:
        image = "data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAA" * (image_bytes // 24)
        content = [{"type": "text", "text": content}, {"type": "image_url", "image_url": {"url": image}}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "model": MODEL}
    if spec.chunks:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    payload = json.dumps(body, separators=(",", ":")).encode()
    return _head(port, len(payload)) + payload


def chat_headers() -> dict[str, str]:
    """The headers that do not depend on the request."""
    return {
        "Accept": "application/json",
        "Accept-Encoding": "gzip, deflate",
        "Authorization": f"Bearer {API_KEY}",
        "Content-Type": "application/json",
        "User-Agent": "OpenAI/Python 3.57.0",
        "X-Stainless-Arch": "x64",
        "X-Stainless-Async": "false",
        "X-Stainless-Lang": "python",
        "X-Stainless-OS": "Linux",
        "X-Stainless-Package-Version": "3.57.0",
        "X-Stainless-Runtime": "CPython",
        "X-Stainless-Runtime-Version": "3.11.7",
        "x-stainless-read-timeout": "600",
        "x-stainless-retry-count": "0",
    }


def _head(port: int, length: int) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Connection: keep-alive",
        *(f"{name}: {value}" for name, value in chat_headers().items()),
        f"Content-Length: {length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
