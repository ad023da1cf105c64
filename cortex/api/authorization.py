"""Which role each route of the control app needs, and the check of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import web

from cortex.accounts.caller import KEYLESS, Caller, Role, may, person_shown
from cortex.accounts.sign_in.person import SESSION_PREFIX
from cortex.accounts.sign_in.sign_in import SignIn
from cortex.api.app_keys import KEYS, SIGN_IN
from cortex.api.sign_in import session_of
from cortex.http.headers import CALLER_NAME
from cortex.proxy.paths import INFERENCE_PATHS
from shared.errors import Forbidden, ServiceError, Unauthorized, shortened
from shared.http import Handler

log = logging.getLogger(__name__)

NEEDED_ROLES: Mapping[tuple[str, str], Role | None] = {
    **{("POST", path): "user" for path in INFERENCE_PATHS},
    ("GET", "/v1/models"): "user",
    ("GET", "/v1/models/{model_id}"): "user",
    ("GET", "/health"): None,
    ("GET", "/openapi.json"): None,
    ("GET", "/"): None,
    ("GET", "/dashboard/me"): None,
    ("GET", "/dashboard/{path}"): None,
    ("GET", "/login"): None,
    ("GET", "/login/callback"): None,
    ("GET", "/login/settings"): None,
    ("POST", "/logout"): None,
    ("GET", "/fleet"): "viewer",
    ("GET", "/fleet/events"): "viewer",
    ("GET", "/fleet/explain"): "viewer",
    ("GET", "/fleet/timeline"): "viewer",
    ("GET", "/fleet/requests"): "user",
    ("GET", "/fleet/logs"): "operator",
    ("POST", "/fleet/register"): None,
    ("GET", "/fleet/configuration"): "admin",
    ("POST", "/fleet/configuration/reload"): "admin",
    ("POST", "/fleet/load"): "operator",
    ("POST", "/fleet/unload"): "operator",
    ("POST", "/fleet/sleep"): "operator",
    ("POST", "/fleet/wake"): "operator",
    ("POST", "/fleet/restart"): "operator",
    ("POST", "/fleet/nodes/{name}/drain"): "operator",
    ("POST", "/fleet/nodes/{name}/resume"): "operator",
    ("GET", "/usage"): "user",
    ("GET", "/usage/energy"): "user",
    ("GET", "/v1/organization/usage/completions"): "user",
    ("GET", "/v1/organization/usage/embeddings"): "user",
    ("GET", "/v1/organization/costs"): "user",
    ("GET", "/keys"): "admin",
    ("POST", "/keys"): "admin",
    ("DELETE", "/keys/{name}"): "admin",
    ("POST", "/keys/{name}/rotate"): "admin",
}
"""By method and path of each route; None: no key is needed (`POST /fleet/register` has a token of its own). A test
compares it with the routes."""


def caller_of(request: web.Request) -> Caller:
    """Who sent the request, as the worker that has passed it on knows by the key.

    Raises:
        Unauthorized: it has no valid key.
    """
    name = request.headers.get(CALLER_NAME.decode(), "")
    caller = person_shown(name) or KEYLESS.get(name) or request.app[KEYS].caller(name)
    if caller is None:
        raise Unauthorized(
            "a valid API key is required: it is missing, unknown, expired or revoked; send it as "
            "`Authorization: Bearer KEY`"
        )
    return caller


@web.middleware
async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses callers whose role does not suffice, and logs what operators and admins change, or try to."""
    needed = _needed(request)
    if needed is None:
        return await handler(request)
    caller = caller_of(request)
    acts = needed != "user" and request.method not in ("GET", "HEAD")
    if not may(caller.role, needed):
        if acts:  # without what stands for {name}: it may be anything, even a key
            log.warning("%s %s refused: %s has the role %s", request.method, _route(request), caller.name, caller.role)
        key = f"the API key {caller.name!r} has" if caller.key_id else "without an API key you have"
        who = f"{caller.name} has" if caller.is_person else key
        hint = "" if caller.key_id else _hint(request)
        raise Forbidden(f"{request.method} {request.path} needs the role {needed}; {who} the role {caller.role}{hint}")
    if not acts:
        return await handler(request)
    try:
        response = await handler(request)
    except BaseException as error:
        outcome = _outcome(request, error)
        # What stands for {name} in a refused request may be anything, even a key.
        path = _route(request) if outcome.startswith("4") else shortened(request.rel_url.raw_path)
        _log_act(request, path, caller, f": {outcome}")
        raise
    _log_act(request, request.path, caller)
    return response


