"""`[auth]` of cortex.toml: who may do what without an API key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from shared.settings import SettingsError, SettingsModel

_FILE_KEY = "it has to be a file with the client's secret ([auth.oidc] client_secret_file)"


def _checked_url(value: str | None) -> str | None:
    if value is not None:
        parts = urlsplit(value)
        _ = parts.port  # raises ValueError for an invalid port
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must be a URL such as https://auth.example.com/realms/team")
    return value


class OidcRoles(SettingsModel):
    """`[auth.oidc.roles]`: the issuer's groups that have each role. A person in several has the highest."""

    user: list[str] = Field(default_factory=list)
    viewer: list[str] = Field(default_factory=list)
    operator: list[str] = Field(default_factory=list)
    admin: list[str] = Field(default_factory=list)


class OidcSettings(SettingsModel):
    """`[auth.oidc]`: people sign in at an issuer of OpenID Connect. Without `issuer` they cannot."""

    issuer: str | None = None
    client_id: str | None = Field(default=None, min_length=1)
    client_secret: str | None = Field(default=None, min_length=1)
    client_secret_env: str | None = None
    client_secret_file: Path | None = None  # relative to cortex.toml
    cli_client_id: str | None = Field(default=None, min_length=1)  # of `cortex login`; None: client_id
    audiences: list[str] = Field(default_factory=list)  # that tokens may be for, besides the client ids
    scopes: list[str] = Field(default_factory=lambda: ["openid", "profile", "email"])
    groups_claim: str = Field(default="groups", min_length=1)  # a.b: the claim b in the claim a
    roles: OidcRoles = OidcRoles()
    default_role: Literal["user", "viewer", "operator", "admin"] | None = None  # of people in none of those groups
    redirect_url: str | None = None  # None: /login/callback at the address that the browser uses
    session_hours: float = Field(default=12.0, gt=0, le=24 * 365, allow_inf_nan=False)

    _issuer_url = field_validator("issuer", "redirect_url")(_checked_url)

    @field_validator("scopes")
    @classmethod
    def _asks_for_an_id_token(cls, value: list[str]) -> list[str]:
        if "openid" not in value:
            raise ValueError("must have openid in it")
        return value

    @model_validator(mode="after")
    def _whole(self) -> OidcSettings:
        if self.issuer is None:
            if self.client_id is not None or self.roles != OidcRoles() or self.default_role is not None:
                raise ValueError("issuer: set it to the issuer's URL, or remove [auth.oidc]")
            return self
        if self.client_id is None:
            raise ValueError("client_id: set it to the client that the issuer has for cortex")
        if not any((self.roles.user, self.roles.viewer, self.roles.operator, self.roles.admin, self.default_role)):
            raise ValueError('roles: set one, such as admin = ["ops"], or default_role')
        given = (self.client_secret, self.client_secret_env, self.client_secret_file)
        if len([each for each in given if each is not None]) > 1:
            raise ValueError("client_secret, client_secret_env and client_secret_file: set only one")
        if self.client_secret_env is not None and not os.environ.get(self.client_secret_env):
            raise ValueError(f"client_secret_env: the environment variable {self.client_secret_env} is not set")
        return self

    @property
    def on(self) -> bool:
        """Whether people can sign in."""
        return self.issuer is not None

    @property
    def token_audiences(self) -> list[str]:
        """Whom an accepted token is for: one of these."""
        return [name for name in (self.client_id, self.cli_client_id, *self.audiences) if name is not None]

    def secret(self) -> str | None:
        """The client's secret; None for a public client. Blocks.

        Raises:
            SettingsError: its file cannot be read, or is empty.
        """
        file = self.client_secret_file
        if file is not None:
            try:
                found = file.read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise SettingsError([f"{file}: {getattr(error, 'strerror', None) or error}: {_FILE_KEY}"]) from error
            if not found:
                raise SettingsError([f"{file}: is empty: {_FILE_KEY}"])
            return found
        return self.client_secret or (os.environ[self.client_secret_env] if self.client_secret_env else None)


class AuthSettings(SettingsModel):
    """`[auth]`: who may do what without a key."""

    trust_loopback: bool = False  # True: clients on this host need no key, although others do
    oidc: OidcSettings = OidcSettings()
