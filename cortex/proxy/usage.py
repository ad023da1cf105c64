"""The engine's token counts, read from the end of an answer as it passes."""

from __future__ import annotations

import json
from dataclasses import dataclass

KEPT_BYTES = 16384
"""`usage` stands in the last event of a stream and near the end of a plain answer."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt: int
    completion: int


class UsageTail:
    """Keeps the last bytes of an answer; costs an append for each chunk."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > 4 * KEPT_BYTES:
            tail = b"".join(self._chunks)[-KEPT_BYTES:]
            self._chunks, self._size = [tail], len(tail)

    def usage(self) -> Usage | None:
        """The last `usage` object seen, None when there is none."""
        return find_usage(b"".join(self._chunks)[-KEPT_BYTES:])


def find_usage(tail: bytes) -> Usage | None:
    """OpenAI's names (prompt_tokens, completion_tokens) and Anthropic's (input_tokens, output_tokens)."""
    text = tail.decode("utf-8", "replace")
    position = len(text)
    while (position := text.rfind('"usage":', 0, position)) >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, position + len('"usage":') + _blanks(text, position + 8))
        except ValueError:
            continue
        if isinstance(found, dict):
            prompt = found.get("prompt_tokens", found.get("input_tokens"))
            completion = found.get("completion_tokens", found.get("output_tokens"))
            return Usage(_count(prompt), _count(completion))
    return None


def _blanks(text: str, position: int) -> int:
    return len(text[position : position + 16]) - len(text[position : position + 16].lstrip())


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
