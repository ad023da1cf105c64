"""What cortex reads of the bodies of requests. Pure. Not compiled, unlike its readers: mypyc does not know msgspec's
structs."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

ABSENT: Final = msgspec.Raw(b"")
"""The value of a member that the body does not have."""


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


class JsonModel(RequestFields, frozen=True, gc=False, kw_only=True):
    """The top-level `model` of a JSON object, never empty, and what else is read of it. The last of several counts."""

    model: str


class FormModel(msgspec.Struct, frozen=True, gc=False):
    """The `model` of a multipart form, never empty: bytes `start` to `end` of the body."""

    model: str
    start: int
    end: int


ModelField: TypeAlias = JsonModel | FormModel


class AnyModel(RequestFields, frozen=True, gc=False):
    """As JsonModel, with a `model` of whatever type."""

    model: msgspec.Raw = ABSENT


class ResponseIds(msgspec.Struct, frozen=True, gc=False):
    """Of `/v1/responses`: of the response that this one continues, and of this one if the client chooses it."""

    previous_response_id: msgspec.Raw = ABSENT
    request_id: msgspec.Raw = ABSENT


class TextFields(msgspec.Struct, frozen=True, gc=False):
    """Of a path without output. Each of the second three is read together with the first."""

    query: msgspec.Raw = ABSENT
    queries: msgspec.Raw = ABSENT
    text_1: msgspec.Raw = ABSENT
    documents: msgspec.Raw = ABSENT
    items: msgspec.Raw = ABSENT
    text_2: msgspec.Raw = ABSENT


decode_fields: Final = msgspec.json.Decoder(RequestFields).decode
decode_model: Final = msgspec.json.Decoder(JsonModel).decode
decode_any_model: Final = msgspec.json.Decoder(AnyModel).decode
decode_response_ids: Final = msgspec.json.Decoder(ResponseIds).decode
decode_texts: Final = msgspec.json.Decoder(TextFields).decode
decode_list: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
"""Each raises msgspec.DecodeError, UnicodeDecodeError or RecursionError for what it cannot read."""
