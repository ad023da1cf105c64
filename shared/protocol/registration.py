"""How a neuron makes itself known to a cortex that does not list it."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from shared.protocol.base import WireModel

DIAL_PATH: Final = "/fleet/dial"
DIAL_PROTOCOL: Final = "neuron-dial"
NAME_HEADER: Final = "Neuron-Name"
"""What a neuron with `dial = "out"` asks for on each connection that it opens, with its name and its key."""


class Registration(WireModel):
    """Body of cortex's `POST /fleet/register`, which a neuron sends every `interval_secs`. `token` is the bearer token
    that it expects from cortex; `instance_id` as in `Discovery`. `endpoint` is `dial://NAME` for a neuron that keeps
    connections to cortex instead of being reached."""

    name: str
    endpoint: str
    token: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    instance_id: str | None = None
    interval_secs: float = Field(default=10, ge=0.1, le=3600)


class DialReply(WireModel):
    """Where the neuron has to keep its connections: on this port of the host that it has registered with. `key` is the
    bearer token there, until another process of the neuron registers."""

    port: int
    tls: bool = False
    key: str


class RegistrationReply(WireModel):
    """`expires_secs`: after this long without another announcement the neuron is removed. `dial` is for a neuron with a
    `dial://` endpoint only."""

    name: str
    expires_secs: float
    dial: DialReply | None = None
