"""Error bodies in vLLM's format."""

from __future__ import annotations

from aiohttp import web

_ANTHROPIC_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


class ApiError(Exception):
    """A request that cannot be served; `kind` is vLLM's `type`."""

    def __init__(self, status: int, message: str, kind: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def body(self) -> dict[str, object]:
        return error_body(self.status, self.message, self.kind, self.param)

    def anthropic_body(self) -> dict[str, object]:
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def error_body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A well-formed request with an unacceptable value."""
    return ApiError(400, message, "BadRequestError", param=param)


def malformed(message: str, param: str | None = None) -> ApiError:
    """A request of the wrong form."""
    return ApiError(400, message, "Bad Request", param=param)


def unknown_model(name: object, known: tuple[str, ...]) -> ApiError:
    message = f"The model `{name}` does not exist. Valid aliases: {', '.join(known)}."
    return ApiError(404, message, "NotFoundError", param="model")


def response(error: ApiError, *, anthropic: bool) -> web.Response:
    return web.json_response(error.anthropic_body() if anthropic else error.body(), status=error.status)
