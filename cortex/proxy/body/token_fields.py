"""The fields of request bodies that say how many tokens a request can use. Pure. Not compiled, unlike their reader:
mypyc does not know msgspec's structs."""

from __future__ import annotations

from typing import Any, Final

import msgspec


class GenerationFields(msgspec.Struct):
    """Of whatever type: how long an answer may be, and how many are made."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None


class CompletionFields(GenerationFields):
    """Of `/v1/completions`, which may have several prompts."""

    prompt: msgspec.Raw = msgspec.Raw(b"null")


class TextFields(msgspec.Struct):
    """Of a path without output. Each of the second three is read together with the first."""

    query: msgspec.Raw = msgspec.Raw(b"null")
    queries: msgspec.Raw = msgspec.Raw(b"null")
    text_1: msgspec.Raw = msgspec.Raw(b"null")
    documents: msgspec.Raw = msgspec.Raw(b"null")
    items: msgspec.Raw = msgspec.Raw(b"null")
    text_2: msgspec.Raw = msgspec.Raw(b"null")


decode_generation: Final = msgspec.json.Decoder(GenerationFields).decode
decode_completion: Final = msgspec.json.Decoder(CompletionFields).decode
decode_texts: Final = msgspec.json.Decoder(TextFields).decode
decode_list: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
"""Each raises msgspec.DecodeError, UnicodeDecodeError or RecursionError for what it cannot read."""
