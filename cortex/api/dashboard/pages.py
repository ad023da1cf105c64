"""Serves the dashboard's files, and says who is looking."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from cortex.accounts.caller import GUEST, may
from cortex.api.authorization import caller_of
from shared.errors import NotFound, Unauthorized

_STATIC = Path(__file__).with_name("static")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Accept",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time: an update of cortex must not meet old scripts
}
_WHERE = {
    "service": "cortex",
    "dashboard": "open this address in a browser",
    "base_url": {"openai": "/v1", "anthropic": "/"},
    "health": "/health",
    "openapi": "/openapi.json",
    "metrics": "at /metrics of the address in [gateway] metrics_listen of cortex.toml, not here",
}


class _File(NamedTuple):
    body: bytes
    headers: dict[str, str]
    etag: str


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, {**_HEADERS, "Content-Type": _TYPES[path.suffix]}, sha256(body).hexdigest()[:20])


_FILES = {path.relative_to(_STATIC).as_posix(): _read(path) for path in _STATIC.rglob("*") if path.is_file()}


async def show_page(request: web.Request) -> web.Response:
    """The dashboard's page. It asks for a key or a sign-in itself where one is needed. Clients other than browsers get
    JSON that says where everything is."""
    if "text/html" in request.headers.get("Accept", ""):
        return _answer(request, _FILES["index.html"])
    return web.json_response(_WHERE, headers={"Vary": "Accept", "Cache-Control": "no-cache"})


async def show_file(request: web.Request) -> web.Response:
    """One of its files. They are the same for everyone and tell nothing about the fleet."""
    found = _FILES.get(request.match_info["path"])
    if found is None:
        raise NotFound("the dashboard has no such file")
    return _answer(request, found)


async def show_viewer(request: web.Request) -> web.Response:
    """Who is looking at the dashboard; `null` and no role without a key. `leaves`: there is a session to end."""
    try:
        caller = caller_of(request)
    except Unauthorized:
        caller = GUEST
    known = caller is not GUEST
    return web.json_response(
        {
            "name": caller.name if known else None,
            "role": caller.role if known else None,
            "may_act": known and may(caller.role, "operator"),
            "may_configure": known and may(caller.role, "admin"),
            "leaves": caller.is_person,
        },
        headers={"Cache-Control": "no-store"},
    )


def _answer(request: web.Request, file: _File) -> web.Response:
    headers = {**file.headers, "ETag": f'"{file.etag}"'}
    if any(tag.value in (file.etag, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, headers=headers)
