"""Reads a request's fields, with errors that name the field. Pure."""

from __future__ import annotations

from typing import Any

from cortex.proxy.translation.interface import Json
from shared.errors import InvalidRequest


def invalid(param: str, reason: str) -> InvalidRequest:
    """The error for the field at `param`, such as `messages[2].content`."""
    return InvalidRequest(f"{param}: {reason}", param=param)


def blocks_of(content: Any, param: str) -> list[Json]:
    """Content as a list of blocks; a string is one block of text, null is none. Raises InvalidRequest."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise invalid(param, "must be a string or a list of content blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{param}[{index}]", "must be a content block")
    return content


def text_of(holder: Json, key: str, param: str) -> str:
    """A string field of the object at `param`. Raises InvalidRequest."""
    value = holder.get(key)
    if not isinstance(value, str):
        raise invalid(f"{param}.{key}", "must be a string")
    return value
