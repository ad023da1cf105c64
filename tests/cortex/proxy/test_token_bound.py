"""What a request may use at most by its body: never less than an engine could count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cortex.accounts.limits.admission import UNKNOWN_CONTEXT, RequestTerms
from cortex.accounts.limits.terms import WHOLE_CONTEXT, ModelTerms, TokenBound
from cortex.accounts.prices import Prices
from cortex.proxy.body.token_bound import token_bound

JSON = "application/json"


def of(path: str, **fields: Any) -> TokenBound:
    return token_bound(path.encode(), json.dumps({"model": "m", **fields}).encode(), JSON)


@pytest.mark.parametrize(
    ("path", "fields", "output", "answers"),
    [
        ("/v1/chat/completions", {"max_tokens": 5}, 5, 1),
        ("/v1/chat/completions", {"max_tokens": 5, "max_completion_tokens": 9, "n": 3}, 9, 3),
        ("/v1/chat/completions", {"max_tokens": None, "n": None}, None, 1),
        ("/v1/chat/completions", {"max_tokens": "7", "n": 2.0}, 7, 2),
        ("/v1/chat/completions", {"max_tokens": [1], "n": {}}, None, 1),
        ("/v1/chat/completions", {"max_tokens": -1, "n": 0}, None, 1),
        ("/v1/chat/completions", {"max_tokens": 1e400}, None, 1),
        # Fields of another path, which engines ignore.
        ("/v1/chat/completions", {"max_output_tokens": 1}, None, 1),
        ("/v1/completions", {"prompt": "a", "max_completion_tokens": 1}, None, 1),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5, "n": 2, "best_of": 4}, 5, 8),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 5, 1),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 5}, 5, 2),
        ("/v1/messages", {"max_tokens": 6}, 6, 1),
        ("/v1/responses", {"input": "a", "max_output_tokens": 7}, 7, 1),
        ("/v1/embeddings", {"input": ["a", "b"], "max_tokens": 5}, 0, 1),
        ("/v1/some/new/path", {"max_tokens": 5}, None, 1),
    ],
)
def test_output_is_what_the_engine_of_that_path_reads(
    path: str, fields: dict[str, Any], output: int | None, answers: int
) -> None:
    bound = of(path, **fields)
    assert (bound.output, bound.answers) == (output, answers)
    assert bound.prompt >= len(json.dumps(fields))


def test_a_prompt_that_the_body_only_refers_to_may_fill_the_context() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://host/a.png"}}
    assert of("/v1/chat/completions", messages=[{"role": "user", "content": [image]}]).prompt == WHOLE_CONTEXT
    assert of("/v1/responses", previous_response_id="resp_1", input="a").prompt == WHOLE_CONTEXT
    text = {"type": "input_text", "text": "an image"}
    assert of("/v1/responses", input=[{"role": "user", "content": [text]}]).prompt < 200
    assert token_bound(b"/v1/audio/transcriptions", b"--x", "multipart/form-data; boundary=x").prompt == WHOLE_CONTEXT


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", rb'{"previous\u005fresponse_id": "resp_1"}'),
        ("/v1/responses", rb'{"c\u006Fnversation": "c"}'),
        ("/v1/completions", rb'{"\u0070rompt_embeds": "x"}'),
        ("/v1/chat/completions", rb'{"messages": [{"content": [{"typ\u0065": "im\u0061ge_url"}]}]}'),
        ("/v1/chat/completions", rb'{"messages": [{"content": [{"t\u0079pe": "image_url"}]}]}'),
        ("/v1/chat/completions", rb'{"messages": [{"content": [{"type": "\u0069mage"}]}]}'),
    ],
)
def test_no_spelling_hides_what_the_body_refers_to(path: str, body: bytes) -> None:
    """An engine reads an escaped letter as the letter."""
    assert token_bound(path.encode(), body, JSON).prompt == WHOLE_CONTEXT


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"input": "žluťoučký kůň \x00 \x1f \x7f <&'> \U0001f600"}).encode(),
        rb'{"input": "\u003cb\u003e \u0026 \u0022 \u0027 \u002b \u0060"}',  # as Go and .NET write them
        rb'{"input": "type \\u0061 for an a"}',
    ],
)
def test_what_encoders_escape_hides_nothing(body: bytes) -> None:
    assert token_bound(b"/v1/responses", body, JSON).prompt == len(body)


def test_a_query_counts_once_for_each_document() -> None:
    assert of("/v1/rerank", query="q" * 1000, documents=["a"] * 8).prompt > 8 * 1000
    assert of("/v1/score", text_1="q" * 1000, text_2=["a"] * 8).prompt > 8 * 1000


def test_counting_tokens_uses_none() -> None:
    assert of("/v1/messages/count_tokens", messages=[]) == TokenBound(0)


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[1]", b'{"max_tokens":', b"[" * 100_000, b"\xff\xfe"])
def test_a_body_that_cannot_be_read_may_use_anything(body: bytes) -> None:
    assert token_bound(b"/v1/chat/completions", body, JSON) == TokenBound(len(body), None)


def test_what_python_reads_beyond_strict_json_counts() -> None:
    body = b'\xef\xbb\xbf{"max_tokens": 5, "temperature": NaN, "n": 2, "n": 3}'
    assert token_bound(b"/v1/chat/completions", body[3:], JSON) == TokenBound(len(body) - 3, 5, 3)
    assert token_bound(b"/v1/chat/completions", body, JSON) == TokenBound(len(body), 5, 3)


def test_the_context_bounds_one_prompt_and_each_answer() -> None:
    terms = RequestTerms([], ModelTerms(context=100, output=10, prices=Prices(1e6, 1e6, 2e6)), 0.0)
    assert terms.most(TokenBound(30, 20)) == (50, 70)
    assert terms.most(TokenBound(30, None)) == (40, 50)
    assert terms.most(TokenBound(30, None, answers=3))[0] == 60
    assert terms.most(TokenBound(WHOLE_CONTEXT, 5))[0] == 100
    assert terms.most(TokenBound(500, 0, prompts=2))[0] == 500
    assert terms.most(TokenBound(30, 10**9, answers=2))[0] == 200
    assert RequestTerms([], ModelTerms(), 0.0).most(TokenBound(30, None))[0] == UNKNOWN_CONTEXT
