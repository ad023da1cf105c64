"""The token counts of one answer, as the engine writes them. Not compiled, unlike their reader: mypyc does not know
msgspec's structs."""

from __future__ import annotations

from typing import Any

import msgspec


class UsageFields(msgspec.Struct, gc=False):
    """The fields of `usage` that count, of whatever type. Reading only these takes less time than reading all.
    First OpenAI's, then Anthropic's."""

    prompt_tokens: Any = msgspec.UNSET
    completion_tokens: Any = msgspec.UNSET
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    input_tokens: Any = msgspec.UNSET
    output_tokens: Any = msgspec.UNSET
    input_tokens_details: Any = None
    output_tokens_details: Any = None
    cache_read_input_tokens: Any = None
    cache_creation_input_tokens: Any = None


decode_fields = msgspec.json.Decoder(UsageFields).decode
"""Reads them from JSON. Raises msgspec.DecodeError."""
