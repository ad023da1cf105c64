"""How long a request's prompt is at least, and whether that certainly exceeds a context. Pure.

What vLLM refuses, and nothing else: only text that every chat template puts into the prompt counts, and images, tools
and earlier turns do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from shared.errors import InvalidRequest

LONGEST_TOKEN_CHARS: Final = 1024
"""More characters than one token of any vocabulary has. The longest of common ones have 128."""


class PromptSize(msgspec.Struct, frozen=True):
    """`text`: part of the prompt, "" if none is certain. `tokens`: of a prompt that consists of token ids, or of the
    text once it is counted. `limit` is the most tokens that the answer may have, in the field `limit_name`."""

    text: str = ""
    tokens: int = 0
    limit: int = 0
    limit_name: str = ""
    seams: int = 0
    """Where in the prompt this text meets other text, which may have tokens in common with it. 0: it is the prompt."""
    special: bool = False
    """The tokenizer adds its special tokens."""
    at_least: bool = False
    """The prompt may have more tokens than `tokens`."""


class _Fields(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    input: msgspec.Raw = msgspec.Raw(b"null")
    max_tokens: msgspec.Raw = msgspec.Raw(b"null")
    max_completion_tokens: msgspec.Raw = msgspec.Raw(b"null")
    max_output_tokens: msgspec.Raw = msgspec.Raw(b"null")
    truncate_prompt_tokens: msgspec.Raw = msgspec.Raw(b"null")
    truncation: msgspec.Raw = msgspec.Raw(b"null")
    add_special_tokens: msgspec.Raw = msgspec.Raw(b"true")
    chat_template: msgspec.Raw = msgspec.Raw(b"null")


_decode: Final = msgspec.json.Decoder(_Fields).decode

_LIMITS: Final[Mapping[bytes, tuple[str, ...]]] = {
    b"/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    b"/v1/completions": ("max_tokens",),
    b"/v1/messages": ("max_tokens",),
    b"/v1/responses": ("max_output_tokens",),
}
"""By path the fields with the most tokens of the answer; the first that is given counts."""

SIZED: Final = frozenset(_LIMITS)
"""The paths whose requests can be judged."""


def prompt_size(path: bytes, body: bytes) -> PromptSize:
    """What is certain of a request to one of the paths SIZED; nothing of a body that cannot be read."""
    try:
        fields = _decode(body)
        limit_name, limit = _limit(path, fields)
        if _may_be_shortened(fields):
            return PromptSize(limit=limit, limit_name=limit_name)
        if path == b"/v1/completions":
            text, tokens = _completion(msgspec.json.decode(fields.prompt))
            special = bytes(fields.add_special_tokens) == b"true"
            return PromptSize(text, tokens, limit, limit_name, special=special)
        turns = msgspec.json.decode(fields.input if path == b"/v1/responses" else fields.messages)
    except (ValueError, RecursionError):  # also for what only json.loads accepts
        return PromptSize()
    # Templates may trim each part.
    parts = [part.strip() for part in ([turns] if isinstance(turns, str) else _last_question(turns))]
    return PromptSize("".join(parts), 0, limit, limit_name, seams=len(parts) + 1)


def excess(size: PromptSize, context: int, longest_token_chars: int) -> InvalidRequest | None:
    """vLLM's refusal of a request that certainly exceeds a context of so many tokens, else None."""
    limit, tokens, chars, most = size.limit, size.tokens, len(size.text), context * longest_token_chars
    if limit > context:
        problem = f"{size.limit_name}={limit} cannot be greater than max_model_len={context}."
        return _refusal(f"{problem} Please request fewer output tokens.", size.limit_name, limit)
    problem = f"This model's maximum context length is {context} tokens. However, your prompt contains"
    advice = "Please reduce the length of the input prompt."
    if tokens > context:
        counted = f"{'at least ' if size.at_least or tokens == context + 1 else ''}{tokens} input tokens"
        why = "which exceeds this limit even without any output tokens"
        return _refusal(f"{problem} {counted}, {why}. {advice}", "input_tokens", tokens)
    if chars > most:
        why = f"more than {most} characters, which is the upper bound for {context} input tokens"
        return _refusal(f"{problem} at least {chars} characters ({why}). {advice}", "input_text", chars)
    return None


def _refusal(message: str, param: str, value: int) -> InvalidRequest:
    extra = {"type": "BadRequestError", "code": 400}
    return InvalidRequest(f"{message} (parameter={param}, value={value})", param=param, extra=extra)


def _limit(path: bytes, fields: _Fields) -> tuple[str, int]:
    names = _LIMITS[path]
    given = ((name, msgspec.json.decode(getattr(fields, name))) for name in names)
    name, value = next(((name, value) for name, value in given if value is not None), (names[0], 0))
    # vLLM calls it so in a message too.
    shown = "max_completion_tokens" if path == b"/v1/messages" else name
    return shown, value if isinstance(value, int) and not isinstance(value, bool) else 0


def _may_be_shortened(fields: _Fields) -> bool:
    """The engine is asked to cut the prompt, or may write it in another way than its template does."""
    cut = bytes(fields.truncate_prompt_tokens), bytes(fields.chat_template)
    return cut != (b"null", b"null") or bytes(fields.truncation) not in (b"null", b'"disabled"')


def _completion(prompt: Any) -> tuple[str, int]:
    """The text of a single prompt, or how many tokens it has that are given as ids."""
    if isinstance(prompt, str):
        return prompt, 0
    return "", len(prompt) if isinstance(prompt, list) and all(type(each) is int for each in prompt) else 0


def _last_question(turns: Any) -> list[str]:
    """The texts of the last turn if it is the user's: some templates leave out what was before."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "user":
        return []
    content = last.get("content")
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") in _TEXTS]
    return [text for text in texts if isinstance(text, str)]


_TEXTS: Final = ("text", "input_text")
