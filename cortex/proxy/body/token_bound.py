"""How many tokens a request can use at most, as far as its body says. Pure.

A token of text is at least one byte, so a text has at most as many tokens as bytes. A body that refers to something
else, such as an image or an earlier response, may have a prompt as long as the context.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import msgspec

from cortex.accounts.limits.terms import WHOLE_CONTEXT, TokenBound
from cortex.proxy.body.form_scan import is_form
from cortex.proxy.body.json_scan import may_have
from cortex.proxy.body.model_field import JSON_TYPE, made_strict, read_fields
from cortex.proxy.body.request_fields import ABSENT, RequestFields, TextFields, decode_list, decode_texts

_CHAT: Final = b"/v1/chat/completions"

_WITHOUT_OUTPUT: Final = frozenset(
    b"/v1/embeddings /v1/rerank /v2/rerank /rerank /v1/score /score /classify /v1/classify /pooling /v1/pooling "
    b"/v2/embed /v1/moderations /v1/audio/speech /v1/images/generations".split()
)
"""Paths whose answers have no tokens."""

COUNTS_NOTHING: Final = frozenset((b"/v1/messages/count_tokens", b"/tokenize", b"/detokenize"))
"""Paths whose requests use no tokens of a model."""

_PARTS: Final = (
    b'_url"',
    b'"image',
    b'"audio',
    b'"video',
    b'"file',
    b'"input_image"',
    b'"input_audio"',
    b'"input_file"',
    b'"document"',
)
"""Types of the parts of a message whose tokens are not those of their text."""

_REFERENCES: Final[Mapping[bytes, tuple[bytes, ...]]] = {
    b"/v1/responses": (b'"previous_response_id"', b'"conversation"'),
    b"/v1/completions": (b'"prompt_embeds"',),
}
"""By path the names of fields that add something to the prompt."""


def token_bound(path: bytes, body: bytes, content_type: str, fields: RequestFields | None = None) -> TokenBound:
    """The bound of a request with this body, as it is sent to the engine. `path` is without its query; `fields` are of
    the body, None to read them here."""
    if path in COUNTS_NOTHING:
        return TokenBound(0)
    if content_type != JSON_TYPE and is_form(content_type):  # whose seconds count, not its bytes
        return TokenBound(WHOLE_CONTEXT, None)
    prompt = WHOLE_CONTEXT if _refers(path, body) else len(body)
    if path in _WITHOUT_OUTPUT:
        return TokenBound(prompt + _repeated(_texts(body)), prompts=2)
    if fields is None:
        fields = read_fields(body)
    prompts = _count(fields.prompt) if path == b"/v1/completions" else 1
    answers = prompts
    n, best_of = fields.n, fields.best_of
    if n is not ABSENT or best_of is not ABSENT:
        answers *= max(_number(n) or 1, _number(best_of) or 1)
    return TokenBound(prompt, _output(path, fields), answers, prompts)


def _output(path: bytes, fields: RequestFields) -> int | None:
    """The most tokens of one answer, in the field that engines read at this path."""
    if path == _CHAT:
        first, second = _number(fields.max_tokens), _number(fields.max_completion_tokens)
        return first if second is None else max(second, first or 0)
    if path in (b"/v1/completions", b"/v1/messages"):
        return _number(fields.max_tokens)
    return _number(fields.max_output_tokens) if path == b"/v1/responses" else None


def _texts(body: bytes) -> TextFields:
    for read in (bytes, made_strict):
        try:
            return decode_texts(read(body))
        except (ValueError, RecursionError):
            continue
    return TextFields()


def _refers(path: bytes, body: bytes) -> bool:
    """Whether something in the body may be longer in the prompt than it is written."""
    # A chat's parts are in a list within the list of messages. To find no second list takes a tenth of the time.
    if path == _CHAT and body.find(b"[") == body.rfind(b"["):
        return False
    if body.find(b'"type"') >= 0 and any(part in body for part in _PARTS):
        return True
    return may_have(body, *_REFERENCES.get(path, ()))


def _number(written: msgspec.Raw) -> int | None:
    """A positive whole number, or None for anything else: the engine refuses that, or ignores it."""
    if written is ABSENT:
        return None
    text = bytes(written)
    try:
        value = int(text) if text.isdigit() else int(float(json.loads(text)))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    return min(value, WHOLE_CONTEXT) if value >= 1 else None


def _repeated(texts: TextFields) -> int:
    """Bytes of a query that is read again with each text."""
    pairs = max(_count(texts.documents), _count(texts.items), _count(texts.text_2))
    repeated = sum(len(bytes(each)) for each in (texts.query, texts.queries, texts.text_1))
    return repeated * pairs if pairs > 1 else 0


def _count(value: msgspec.Raw) -> int:
    """How many prompts or texts this is: one, or those of a list. A list of token ids is one."""
    written = bytes(value)
    if not written.startswith(b"["):
        return 1
    items = decode_list(written)
    return 1 if not items or bytes(items[0])[:1].isdigit() else len(items)
