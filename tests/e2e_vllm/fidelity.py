"""Requests for the comparison of cortex with vLLM: well-formed and faulty ones, for every path that cortex routes."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

TEXT = "The cat sees the moon"
MESSAGES = [{"role": "user", "content": TEXT}]
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000a49444154789c6360000002000154a24f5f"
        "0000000049454e44ae426082"
    )
).decode()
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
    },
}


@dataclass(frozen=True)
class Case:
    """One request. `body` without its model."""

    path: str
    body: dict[str, Any]
    name: str
    headers: dict[str, str] = field(default_factory=dict)

    def payload(self, model: str) -> bytes:
        return json.dumps({"model": model, **self.body}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _cases(path: str, common: dict[str, Any], variants: dict[str, dict[str, Any]]) -> list[Case]:
    """Each variant whole and, unless it says otherwise, streamed. None removes a field of `common`."""
    found = []
    for name, change in variants.items():
        body = {key: value for key, value in {**common, **change}.items() if value is not None}
        found.append(Case(path, body, f"{path} {name}"))
        if "stream" not in change:
            found.append(Case(path, {**body, "stream": True}, f"{path} {name}, streamed"))
    return found


_CHAT = _cases(
    "/v1/chat/completions",
    {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True},
    {
        "plain": {},
        "usage in the stream": {"stream": True, "stream_options": {"include_usage": True}},
        "continuous usage": {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        "logprobs": {"logprobs": True, "top_logprobs": 2},
        "two choices": {"n": 2, "seed": 7},
        "stop string": {"stop": ["a", "e"]},
        "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        "json object": {"response_format": {"type": "json_object"}, "max_tokens": 16},
        "json schema": {"response_format": SCHEMA, "max_tokens": 16},
        "system and assistant": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Yes?"},
                *MESSAGES,
            ]
        },
        "parts of content": {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]},
        "other alphabets": {"messages": [{"role": "user", "content": "Grüße, 世界 🌙 \u2028 \x00"}]},
        "unknown field": {"no_such_field": {"a": [1, 2]}},
        "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 4},
        "tool choice none": {"tools": [WEATHER], "tool_choice": "none"},
        "tool choice auto, not enabled": {"tools": [WEATHER], "tool_choice": "auto"},
        "tool choice of an unknown function": {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "nothing"}},
        },
        "image for a text model": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}],
                }
            ]
        },
        "no messages": {"messages": None},
        "empty messages": {"messages": []},
        "messages of a wrong type": {"messages": "hello"},
        "unknown role": {"messages": [{"role": "visitor", "content": "x"}]},
        "temperature too high": {"temperature": 99},
        "temperature as text": {"temperature": "warm"},
        "top_p below 0": {"top_p": -1},
        "max_tokens 0": {"max_tokens": 0},
        "max_tokens negative": {"max_tokens": -5},
        "longer than the context": {"messages": [{"role": "user", "content": "moon " * 3000}]},
        "more tokens than the context": {"max_tokens": 100_000},
        "too many logprobs": {"logprobs": True, "top_logprobs": 10_000},
        "stream options without a stream": {"stream": False, "stream_options": {"include_usage": True}},
    },
)
_COMPLETIONS = _cases(
    "/v1/completions",
    {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "ignore_eos": True},
    {
        "plain": {},
        "usage in the stream": {"stream": True, "stream_options": {"include_usage": True}},
        "several prompts": {"prompt": ["one", "two"]},
        "token ids": {"prompt": [1, 2, 3]},
        "echo": {"echo": True},
        "logprobs": {"logprobs": 1},
        "no prompt": {"prompt": None},
        "empty prompt": {"prompt": ""},
        "suffix": {"suffix": "end"},
        "token id out of range": {"prompt": [10_000_000]},
        "longer than the context": {"prompt": "moon " * 3000},
    },
)
_MESSAGES = _cases(
    "/v1/messages",
    {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True},
    {
        "plain": {},
        "system": {"system": "Be brief."},
        "stop sequence": {"stop_sequences": ["a", "e"]},
        "no max_tokens": {"max_tokens": None},
        "no messages": {"messages": None},
        "max_tokens negative": {"max_tokens": -1},
        "longer than the context": {"messages": [{"role": "user", "content": "moon " * 3000}]},
    },
)
_RESPONSES = _cases(
    "/v1/responses",
    {"input": TEXT, "max_output_tokens": 8, "temperature": 0, "store": False},
    {
        "plain": {},
        "instructions": {"instructions": "Be brief."},
        "list of items": {"input": [{"role": "user", "content": TEXT}]},
        "no input": {"input": None},
        "unknown earlier response": {"previous_response_id": "resp_nothing"},
        "longer than the context": {"input": "moon " * 3000},
    },
)
_PLAIN: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/messages/count_tokens", "plain", {"messages": MESSAGES}),
    ("/v1/messages/count_tokens", "no messages", {}),
    ("/tokenize", "prompt", {"prompt": TEXT}),
    ("/tokenize", "messages", {"messages": MESSAGES}),
    ("/tokenize", "nothing", {}),
    ("/detokenize", "tokens", {"tokens": [1, 2, 3]}),
    ("/detokenize", "tokens of a wrong type", {"tokens": "abc"}),
    ("/v1/embeddings", "a text model", {"input": TEXT}),
    ("/v1/score", "a text model", {"text_1": "a", "text_2": "b"}),
    ("/pooling", "a text model", {"input": TEXT}),
    ("/classify", "a text model", {"input": TEXT}),
    ("/v1/audio/transcriptions", "JSON instead of a form", {"file": "x"}),
]
_EMBEDDING: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/embeddings", "text", {"input": TEXT}),
    ("/v1/embeddings", "several texts", {"input": ["one", "two", "three"]}),
    ("/v1/embeddings", "token ids", {"input": [101, 102]}),
    ("/v1/embeddings", "base64", {"input": TEXT, "encoding_format": "base64"}),
    ("/v1/embeddings", "dimensions", {"input": TEXT, "dimensions": 8}),
    ("/v1/embeddings", "no input", {}),
    ("/v1/embeddings", "empty list", {"input": []}),
    ("/v1/embeddings", "unknown encoding", {"input": TEXT, "encoding_format": "hex"}),
    ("/v1/embeddings", "too long", {"input": "moon " * 3000}),
    ("/v1/score", "pair", {"text_1": "a cat", "text_2": "a kitten"}),
    ("/v1/score", "one with several", {"text_1": "a cat", "text_2": ["a kitten", "a debt"]}),
    ("/score", "pair", {"text_1": "a cat", "text_2": "a kitten"}),
    ("/v1/score", "nothing", {}),
    ("/v1/rerank", "plain", {"query": "a cat", "documents": ["a debt", "a kitten"]}),
    ("/rerank", "top_n", {"query": "a cat", "documents": ["a debt", "a kitten"], "top_n": 1}),
    ("/v1/rerank", "no documents", {"query": "a cat"}),
    ("/pooling", "text", {"input": TEXT}),
    ("/pooling", "no input", {}),
    ("/classify", "text", {"input": TEXT}),
    ("/tokenize", "prompt", {"prompt": TEXT}),
    ("/v1/chat/completions", "an embedding model", {"messages": MESSAGES}),
    ("/v1/completions", "an embedding model", {"prompt": TEXT}),
    ("/v1/messages", "an embedding model", {"messages": MESSAGES, "max_tokens": 4}),
    ("/v1/responses", "an embedding model", {"input": TEXT}),
]

TEXT_CASES = [*_CHAT, *_COMPLETIONS, *_MESSAGES, *_RESPONSES, *(Case(p, b, f"{p} {n}") for p, n, b in _PLAIN)]
EMBEDDING_CASES = [Case(p, b, f"{p} {n}") for p, n, b in _EMBEDDING]
