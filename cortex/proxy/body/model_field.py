"""Finds the `model` of a request body, and replaces it without changing any other byte. Pure.

A body may be 32 MiB of base64 images, so it is neither decoded nor copied: msgspec checks a JSON body in C and creates
only `model`. Its position is searched only when an alias is replaced (`json_scan`).

Accepts what `json.loads`, and so vLLM, accepts, with these differences:

- a `model` with a lone surrogate ("\\ud800") is refused: it cannot be a name;
- UTF-16 and UTF-32 are refused: JSON between systems is UTF-8 (RFC 8259, section 8.1);
- an integer of more than 4300 digits passes here, and Python's parser at the engine refuses it.

NaN, Infinity, lone surrogates in other strings and a byte order mark are accepted, although msgspec refuses them.
"""

from __future__ import annotations

import codecs
import json
from typing import Final

import msgspec

from cortex.proxy.body.form_scan import FormScan, delimiter_of, is_form
from cortex.proxy.body.json_scan import TooIntricateError, may_have, place_of_member
from cortex.proxy.body.request_fields import (
    FormModel,
    JsonModel,
    ModelField,
    RequestFields,
    decode_any_model,
    decode_fields,
    decode_model,
    decode_response_ids,
)
from shared.errors import InvalidRequest

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_UTF8_SLICE = 1 << 14

# Replacements of the same length for what json.loads accepts and msgspec refuses. Numbers get blanks around them:
# `1NaN` must not become a number. Half a surrogate pair becomes a private character, never an ASCII one: `\ud06d`
# must not become the `m` of a `model`. Strings change too, so `model` is read from the original body.
_LENIENCIES = (
    (b"-Infinity", b" 0       "),
    (b"Infinity", b" 0      "),
    (b"NaN", b" 0 "),
    (b"\\ud", b"\\ue"),
    (b"\\uD", b"\\ue"),
)

JSON_TYPE: Final = "application/json"
_NO_MODEL = "the body must have a string 'model'"
_FORM_ENCODED = "application/x-www-form-urlencoded"

_decode_text = msgspec.json.Decoder(str).decode


class MissingModel(InvalidRequest):
    """The body is a JSON object or a multipart form, and names no model."""


def find_model(body: bytes, content_type: str) -> ModelField:
    """The `model` of a JSON object, or of a multipart form.

    Raises:
        MissingModel: it has none, or an empty one.
        InvalidRequest: the body is neither, or its `model` is not a string.
    """
    if content_type != JSON_TYPE and is_form(content_type):
        return _model_of_form(body, content_type)
    try:
        return _model_of_json(body)
    except MissingModel:
        raise
    except InvalidRequest as error:
        raise _of_another_kind(body, content_type) or error from None


def _of_another_kind(body: bytes, content_type: str) -> InvalidRequest | None:
    """The error for an empty body or a form; None for anything that could be JSON with a mistake."""
    if not body.strip():
        return InvalidRequest("the body is empty: send a JSON object that names a model")
    if content_type.lower().startswith(_FORM_ENCODED) and body.lstrip()[:1] not in b"{[":
        return InvalidRequest("the body is form-encoded: send JSON, with Content-Type: application/json")
    return None


def model_at_start(start: bytes, content_type: str) -> str | None:
    """The `model` of a multipart form, None unless its start contains that completely."""
    if not is_form(content_type):
        return None
    try:
        return _model_of_form(start, content_type).model
    except InvalidRequest:
        return None


def replaced(field: ModelField, body: bytes, model: str) -> bytes:
    """`body`, in which `field` was found, with another model and otherwise unchanged.

    A JSON body of more than 100,000 brackets and strings gets a second `model` at its end instead, which then counts:
    searching for the first would block the event loop.
    """
    if isinstance(field, FormModel):
        return _spliced(body, field.start, field.end, model.encode())
    value = json.dumps(model).encode()
    try:
        start, end = place_of_member(body, "model")
    except TooIntricateError:
        end = body.rindex(b"}")
        return b"".join((memoryview(body)[:end], b',"model":', value, memoryview(body)[end:]))
    return _spliced(body, start, end, value)


def find_or_add_model(body: bytes, content_type: str, default: str | None) -> tuple[ModelField, bytes]:
    """The `model` of `body`, and the body, with the model `default` if it had none. Raises as `find_model`."""
    try:
        return find_model(body, content_type), body
    except MissingModel:
        if default is None:
            raise
    body = with_model(body, content_type, default)
    return find_model(body, content_type), body


def with_model(body: bytes, content_type: str, model: str) -> bytes:
    """`body`, for which `find_model` raises MissingModel, with this model and otherwise unchanged."""
    if is_form(content_type):
        delimiter = delimiter_of(content_type)
        start = max(0, body.find(delimiter))
        return _spliced(body, start, start, form_part(delimiter, "model", model))
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip(b" \t\r\n").endswith(b"{") else b","
    member = b'%b"model":%b' % (comma, json.dumps(model).encode())
    return b"".join((memoryview(body)[:end], member, memoryview(body)[end:]))


