"""One HTTP call to a running cortex."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

LOAD_TIMEOUT_SECS = 2 * 3600.0
CALL_TIMEOUT_SECS = 30.0


class CallFailed(Exception):
    """The call did not succeed; the message is for the person at the terminal."""


def call(
    url: str, method: str, path: str, *, api_key: str | None, body: dict[str, Any] | None = None, patient: bool = False
) -> Any:
    """The JSON answer. `patient` True waits as long as a load may take.

    Raises:
        CallFailed: cortex is out of reach or answered with an error.
    """
    if not _is_web_address(url):
        raise CallFailed(f"--url {url!r} must begin with http:// or https://")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data=data, headers=headers, method=method)  # noqa: S310 - the scheme is checked above
    timeout = LOAD_TIMEOUT_SECS if patient else CALL_TIMEOUT_SECS
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310 - as above
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise CallFailed(_message(error.read(), error.code)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CallFailed(f"{url}: {getattr(error, 'reason', None) or str(error) or type(error).__name__}") from error


def _is_web_address(url: str) -> bool:
    try:
        return urlsplit(url).scheme in ("http", "https")
    except ValueError:
        return False


def _message(text: bytes, status: int) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {status}: {text[:300].decode('utf-8', 'replace')}"
