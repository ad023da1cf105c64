"""Errors as data: status, code, type, and both shapes of a body."""

from __future__ import annotations

import pytest

from shared.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RequestTooLarge,
    ServiceError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UpstreamError,
)

CASES: list[tuple[ServiceError, int, str, str, str]] = [
    (ServiceError("x"), 500, "internal_error", "api_error", "api_error"),
    (InvalidRequest("x"), 400, "invalid_request", "invalid_request_error", "invalid_request_error"),
    (Unauthorized("x"), 401, "invalid_api_key", "authentication_error", "authentication_error"),
    (NotFound("x", code="model_not_found"), 404, "model_not_found", "invalid_request_error", "not_found_error"),
    (Conflict("x", code="already_loaded"), 409, "already_loaded", "invalid_request_error", "invalid_request_error"),
    (RequestTooLarge("x"), 413, "request_too_large", "invalid_request_error", "request_too_large"),
    (TooManyRequests("x"), 429, "rate_limit_exceeded", "rate_limit_error", "rate_limit_error"),
    (UpstreamError("x"), 502, "upstream_unreachable", "api_error", "api_error"),
    (Unavailable("x", retry_after=1), 503, "unavailable", "api_error", "overloaded_error"),
]


@pytest.mark.parametrize(("error", "status", "code", "kind", "anthropic"), CASES, ids=str)
def test_status_code_and_type_of_each_class(
    error: ServiceError, status: int, code: str, kind: str, anthropic: str
) -> None:
    """Status, code and type of each class, in OpenAI's shape and in Anthropic's."""
    assert (error.status, error.code, error.type) == (status, code, kind)
    assert error.body() == {"error": {"message": "x", "type": kind, "code": code, "param": None}}
    assert error.anthropic_body() == {"type": "error", "error": {"type": anthropic, "message": "x", "code": code}}
    assert str(error) == "x"


def test_extra_fields_are_part_of_the_error() -> None:
    """`extra` is added to the inner object; the four standard fields stay."""
    error = NotFound("x", param="model", extra={"free_mb": 5})
    assert error.body()["error"] == {
        "message": "x",
        "type": "invalid_request_error",
        "code": "not_found",
        "param": "model",
        "free_mb": 5,
    }
