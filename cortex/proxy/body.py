"""The `model` of a request body: found, and replaced without touching any other byte. Pure."""

from __future__ import annotations

import email.parser
import email.policy
import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]

from shared.errors import InvalidRequest

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ModelField:
    """The value of the top-level `model`, and where it stands in the body (bytes `start` to `end`)."""

    model: str
    start: int
    end: int
    json: bool

    def replaced(self, body: bytes, model: str) -> bytes:
        """The body with another model in that place, everything else as it came."""
        value = json.dumps(model).encode() if self.json else model.encode()
        return body[: self.start] + value + body[self.end :]


def find_model(body: bytes, content_type: str) -> ModelField:
    """The `model` of a JSON object, or of a multipart form.

    Raises:
        InvalidRequest: neither, or no string `model` in it.
    """
    if content_type.lower().startswith("multipart/form-data"):
        return _model_of_form(body, content_type)
    return _model_of_json(body)


def _model_of_json(body: bytes) -> ModelField:
    """Walks the top level only, so that a `model` in a nested object or a string is not taken for it. Of several, the
    last counts, as in every JSON parser an engine uses."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    try:
        span = _model_span(text)
    except (ValueError, IndexError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if span is None:
        raise _no_model()
    value, start, end = span
    if not isinstance(value, str) or not value:
        raise _no_model()
    offset = len(text[:start].encode()) if not text.isascii() else start
    return ModelField(value, offset, offset + len(text[start:end].encode()), json=True)


def _model_span(text: str) -> tuple[object, int, int] | None:
    """(value, start, end) of the top-level `model` in characters; None when the body is no object or has none."""
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        _DECODER.decode(text)  # raises when it is not even JSON
        return None
    found: tuple[object, int, int] | None = None
    position = _skip(text, position + 1)
    while text[position] != "}":
        if text[position] != '"':
            raise ValueError(f"a property name is expected at character {position}")
        key, position = scanstring(text, position + 1)
        position = _skip(text, position)
        if text[position] != ":":
            raise ValueError(f"':' is expected at character {position}")
        start = _skip(text, position + 1)
        value, end = _DECODER.raw_decode(text, start)
        if key == "model":
            found = value, start, end
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
            if text[position] == "}":
                raise ValueError(f"a property name is expected at character {position}")
        elif text[position] != "}":
            raise ValueError(f"',' is expected at character {position}")
    if _skip(text, position + 1) != len(text):
        raise ValueError(f"nothing is expected after the object, at character {position + 1}")
    return found


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return position if match is None else match.end()


def _model_of_form(body: bytes, content_type: str) -> ModelField:
    """The part named `model` of a multipart form."""
    header = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(f"Content-Type: {content_type}\r\n\r\n")
    boundary = header.get_boundary()
    if not boundary:
        raise InvalidRequest("the multipart body has no boundary")
    delimiter = b"--" + boundary.encode("utf-8", "surrogateescape")
    position = body.find(delimiter)
    while position >= 0:
        start = position + len(delimiter)
        position = body.find(b"\r\n" + delimiter, start)
        head, separator, _ = body[start : start + 4096].partition(b"\r\n\r\n")
        if position < 0 or not separator:
            break
        part = email.parser.BytesHeaderParser(policy=email.policy.HTTP).parsebytes(head.lstrip(b"\r\n") + b"\r\n\r\n")
        if part.get_param("name", header="content-disposition") == "model":
            begin = start + len(head) + len(separator)
            return _form_value(body, begin, position)
        position += 2
    raise _no_model()


def _form_value(body: bytes, begin: int, end: int) -> ModelField:
    try:
        value = body[begin:end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("the form's 'model' is not UTF-8", param="model") from error
    if not value.strip():
        raise _no_model()
    return ModelField(value.strip(), begin, end, json=False)


def _no_model() -> InvalidRequest:
    return InvalidRequest("the body must have a string 'model'", param="model")