def _log_act(request: web.Request, path: str, caller: Caller, outcome: str = "") -> None:
    """`outcome`: why it was not done, or perhaps not all of it."""
    dry_run = request.query.get("dry_run")
    details = "" if dry_run is None else f"?dry_run={shortened(dry_run)!r}"
    log.info("%s %s%s by %s%s", request.method, path, details, caller.name, outcome)


def _outcome(request: web.Request, error: BaseException) -> str:
    """The status that the client gets, unless it does not get any."""
    if isinstance(error, (ServiceError, web.HTTPException)):
        return str(error.status)
    if isinstance(error, ConnectionError) or request.transport is None or request.transport.is_closing():
        return "client left"
    if isinstance(error, web.RequestPayloadError):
        return str(HTTPStatus.BAD_REQUEST.value)
    return str(HTTPStatus.INTERNAL_SERVER_ERROR.value) if isinstance(error, Exception) else "cancelled"


def _hint(request: web.Request) -> str:
    """What a client without a key can do about it."""
    if request.app[SIGN_IN] is not None:
        return ": sign in at /login, or send a key"
    if not request.app[KEYS].table.empty:
        return ": send a key"
    return ": create a key on cortex's host with `cortex keys create NAME --admin --config FILE`, and send it"


class StreamAccess:
    """Whether the caller of a request may still have its answer: one that does not end outlives the check at its
    beginning. Keys and people are checked again; clients without a key keep their streams until they leave."""

    def __init__(self, request: web.Request) -> None:
        self._keys = request.app[KEYS]
        self._needed: Role = _needed(request) or "user"
        caller = caller_of(request)
        self._key_id = "" if caller.is_person else caller.key_id
        sign_in = request.app.get(SIGN_IN)
        self._person = _PersonAccess(sign_in, request, self._needed) if caller.is_person and sign_in else None
        key = self._keys.valid_key(self._key_id)
        self._digest = None if key is None else key.digest  # None: it has expired since the worker knew it

    async def lasts(self) -> bool:
        """False once the key is revoked, has expired, has a new secret or no longer has the role; likewise once the
        session has ended, or the person has lost the role."""
        if self._person is not None:
            return await self._person.lasts()
        if not self._key_id:
            return True
        now = self._keys.valid_key(self._key_id)
        return now is not None and now.digest == self._digest and may(now.role, self._needed)


class _PersonAccess:
    """Of a signed-in person. A session is looked up every second. A token says the same until it expires, so it
    is checked again only when [auth.oidc] has changed: that it expires does not end what has begun."""

    def __init__(self, sign_in: SignIn, request: web.Request, needed: Role) -> None:
        self._sign_in = sign_in
        self._needed: Role = needed
        self._credential = _credential(request)
        self._settings = sign_in.settings
        self._until = 0.0

    async def lasts(self) -> bool:
        settings = self._sign_in.settings
        expires = self._credential.startswith(SESSION_PREFIX) and time.time() >= self._until
        if not expires and (settings is self._settings or settings == self._settings):
            return True
        try:
            found = await self._sign_in.identify(self._credential)
        except ServiceError as error:
            return error.status >= HTTPStatus.INTERNAL_SERVER_ERROR  # then it cannot be found out now
        self._settings, self._until = settings, found.until
        return may(found.caller.role, self._needed)


def _credential(request: web.Request) -> bytes:
    """What a worker has recognised a person by: the token, or else the secret of the session."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
    return token.encode("utf-8", "surrogatepass") if token else session_of(request) or b""


def _needed(request: web.Request) -> Role | None:
    """The role of the route. For an unknown route any key will do, and only the 404 follows."""
    route = _route(request)
    if not route:
        return "user"
    method = "GET" if request.method == "HEAD" else request.method
    return NEEDED_ROLES.get((method, route), "admin")


def _route(request: web.Request) -> str:
    """Its path as in `NEEDED_ROLES`, "" if it is unknown."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical
