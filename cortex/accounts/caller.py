"""What cortex knows of the client that sent a request. Pure. Not compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

import base64
from fnmatch import fnmatchcase
from typing import Final, Literal, TypeAlias

import msgspec

Role: TypeAlias = Literal["user", "viewer", "operator", "admin"]
"""user: inference, and its own usage. viewer: reads the fleet and all usage. operator: also acts on the fleet. admin:
also manages keys. Each may do what those before it may."""


class Caller(msgspec.Struct, frozen=True, gc=False):
    """One API key as requests see it. `key_id` is "" for a client without a key.

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

    def may_use(self, model_id: str) -> bool:
        """`model_id`: as in the catalogue, without a variant."""
        return not self.models or any(fnmatchcase(model_id, glob) for glob in self.models)


ANONYMOUS: Final = Caller("", "anonymous", role="admin")
"""A client without a key, where cortex has none."""

CALLER_HEADER: Final = "x-cortex-caller"
"""Of a request that a worker hands to the control app. Clients cannot send it: workers remove theirs."""

_decode: Final = msgspec.json.Decoder(Caller).decode


def to_header(caller: Caller) -> bytes:
    return base64.b64encode(msgspec.json.encode(caller))


def from_header(value: str | None) -> Caller:
    """The caller in a header. Without one it is the user that cortex runs as: nobody else can open its socket."""
    return ANONYMOUS if value is None else _decode(base64.b64decode(value))
