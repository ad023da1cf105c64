"""What a waiting request is expected to use."""

from __future__ import annotations

from typing import Any

from cortex.http.heads import request_reader
from cortex.http.request import Request
from cortex.proxy.prompt.expected_tokens import UNKNOWN_ANSWER, ExpectedTokens
from tests.cortex.raw_http import request


def _request(body: bytes) -> Request:
    head, reader = request_reader()
    reader.feed(request(body))
    read = Request(head, peer="", received=0)
    read.body = body
    return read


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
