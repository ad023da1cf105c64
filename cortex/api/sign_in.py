"""`/login` and `/logout`: people sign in at the issuer of `[auth.oidc]` with a browser, which then has a session."""

from __future__ import annotations

import hmac
import html
import re
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from aiohttp import web

from cortex.accounts.sign_in.person import SESSION_COOKIE, SESSION_PREFIX
from cortex.accounts.sign_in.sign_in import SignIn
from cortex.api.app_keys import LIVE, SIGN_IN
from cortex.http.headers import forwarded_https
from shared.errors import InvalidRequest, NotFound, ServiceError, render, shortened
from shared.http import error_response, request_id_of


class _Cookie(NamedTuple):
    """Scripts cannot read it, and a page of another site can only send it by a link."""

    name: str
    path: str

    def set(self, answer: web.Response, value: str, *, secs: int, secure: bool) -> None:
        answer.set_cookie(self.name, value, path=self.path, max_age=secs, httponly=True, samesite="Lax", secure=secure)

    def delete(self, answer: web.Response) -> None:
        answer.del_cookie(self.name, path=self.path)

    def of(self, request: web.Request) -> str:
        """What the browser has sent, "" for nothing."""
        return request.cookies.get(self.name, "")


_SESSION = _Cookie(SESSION_COOKIE.decode(), "/")
_JOURNEY = _Cookie("cortex_login", "/login")
"""Of a browser that is on its way to the issuer and back."""
_JOURNEY_SECS = 600
_LOCAL = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,1000}|/")
_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_NO_ROUTE = "people cannot sign in here, because cortex.toml has no [auth.oidc]"


def _as_page(handler: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
    """Shows errors as a page to browsers."""

    @wraps(handler)
    async def shown(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except ServiceError as error:
            if not _wants_page(request):
                raise
            rendered = render(error, request_id_of(request), anthropic=False)
            again = '<p><a href="/login">Sign in again</a></p>'
            page = _page("Sign-in", f"<p>{html.escape(error.message)}</p>{again}", status=error.status)
            page.headers.update({name: value for name, value in rendered.headers.items() if name != "content-type"})
            _JOURNEY.delete(page)
            return page

    return shown


@_as_page
async def login(request: web.Request) -> web.Response:
    """Sends a browser to the issuer. `next`: the path to show after that."""
    departure = await _sign_in(request).depart(_redirect_url(request))
    after = request.query.get("next", "/")
    answer = web.Response(status=303, headers={"Location": departure.url, "Cache-Control": "no-store"})
    kept = ".".join((departure.state, departure.nonce, departure.verifier, quote(_local(after), safe="")))
    _JOURNEY.set(answer, kept, secs=_JOURNEY_SECS, secure=_secure(request))
    return answer


@_as_page
async def login_callback(request: web.Request) -> web.Response:
    """The browser comes back from the issuer: it gets a session."""
    sign_in, query = _sign_in(request), request.query
    kept = _JOURNEY.of(request).split(".", 3)
    if len(kept) != 4 or not hmac.compare_digest(_bytes(kept[0]), _bytes(query.get("state", ""))):
        raise InvalidRequest(
            "this is not the end of a sign-in that this browser has begun, or that was too long ago; begin at /login"
        )
    _, nonce, verifier, after = kept
    if "error" in query:
        reason = query.get("error_description") or query["error"]
        raise InvalidRequest(f"the issuer refuses the sign-in: {shortened(reason)}; begin again at /login")
    if not query.get("code"):
        raise InvalidRequest("the issuer has sent no code; begin again at /login")
    secret = await sign_in.arrive(query["code"], nonce=nonce, verifier=verifier, redirect_url=_redirect_url(request))
    # A page, not a redirect: to the browser a redirect would still come from the issuer's site.
    target = html.escape(_local(unquote(after)))
    answer = _page("cortex", f'<p>You have signed in: <a href="{target}">go on</a></p>', go_to=target)
    _JOURNEY.delete(answer)
    secs = int(sign_in.settings.session_hours * 3600)
    _SESSION.set(answer, secret, secs=secs, secure=_secure(request))
    return answer


async def login_settings(request: web.Request) -> web.Response:
    """What `cortex login` needs to know."""
    settings = _sign_in(request).settings
    return web.json_response(
        {
            "issuer": settings.issuer,
            "client_id": settings.cli_client_id or settings.client_id,
            "scopes": settings.scopes,
        }
    )


async def logout(request: web.Request) -> web.Response:
    """Ends the browser's session, here and at every cortex of the same database. The issuer's own session goes on."""
    sign_in, secret = _sign_in(request), session_of(request)
    answer = web.json_response({"signed_out": secret is not None})
    if secret is not None:
        try:
            await sign_in.leave(secret)
        except ServiceError as error:  # the browser must not stay signed in
            answer = error_response(request, error)
        _SESSION.delete(answer)
    return answer


def _sign_in(request: web.Request) -> SignIn:
    sign_in = request.app[SIGN_IN]
    if sign_in is None:
        raise NotFound(_NO_ROUTE)
    return sign_in


def session_of(request: web.Request) -> bytes | None:
    """The secret of the browser's session."""
    secret = _bytes(_SESSION.of(request))
    return secret if secret.startswith(SESSION_PREFIX) else None


def _bytes(sent: str) -> bytes:
    """What a client sent is not always UTF-8: aiohttp then has surrogates in it."""
    return sent.encode("utf-8", "surrogatepass")


def _wants_page(request: web.Request) -> bool:
    return "text/html" in request.headers.get("Accept", "")


def _local(path: str) -> str:
    """The path, if it leads to this service and not elsewhere."""
    return path if _LOCAL.fullmatch(path) else "/"


def _secure(request: web.Request) -> bool:
    """Whether the browser reaches cortex over TLS, here or at a proxy in front."""
    forwarded = request.headers.get("X-Forwarded-Proto", "").encode("utf-8", "surrogateescape")
    return request.app[LIVE].config.gateway.tls_files is not None or forwarded_https(forwarded)


def _redirect_url(request: web.Request) -> str:
    """Where the issuer sends the browser back to."""
    configured = _sign_in(request).settings.redirect_url
    return configured or f"{'https' if _secure(request) else 'http'}://{request.host}/login/callback"


def _page(title: str, body: str, *, status: int = 200, go_to: str | None = None) -> web.Response:
    """`body` and `go_to` are HTML."""
    refresh = "" if go_to is None else f'<meta http-equiv="refresh" content="0;url={go_to}">'
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width">{refresh}</head><body>{body}</body></html>'
    )
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return web.Response(text=text, status=status, content_type="text/html", headers=headers)
