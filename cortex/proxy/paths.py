"""Which path means what: for engines, for cortex itself, misspelt, or unknown. Pure."""

from __future__ import annotations

import re
from typing import Final

from cortex.http.request import Request
from shared.errors import NotFound, shortened

INFERENCE_PATHS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""POST routes whose body names a model, as vLLM has them. A POST to any other path that is not cortex's own goes to an
engine too if its body names a model."""
INFERENCE: Final = frozenset(path.encode() for path in INFERENCE_PATHS)

MODELS: Final = b"/v1/models"
OWN_PATHS: Final = (MODELS, b"/health", b"/fleet", b"/openapi.json")
"""cortex answers these and everything below them itself."""

_OWN_BELOW: Final = tuple(path + b"/" for path in OWN_PATHS)
_ONE_MODEL: Final = re.compile(rb"/*(?:v1/+)*models/+(.*[^/])/*")


def is_own(path: bytes) -> bool:
    """True for paths that cortex answers itself."""
    return path in OWN_PATHS or path.startswith(_OWN_BELOW)


def is_for_web_pages(path: bytes) -> bool:
    """True for paths that pages of allowed origins may use: inference and the list of models, not the fleet."""
    return not is_own(path) or path == MODELS or path.startswith(MODELS + b"/")


def meant_path(path: bytes, *, reads: bool) -> bytes:
    """The known path that a slightly wrong one clearly means, otherwise `path` itself. `reads`: the method is GET or
    HEAD.

    Clients join base URL and path: a missing, doubled or trailing slash and a missing or doubled `/v1` come from a
    base URL with or without `/v1`. `path` is as received, without query.
    """
    one = _ONE_MODEL.fullmatch(path) if reads else None
    if one is not None:
        return path if path.startswith(MODELS + b"/") and not path.endswith(b"/") else b"%b/%b" % (MODELS, one[1])
    segments = [segment for segment in path.split(b"/") if segment]
    while segments[:2] == [b"v1", b"v1"]:
        del segments[0]
    plain = b"/" + b"/".join(segments)
    for known in (plain, b"/v1" + plain):
        if known in INFERENCE or known == MODELS:
            return known
    return plain if is_own(plain) else path


def has_wrong_base(path: bytes) -> bool:
    """True for a known path behind something else, such as `/api/v1/chat/completions`, and for the beginning of one:
    the client has the wrong base URL."""
    return path not in INFERENCE and (path.endswith(_BELOW_V1) or path.rstrip(b"/") in _BEGINNINGS)


_BELOW_V1: Final = tuple(path for path in INFERENCE if path.startswith(b"/v1/"))
_BEGINNINGS: Final = frozenset({b"", b"/v1", b"/chat", b"/v1/chat", b"/audio", b"/v1/audio"})


def no_route(request: Request) -> NotFound:
    """The error for an unknown path. It gives the base URLs, with https if a proxy in front says so."""
    scheme = "https" if (request.passed_value(b"x-forwarded-proto") or b"").lower() == b"https" else "http"
    base = f"{scheme}://{shortened((request.host or b'HOST').decode('latin-1'))}"
    path = shortened(request.raw_path.decode("latin-1"))
    return NotFound(
        f"no route for {request.method.decode('latin-1')} {path!r}: the base URL is {base}/v1 for OpenAI's clients and "
        f"{base} for Anthropic's. A POST to any other path must name a model in its body"
    )
