"""Asks an engine for the usage of a stream, without changing any other byte of the request. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cortex.proxy.body.alias_edit import Splice
from cortex.proxy.body.json_scan import TooIntricateError, place_of_member
from cortex.proxy.body.request_fields import ABSENT, RequestFields

HAVE_OPTION: Final = frozenset({b"/v1/chat/completions", b"/v1/completions"})
"""The paths whose streams report usage only if `stream_options` asks for it."""

_OPTION: Final = b'"stream_options":{"include_usage":true}'


def usage_splice(body: bytes, fields: RequestFields) -> Splice | None:
    """What makes this request ask for usage; None if it is for no stream, asks already, or its option is wrong. `body`:
    a JSON object with these fields."""
    if fields.stream is ABSENT or bytes(fields.stream) != b"true":
        return None
    options = bytes(fields.stream_options)
    try:
        if not options:
            end = body.rindex(b"}")
            return end, end, b"," + _OPTION  # it has a member, `stream`
        given: Any = msgspec.json.decode(options)
        if given is None:
            given = {}
        if not isinstance(given, dict) or given.get("include_usage") not in (None, False):
            return None
        # These would put usage into every event.
        more = {name: value for name, value in given.items() if name != "continuous_usage_stats"}
        value = msgspec.json.encode({**more, "include_usage": True})
        return (*place_of_member(body, "stream_options"), value)
    except (ValueError, LookupError, RecursionError, TooIntricateError):
        return None
