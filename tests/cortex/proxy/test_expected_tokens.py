"""What a waiting request is expected to use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from cortex.http.request import Request
from cortex.proxy.prompt.expected_tokens import UNKNOWN_ANSWER, ExpectedTokens

CHAT = b"/v1/chat/completions"


def _request(body: bytes) -> Request:
    return cast(Request, SimpleNamespace(path=CHAT, body=body, content_type=b"application/json"))


def _body(text: str, more: str = "") -> bytes:
    return f'{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]{more}}}'.encode()


def test_a_first_request_is_judged_by_its_size_and_limit() -> None:
    expected: Any = ExpectedTokens()
    short = expected.of(_request(_body("hi", ',"max_tokens":10')), "k", "m")
    long = expected.of(_request(_body("hi " * 4000, ',"max_tokens":10')), "k", "m")
    open_ended = expected.of(_request(_body("hi")), "k", "m")
    assert 10 < short < 100
    assert 2000 < long < 12_000
    assert open_ended > UNKNOWN_ANSWER


def test_later_ones_by_what_those_before_used() -> None:
    """Of the same key and model."""
    expected = ExpectedTokens()
    for _ in range(30):
        expected.learn("k", "m", 5000)
    assert expected.of(_request(_body("hi")), "k", "m") == 5000
    expected.learn("k", "m", 0)
    assert expected.of(_request(_body("hi")), "k", "m") == 4000
    assert expected.of(_request(_body("hi")), "other", "m") < 1000
    assert expected.of(_request(_body("hi")), "k", "other") < 1000
