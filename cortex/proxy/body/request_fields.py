"""The members of JSON bodies that cortex reads, beside `model`. Pure. Not compiled, unlike their readers: mypyc does
not know msgspec's structs."""

from __future__ import annotations

from typing import Final

import msgspec

ABSENT: Final = msgspec.Raw(b"")
"""The value of a member that is not there."""


class RequestFields(msgspec.Struct, frozen=True, gc=False):
    """Values as they are written, of whatever type; the last of several counts, as in every engine's parser. They keep
    the body in memory.

    Whether the answer is a stream and has usage, how long an answer may be, how many are made, and the prompts of
    `/v1/completions`.
    """

    stream: msgspec.Raw = ABSENT
    stream_options: msgspec.Raw = ABSENT
    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT
    best_of: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT


class TextFields(msgspec.Struct, frozen=True, gc=False):
    """Of a path without output. Each of the second three is read together with the first."""

    query: msgspec.Raw = ABSENT
    queries: msgspec.Raw = ABSENT
    text_1: msgspec.Raw = ABSENT
    documents: msgspec.Raw = ABSENT
    items: msgspec.Raw = ABSENT
    text_2: msgspec.Raw = ABSENT


decode_fields: Final = msgspec.json.Decoder(RequestFields).decode
decode_texts: Final = msgspec.json.Decoder(TextFields).decode
decode_list: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
"""Each raises msgspec.DecodeError, UnicodeDecodeError or RecursionError for what it cannot read."""
