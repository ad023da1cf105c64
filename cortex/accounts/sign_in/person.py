"""A person as the issuer describes them, and as requests see them. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec

from cortex.accounts.caller import PERSON_PREFIX, Caller, Role
from cortex.config.sign_in import OidcSettings
from shared.errors import Forbidden, Unauthorized, shortened

SESSION_COOKIE: Final = b"cortex_session"
"""The name of a browser's cookie."""
SESSION_PREFIX: Final = b"cortex-session-"
"""Begins the secret in this cookie."""

_NAME_CLAIMS: Final = ("preferred_username", "email", "name")
_UNUSUAL: Final = re.compile(r"[^A-Za-z0-9._@+-]")
_SUBJECT: Final = re.compile(r"[A-Za-z0-9._@+|:=/-]{1,255}")
_MAX_NAME_CHARS: Final = 64
_MAX_GROUPS: Final = 1000


class Person(msgspec.Struct, frozen=True):
    """`subject` is the issuer's id of the person, which stays when the name changes."""

    subject: str
    name: str
    groups: tuple[str, ...]


class Identified(msgspec.Struct, frozen=True):
    """Who a credential is of, and until when that may be remembered, in UTC seconds."""

    caller: Caller
    until: float


class People(Protocol):
    """Knows who a token or the secret of a session is of."""

    async def identify(self, credential: bytes) -> Identified:
        """Raises ServiceError: Unauthorized for a credential that is not valid, Forbidden for a person without a role,
        Unavailable if that cannot be found out now."""


def is_token(api_key: bytes) -> bool:
    """Whether this may be a token of an issuer (a signed JWT): no key that cortex makes looks like one."""
    return api_key[:2] == b"ey" and api_key.count(b".") == 2


def person_of(claims: Mapping[str, Any], groups_claim: str) -> Person:
    """The person of a valid token.

    Raises:
        Unauthorized: the token does not say whose it is.
    """
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise Unauthorized("the token has no `sub` claim: it does not say whose it is")
    if not _SUBJECT.fullmatch(subject):
        subject = hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()
    given = (claims.get(claim) for claim in _NAME_CLAIMS)
    name = next((value for value in given if isinstance(value, str) and value), subject)
    return Person(subject, _UNUSUAL.sub("_", name)[:_MAX_NAME_CHARS], _groups(claims, groups_claim))


def _groups(claims: Mapping[str, Any], claim: str) -> tuple[str, ...]:
    """The values of a claim; with dots in its name, of one in other claims."""
    value: Any = claims.get(claim)
    if value is None:
        value = claims
        for part in claim.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        return ()
    return tuple(group for group in value if isinstance(group, str))[:_MAX_GROUPS]


def caller_of(person: Person, settings: OidcSettings) -> Caller:
    """The person with the highest role of their groups.

    Raises:
        Forbidden: they have none.
    """
    highest_first: Mapping[Role, list[str]] = {
        "admin": settings.roles.admin,
        "operator": settings.roles.operator,
        "viewer": settings.roles.viewer,
        "user": settings.roles.user,
    }
    groups = set(person.groups)
    own = (
        role
        for role, allowed in highest_first.items()
        if role == settings.default_role or not groups.isdisjoint(allowed)
    )
    role = next(own, None)
    if role is None:
        shown = shortened(", ".join(person.groups)) or "none"
        raise Forbidden(
            f"{person.name} has signed in, but has no role here: the groups are {shown} (claim "
            f"{settings.groups_claim!r}), and an administrator has to give one of them a role in [auth.oidc.roles]"
        )
    return Caller(f"{PERSON_PREFIX}{person.subject}", f"{PERSON_PREFIX}{person.name}", role=role)
