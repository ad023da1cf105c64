"""What cortex knows of the client that sent a request. Pure. Not compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final, Literal, TypeAlias, get_args

import msgspec

Role: TypeAlias = Literal["user", "viewer", "operator", "admin"]
"""user: inference, and its own usage. viewer: reads the fleet and all usage. operator: also acts on the fleet. admin:
also manages keys. Each may do what those before it may."""


PERSON_PREFIX: Final = "oidc:"
"""Begins the name and the id of a person. No key's name has a colon, and no key's id begins with this."""


PEOPLE: Final = f"{PERSON_PREFIX}people"
"""Stands for all people who sign in on pages of metrics: their addresses are not for such a page."""


def label_of(name: str) -> str:
    """The caller of this name in metrics."""
    return PEOPLE if name.startswith(PERSON_PREFIX) else name


class Caller(msgspec.Struct, frozen=True, gc=False):
    """One API key, or one person who signs in, as requests see it. `key_id` is "" for a client without a key.

    `priority`: higher ones are served first, whatever others wait; 0 unless configured. `weight`: its share among
    callers of the same priority. `models`: globs of the model ids that it may use, none for all. `limited`: its
    requests need a `Grant`.
    """

    key_id: str
    name: str
    role: Role = "user"
    priority: int = 0
    weight: float = 1.0
    models: tuple[str, ...] = ()
    limited: bool = False

    @property
    def is_person(self) -> bool:
        """The caller signs in instead of having a key."""
        return self.key_id.startswith(PERSON_PREFIX)

    @property
    def label(self) -> str:
        """The caller in metrics."""
        return label_of(self.name)

    def may_use(self, model_id: str) -> bool:
        """`model_id`: as in the catalogue, without a variant."""
        return not self.models or any(fnmatchcase(model_id, glob) for glob in self.models)


_ROLES: Final[tuple[Role, ...]] = get_args(Role)


def may(role: Role, needed: Role) -> bool:
    """Whether this role may do what needs the other one."""
    return _ROLES.index(role) >= _ROLES.index(needed)


ANONYMOUS: Final = Caller("", "anonymous", role="admin")
"""A client on this host that no proxy stands for, where cortex has no keys."""

LOOPBACK: Final = Caller("", "loopback", role="admin")
"""A client on this host without a key, where cortex has keys and trusts it."""

GUEST: Final = Caller("", "guest", role="user", priority=-1_000_000)
"""A client without a key that is not on this host, or where others have a key: it gets what they leave."""

KEYLESS: Final[Mapping[str, Caller]] = {caller.name: caller for caller in (ANONYMOUS, LOOPBACK, GUEST)}


def shown_caller(caller: Caller) -> bytes:
    """The caller for the control process, in ASCII: it knows keys by their id, but not people."""
    return msgspec.json.encode(caller) if caller.is_person else (caller.key_id or caller.name).encode()


def person_shown(text: str) -> Caller | None:
    """The person that `shown_caller` has written; None for any other caller."""
    return msgspec.json.decode(text, type=Caller) if text.startswith("{") else None
