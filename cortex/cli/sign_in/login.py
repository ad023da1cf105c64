"""`cortex login` and `cortex logout`."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from cortex.cli.client import CALL_TIMEOUT_SECS, CallFailed, base_url, call
from cortex.cli.sign_in.issuer_client import IssuerClient, Tokens, discovered, post, reason_of
from cortex.cli.sign_in.kept_tokens import forget, keep
from shared.terminal.command_line import fail

PATIENCE_SECS = 600.0
"""How long a person may take to sign in."""
_DEFAULT_INTERVAL_SECS = 5.0
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


def run_login(url: str, *, with_browser: bool) -> int:
    """Signs in, checks that cortex accepts it, and keeps the token. `with_browser`: with one on this machine, also if
    the issuer would take another device's."""
    try:
        settings = call(url, "GET", "/login/settings", api_key=None, timeout_secs=CALL_TIMEOUT_SECS)
        try:
            issuer_url, client_id, scopes = settings["issuer"], settings["client_id"], " ".join(settings["scopes"])
        except (LookupError, TypeError) as error:
            raise CallFailed(f"{url} does not answer like a cortex, check --url") from error
        issuer = discovered(issuer_url, client_id)
        device = issuer.endpoint("device_authorization_endpoint")
        if with_browser or device is None:
            tokens = _with_browser(issuer, scopes)
        else:
            tokens = _with_device_code(issuer, device, scopes)
        call(url, "GET", "/v1/models", api_key=tokens.id_token, timeout_secs=CALL_TIMEOUT_SECS)
        entry = {"issuer": issuer_url, "client_id": client_id, **vars(tokens)}
        keep(url, entry)
    except CallFailed as error:
        fail("cortex", error)
    claims = tokens.claims
    print(f"signed in at {base_url(url)} as {claims.get('preferred_username') or claims.get('email') or claims['sub']}")
    return 0


def run_logout(url: str) -> int:
    """Forgets the token, and has the issuer end it if it can."""
    try:
        entry = forget(url)
        if entry is None:
            print(f"not signed in at {base_url(url)}")
            return 0
        print(f"signed out of {base_url(url)}")
        if entry.get("refresh_token"):
            issuer = discovered(entry["issuer"], entry["client_id"])
            endpoint = issuer.endpoint("revocation_endpoint")
            if endpoint is not None:  # RFC 7009
                post(endpoint, {"client_id": entry["client_id"], "token": entry["refresh_token"]})
    except CallFailed as error:
        fail("cortex", f"the token is forgotten here, but the issuer cannot end it: {error}")
    return 0


def _with_device_code(issuer: IssuerClient, endpoint: str, scopes: str) -> Tokens:
    """The device authorization grant (RFC 8628): the person signs in with any browser."""
    status, given = post(endpoint, {"client_id": issuer.client_id, "scope": scopes})
    try:
        code, user_code = str(given["device_code"]), str(given["user_code"])
        address = str(given.get("verification_uri_complete") or given["verification_uri"])
        interval = float(given.get("interval", _DEFAULT_INTERVAL_SECS))
        deadline = time.monotonic() + float(given["expires_in"])
    except (LookupError, TypeError, ValueError) as error:
        raise CallFailed(f"{endpoint} answers {status}: {reason_of(given)}; try --browser") from error
    shown = "".join(each for each in f"Open {address} and enter the code {user_code}" if each.isprintable())
    print(shown, flush=True)
    while time.monotonic() < deadline:
        time.sleep(interval)
        found = issuer.ask_for_tokens({"grant_type": _DEVICE_GRANT, "device_code": code})
        if isinstance(found, Tokens):
            return found
        if found["error"] == "slow_down":
            interval += 5
        elif found["error"] != "authorization_pending":
            raise CallFailed(f"the issuer refuses the sign-in: {reason_of(found)}")
    raise CallFailed("the code was not entered in time: run the command again")


def _with_browser(issuer: IssuerClient, scopes: str) -> Tokens:
    """The authorization code flow with PKCE; the browser comes back to a port on loopback (RFC 8252)."""
    state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
    with _Return(state) as returned:
        redirect_url = f"http://127.0.0.1:{returned.server_port}/callback"
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": issuer.client_id,
            "redirect_uri": redirect_url,
            "scope": scopes,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        endpoint = issuer.endpoint("authorization_endpoint")
        if endpoint is None:
            raise CallFailed("the issuer offers no authorization_endpoint to open in a browser")
        address = f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}"
        print(f"Open {address}", flush=True)
        webbrowser.open(address)
        code = returned.wait()
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_url, "code_verifier": verifier}
    found = issuer.ask_for_tokens(form)
    if not isinstance(found, Tokens):
        raise CallFailed(f"the issuer refuses the sign-in: {reason_of(found)}")
    if found.claims.get("nonce") != nonce:
        raise CallFailed("the issuer's token is of another sign-in: run the command again")
    return found


class _Return(HTTPServer):
    """Waits on loopback for the browser that the issuer sends back."""

    def __init__(self, state: str) -> None:
        super().__init__(("127.0.0.1", 0), _ReturnHandler)
        self.state = state
        self.answer: dict[str, str] | None = None

    def wait(self) -> str:
        """The code. Raises CallFailed."""
        deadline = time.monotonic() + PATIENCE_SECS
        while self.answer is None:
            self.timeout = deadline - time.monotonic()
            if self.timeout <= 0:
                raise CallFailed("the browser did not come back in time: run the command again")
            self.handle_request()
        if "code" not in self.answer:
            raise CallFailed(f"the issuer refuses the sign-in: {reason_of(self.answer)}")
        return self.answer["code"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that breaks off its request does no harm."""


class _ReturnHandler(BaseHTTPRequestHandler):
    timeout = 10
    server: _Return

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        expected = parts.path == "/callback" and secrets.compare_digest(query.get("state", ""), self.server.state)
        if expected:
            self.server.answer = query
        text = b"You can close this page and go back to the terminal." if expected else b"This is not the sign-in."
        self.send_response(200 if expected else 400)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """The address has the code, which must not be shown."""
