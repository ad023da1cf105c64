"""HTTP calls to a running cortex."""

from __future__ import annotations

import errno
import html
import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LOAD_TIMEOUT_SECS = 2 * 3600.0
CALL_TIMEOUT_SECS = 30.0
_NEEDS_KEY = ", set CORTEX_API_KEY to a valid key, or sign in with `cortex login` where that is possible"
_TRUST = "set CORTEX_CA to a PEM file with the certificate of the authority that signed it"
_NAME = "set --url or CORTEX_URL to an address with a name that is in the certificate"
_PAGE_BYTES = 1 << 16
_EXCERPT_CHARS = 120
_TAGS = re.compile(r"<(script|style|title)\b.*?(?:</\1\s*>|$)|<[^<>]*>", re.IGNORECASE | re.DOTALL)
_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


class CallFailed(Exception):
    """The call failed; the message is for the person at the terminal."""


class NotConnected(CallFailed):
    """The host refuses the connection, or does not answer."""


class ErrorAnswer(CallFailed):
    """Something answered with an HTTP error. `body`: its JSON, None if it is not JSON."""

    def __init__(self, text: str, body: Any, status: int) -> None:
        super().__init__(text)
        self.body = body
        self.status = status


class StreamEvent(NamedTuple):
    """A server-sent event, or a comment, which has no data."""

    name: str
    data: str
    comment: str = ""


def call(
    url: str, method: str, path: str, *, api_key: str | None, timeout_secs: float, body: dict[str, Any] | None = None
) -> Any:
    """The JSON answer.

    Raises:
        CallFailed: cortex is unreachable, answered with an error (ErrorAnswer), or does not run (NotConnected).
    """
    with _answer(url, method, path, api_key=api_key, timeout_secs=timeout_secs, body=body) as response:
        text = response.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise CallFailed(f"{base_url(url)} does not answer like a cortex, check --url") from error


def stream(
    url: str, method: str, path: str, *, api_key: str | None, timeout_secs: float, body: dict[str, Any] | None = None
) -> Iterator[StreamEvent]:
    """The events of an answer as they come. `timeout_secs`: of silence. Raises as `call`."""
    with _answer(url, method, path, api_key=api_key, timeout_secs=timeout_secs, body=body) as response:
        name, data = "message", list[str]()
        for raw in response:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if line.startswith(":"):
                yield StreamEvent("", "", line[1:].strip())
            elif line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                yield StreamEvent(name, "\n".join(data))
                name, data = "message", []


@contextmanager
def _answer(
    url: str, method: str, path: str, *, api_key: str | None, timeout_secs: float, body: dict[str, Any] | None
) -> Iterator[http.client.HTTPResponse]:
    url = base_url(url)
    if not _is_web_address(url):
        raise CallFailed(f"--url {url!r} must start with http:// or https://")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data=data, headers=headers, method=method)  # noqa: S310 - the scheme is checked above
    try:
        context = _trusted() if url.startswith("https://") else None
        opener = urllib.request.build_opener(_SameOrigin, urllib.request.HTTPSHandler(context=context))
        with opener.open(request, timeout=timeout_secs) as response:
            yield response
    except urllib.error.HTTPError as error:
        hint = _NEEDS_KEY if error.code == HTTPStatus.UNAUTHORIZED else ""
        text = error.read()
        raise ErrorAnswer(_message(text, error.code) + hint, _json(text), error.code) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        if isinstance(reason, ssl.SSLCertVerificationError):
            advice = _NAME if reason.verify_code in _OTHER_NAME else _TRUST
            raise CallFailed(f"{url}: the TLS certificate is not trusted: {reason.verify_message}; {advice}") from error
        if isinstance(reason, ssl.SSLError):
            reason = f"TLS fails ({reason.reason}): does the address need http:// instead of https://?"
        failure = NotConnected if _is_of_connecting(reason) else CallFailed
        raise failure(f"{url}: {reason}; start cortex there, or set --url or CORTEX_URL") from error


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the same host and port only: another must not get the key."""

    def redirect_request(  # noqa: PLR0917 - as urllib calls it
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            fp.close()
            raise CallFailed(f"{req.full_url} redirects to {newurl}: if that is cortex, set --url to it")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def base_url(url: str) -> str:
    """The address of cortex in what people paste from their clients: one without a scheme, or OpenAI's base URL."""
    return (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1").rstrip("/")


def _trusted() -> ssl.SSLContext:
    """Trusts the file in CORTEX_CA, or the system's authorities. Raises CallFailed."""
    from shared.tls import TlsError, TlsFiles, client_context

    path = os.environ.get("CORTEX_CA")
    try:
        return client_context(TlsFiles(ca=Path(path) if path else None))
    except TlsError as error:
        raise CallFailed(f"CORTEX_CA: {error}") from error


def _is_web_address(url: str) -> bool:
    try:
        return urlsplit(url).scheme in ("http", "https")
    except ValueError:
        return False


def _is_of_connecting(reason: object) -> bool:
    """True if no connection was made. urllib gives a reason for what fails before the request is sent, and raises what
    fails afterwards as it is."""
    unreachable = isinstance(reason, OSError) and reason.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
    return unreachable or isinstance(reason, (ConnectionRefusedError, TimeoutError))


def _message(text: bytes, status: int) -> str:
    try:
        return str(_json(text)["error"]["message"])
    except (LookupError, TypeError):
        said = _excerpt(text)
        return f"HTTP {status}: {said}" if said else f"HTTP {status}"


def _excerpt(body: bytes) -> str:
    """The beginning of a text, or of the text of a page, on one line."""
    text = html.unescape(_TAGS.sub(" ", body[:_PAGE_BYTES].decode("utf-8", "replace")))
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= _EXCERPT_CHARS else f"{line[:_EXCERPT_CHARS]}…"


def _json(text: bytes) -> Any:
    """None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None
