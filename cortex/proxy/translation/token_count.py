"""The tokens of a chat's prompt, counted by an engine's `/tokenize`, or estimated where it has none. Pure."""

from __future__ import annotations

from math import ceil
from typing import Final

from cortex.proxy.translation.interface import Json, engine_object, to_json

BYTES_PER_TOKEN: Final = 3.5
"""Of UTF-8: English has 4 to 5, source code and Chinese have about 3."""
TOKENS_PER_MESSAGE: Final = 4
"""What a chat template puts around a message."""
TOKENS_PER_IMAGE: Final = 1000

_NO_COUNT: Final = frozenset({400, 404, 405, 415, 422, 501})
"""Statuses of an engine that has no `/tokenize`, or one that takes no conversation."""

_OF_THE_PROMPT: Final = (
    "model",
    "messages",
    "tools",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
)


class TokenCount:
    """Implements `interface.Translation` but for `answer`.

    vLLM's `/tokenize` takes a conversation, applies the model's template and answers `count`: exact. llama.cpp's takes
    text as `content` and answers `tokens`. Everything but an exact count has `"estimated": true`, which clients ignore.
    """

    path = b"/tokenize"

    def __init__(self, chat: Json) -> None:
        """`chat` is the body for the engine's chat completions."""
        text, images = _text_of(chat)
        self._beside_text = TOKENS_PER_MESSAGE * len(chat["messages"]) + TOKENS_PER_IMAGE * images
        self._estimate = ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + self._beside_text
        self.body = to_json({**{name: chat[name] for name in _OF_THE_PROMPT if name in chat}, "content": text})

    def count(self, status: int, body: bytes) -> Json | None:
        """The client's answer for the engine's, None if that is an error for the client."""
        if status >= 400 and status not in _NO_COUNT:
            return None
        found = (engine_object(body) if status == 200 else None) or {}
        count, tokens = found.get("count"), found.get("tokens")
        if isinstance(count, int) and not isinstance(count, bool):
            return {"input_tokens": count}
        estimate = len(tokens) + self._beside_text if isinstance(tokens, list) and tokens else self._estimate
        return {"input_tokens": estimate, "estimated": True}

    def stream(self) -> None:
        return None


def _text_of(chat: Json) -> tuple[str, int]:
    """All text of a chat with its tools, and how many images it has."""
    texts: list[str] = [to_json(tool).decode() for tool in chat.get("tools", [])]
    images = 0
    for message in chat["messages"]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        texts += [part["text"] for part in parts if part["type"] == "text"]
        images += sum(part["type"] != "text" for part in parts)
        texts.append(message.get("reasoning_content", ""))
        texts += [call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", [])]
    return "\n".join(text for text in texts if text), images
