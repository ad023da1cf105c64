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
    """The groups that have this [role](keys.md#what-may-a-key-do), as the issuer writes them; a person in several
    groups has the highest role. Default: `[]`."""
    viewer: list[str] = Field(default_factory=list)
    """The groups that have this role. Default: `[]`."""
    operator: list[str] = Field(default_factory=list)
    """The groups that have this role. Default: `[]`."""
    admin: list[str] = Field(default_factory=list)
    """The groups that have this role. Default: `[]`."""


class OidcSettings(SettingsModel):
    """`[auth.oidc]`: people sign in at an issuer of OpenID Connect. Without `issuer` they cannot."""

    issuer: str | None = None
    """URL of the issuer, without `/.well-known/openid-configuration`. With it, clients on the same host need a key or a
    sign-in like all others. Default: none: people cannot sign in."""
    client_id: str | None = Field(default=None, min_length=1)
    """The client that the issuer has for cortex. Default: required with `issuer`."""
    client_secret: str | None = Field(default=None, min_length=1)
    """Its secret, if the issuer has given it one. `cortex login` does not have it. Default: none: a public client."""
    client_secret_env: str | None = None
    """Instead: the environment variable that has it. Default: none."""
    client_secret_file: Path | None = None
    """Instead: the file that has it, relative to cortex.toml. Default: none."""
    cli_client_id: str | None = Field(default=None, min_length=1)
    """A public client for `cortex login`, where the other one has a secret. Default: `client_id`."""
    audiences: list[str] = Field(default_factory=list)
    """Values of `aud` that tokens may have besides the client ids. Default: `[]`."""
    scopes: list[str] = Field(default_factory=lambda: ["openid", "profile", "email"])
    """What cortex asks for; `openid` must be one of them. Default: `["openid", "profile", "email"]`."""
    groups_claim: str = Field(default="groups", min_length=1)
    """The claim with a person's groups: a list, or words in a text. `realm_access.roles` is the claim `roles` in the
    claim `realm_access`."""
    roles: OidcRoles = OidcRoles()
    default_role: Literal["user", "viewer", "operator", "admin"] | None = None
    """Role of people in no group of `[auth.oidc.roles]`: `"user"`, `"viewer"`, `"operator"` or `"admin"`. Default:
    none: they are refused."""
    redirect_url: str | None = None
    """Where the issuer sends browsers back to. Default: `/login/callback` at the address that the browser uses."""
    session_hours: float = Field(default=12.0, gt=0, le=24 * 365, allow_inf_nan=False)
    """How long a browser stays signed in."""

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

    trust_loopback: bool = False
    """`true`: where there are API keys, clients on the same host need none and may do everything. Not behind a proxy on
    that host that sends no `X-Forwarded-For`."""
    oidc: OidcSettings = OidcSettings()
