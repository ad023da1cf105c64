"""The token counts of one answer, as the engine writes them and as they are counted. Not compiled, unlike their
reader: mypyc does not know msgspec's structs."""

from __future__ import annotations

from typing import Any

import msgspec


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request. `cached` counts prompt tokens that the engine took from its prefix cache: part of `prompt`
    in OpenAI's APIs, not in Anthropic's."""

    prompt: int
    completion: int
    cached: int = 0


class UsageFields(msgspec.Struct, gc=False):
    """The fields of `usage` that count, of whatever type. Reading only these takes less time than reading all."""

    prompt_tokens: Any = msgspec.UNSET
    completion_tokens: Any = msgspec.UNSET
    input_tokens: Any = msgspec.UNSET
    output_tokens: Any = msgspec.UNSET
    prompt_tokens_details: Any = None
    input_tokens_details: Any = None
    cache_read_input_tokens: Any = None


decode_fields = msgspec.json.Decoder(UsageFields).decode
"""Reads them from JSON. Raises msgspec.DecodeError."""
