"""The issuer, as a terminal sees it: plain HTTP calls that block."""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from cortex.cli.client import CallFailed

TIMEOUT_SECS = 30.0
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """What an issuer has given out. Times are UTC seconds. `refresh_token` is None if there is none."""

    id_token: str
    refresh_token: str | None
    expires_at: float

    @property
    def claims(self) -> dict[str, Any]:
        """Of the ID token. Its signature is not checked here: it came straight from the issuer."""
        return _claims(self.id_token)


class IssuerClient:
    """`offer` is its discovery document."""

    def __init__(self, offer: dict[str, Any], client_id: str) -> None:
        self.offer = offer
        self.client_id = client_id

    def endpoint(self, name: str) -> str | None:
        """Its address; None if the issuer does not offer it. Only a web address: a browser would open any other too."""
        value = self.offer.get(name)
        return value if isinstance(value, str) and urlsplit(value).scheme in ("http", "https") else None

    def ask_for_tokens(self, form: dict[str, str]) -> Tokens | dict[str, Any]:
        """The tokens for this grant, or the issuer's error, as a dict with `error`.

        Raises:
            CallFailed: the issuer does not answer, or not as it should.
        """
        status, answer = post(str(self.endpoint("token_endpoint")), {"client_id": self.client_id, **form})
        if status == 200 and isinstance(answer.get("id_token"), str):
            claims = _claims(answer["id_token"])
            refresh = answer.get("refresh_token")
            return Tokens(answer["id_token"], refresh if isinstance(refresh, str) else None, float(claims["exp"]))
        if "error" in answer:
            return answer
        raise CallFailed(f"{self.endpoint('token_endpoint')} answers {status} without an ID token")


def discovered(issuer: str, client_id: str) -> IssuerClient:
    """The issuer at this URL. Raises CallFailed."""
    _, offer = _ask(issuer.rstrip("/") + "/.well-known/openid-configuration", None)
    if str(offer.get("issuer", "")).rstrip("/") != issuer.rstrip("/"):
        raise CallFailed(f"{issuer} does not describe itself as an issuer of OpenID Connect")
    return IssuerClient(offer, client_id)


def post(url: str, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of the answer. Raises CallFailed."""
    return _ask(url, urlencode(form).encode())


def reason_of(answer: dict[str, Any]) -> str:
    """Why an issuer refuses."""
    return str(answer.get("error_description") or answer.get("error"))[:300]


def _ask(url: str, data: bytes | None) -> tuple[int, dict[str, Any]]:
    if urlsplit(url).scheme not in ("http", "https"):
        raise CallFailed(f"{url!r} is not an address of an issuer")
    request = urllib.request.Request(url, data=data, headers={"Accept": "application/json"})  # noqa: S310 - see above
    try:
        context = _trusted() if url.startswith("https://") else None
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECS, context=context) as response:  # noqa: S310 - see above
            status, body = response.status, response.read(_MAX_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            status, body = error.code, error.read(_MAX_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CallFailed(f"{url}: {getattr(error, 'reason', None) or error}") from error
    try:
        answer = json.loads(body) if body.strip() else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise CallFailed(f"{url} answers {status} without a JSON object")
    return status, answer


def _trusted() -> ssl.SSLContext:
    """The system's authorities, and that of CORTEX_CA: the issuer often has its certificate from the same one."""
    context = ssl.create_default_context()
    extra = os.environ.get("CORTEX_CA")
    if extra:
        context.load_verify_locations(extra)
    return context


def _claims(token: str) -> dict[str, Any]:
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        float(claims["exp"])
    except (ValueError, LookupError, TypeError) as error:
        raise CallFailed("the issuer's ID token cannot be read") from error
    assert isinstance(claims, dict)
    return claims