def _model_of_json(body: bytes) -> JsonModel:
    if not body.isascii():
        _check_utf8(body)  # msgspec does not check strings that it skips
    try:
        field = decode_model(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        field = _model_of_lenient_json(body)
    if not field.model:
        raise missing_model()
    return field


def _model_of_lenient_json(body: bytes) -> JsonModel:
    """For a body that msgspec refuses: it has NaN or the like, has a non-string `model` before the last one, or is
    invalid."""
    strict = made_strict(body)
    try:
        found = decode_any_model(strict)
        if bytes(found.model) in {b"", b"null"}:
            raise missing_model()
        place = place_of_member(body, "model")
    except msgspec.ValidationError:
        raise InvalidRequest(f"the body is {_json_kind(body)}: send a JSON object that names a model") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except TooIntricateError as error:
        raise InvalidRequest(f"the body is too complex for JSON with NaN or other extensions: {error}") from error
    if body[place[0]] != ord('"'):
        raise InvalidRequest(f"'model' must be a string, got {_json_kind(body[place[0] :])}", param="model")
    try:
        model = _decode_text(memoryview(body)[slice(*place)])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body's 'model' is not Unicode text: {error}", param="model") from error
    return JsonModel(model=model, **{name: getattr(found, name) for name in RequestFields.__struct_fields__})


def read_fields(body: bytes) -> RequestFields:
    """The fields of a JSON object; of anything else none. Never raises."""
    for read in (bytes, made_strict):
        try:
            return decode_fields(read(body))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return RequestFields()


def asks_for_stream(body: bytes) -> bool:
    """True for a JSON object whose top-level `stream` is true; never raises. The last of several counts."""
    return bytes(read_fields(body).stream) == b"true"


def previous_response_id(body: bytes) -> str | None:
    """The top-level string `previous_response_id` of a JSON object; never raises. The last of several counts."""
    if not may_have(body, b"previous_response_id"):
        return None
    for read in (bytes, made_strict):
        try:
            return _decode_text(memoryview(decode_response_ids(read(body)).previous_response_id))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return None


def chooses_response_id(body: bytes) -> bool:
    """True for a JSON object with a top-level `request_id`: engines take it as the id of the response. Never raises."""
    if not may_have(body, b"request_id"):
        return False
    for read in (bytes, made_strict):
        try:
            return bytes(decode_response_ids(read(body)).request_id) not in {b"", b"null"}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return False


def made_strict(body: bytes) -> bytes:
    """The body with all that json.loads accepts and msgspec refuses replaced, at the same length."""
    for lenient, same in _LENIENCIES:
        body = body.replace(lenient, same)
    return b"   " + body[3:] if body.startswith(codecs.BOM_UTF8) else body


def _check_utf8(body: bytes) -> None:
    """Checks in slices: decoding 32 MiB at once could take 128 MiB. Accepts surrogates, as json.loads does."""
    try:
        if len(body) <= _UTF8_SLICE:  # a quarter of the cost
            body.decode("utf-8", "surrogatepass")
            return
        decoder, view = _Utf8Decoder("surrogatepass"), memoryview(body)
        for start in range(0, len(body), _UTF8_SLICE):
            decoder.decode(view[start : start + _UTF8_SLICE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason}") from error


def _model_of_form(body: bytes, content_type: str) -> FormModel:
    """The part named `model` of a multipart form."""
    scan = FormScan(delimiter_of(content_type))
    scan.feed(body)
    if scan.model is None:
        raise form_without_model()
    start, end = scan.model
    return FormModel(form_value(body[start:end]), start, end)


def form_value(value: bytes) -> str:
    """The name in the `model` of a form. Raises InvalidRequest if it is not UTF-8, MissingModel if it is empty."""
    try:
        name = value.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest("the form's 'model' is not UTF-8", param="model") from error
    if not name:
        raise missing_model()
    return name


def form_without_model() -> MissingModel:
    """The error for a form without a complete `model`."""
    return MissingModel("the form has no complete part named 'model'", param="model")


def form_part(delimiter: bytes, name: str, value: str) -> bytes:
    """A part of a form, to be put before another one."""
    escaped = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A").encode()
    return b'%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (delimiter, escaped, value.encode())


def _spliced(body: bytes, start: int, end: int, value: bytes) -> bytes:
    """A copy of the body with `value` in place of the bytes from `start` to `end`."""
    view = memoryview(body)
    return b"".join((view[:start], value, view[end:]))


def _json_kind(text: bytes) -> str:
    """What the JSON value that `text` begins with is."""
    first = text.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    kinds = {b"[": "a list", b"{": "an object", b'"': "a string", b"t": "true", b"f": "false", b"n": "null"}
    return kinds.get(first, "a number")


def missing_model() -> MissingModel:
    """The error for a body without a model."""
    return MissingModel(_NO_MODEL, param="model")
